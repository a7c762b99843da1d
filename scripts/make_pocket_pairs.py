"""Make pairs of small pictures before and after an edit, with the instruction, from the pocket editor's training set.

.venv/bin/python scripts/make_pocket_pairs.py                                     the example pairs that ship
.venv/bin/python scripts/make_pocket_pairs.py --edits sepia --count 8 --out FOLDER    others
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from in_host import enter_host

enter_host()
from hywu_core.bases.pocket.extras import PAIRS  # noqa: E402
from study import pictures  # noqa: E402
from study.edits import SUITES, Edit  # noqa: E402
from study.personal import NEW  # noqa: E402

COUNT, SIDE, QUALITY = 24, 64, 90
SHIPPED = ("darken", "brighten")
KNOWN: dict[str, Edit] = {edit.name: edit for edit in SUITES["all"]} | NEW


def write_pairs(folder: Path, edits: list[Edit], count: int) -> None:
    """`count` pictures, each with every edit, and their list pairs.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    found, names = pictures.compose("train", SIDE)
    step = len(names) // count
    lines = []
    for number, picture in enumerate(found[::step][:count]):
        source = f"{number:02}.webp"
        _save(picture, folder / source)
        for edit in edits:
            target = f"{number:02}-{edit.name}.webp"
            _save(edit(picture.unsqueeze(0))[0], folder / target)
            lines.append({"source": source, "target": target, "instruction": edit.wordings[0]})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")


def _save(picture, path: Path) -> None:
    pictures.to_image(picture).save(path, quality=QUALITY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", nargs="+", choices=tuple(KNOWN), default=SHIPPED, metavar="EDIT")
    parser.add_argument("--count", type=int, default=COUNT, help="pictures")
    parser.add_argument("--out", type=Path, default=PAIRS)
    arguments = parser.parse_args()
    # in the order of the suite
    write_pairs(arguments.out, [edit for name, edit in KNOWN.items() if name in arguments.edits], arguments.count)


if __name__ == "__main__":
    main()
