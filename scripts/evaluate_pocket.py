"""Measure the shipped pocket editor, generator and shared LoRA on held-out pictures, with every control.

    .venv/bin/python scripts/evaluate_pocket.py [--images DIR] [--seed N] [--json FILE] [--out DIR] [--words]

Without --images, the shipped test pictures are used: no kind of emoji and no photograph of the training set. With a folder of
your own, the same edits are measured on it. Then the results of the fair comparison (scripts/sweep_pocket.py) are shown, with
intervals, gates and findings. The exit code is 1 if a gate of the comparison fails.

With --words, other things are measured: how wordings are understood that were never trained on, whether instructions that
ask for no edit leave the picture alone, and how well pictures of all sizes are copied.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from in_host import ROOT, enter_host

enter_host()
import torch  # noqa: E402

from hywu_core import Generator, load_generator  # noqa: E402
from hywu_core.analysis.geometry import centred, cosines, gram, plane, separation  # noqa: E402
from hywu_core.analysis.statistics import bootstrap  # noqa: E402
from hywu_core.bases import pocket  # noqa: E402
from hywu_core.errors import HywuError  # noqa: E402
from hywu_core.files.lora_files import load_lora  # noqa: E402
from hywu_core.host.training.objective import DiffusionObjective  # noqa: E402
from study import evaluation, figures, pictures, reading, report  # noqa: E402
from study.edits import SUITES  # noqa: E402
from study.task import Case, EditingTask  # noqa: E402

RESULTS = ROOT / "results" / "pocket.json"
SUFFIXES = {"blind": "", "told": "-told"}  # of the shipped files
TAUGHT = {"blind": "eight", "told": "all"}  # the suites that they were trained on
COUNT = 128


def load_pictures(folder: Path | None, size: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Held-out pictures, COUNT of them or as many as there are."""
    if folder:
        found, names = pictures.read_folder(folder, size)
    else:
        found, names = pictures.compose("test", size, 1, seed)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:COUNT].tolist()
    return found[order], [names[index] for index in order]


def shipped(regime: str) -> Generator:
    """The generator of a regime."""
    return load_generator(ROOT / "models" / f"pocket-generator{SUFFIXES[regime]}.safetensors")


def measure(regime: str, found: torch.Tensor, names: list[str], out: Path) -> dict[str, Any]:
    """Everything about one regime, and its map of LoRAs as a picture."""
    suffix = SUFFIXES[regime]
    generator = shipped(regime)
    shared = load_lora(pocket.WEIGHTS / f"shared{suffix}.safetensors").to(dtype=torch.float32)
    model, clip, _ = pocket.load_pocket_editor()
    task = EditingTask(clip, found, names, SUITES[TAUGHT[regime]], generator.config, regime)
    cases = task.balanced_cases(COUNT)
    scores = {
        "base": evaluation.score(model, task, cases),
        "shared": evaluation.score(model, task, cases, lambda part: shared),
        **evaluation.score_generator(generator, model, task, cases),
    }
    products = gram(evaluation.write_all(generator, task, cases)).double()
    groups = [case.edit for case in cases]
    edits = [edit.name for edit in task.edits]
    title = f"{len(cases)} generated LoRAs by their dW, centred ({regime})"
    figures.lora_map(plane(products).float(), groups, edits, title).save(out / f"map-{regime}.png")
    gradients = evaluation.gradient_products(DiffusionObjective(model), shared, task)
    return {
        "psnr": {name: bootstrap(values)._asdict() for name, values in scores.items()},
        "generator_minus_shared": bootstrap(scores["matched"] - scores["shared"])._asdict(),
        "by_edit": {edit: _mean(scores["matched"], cases, index) for index, edit in enumerate(edits)},
        "geometry": {
            "raw": separation(cosines(products), groups)._asdict(),
            "centred": separation(cosines(centred(products)), groups)._asdict(),
        },
        "opposite_gradient_cosine": {
            "raw": _opposites(cosines(gradients), edits),
            "centred": _opposites(cosines(centred(gradients)), edits),
        },
    }


def _opposites(cosine: torch.Tensor, edits: list[str]) -> dict[str, float]:
    return {f"{edits[i]}/{edits[i + 1]}": round(float(cosine[i, i + 1]), 3) for i in range(0, len(edits), 2)}


def _mean(values: torch.Tensor, cases: list[Case], edit: int) -> float:
    chosen = [value for value, case in zip(values.tolist(), cases, strict=True) if case.edit == edit]
    return round(sum(chosen) / len(chosen), 2) if chosen else float("nan")


def show(regime: str, found: dict[str, Any]) -> None:
    """One regime as text."""
    title = {"told": "R2, the base reads the instruction too", "blind": "R1, only the generator reads the instruction"}
    print(f"\n{title[regime]}: PSNR in dB, mean and 95 % interval")
    for name, value in found["psnr"].items():
        print(f"  {report.TITLES[name].strip('*'):<42} {value['mean']:6.2f} [{value['low']:.2f}, {value['high']:.2f}]")
    raw, free = found["geometry"]["raw"], found["geometry"]["centred"]
    print(f"  cosine of dW within / across edits: {raw['within']:.2f} / {raw['across']:.2f}", end="")
    print(f"; centred {free['within']:.2f} / {free['across']:.2f}, 1-NN purity {free['purity']:.2f}")
    raw, free = (list(found["opposite_gradient_cosine"][kind].values()) for kind in ("raw", "centred"))
    print(f"  gradient cosine of opposite edits at the shared LoRA: {sum(raw) / len(raw):.2f}", end="")
    print(f"; without what all edits share {sum(free) / len(free):.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="a folder of your own pictures instead of the shipped test set")
    parser.add_argument("--seed", type=int, default=0, help="of the choice and the composition of pictures")
    parser.add_argument("--size", type=int, default=32, help="side in pixels")
    parser.add_argument("--json", type=Path, help="also write everything there")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "evaluate", help="where the maps go")
    parser.add_argument("--words", action="store_true", help="measure wordings, other instructions and copies instead")
    arguments = parser.parse_args()
    if arguments.words:
        measured = reading.measure({regime: (shipped(regime), suite) for regime, suite in TAUGHT.items()})
        print(reading.text(measured))
        if arguments.json:
            arguments.json.write_text(json.dumps(measured, indent=1), encoding="utf-8")
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        found, names = load_pictures(arguments.images, arguments.size, arguments.seed)
        measured = {regime: measure(regime, found, names, arguments.out) for regime in SUFFIXES}
    except HywuError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    print(f"{len(names)} pictures of {arguments.size}x{arguments.size}, shipped weights")
    for regime, value in measured.items():
        show(regime, value)
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1), encoding="utf-8")
    if not RESULTS.exists():
        return 0
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    print(f"\nThe fair comparison ({RESULTS.relative_to(ROOT)}), several seeds, rates chosen on the validation split\n")
    print(report.markdown(results), report.summary(results), sep="\n\n")
    return 0 if all(gate.holds for gate in report.gates(results)) else 1


if __name__ == "__main__":
    sys.exit(main())
