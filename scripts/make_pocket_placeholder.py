"""Write the pocket editor's files with seeded random weights, until trained ones replace them through the same files.

    .venv/bin/python scripts/make_pocket_placeholder.py [--seed N] [--host DIR]

The editor then samples noise, which its generator's LoRA changes: every node can be seen working, nothing is edited.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def enter_host(host: Path) -> None:
    """Make `import comfy` work, on the CPU."""
    sys.path.insert(0, str(host))
    argv, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    sys.argv = argv


def write_editor(seed: int) -> None:
    """The base model and its text encoder."""
    from hywu_core.bases import pocket
    from hywu_core.bases.pocket import editor, text

    files, provenance = pocket.pocket_files(), {"weights": f"random, seed {seed}"}
    config, text_config = pocket.EditorConfig(), pocket.TextConfig(words=pocket.default_words())
    pocket.save_editor(editor.initial_state(config, seed), config, files.editor, provenance)
    pocket.save_text_encoder(text.initial_state(text_config, seed), text_config, files.text, provenance)
    print(*files, sep="\n")


def write_generator(seed: int) -> None:
    """The generator for it: rank 4 on the picture's attention and feed-forward of all four double blocks."""
    import torch

    from hywu_core import Generator, GeneratorConfig, save_generator
    from hywu_core.bases.pocket import EditorConfig

    base = EditorConfig()
    width, inner = base.width, 4 * base.width
    shapes = {
        "img_attn.qkv": (width, 3 * width),
        "img_attn.proj": (width, width),
        "img_mlp.0": (width, inner),
        "img_mlp.2": (inner, width),
    }
    config = GeneratorConfig(
        d_model=128,
        head_dim=32,
        num_pg_layers=2,
        input_dim=base.context_dim,
        output_dim=64,
        num_base_model_layers=base.depth,
        rank=4,
        alpha=8,
        token_dim=64,
        dim_accumulation=2,
        pg_mapping={name: {"lora_A_dim": rows, "lora_B_dim": out} for name, (rows, out) in shapes.items()},
        prefix="double_blocks.",
        hywu={
            "base": "pocket editor",
            "condition": [{"kind": "conditioning", "width": base.context_dim}],
            "weights": f"random, seed {seed}",
        },
    )
    generator = Generator(config).initialize(seed)
    head = generator.model.proj_out_B.weight
    with torch.no_grad():  # training starts from a zero B head; here an effect should show without training
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(seed)) * 0.02)
    print(save_generator(generator, ROOT / "models" / "pocket-generator.safetensors", dtype=torch.bfloat16))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--host", type=Path, default=ROOT / ".host" / "ComfyUI", help="ComfyUI's folder")
    arguments = parser.parse_args()
    enter_host(arguments.host)
    write_editor(arguments.seed)
    write_generator(arguments.seed)
