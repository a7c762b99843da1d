"""Whether the pocket editor understands words and keeps pictures: wordings that were never trained on, instructions that ask
for no edit, and copies of pictures of all sizes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hywu_core.analysis.statistics import bootstrap, psnr
from hywu_core.bases import pocket
from hywu_core.generator import Generator

from . import pictures
from .edits import BASE_EDITS, SUITES, Edit
from .evaluation import chunks, edited, score, write
from .foreign import foreign
from .task import Case, EditingTask, Regime
from .wordings import held_out, trained

SIZES = ((32, 32), (64, 64), (128, 128), (192, 192), (64, 192), (128, 96))
COPIES = {32: 32, 64: 16, 128: 8, 192: 4}  # longer side in pixels: how many pictures
SAME = 30.0  # dB from which an answer counts as the base's own copy
KINDS = ("frame", "synonym", "typo")


def copies(model: Any, clip: Any) -> dict[str, dict[str, float]]:
    """For every size: PSNR in dB of the told-nothing base against the source, and how much its error jumps at the borders of
    patches, relative to inside them (1 where no grid is to be seen).
    """
    found = {}
    for height, width in SIZES:
        count = COPIES[max(height, width)]
        shown, names = pictures.compose("test", (height, width), count=count)
        task = EditingTask(clip, shown, names, BASE_EDITS, None, "blind")
        answers = torch.cat([edited(model, task, [Case(index, 0)]) for index in range(len(names))])
        values = psnr(answers, shown)
        found[f"{height}x{width}"] = {
            "pictures": count,
            "mean": round(float(values.mean()), 2),
            "lowest": round(float(values.min()), 2),
            "grid": round(grid(answers - shown, model.model.diffusion_model.patch_size), 2),
        }
    return found


def grid(error: Tensor, patch: int) -> float:
    """Mean absolute step of an error (B, 3, H, W) from pixel to pixel across the borders of patches, over that inside."""
    across, inside = [], []
    for axis in (2, 3):
        steps = error.diff(dim=axis).abs()
        border = torch.arange(steps.shape[axis]) % patch == patch - 1
        across.append(steps.index_select(axis, border.nonzero().flatten()).mean())
        inside.append(steps.index_select(axis, (~border).nonzero().flatten()).mean())
    return float(sum(across) / sum(inside))


def paraphrases(
    generator: Generator, model: Any, clip: Any, suite: str, regime: Regime, size: int = 32, seed: int = 0
) -> dict[str, Any]:
    """PSNR in dB by what is new in a wording, and its difference to trained wordings of the same edit on the same picture."""
    chance, edits, asked = random.Random(seed), [], []
    shown, names = pictures.compose("test", size, 1, seed)
    for index, edit in enumerate(SUITES[suite]):
        known, new = trained(edit), held_out(edit)
        edits.append(edit._replace(wordings=(*known, *(text for kind in KINDS for text in new[kind]))))
        place = len(known)
        for kind in KINDS:
            for _ in new[kind]:
                picture = chance.randrange(len(names))
                usual = Case(picture, index, chance.randrange(len(known)))
                asked.append((kind, Case(picture, index, place), usual))
                place += 1
    task = EditingTask(clip, shown, names, edits, generator.config, regime)
    labels, ordered, partners = zip(*asked, strict=True)
    values = score(model, task, ordered, lambda part: write(generator, task, part))
    usual = score(model, task, partners, lambda part: write(generator, task, part))
    alone = score(model, task, ordered)
    less = usual - values
    worst = sorted(zip(less.tolist(), ordered, strict=True), reverse=True)[:12]
    return {
        "trained": bootstrap(usual)._asdict(),
        "base": bootstrap(alone)._asdict(),
        "by_kind": {kind: _of(labels, kind, values, less) for kind in KINDS},
        "held_out": bootstrap(values)._asdict(),
        "lost": bootstrap(less)._asdict(),
        "worst": [
            {"edit": edits[case.edit].name, "wording": edits[case.edit].wordings[case.wording], "lost": round(value, 2)}
            for value, case in worst
        ],
    }


def _of(labels: Sequence[str], kind: str, values: Tensor, less: Tensor) -> dict[str, Any]:
    chosen = [index for index, label in enumerate(labels) if label == kind]
    return {
        "wordings": len(chosen),
        "psnr": bootstrap(values[chosen])._asdict(),
        "lost": bootstrap(less[chosen])._asdict(),
    }


def unknown(
    generator: Generator, model: Any, clip: Any, regime: Regime, count: int = 200, size: int = 32, seed: int = 0
) -> dict[str, Any]:
    """How near the answers to instructions that ask for no edit are to the base's copy: PSNR in dB between the two, and the
    share of them of at least SAME.
    """
    texts = list(foreign(trained_on=False, framed=count))
    random.Random(seed).shuffle(texts)
    edit = Edit("unknown", lambda x: x, tuple(texts[:count]))
    shown, names = pictures.compose("test", size, 1, seed)
    task = EditingTask(clip, shown, names, (edit,), generator.config, regime)
    silent = EditingTask(clip, shown, names, (edit,), generator.config, "blind")
    cases = [Case(index % len(names), 0, index) for index in range(len(edit.wordings))]
    parts = [
        psnr(edited(model, task, part, write(generator, task, part)), edited(model, silent, part))
        for part in chunks(cases)
    ]
    values = torch.cat(parts)
    worst = sorted(zip(values.tolist(), edit.wordings, strict=True))[:12]
    return {
        "instructions": len(values),
        "psnr": bootstrap(values)._asdict(),
        "left_alone": round(float((values >= SAME).float().mean()), 3),
        "worst": [{"instruction": text, "psnr": round(value, 2)} for value, text in worst],
    }


def measure(generators: dict[Regime, tuple[Generator, str]]) -> dict[str, Any]:
    """Everything, on the editor that ships; `generators` with the suite of each, by regime."""
    model, clip, _ = pocket.load_pocket_editor()
    found: dict[str, Any] = {"copy": copies(model, clip)}
    for regime, (generator, suite) in generators.items():
        found[regime] = {
            "suite": suite,
            "paraphrases": paraphrases(generator, model, clip, suite, regime),
            "unknown": unknown(generator, model, clip, regime),
        }
    return found


def text(found: dict[str, Any]) -> str:
    """What was measured, to read."""
    lines = ["Copies by the base that is told nothing, PSNR in dB (lowest), and the grid of its error (1: none)"]
    for size, value in found["copy"].items():
        lines.append(f"  {size:<8} {value['mean']:6.2f} ({value['lowest']:.2f})  grid {value['grid']:.2f}")
    for regime in (key for key in found if key != "copy"):
        value = found[regime]["paraphrases"]
        lines.append(
            f"{regime}: trained wordings {value['trained']['mean']:.2f} dB, base {value['base']['mean']:.2f} dB"
        )
        for kind, part in value["by_kind"].items():
            lost = part["lost"]
            lines.append(
                f"  {kind:<8} {part['psnr']['mean']:6.2f} dB, {lost['mean']:.2f} [{lost['low']:.2f}, {lost['high']:.2f}] less"
                f" than trained ones, {part['wordings']} wordings"
            )
        lost = value["lost"]
        lines.append(
            f"  all of them, {lost['mean']:.2f} dB [{lost['low']:.2f}, {lost['high']:.2f}] less than trained wordings"
        )
        value = found[regime]["unknown"]
        lines.append(
            f"  {value['instructions']} instructions that ask for no edit: {value['psnr']['mean']:.2f} dB to the base's "
            f"copy, {100 * value['left_alone']:.0f} % of them above {SAME:g} dB"
        )
    return "\n".join(lines)
