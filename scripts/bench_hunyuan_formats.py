"""What the formats of a HunyuanImage-3's weights do to its numbers: the tiny base of the tests, in each of them.

Run: .venv/bin/python scripts/bench_hunyuan_formats.py
First, what loading takes of the main memory: a larger checkpoint with as many tensors as the released one is loaded in a
process of its own, and the growth of the most memory that the process ever held is given as a share of the files' size. It
counts pages of memory-mapped files, which the system can take back.

Then it prints relative L2 distances from the base as it is stored, in bfloat16: of the condition, of what the generated LoRA
adds to the weights, and of the sampled latent with that LoRA. All of them compute in float32, so it is the storing alone that
is measured. The base's weights are random: this compares formats, and says nothing of how edits look.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from in_host import ROOT, enter_host

sys.path.append(str(ROOT / "tests"))
GENERATOR = ROOT / "tests" / "fixtures" / "pg_tiny"
BASELINE = "bfloat16"
BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
WIDTHS = {"hidden": 256, "intermediate": 128}  # of the checkpoint whose loading is measured: 0.4 GB in bfloat16
SHARDS = 8
STEPS, GUIDANCE, GRID, SEED = 3, 2.5, (14, 18), 7


class Run(NamedTuple):
    """One edit from beginning to end."""

    condition: object  # Tensor (1, L, H)
    lora: object  # InstanceLora
    latent: object  # Tensor (1, C, 1, h, w)


class Distances(NamedTuple):
    """Relative L2, of each part of a run."""

    condition: float
    lora: float
    latent: float


def run(folder: Path, mode: str = "bypass") -> Run:
    """Load a folder, read the tests' edit, generate its LoRA, and sample one latent with it."""
    import comfy.sample
    import torch
    from hunyuan_tiny import golden_edit

    from hywu_core import load_generator
    from hywu_core.bases.hunyuan_image3.edit import to_conditioning
    from hywu_core.bases.hunyuan_image3.loader import load
    from hywu_core.bases.hunyuan_image3.text_mode import read_edit
    from hywu_core.condition import assemble
    from hywu_core.host.lora.apply import apply_lora

    with torch.inference_mode():
        model, _, encoder = load(folder)
        edit = golden_edit(encoder)
        condition = read_edit(model, edit).condition
        generator = load_generator(GENERATOR)
        lora = generator.generate(assemble(condition, generator.config))
        patched, _ = apply_lora(model, lora, 1.0, mode)
        rows = [to_conditioning(edit), to_conditioning(edit._replace(unconditional=True))]
        shape = (1, encoder.config.vae.latent_channels, 1, *GRID)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
        latent = comfy.sample.sample(
            patched, noise, STEPS, GUIDANCE, "euler", "simple", *rows, torch.zeros(shape), disable_pbar=True, seed=SEED
        )
    return Run(condition.parts[0].tokens.clone(), lora, latent.clone())


def distances(found: Run, expected: Run) -> Distances:
    """Of a run from another."""
    from hunyuan_tiny import relative

    return Distances(
        relative(found.condition, expected.condition),
        relative(changes(found.lora), changes(expected.lora)),
        relative(found.latent, expected.latent),
    )


def changes(lora):
    """What a LoRA adds to the weights, all targets in one vector: scale * B . A."""
    import torch

    return torch.cat([(lora.scale * pair.up @ pair.down).flatten() for pair in lora.factors.values()])


def sizes(folder: Path) -> tuple[int, int]:
    """Bytes of the weights that the formats are for, and of all weights."""
    from hywu_core.bases.hunyuan_image3.files import inspect_base
    from hywu_core.bases.hunyuan_image3.quantised import can_be_quantised

    large = total = 0
    for name, header in inspect_base(folder).headers.items():
        size = math.prod(header.shape) * BYTES[header.dtype]
        weight = re.sub(r"\.experts\.\d+\.", ".experts.", name).rpartition(".")[0] + ".weight"  # that it belongs to
        total, large = total + size, large + size * can_be_quantised(weight)
    return large, total


def make(folder: Path) -> None:
    """Write the checkpoint whose loading is measured, and its conversions beside it."""
    import torch
    from hunyuan_tiny import full_count_config, make_full_count_folder

    from hywu_core.bases.hunyuan_image3.convert import convert
    from hywu_core.bases.hunyuan_image3.quantised import FORMATS

    make_full_count_folder(folder / BASELINE, SHARDS, full_count_config(**WIDTHS))
    for kind in FORMATS:
        convert(folder / BASELINE, folder / kind, kind, torch.device("cpu"), lambda line: None)


def load_and_measure(folder: Path) -> None:
    """Load a folder and print what it took, in bytes, as JSON."""
    import torch

    from hywu_core.bases.hunyuan_image3.loader import load

    before = peak()
    kept = load(folder, torch.bfloat16)
    print(json.dumps({"grown": peak() - before, "files": sizes(folder)[1]}))
    del kept


def peak() -> int:
    """The most bytes that this process ever held."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_loading() -> None:
    """Print a table. Everything is done in processes of their own: one starts with its parent's peak, which must be small."""
    with tempfile.TemporaryDirectory() as work:
        _again("--make", work)
        print("| stored as | files, GB | peak of loading, GB | peak / files |")
        print("|---|---|---|---|")
        for name in sorted(folder.name for folder in Path(work).iterdir()):
            found = json.loads(_again("--load", Path(work, name)).splitlines()[-1])
            grown, files = found["grown"], found["files"]
            print(f"| {name} | {files / 1e9:.3f} | {grown / 1e9:.3f} | {grown / files:.2f} |", flush=True)


def _again(*arguments: str | Path) -> str:
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Convert, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)  # both are how the script calls itself
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make or arguments.load:
        enter_host()
        logging.getLogger().setLevel(logging.ERROR)
        make(arguments.make) if arguments.make else load_and_measure(arguments.load)
    else:
        measure_loading()
        measure_formats()


def measure_formats() -> None:
    """Print a table of the tiny base in every format."""
    enter_host()
    import torch
    from hunyuan_tiny import make_folder

    from hywu_core.bases.hunyuan_image3.convert import convert
    from hywu_core.bases.hunyuan_image3.quantised import FORMATS

    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as work:
        folders = {BASELINE: make_folder(Path(work, "base"))}
        for kind in FORMATS:
            folders[kind] = convert(folders[BASELINE], Path(work, kind), kind, torch.device("cpu"), lambda line: None)
        runs = {name: run(folder) for name, folder in folders.items()}
        bytes_of = {name: sizes(folder) for name, folder in folders.items()}
    print("| stored as | condition | LoRA | latent | size of large weights | size of all |")
    print("|---|---|---|---|---|---|")
    for name, found in runs.items():
        errors = " | ".join(f"{error:.3f}" for error in distances(found, runs[BASELINE]))
        ratios = " | ".join(f"{n / of:.3f}" for n, of in zip(bytes_of[name], bytes_of[BASELINE], strict=True))
        print(f"| {name} | {errors} | {ratios} |")


if __name__ == "__main__":
    main()
