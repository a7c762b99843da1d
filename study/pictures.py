"""The pictures that the pocket editor is trained and measured on: tiles that ship, composed anew from a seed.

A picture is an emoji on a gradient of two colours, or a crop of a photograph. Splits share no kind of emoji and no
photograph.
`tiles/pictures.json` names every tile, its source and its licence.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hywu_core.bases import pocket
from hywu_core.host.pictures import PictureError, read

FOLDER = Path(pocket.__file__).resolve().parent / "tiles"
TILE, COLUMNS = 64, 16  # pixels of a tile, tiles in a row of a sheet
SCENE, MORE_TILES = 96, 3  # pixels from which a picture shows more tiles than one, and how many more
SPLITS = ("train", "validation", "test")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def split_names(split: str) -> list[str]:
    """The names of a split's tiles, "<kind>/<name>"."""
    return json.loads((FOLDER / "pictures.json").read_text(encoding="utf-8"))["splits"][split]


def compose(
    split: str, size: int | tuple[int, int], variants: int = 1, seed: int = 0, count: int | None = None
) -> tuple[Tensor, list[str]]:
    """Every tile of a split, `variants` times, each on a background and in a place of its own. Pictures of SCENE pixels and
    more show other tiles of the split beside it.

    Args:
        size: side in pixels, or height and width.
        seed: of backgrounds and places; the same seed gives the same pictures.
        count: of the pictures; drawn with the seed if it is less than all.
    Returns:
        (count, 3, height, width) in [0, 1], and a name for each. All tiles come once before any comes twice.
    """
    names = split_names(split)
    tiles = _Tiles(split)
    places = [(variant, place) for variant in range(variants) for place in range(len(names))]
    if count is not None and count < len(places):
        places = random.Random(seed).sample(places, count)
    pictures, keys = [], []
    for variant, place in places:
        chance = random.Random(f"{seed} {variant} {names[place]}")
        pictures.append(_tensor(_composed(tiles, place, size if isinstance(size, tuple) else (size, size), chance)))
        keys.append(f"{names[place]}-{variant}")
    return torch.stack(pictures), keys


class _Tiles:
    """The tiles of a split by number."""

    def __init__(self, split: str):
        self.sheet, self.count = Image.open(FOLDER / f"{split}.webp").convert("RGBA"), len(split_names(split))

    def __getitem__(self, place: int) -> Image.Image:
        corner = TILE * (place % COLUMNS), TILE * (place // COLUMNS)
        return self.sheet.crop((*corner, corner[0] + TILE, corner[1] + TILE))


def read_folder(folder: Path, size: int) -> tuple[Tensor, list[str]]:
    """Every picture of a folder, cut to a square around its centre.

    Returns:
        (count, 3, size, size) in [0, 1], and the file names.
    Raises:
        PictureError: if the folder holds none, or one cannot be read.
    """
    files = sorted(f for f in Path(folder).iterdir() if f.suffix.lower() in SUFFIXES) if Path(folder).is_dir() else []
    if not files:
        raise PictureError(f"{folder} holds no pictures. Expected files ending in {', '.join(sorted(SUFFIXES))}.")
    found = [read(file, size).movedim(-1, 1) for file in files]
    return torch.cat(found), [file.name for file in files]


def to_image(picture: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> a picture."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def _composed(tiles: _Tiles, place: int, size: tuple[int, int], chance: random.Random) -> Image.Image:
    tile, (height, width) = tiles[place], size
    if chance.random() < 0.5:
        tile = ImageOps.mirror(tile)
    if _is_photograph(tile):  # fills the picture
        return ImageOps.fit(tile.convert("RGB"), (width, height), Image.LANCZOS)
    picture = _gradient(size, chance)
    side = round(min(size) * chance.uniform(0.7, 0.95))
    _paste(picture, tile, side, chance)
    if min(size) >= SCENE:
        others = [tiles[chance.randrange(tiles.count)] for _ in range(MORE_TILES)]
        for other in others:
            _paste(picture, other, round(min(size) * chance.uniform(0.2, 0.45)), chance)
    return picture


def _paste(picture: Image.Image, tile: Image.Image, side: int, chance: random.Random) -> None:
    corner = chance.randint(0, picture.width - side), chance.randint(0, picture.height - side)
    tile = tile.resize((side, side), Image.LANCZOS)
    picture.paste(tile, corner, tile)


def _is_photograph(tile: Image.Image) -> bool:
    return tile.getchannel("A").getextrema()[0] == 255


def _gradient(size: tuple[int, int], chance: random.Random) -> Image.Image:
    level = chance.uniform(0.15, 0.85)  # dark and bright pictures, for edits that depend on it
    first, second = ([level + chance.uniform(-0.35, 0.35) for _ in range(3)] for _ in range(2))
    across, down = chance.uniform(-1, 1), chance.uniform(-1, 1)
    rows, columns = (numpy.linspace(-0.5, 0.5, side) for side in size)
    share = across * columns[None, :] + down * rows[:, None] + 0.5
    mixed = numpy.array(first) * (1 - share[..., None]) + numpy.array(second) * share[..., None]
    return Image.fromarray((mixed.clip(0, 1) * 255).round().astype(numpy.uint8))


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(numpy.asarray(picture).copy()).permute(2, 0, 1).float() / 255
