"""Pairs of a folder as the host's lists, for the training node: encoded once, and read from files as they are needed."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import folder_paths
import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .. import pictures, progress
from .pair_lists import CAPTIONS, LISTS, PICTURES, PairError, rows_of
from .pairs_of_folder import EncodedPairs, Encoders, Pair, Reading, read_pairs

KEPT = "hywu-pairs"  # below the host's temporary folder, which it empties when it starts
SHOWN, SIDE, GAP, LINE, FONT = 8, 256, 6, 22, 14  # rows of a sheet; pixels


_shipped: dict[str, Path] = {}  # folders of pairs that came with the pack


class Loaded(NamedTuple):
    """Lists of equal length, one entry for each pair and wording; and a picture of some of them."""

    latents: list[dict[str, Tensor]]  # edited pictures
    positive: list[list]  # what the base reads, with the source picture
    generator_positive: list[list]  # what the generator reads
    instructions: list[str]
    sheet: Tensor  # IMAGE (1, H, W, 3)


def load(name: str, clip: Any, vae: Any, reading: Reading) -> Loaded:
    """Encode the pairs of a folder below the input folder. Shows progress and can be cancelled.

    Args:
        name: of the folder, as the host lists it.
        reading: `text_sees_source` for text encoders that see the picture. Every wording of an instruction is a pair.
    Raises:
        PairError: for a folder that holds no pairs, naming every one that cannot be used.
    """
    folder = folder_of(name)
    read = read_pairs(folder, reading.size, reading.background)
    pairs = EncodedPairs(
        [pair._replace(instruction=text, others=()) for pair in read for text in pair.wordings],
        Path(folder_paths.get_temp_directory(), KEPT),
        _encoders(clip, vae),
        reading,
    )
    pairs.encode(pairs.missing(), Encoders(clip, vae), progress.bar())
    entries = [pairs.entries(index) for index in range(len(pairs))]
    latents, positive, generator_positive = (list(some) for some in zip(*entries, strict=True))
    texts = [pair.instruction for pair in pairs.pairs]
    return Loaded(latents, positive, generator_positive, texts, _sheet(read, reading))


def ship(name: str, folder: Path) -> None:
    """Offer a folder of the pack's own, before those below the input folder."""
    _shipped[name] = folder


def names() -> list[str]:
    """Folders to choose from."""
    return [*_shipped, *(name for name in folder_paths.get_input_subfolders() if name not in _shipped)]


def folder_of(name: str) -> Path:
    """A folder that came with the pack, or one below the host's input folder.

    Raises:
        PairError: if there is none of this name.
    """
    if name in _shipped:
        return _shipped[name]
    root = Path(folder_paths.get_input_directory()).resolve()
    folder = (root / name).resolve()
    if not folder.is_dir() or not folder.is_relative_to(root) or folder == root:
        raise PairError(f"There is no folder {name!r} in {root}. Put the pairs into a folder there, and refresh (R).")
    return folder


def fingerprint(name: str) -> str:
    """Changes with every list, text and picture of a folder."""
    found, folder = hashlib.sha256(), folder_of(name)
    paths = {path for path in folder.rglob("*") if path.suffix.lower() in (*PICTURES, *CAPTIONS) or path.name in LISTS}
    if any((folder / name).is_file() for name in LISTS):  # which may name pictures of other folders
        with suppress(PairError):  # it is said when the node runs
            paths |= {path for row in rows_of(folder)[0] for path in (row.source, row.target)}
    for path in sorted(paths):
        with suppress(OSError):
            about = path.stat()
            found.update(f"{path} {about.st_size} {about.st_mtime_ns}\n".encode())
    return found.hexdigest()


def _encoders(clip: Any, vae: Any) -> str:
    """Tells what other encoders made of the same pictures apart, as long as the server runs."""
    weights = [f"{owner.patcher.clone_base_uuid}{owner.patcher.patches_uuid}" for owner in (clip, vae)]
    # which a clone of a CLIP has of its own, while its weights are the same
    settings = clip.layer_idx, sorted(clip.tokenizer_options.items())
    return f"{' '.join(weights)} {settings}"


def _sheet(pairs: list[Pair], reading: Reading) -> Tensor:
    """Some pairs, evenly chosen: before and after, below what was asked for."""
    count = min(SHOWN, len(pairs))
    rows = [_row(pairs[place * len(pairs) // count], reading) for place in range(count)]
    width, height = max(row.width for row in rows), sum(row.height + GAP for row in rows) - GAP
    sheet, top = Image.new("RGB", (width, height), "white"), 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + GAP
    return torch.from_numpy(numpy.asarray(sheet).astype(numpy.float32) / 255).unsqueeze(0)


def _row(pair: Pair, reading: Reading) -> Image.Image:
    size = reading.size_of(pair) if reading.size else 0
    shown = []
    for path in (pair.source, pair.target):
        pixels = pictures.read(path, size, reading.background)[0]
        image = Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().numpy())
        shown.append(image.resize((SIDE, max(1, SIDE * image.height // image.width)), Image.Resampling.LANCZOS))
    row = Image.new("RGB", (2 * SIDE + GAP, LINE + max(image.height for image in shown)), "white")
    font = ImageFont.load_default(FONT)
    text = pair.instruction
    while font.getlength(text) > row.width and len(text) > 1:
        text = text[:-2] + "\u2026"
    ImageDraw.Draw(row).text((2, 2), text, fill="black", font=font)
    for place, image in enumerate(shown):
        row.paste(image, (place * (SIDE + GAP), LINE))
    return row
