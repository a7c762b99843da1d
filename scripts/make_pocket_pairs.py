"""Make the example pairs that ship: pictures of the pocket editor's training set, darkened and brightened.

.venv/bin/python scripts/make_pocket_pairs.py
"""

from __future__ import annotations

import json

from in_host import enter_host
from PIL import Image

enter_host()
from hywu_core.bases.pocket.extras import PAIRS  # noqa: E402
from study import pictures  # noqa: E402
from study.edits import EIGHT  # noqa: E402

COUNT, SIDE, QUALITY = 24, 64, 90
EDITS = ("darken", "brighten")


def main() -> None:
    PAIRS.mkdir(exist_ok=True)
    found, names = pictures.compose("train", SIDE)
    step = len(names) // COUNT
    lines = []
    for number, picture in enumerate(found[::step][:COUNT]):
        source = f"{number:02}.webp"
        _save(picture, source)
        for edit in EIGHT:
            if edit.name in EDITS:
                target = f"{number:02}-{edit.name}.webp"
                _save(edit(picture.unsqueeze(0))[0], target)
                lines.append({"source": source, "target": target, "instruction": edit.wordings[0]})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (PAIRS / "pairs.jsonl").write_text(text, encoding="utf-8")


def _save(picture, name: str) -> None:
    image = Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())
    image.save(PAIRS / name, quality=QUALITY)


if __name__ == "__main__":
    main()
