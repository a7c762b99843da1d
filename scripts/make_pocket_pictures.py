"""Make the pictures that ship with the pocket editor, from two public packages that were unpacked before:

    npm pack emoji-datasource-google@16.0.0      Noto Emoji artwork, 64x64, Apache-2.0
    pip download --no-deps scikit-image==0.26.0  photographs in the public domain (its data/README.txt)

    .venv/bin/python scripts/make_pocket_pictures.py --emoji package --photos skimage/data

The tiles of each split go into one WebP sheet, what they are and under which licence into pictures.json. The splits share no
kind of emoji and no photograph: look-alikes (three cats, five hearts) must not stand on both sides.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from in_host import enter_host
from PIL import Image

enter_host()
from study.pictures import COLUMNS, FOLDER, TILE  # noqa: E402

EMOJI = {"name": "Noto Emoji 2.048", "licence": "Apache-2.0", "source": "npm: emoji-datasource-google 16.0.0"}
PHOTO = {"licence": "public domain (NASA, CC0)", "source": "PyPI: scikit-image 0.26.0"}
PER_KIND = 16  # at most so many emoji of one kind
SKIPPED = {
    *("skin-tone", "country-flag", "subdivision-flag", "keycap", "alphanum", "time", "person-role", "family", "zodiac")
}
TEST_KINDS = {"animal-bird", "food-fruit", "place-building", "transport-water", "musical-instrument", "cat-face",
              "plant-flower", "sport", "face-hat", "household", "drink", "medical"}  # fmt: skip
VALIDATION_KINDS = {"animal-reptile", "food-sweet", "transport-air", "office", "science", "face-affection"}
PHOTOS = {
    "train": ("astronaut.png", "coffee.png", "hubble_deep_field.jpg"),
    "validation": (),
    "test": ("chelsea.png", "rocket.jpg"),
}
CROPS = {"train": 20, "validation": 0, "test": 16}  # of each photograph


def emoji_tiles(folder: Path) -> dict[str, list[tuple[str, Image.Image]]]:
    """{split: [(name, tile)]}, at most PER_KIND of each kind, chosen by a seeded shuffle."""
    kinds: dict[str, list[dict]] = {}
    for entry in json.loads((folder / "emoji.json").read_text(encoding="utf-8")):
        if entry["has_img_google"] and entry["subcategory"] not in SKIPPED:
            kinds.setdefault(entry["subcategory"], []).append(entry)
    tiles: dict[str, list] = {"train": [], "validation": [], "test": []}
    for kind, entries in sorted(kinds.items()):
        random.Random(kind).shuffle(entries)
        split = "test" if kind in TEST_KINDS else "validation" if kind in VALIDATION_KINDS else "train"
        for entry in entries[:PER_KIND]:
            tile = Image.open(folder / "img" / "google" / "64" / entry["image"]).convert("RGBA")
            tiles[split].append((f"{kind}/{entry['short_name']}", tile.resize((TILE, TILE), Image.LANCZOS)))
    return tiles


def photo_tiles(folder: Path, split: str) -> list[tuple[str, Image.Image]]:
    """Square crops of several sizes from each photograph of a split."""
    tiles = []
    for name in PHOTOS[split]:
        photo, chance = Image.open(folder / name).convert("RGBA"), random.Random(name)
        for index in range(CROPS[split]):
            side = int(min(photo.size) * chance.uniform(0.3, 0.95))
            left, top = chance.randint(0, photo.width - side), chance.randint(0, photo.height - side)
            crop = photo.crop((left, top, left + side, top + side)).resize((TILE, TILE), Image.LANCZOS)
            tiles.append((f"photo/{Path(name).stem}-{index}", crop))
    return tiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--emoji", type=Path, required=True, help="the unpacked npm package")
    parser.add_argument("--photos", type=Path, required=True, help="skimage/data of the unpacked wheel")
    arguments = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    index = {"emoji": EMOJI, "photo": PHOTO, "splits": {}}
    for split, tiles in emoji_tiles(arguments.emoji).items():
        tiles += photo_tiles(arguments.photos, split)
        sheet = Image.new("RGBA", (TILE * COLUMNS, TILE * -(-len(tiles) // COLUMNS)))
        for place, (_, tile) in enumerate(tiles):
            sheet.paste(tile, (TILE * (place % COLUMNS), TILE * (place // COLUMNS)))
        sheet.save(FOLDER / f"{split}.webp", quality=90, method=6)
        index["splits"][split] = [name for name, _ in tiles]
        print(split, len(tiles), (FOLDER / f"{split}.webp").stat().st_size)
    (FOLDER / "pictures.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
