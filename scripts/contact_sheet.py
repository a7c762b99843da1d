"""One picture that shows what a generator is for: the same base, the same pictures, a LoRA shared by all edits beside a LoRA
written for each. Started by demo.sh.

    .venv/bin/python scripts/contact_sheet.py [--out out/demo/contact_sheet.png] [--images DIR] [--size 64]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from in_host import ROOT, enter_host

enter_host()
import torch  # noqa: E402

from hywu_core import load_generator  # noqa: E402
from hywu_core.bases import pocket  # noqa: E402
from hywu_core.errors import HywuError  # noqa: E402
from hywu_core.files.lora_files import load_lora  # noqa: E402
from study import evaluation, figures, pictures  # noqa: E402
from study.edits import SUITES  # noqa: E402
from study.task import Case, EditingTask  # noqa: E402

COLUMNS = ("source", "base alone", "one shared LoRA", "generated LoRA", "target")
SHOWN = {  # held-out tile -> edit
    "cat-face/heart_eyes_cat-0": "warm",
    "photo/chelsea-3-0": "cool",
    "animal-bird/owl-0": "desaturate",
    "food-fruit/cherries-0": "brighten",
    "place-building/school-0": "darken",
    "plant-flower/sunflower-0": "blur",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo" / "contact_sheet.png")
    parser.add_argument("--images", type=Path, help="a folder of your own pictures instead of the shipped test set")
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    arguments = parser.parse_args()
    try:
        if arguments.images:
            found, names = pictures.read_folder(arguments.images, arguments.size)
            chosen = dict(enumerate(list(SHOWN.values())[: len(names)]))
        else:
            found, names = pictures.compose("test", arguments.size)
            chosen = {names.index(name): edit for name, edit in SHOWN.items()}
    except HywuError as error:
        print(f"contact sheet: {error}", file=sys.stderr)
        return 2
    generator = load_generator(ROOT / "models" / "pocket-generator.safetensors")
    shared = load_lora(pocket.WEIGHTS / "shared.safetensors").to(dtype=torch.float32)
    model, clip, _ = pocket.load_pocket_editor()
    task = EditingTask(clip, found, names, SUITES["eight"], generator.config, "blind")
    edits = [edit.name for edit in task.edits]
    cases = [Case(picture, edits.index(edit)) for picture, edit in chosen.items()]
    columns = (
        found[[case.picture for case in cases]],
        evaluation.edited(model, task, cases),
        evaluation.edited(model, task, cases, shared),
        evaluation.edited(model, task, cases, evaluation.write(generator, task, cases)),
        task.targets(cases),
    )
    rows = torch.stack(columns, dim=1)
    texts = ["\n".join(task.edits[case.edit].wordings[0].rsplit(" ", 1)) for case in cases]
    title = "Pocket editor on pictures it never saw: every row is one picture and one instruction"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figures.contact_sheet(list(zip(texts, rows, strict=True)), COLUMNS, title).save(arguments.out)
    print(f"  contact sheet  {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
