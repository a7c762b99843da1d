"""Convert a generator into one with its large weights quantised, for half of the memory, or into another type.

    .venv/bin/python scripts/convert_generator.py SOURCE TARGET --format int8
    .venv/bin/python scripts/convert_generator.py --plan SOURCE [--length 7000]

SOURCE is a generator's folder or .safetensors file, TARGET a folder to write. The same command goes on with a conversion that
was stopped. --plan prints what the generator needs in each format on cards of several sizes, as Markdown: derived by
arithmetic, not measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from in_host import ROOT  # noqa: F401 (makes hywu_core importable from anywhere)

from hywu_core.config import GeneratorConfig
from hywu_core.errors import HywuError
from hywu_core.files.checkpoint import inspect_generator
from hywu_core.files.convert import convert_generator
from hywu_core.files.quantised import FP8, INT8
from hywu_core.plan import plan, summary

FORMATS = {"int8": INT8, "fp8": FP8, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CARDS = (24, 16, 12, 8)  # GiB
BUS = 12e9  # bytes a second, of a slot of the third generation or a card with eight lanes
RESERVED = 2**30  # of a card, for the system and what else is there
STOPPED = 130  # the exit code of a run that was asked to stop


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a generator's folder or file; with --plan its config.json is enough")
    parser.add_argument("target", nargs="?", help="the folder to write: empty, not there, or of the same conversion")
    parser.add_argument("--format", choices=FORMATS, default="int8", help="of the large weights (default: %(default)s)")
    parser.add_argument("--plan", action="store_true", help="print what it needs instead")
    parser.add_argument(
        "--length", type=int, default=7000, help="tokens of a condition for --plan (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if not arguments.plan and not arguments.target:
        parser.error("SOURCE and TARGET are needed, or --plan SOURCE")
    return arguments


def table(config: GeneratorConfig, length: int) -> str:
    """What a generate needs in each format on each card, as Markdown."""
    lines = [
        "| weights | GB | " + " | ".join(f"{card} GB card" for card in CARDS) + " |",
        "|" + "---|" * (2 + len(CARDS)),
    ]
    for name, matrix_bytes in (("bfloat16", None), ("int8", 1), ("fp8", 1)):
        cells = []
        for card in CARDS:
            budget = card * 2**30 - RESERVED
            planned = plan(config, 1, length, torch.bfloat16, matrix_bytes=matrix_bytes, budget=budget)
            if planned.peak + planned.block > budget:
                cells.append("does not fit")
            elif not planned.streamed:
                cells.append("resident")
            else:
                cells.append(f"{planned.streamed / 1e9:.1f} GB streamed, {planned.streamed / BUS:.1f} s")
        lines.append(f"| {name} | {planned.weights / 1e9:.1f} | " + " | ".join(cells) + " |")
    whole = plan(config, 1, length, torch.bfloat16)
    lines.append(
        f"\n{summary(config, whole.weights)}. Condition of {length:,} tokens: {whole.flops / 1e15:.2f} PFLOP, "
        f"{whole.peak / 1e9:.1f} GB beside the weights. Derived by arithmetic, not measured; each weight crosses the bus "
        f"once a generate, at {BUS / 1e9:.0f} GB/s."
    )
    return "\n".join(lines)


def main() -> None:
    """Errors that a user can cause are one line."""
    arguments = read_arguments()
    try:
        if arguments.plan:
            file = Path(arguments.source)
            if file.suffix == ".json":
                config = GeneratorConfig.from_json(file.read_text(encoding="utf-8"), str(file))
            else:
                config = inspect_generator(file).config
            print(table(config, arguments.length))
        else:
            convert_generator(
                arguments.source, arguments.target, FORMATS[arguments.format], lambda line: print(line, flush=True)
            )
    except (HywuError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("Stopped. The same command goes on.", file=sys.stderr)
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
