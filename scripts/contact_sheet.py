"""One picture that shows what a generator is for: the same base, the same pictures, a LoRA shared by all edits beside a LoRA
written for each. Started by demo.sh.

    .venv/bin/python scripts/contact_sheet.py [--out out/demo/contact_sheet.png] [--images DIR] [--size 96] [--taught FILE]

With --taught, a generator that scripts/teach.py taught sepia, that edit is shown too, in a last row.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

from in_host import ROOT, enter_host

enter_host()
import torch  # noqa: E402

from hywu_core import Generator, load_generator  # noqa: E402
from hywu_core.bases import pocket  # noqa: E402
from hywu_core.errors import HywuError  # noqa: E402
from hywu_core.files.lora_files import load_lora  # noqa: E402
from study import evaluation, figures, pictures  # noqa: E402
from study.edits import SUITES, Edit  # noqa: E402
from study.personal import NEW  # noqa: E402
from study.task import Case, EditingTask  # noqa: E402

COLUMNS = ("source", "base alone", "one shared LoRA", "generated LoRA", "target")
LINE = 18  # letters of a row's name in one line
UNKNOWN = "place a penguin in the scene"
TAUGHT = "animal-bird/penguin-0"  # the tile on which a new edit is shown


class Row(NamedTuple):
    """An edit, and how it is asked for."""

    edit: str
    asked: str = ""  # by default as the suite does


SHOWN = {  # held-out tile -> what is asked; words of its own are ones that no generator was trained on
    "cat-face/heart_eyes_cat-0": Row("warm", "make it look like a sunset"),
    "food-fruit/cherries-0": Row("brighten"),
    "plant-flower/sunflower-0": Row("blur"),
    "photo/chelsea-3-0": Row("cool", "could you cool my picture a bit"),
    "animal-bird/owl-0": Row("desaturate", "turn it monochorme"),
    "place-building/school-0": Row("unknown", UNKNOWN),
}


def edit_of(row: Row) -> Edit:
    """With the words of the row."""
    if row.edit == "unknown":
        return Edit(row.edit, lambda pictures: pictures, (row.asked,))
    found = next(edit for edit in SUITES["eight"] if edit.name == row.edit)
    return found._replace(wordings=(row.asked,)) if row.asked else found


def rows_of(generator: Generator, edits: dict[int, Edit], found: torch.Tensor, names: list[str]) -> list:
    """For every picture that is edited, by its number, the words and the pictures of COLUMNS."""
    model, clip, _ = pocket.load_pocket_editor()
    shared = load_lora(pocket.WEIGHTS / "shared.safetensors").to(dtype=torch.float32)
    task = EditingTask(clip, found, names, tuple(edits.values()), generator.config, "blind")
    cases = [Case(picture, place) for place, picture in enumerate(edits)]
    columns = (
        found[list(edits)],
        evaluation.edited(model, task, cases),
        evaluation.edited(model, task, cases, shared),
        evaluation.edited(model, task, cases, evaluation.write(generator, task, cases)),
        task.targets(cases),
    )
    texts = ["\n".join(textwrap.wrap(edit.wordings[0], LINE)) for edit in edits.values()]
    return list(zip(texts, torch.stack(columns, dim=1), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo" / "contact_sheet.png")
    parser.add_argument("--images", type=Path, help="a folder of your own pictures instead of the shipped test set")
    parser.add_argument("--size", type=int, default=96, help="side in pixels")
    parser.add_argument("--taught", type=Path, help="a generator that was taught sepia")
    arguments = parser.parse_args()
    shown = {tile: edit_of(row) for tile, row in SHOWN.items()}
    try:
        if arguments.images:
            found, names = pictures.read_folder(arguments.images, arguments.size)
            chosen = dict(enumerate(list(shown.values())[: len(names)]))
        else:
            found, names = pictures.compose("test", arguments.size)
            chosen = {names.index(name): edit for name, edit in shown.items()}
        rows = rows_of(load_generator(ROOT / "models" / "pocket-generator.safetensors"), chosen, found, names)
        if arguments.taught:
            picture = names.index(TAUGHT) if TAUGHT in names else len(chosen) % len(names)
            rows += rows_of(load_generator(arguments.taught), {picture: NEW["sepia"]}, found, names)
    except HywuError as error:
        print(f"contact sheet: {error}", file=sys.stderr)
        return 2
    title = "Pocket editor on pictures it never saw: every row is one picture and one instruction"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figures.contact_sheet(rows, COLUMNS, title).save(arguments.out)
    print(f"  contact sheet  {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
