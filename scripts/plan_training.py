"""What training a generator on a real base would take: memory and time, derived from shapes; nothing is loaded or run.

    python scripts/plan_training.py [--pixels 512] [--size small] [--teraflops 60]

The bases are the host's own classes at their released sizes, on the meta device. Memory is what Train HY-WU Generator
asks the host for on an NVIDIA card. The work of a pair is three passes through the base's matrices (forward, once more for
checkpointing, backward to the LoRA), and as many through the generator's; attention of the base is left out, which these
lengths forgive.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from in_host import enter_host

enter_host()

import comfy.model_base  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.supported_models  # noqa: E402

from hywu_core.condition import CONDITIONING, REFERENCE_LATENT, Condition, ConditionPart  # noqa: E402
from hywu_core.config import GeneratorConfig  # noqa: E402
from hywu_core.host.model import find_stacks  # noqa: E402
from hywu_core.host.new_generator import SIZES, generator_config  # noqa: E402
from hywu_core.host.training.objective import pass_room  # noqa: E402
from hywu_core.host.training.session import COPIES  # noqa: E402
from hywu_core.plan import parameters, plan  # noqa: E402
from hywu_core.training.memory import graph_bytes  # noqa: E402

# the host reckons with less where attention is fused
comfy.model_management.pytorch_attention_flash_attention = lambda: True

TEXT_TOKENS = 256
PIXELS_OF_A_TOKEN = 16  # latents are an eighth of the picture, patches are two wide
PASSES = 3  # forward, forward again for checkpointing, backward
ROWS_OF_TEXT = ("txt_", "add_", "to_add", "context_block")  # matrices that only see the text's tokens
ONE_ROW = ("_mod", "modulation", "adaLN")  # and those that see one row for all


class Base(NamedTuple):
    name: str
    kind: str  # in comfy.supported_models
    channels: int  # of its latents
    text_width: int
    shrinks: int  # pixels of a latent's side
    reads_source: bool  # as a reference latent, whose tokens pass through it as well
    config: dict[str, Any]


FLUX = {"image_model": "flux", "vec_in_dim": 768, "mlp_ratio": 4.0, "theta": 10000, "patch_size": 2, "qkv_bias": True}
FLUX2 = {
    "image_model": "flux2", "axes_dim": [32] * 4, "mlp_ratio": 3.0, "theta": 2000, "in_channels": 128, "out_channels": 128,
    "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False, "txt_ids_dims": [3],
    "default_ref_method": "index", "ref_index_scale": 10.0, "patch_size": 1, "vec_in_dim": None, "guidance_embed": False,
}  # fmt: skip
BASES = (
    Base("FLUX.2 klein 4B", "Flux2", 128, 7680, 16, True, FLUX2 | {
        "hidden_size": 3072, "num_heads": 24, "context_in_dim": 7680, "depth": 5, "depth_single_blocks": 20,
    }),
    Base("Z-Image", "ZImage", 16, 2560, 8, False, {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 3840, "n_layers": 30, "n_refiner_layers": 2,
        "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
        "qk_norm": True, "z_image_modulation": True, "ffn_dim_multiplier": 8 / 3, "rope_theta": 256.0, "time_scale": 1000.0,
        "pad_tokens_multiple": 32,
    }),
    Base("FLUX.1 Kontext", "Flux", 16, 4096, 8, True, FLUX | {
        "in_channels": 16, "out_channels": 16, "context_in_dim": 4096, "hidden_size": 3072, "num_heads": 24, "depth": 19,
        "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "guidance_embed": True, "txt_ids_dims": [],
    }),
    Base("Wan 2.1 14B", "WAN21_T2V", 16, 4096, 8, False, {
        "image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "in_dim": 16, "dim": 5120, "ffn_dim": 13824,
        "freq_dim": 256, "text_dim": 4096, "out_dim": 16, "num_heads": 40, "num_layers": 40,
    }),
    Base("Qwen-Image-Edit", "QwenImage", 16, 3584, 8, True, {
        "image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 3584, "axes_dims_rope": (16, 56, 56),
    }),
)  # fmt: skip


class Row(NamedTuple):
    base: str
    weights: int  # elements of the base
    generator: int  # elements
    memory: int  # bytes beside the base
    teraflop: float  # of a pair in a step


def on_meta(base: Base) -> comfy.model_base.BaseModel:
    """The base at its released size, without weights."""
    config = getattr(comfy.supported_models, base.kind)(dict(base.config))
    config.set_inference_dtype(torch.bfloat16, None)
    config.custom_operations = None
    with torch.device("meta"):
        return config.get_model({}, "", device="meta")


def new_generator(base: Base, model: comfy.model_base.BaseModel, size: str, latent: torch.Tensor) -> GeneratorConfig:
    """As **New HY-WU Generator** makes it: attention and feed-forward of the largest stack, rank 16."""
    text = ConditionPart(CONDITIONING, torch.empty(1, TEXT_TOKENS, base.text_width, device="meta"))
    return generator_config(model, Condition((text, ConditionPart(REFERENCE_LATENT, latent))), size)


def passed(model: comfy.model_base.BaseModel, tokens: int) -> float:
    """Products of a forward pass through the matrices of all stacks."""
    total = 0
    for stack in find_stacks(model):
        for name, (columns, rows) in stack.linears.items():
            seen = 1 if any(word in name for word in ONE_ROW) else tokens
            seen = min(seen, TEXT_TOKENS) if any(word in name for word in ROWS_OF_TEXT) else seen
            total += stack.blocks * columns * rows * seen
    return float(total)


def row(base: Base, pixels: int, size: str) -> Row:
    model = on_meta(base)
    side = pixels // base.shrinks
    frames = (1,) if base.kind.startswith("WAN") else ()
    latent = torch.empty(1, base.channels, *frames, side, side, device="meta")
    config = new_generator(base, model, size, latent.flatten(1, -3) if frames else latent)
    picture = (pixels // PIXELS_OF_A_TOKEN) ** 2
    length = TEXT_TOKENS + picture
    memory = COPIES * 4 * parameters(config) + graph_bytes(config, length, torch.bfloat16, recomputed=True)
    source = {"reference_latents": [latent]} if base.reads_source else {}
    memory += pass_room(
        model, latent.shape[1:], [torch.empty(1, TEXT_TOKENS, base.text_width, device="meta"), source], 1
    )
    tokens = picture * (2 if base.reads_source else 1) + (0 if base.kind.startswith("WAN") else TEXT_TOKENS)
    flops = PASSES * (2 * passed(model, tokens) + plan(config, 1, length, torch.bfloat16).flops)
    weights = sum(parameter.numel() for parameter in model.diffusion_model.parameters())
    return Row(base.name, weights, parameters(config), memory, flops / 1e12)


def table(pixels: int, size: str, teraflops: float) -> str:
    """A page's table in Markdown."""
    lines = [
        "| Base | weights, bf16 / fp8 | beside them | generator's file | 5,000 steps of one pair |",
        "|---|---|---|---|---|",
    ]
    for found in (row(base, pixels, size) for base in BASES):
        hours = 5000 * found.teraflop / teraflops / 3600
        lines.append(
            f"| {found.base} | {2 * found.weights / 1e9:.0f} / {found.weights / 1e9:.0f} GB | {found.memory / 1e9:.1f} GB "
            f"| {2 * found.generator / 1e6:.0f} MB | {hours:.1f} h |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, default=512, help="side of the pictures")
    parser.add_argument("--size", choices=tuple(SIZES), default="small", help="of the generator")
    parser.add_argument(
        "--teraflops", type=float, default=60.0, help="what the card does of products in bfloat16, each second"
    )
    arguments = parser.parse_args()
    print(table(arguments.pixels, arguments.size, arguments.teraflops))


if __name__ == "__main__":
    main()
