"""What a negative strength does, measured: a LoRA written for one edit, put on with -1, against the opposite edit.

    .venv/bin/python scripts/negative_pocket.py [--count 64] [--json results/negative.json]

Held-out pictures, shipped weights, PSNR in dB against the right answer of the OPPOSITE edit. An edit that has an exact
opposite (warm and cool, brighten and darken) is the best case that there is for a negative strength.
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

from hywu_core import load_generator  # noqa: E402
from hywu_core.analysis.statistics import bootstrap, psnr  # noqa: E402
from hywu_core.bases import pocket  # noqa: E402
from hywu_core.host.lora.apply import apply_lora  # noqa: E402
from study import evaluation, pictures  # noqa: E402
from study.edits import SUITES, opposite  # noqa: E402
from study.task import Case, EditingTask  # noqa: E402

SUFFIXES = {"blind": "", "told": "-told"}  # of the shipped files
STRENGTHS = (-0.5, -1.0, -1.5, -2.0)
SIZE = 32  # side in pixels


def measure(regime: str, count: int) -> dict[str, Any]:
    """{way: {"mean", "low", "high"}} of one regime, and the mean of every edit at -1."""
    generator = load_generator(ROOT / "models" / f"pocket-generator{SUFFIXES[regime]}.safetensors")
    found, names = pictures.compose("test", SIZE)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))[:count].tolist()
    model, clip, _ = pocket.load_pocket_editor()
    task = EditingTask(clip, found[order], [names[i] for i in order], SUITES["eight"], generator.config, regime)
    asked = task.balanced_cases(count)
    wanted = [case._replace(edit=opposite(task.edits, case.edit)) for case in asked]

    def scores(told: list[Case], write_for: list[Case] | None, strength: float = 1.0) -> torch.Tensor:
        """Of the base told these cases, with LoRAs written for those at a strength, against what is wanted."""
        found = []
        for start in range(0, len(asked), evaluation.CHUNK):
            part = slice(start, start + evaluation.CHUNK)
            patched = model
            if write_for is not None:
                patched, _ = apply_lora(model, evaluation.write(generator, task, write_for[part]), strength, "bypass")
            found.append(psnr(evaluation.edited(patched, task, told[part]), task.targets(wanted[part])))
        return torch.cat(found)

    ways = {"base alone": scores(asked, None)}
    ways |= {f"strength {strength:g}": scores(asked, asked, strength) for strength in STRENGTHS}
    ways["written for the opposite"] = scores(wanted, wanted)
    edits = [edit.name for edit in task.edits]
    minus, plain = ways["strength -1"].tolist(), ways["base alone"].tolist()
    by_edit = {}
    for index, name in enumerate(edits):
        gains = [minus[i] - plain[i] for i, case in enumerate(asked) if case.edit == index]
        by_edit[f"-{name} as {edits[opposite(task.edits, index)]}"] = round(sum(gains) / len(gains), 2)
    return {"psnr": {way: bootstrap(values)._asdict() for way, values in ways.items()}, "gain_by_edit": by_edit}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=64, help="held-out pictures, each with one edit")
    parser.add_argument("--json", type=Path, help="also write everything there")
    arguments = parser.parse_args()
    measured = {regime: measure(regime, arguments.count) for regime in SUFFIXES}
    for regime, found in measured.items():
        print(f"\n{regime}: PSNR in dB against the opposite edit, mean and 95 % interval, {arguments.count} cases")
        for way, value in found["psnr"].items():
            print(f"  {way:<26} {value['mean']:6.2f} [{value['low']:.2f}, {value['high']:.2f}]")
        print("  gain over the base alone at -1, by edit:")
        for name, gain in found["gain_by_edit"].items():
            print(f"    {name:<28} {gain:+.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
