"""Compare this pack's HunyuanImage-3 and HY-WU with another implementation, on real weights or on tiny ones.

    .venv/bin/python scripts/parity_hunyuan_image3.py dump --base DIR --generator DIR --image FILE [--image FILE ...] \\
        --prompt TEXT --system-prompt TEXT --reasoning TEXT --size HxW|auto --seed N --steps N --dtype float32 \\
        --out FILE.safetensors
    .venv/bin/python scripts/parity_hunyuan_image3.py compare FILE.safetensors OTHER.safetensors [--tolerance 1e-4]

dump runs one edit without and with its generated LoRA, as the reference does (latents drawn by the seed, noise in bfloat16,
its schedule, an empty reasoning as an empty answer), and writes float32 tensors, as the model sees them:

    ids (2, L)                         token ids, conditional and unconditional row; int64
    condition (1, L', H)               last hidden states of the text pass
    ratio_logits (1, vocabulary)       of the token that names the size
    lora.<target>.lora_A / .lora_B     the generated factors; lora.scale
    base.step<i>.pred (1, C, h, w)     velocity after guidance, LoRA off; lora.step<i>.pred with it
    base.latent_final (1, C, h, w)     lora.latent_final
    image (1, height, width, 3)        of the LoRA run, in [0, 1]

--noise, --cond-latents and --vit-pixels (safetensors) replace what another resize or random generator would change: one
tensor, or one for each picture in the order of their names. cond-latents are scaled as the model reads them; vit-pixels are
patches (slots, 768), with an optional spatial_shapes (pictures, 2), or normalised pixels (3, H, W).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from in_host import enter_host


def arguments_of(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    dump = commands.add_parser("dump", help="run one edit and write what it computes")
    dump.add_argument("--base", type=Path, required=True, help="the base's folder")
    dump.add_argument("--generator", type=Path, required=True, help="the generator's folder")
    dump.add_argument("--image", type=Path, action="append", default=[], help="a source picture; up to three times")
    dump.add_argument("--prompt", required=True, help="the instruction")
    dump.add_argument("--system-prompt", help="the base folder's own if it is not given")
    dump.add_argument("--reasoning", help="text in <think> and <recaption> tags; '' is written as an empty answer")
    dump.add_argument("--size", default="auto", help="HxW or auto")
    dump.add_argument("--seed", type=int, default=0)
    dump.add_argument("--steps", type=int, default=50)
    dump.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    dump.add_argument("--cpu", action="store_true", help="stay on the CPU although there is a GPU")
    dump.add_argument("--noise", type=Path, help="initial noise")
    dump.add_argument("--cond-latents", type=Path, help="latents of the source pictures")
    dump.add_argument("--vit-pixels", type=Path, help="what the vision tower sees of the source pictures")
    dump.add_argument("--out", type=Path, required=True)
    compare = commands.add_parser("compare", help="relative L2 distance of every tensor of two dumps")
    compare.add_argument("first", type=Path)
    compare.add_argument("second", type=Path)
    compare.add_argument("--tolerance", type=float, default=1e-4)
    return parser.parse_args(given)


def read_overrides(arguments: argparse.Namespace):
    """The optional files as tensors."""
    from hywu_core.bases.hunyuan_image3.parity import Overrides

    noise, latents = tensors(arguments.noise), tensors(arguments.cond_latents)
    patches = tensors(arguments.vit_pixels)
    shapes = patches.pop("spatial_shapes", None) if patches else None
    return Overrides(
        noise=one_each(noise, 3)[0] if noise else None,
        latents=one_each(latents, 3) if latents else None,
        patches=one_each(patches, 2) if patches else None,
        grids=tuple(tuple(row) for row in shapes.reshape(-1, 2).tolist()) if shapes is not None else None,
    )


def tensors(path: Path | None) -> dict:
    """All tensors of a file, numbers in the order of their names."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from hywu_core.errors import CheckpointError

    if path is None:
        return {}
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}).") from None

    def natural(name: str) -> list:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    return {name: found[name] for name in sorted(found, key=natural)}


def one_each(found: dict, dimensions: int) -> tuple:
    """One tensor of so many dimensions for each picture, whether they come stacked or by name."""
    parts = []
    for tensor in found.values():
        if dimensions == 3 and tensor.ndim == 5:  # with a frame axis
            tensor = tensor.squeeze(2)
        if dimensions == 2 and tensor.ndim >= 3 and tensor.shape[-3] == 3 and tensor.shape[-1] != 768:  # whole pixels
            parts += list(tensor.reshape(-1, *tensor.shape[-3:]))
        else:
            parts += list(tensor.reshape(-1, *tensor.shape[-dimensions:]))
    return tuple(part[None] if dimensions == 3 else part for part in parts)


def run_dump(arguments: argparse.Namespace) -> int:
    import torch

    enter_host(cpu=arguments.cpu or not torch.accelerator.is_available())
    from hywu_core.bases.hunyuan_image3 import parity
    from hywu_core.files.safetensors import write_safetensors
    from hywu_core.host import pictures

    with torch.inference_mode():
        parts = parity.Parts.read(arguments.base, arguments.generator, getattr(torch, arguments.dtype))
        case = parity.Case(
            tuple(pictures.read(path) for path in arguments.image),
            arguments.prompt,
            arguments.system_prompt,
            arguments.reasoning,
            arguments.size,
            arguments.seed,
            arguments.steps,
        )
        found = parity.dump(parts, case, read_overrides(arguments))
        kept = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}
        asked = {name: str(value) for name, value in vars(arguments).items() if value is not None}
        write_safetensors(arguments.out, kept, {"format": "pt"} | asked)
    print(f"parity: {len(kept)} tensors are in {arguments.out}")
    return 0


def run_compare(arguments: argparse.Namespace) -> int:
    """compare: 1 if anything is further apart than the tolerance."""
    enter_host()
    from hywu_core.bases.hunyuan_image3.parity import compare

    lines = compare(tensors(arguments.first), tensors(arguments.second))
    far = [
        value
        for _, value in lines
        if value != "equal" and not (isinstance(value, float) and value <= arguments.tolerance)
    ]
    for name, value in lines:
        print(f"{name:<60} {value if isinstance(value, str) else f'{value:.2e}'}")
    print(f"parity: {len(lines) - len(far)} of {len(lines)} tensors are within {arguments.tolerance:g}")
    return 1 if far else 0


def main() -> int:
    """Run a command; errors a user can cause are one line."""
    arguments = arguments_of()
    try:
        return run_compare(arguments) if arguments.command == "compare" else run_dump(arguments)
    except ValueError as error:  # HywuError is one; it can only be imported once the host is entered
        print(f"parity: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
