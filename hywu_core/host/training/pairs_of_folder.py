"""Training pairs from a folder: pictures before and after an edit, and the instruction that asks for it.

A folder holds `pairs.jsonl` (one JSON object a line) or `pairs.csv`, with the columns source, target and instruction;
pictures are named relative to it. Every pair is encoded by the host's VAE and text encoder once and kept in a file, so that
neither is needed while the base trains, nor when a run goes on.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...condition import Condition, assemble
from ...config import GeneratorConfig
from ...errors import HywuError
from ...files.safetensors import open_safetensors, write_safetensors
from ...training.data import Sample
from ..conditions import from_host

LISTS, COLUMNS = ("pairs.jsonl", "pairs.csv"), ("source", "target", "instruction")
SAME_SHAPE = 0.01  # relative difference of aspect ratios up to which pictures are cut to one size
ORIENTATION = 0x0112  # EXIF tag
OPTIONS = "options"  # of a kept file's metadata: what a CONDITIONING holds beside tensors


class PairError(HywuError):
    """Training pairs are missing, cannot be read, or do not fit together."""


class Pair(NamedTuple):
    """A picture, what is asked for, and what is right."""

    source: Path
    target: Path
    instruction: str
    where: str  # file and line that name it

    @property
    def key(self) -> str:
        """A short name for errors and logs."""
        return f"{self.source.name} -> {self.target.name}"


class Encoders(NamedTuple):
    """What turns a pair into what base and generator read."""

    clip: Any
    vae: Any
    clip_vision: Any = None


class Reading(NamedTuple):
    """How pairs are read."""

    size: int = 0  # side to which pictures are cut and resized; 0: as they are
    regime: str = "told"  # "blind": only the generator reads the instruction
    text_sees_source: bool = False
    guidance: float = 0.0  # 0: the base's default


def read_pairs(folder: Path, size: int = 0) -> list[Pair]:
    """All pairs of a folder, every picture looked at.

    Args:
        size: see `Reading`; without one, both pictures of a pair must have one size.
    Raises:
        PairError: naming file and line, for no pairs, one pair, or a pair that cannot be used.
    """
    pairs = [_pair(folder, values, where) for values, where in _rows(_list_file(folder))]
    if len(pairs) < 2:
        count = "one pair" if pairs else "no pairs"
        raise PairError(
            f"{_list_file(folder)} names {count}. A generator learns what tells edits apart, so it needs at least two, "
            "and hundreds to be useful. Add more lines."
        )
    for pair in pairs:
        _check_sizes(pair, size)
    return pairs


def hold_out(pairs: Sequence[Pair], share: float) -> tuple[list[Pair], list[Pair]]:
    """(for training, for validation). Whole source pictures are held out, always the same ones, whatever else is added."""
    order = sorted({pair.source for pair in pairs}, key=lambda path: hashlib.sha256(path.name.encode()).digest())
    chosen = set(order[: min(len(order) - 1, max(1, round(share * len(order))))]) if share else set()
    return [p for p in pairs if p.source not in chosen], [p for p in pairs if p.source in chosen]


def fingerprint(pairs: Sequence[Pair]) -> str:
    """Of the names and instructions, in their order: what decides which pair a step of a run sees."""
    text = json.dumps([[pair.source.name, pair.target.name, pair.instruction] for pair in pairs])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class EncodedPairs:
    """Pairs as training data, each read from its file when it is its turn. See `hywu_core.training.SampleSource`.

    Args:
        kept: folder of the encoded pairs.
        base: tells apart what other encoders made of the same pictures.
    """

    config: GeneratorConfig  # of the generator that reads the conditions; needed for `sample`

    def __init__(self, pairs: Sequence[Pair], kept: Path, base: str, reading: Reading):
        self.pairs, self.reading = list(pairs), reading
        self.files = [kept / f"{_identity(pair, base, reading)}.safetensors" for pair in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def missing(self) -> list[int]:
        """Indices of the pairs that are not encoded yet."""
        return [index for index, file in enumerate(self.files) if not file.exists()]

    def encode(self, indices: Sequence[int], encoders: Encoders, progress: Callable[[int, int], None]) -> None:
        """Encode pairs and keep them.

        Raises:
            PairError: for a picture that cannot be read.
            SaveError: if there is no room.
        """
        for done, index in enumerate(indices):
            tensors, options = _encoded(self.pairs[index], encoders, self.reading)
            write_safetensors(self.files[index], tensors, {OPTIONS: json.dumps(options)})
            progress(done + 1, len(indices))

    def sample(self, index: int, source: torch.Generator) -> Sample:
        """The pair at an index; nothing of it is drawn."""
        tensors, options = self._kept(index)
        part = "silence" if self.reading.regime == "blind" else "text"
        condition = assemble(self._condition(tensors, options), self.config)[0]
        return Sample(
            tensors["target"][0], _entry(tensors, options, part, self.reading), condition, self.pairs[index].key
        )

    def condition(self, index: int) -> Condition:
        """What there is for a generator to read."""
        return self._condition(*self._kept(index))

    def _condition(self, tensors: dict[str, Tensor], options: dict[str, Any]) -> Condition:
        vision = {"last_hidden_state": tensors["vision"]} if "vision" in tensors else None
        return from_host([_entry(tensors, options, "text", self.reading)], vision)

    def _kept(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        with open_safetensors(self.files[index], PairError) as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}
            return tensors, json.loads(handle.metadata()[OPTIONS])


def read_picture(path: Path, size: int = 0) -> Tensor:
    """A picture as the host's IMAGE: (1, H, W, 3) in [0, 1], cut around its centre and resized if a size is given.

    Raises:
        PairError: if it cannot be read.
    """
    picture = _opened(path, lambda image: ImageOps.exif_transpose(image).convert("RGB"))
    if size:
        picture = ImageOps.fit(picture, (size, size), Image.LANCZOS)
    return torch.from_numpy(numpy.asarray(picture).copy()).float().unsqueeze(0) / 255


def _encoded(pair: Pair, encoders: Encoders, reading: Reading) -> tuple[dict[str, Tensor], dict[str, Any]]:
    source, target = read_picture(pair.source, reading.size), read_picture(pair.target, reading.size)
    tensors, options = {}, {}
    with torch.no_grad():
        for name, picture in (("source", source), ("target", target)):
            tensors[name] = encoders.vae.encode(picture[..., :3])
        seen = {"images": [source]} if reading.text_sees_source else {}
        for part, text in (("text", pair.instruction), ("silence", "")):
            if part == "silence" and reading.regime == "told":
                continue
            found = encoders.clip.encode_from_tokens(encoders.clip.tokenize(text, **seen), return_dict=True)
            options[part] = {}
            for name, value in found.items():
                _put(tensors, options[part], f"{part}.{name}", name, value, pair)
        if encoders.clip_vision is not None:
            tensors["vision"] = encoders.clip_vision.encode_image(source)["last_hidden_state"]
    return tensors, options


def _put(tensors: dict, options: dict, full: str, name: str, value: Any, pair: Pair) -> None:
    if isinstance(value, Tensor):
        tensors[full] = value
    elif value is None or isinstance(value, (bool, int, float, str)):
        options[name] = value
    else:
        raise PairError(
            f"{pair.where}: this text encoder gives {name} as {type(value).__name__}, which cannot be kept in a file. "
            "Train for this base with the Train HY-WU Generator node."
        )


def _entry(tensors: dict[str, Tensor], options: dict, part: str, reading: Reading) -> list:
    """An entry of the host's CONDITIONING, with the source picture as its reference latent."""
    own = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
    own |= {name: value for name, value in options[part].items() if value is not None}
    own |= {"guidance": reading.guidance} if reading.guidance else {}
    return [own.pop("cond"), own | {"reference_latents": [tensors["source"]]}]


def _identity(pair: Pair, base: str, reading: Reading) -> str:
    """Of everything that decides what the encoders make of a pair; guidance is added later."""
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in (pair.source, pair.target)]
    text = json.dumps([files, pair.instruction, base, *reading._replace(guidance=0.0)])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _list_file(folder: Path) -> Path:
    for name in LISTS:
        if (folder / name).is_file():
            return folder / name
    kind = f"has neither {' nor '.join(LISTS)}" if folder.is_dir() else "is not a folder"
    raise PairError(
        f"{folder} {kind}. Put pictures there, and a pairs.jsonl with one line for each pair: "
        '{"source": "a.png", "target": "a_edited.png", "instruction": "make it warmer"}'
    )


def _rows(file: Path) -> list[tuple[Any, str]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PairError(f"{file} cannot be read as UTF-8 text ({error}).") from None
    if file.suffix == ".csv":
        reader = csv.DictReader(text.splitlines())
        return [(row, f"{file}, line {reader.line_num}") for row in reader]
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append((json.loads(line), f"{file}, line {number}"))
            except ValueError as error:
                raise PairError(f"{file}, line {number}: not valid JSON ({error}).") from None
    return rows


def _pair(folder: Path, values: Any, where: str) -> Pair:
    lacking = [
        n for n in COLUMNS if not isinstance(values, dict) or not isinstance(values.get(n), str) or not values[n]
    ]
    if lacking:
        raise PairError(
            f"{where}: {lacking[0]} is missing or empty. Every pair has {', '.join(COLUMNS)}, all of them text."
        )
    source, target = folder / values["source"], folder / values["target"]
    for path in (source, target):
        if not path.is_file():
            raise PairError(f"{where}: {path} does not exist. Names are relative to {folder}.")
    return Pair(source, target, values["instruction"], where)


def _check_sizes(pair: Pair, size: int) -> None:
    (width, height), (new_width, new_height) = _size(pair.source), _size(pair.target)
    shapes = width / height, new_width / new_height
    if (width, height) == (new_width, new_height) or (size and abs(shapes[0] / shapes[1] - 1) <= SAME_SHAPE):
        return
    raise PairError(
        f"{pair.where}: {pair.source.name} has {width} x {height} pixels, but {pair.target.name} has {new_width} x "
        f"{new_height}. Both pictures of a pair must show the same place: give them one size"
        f"{'' if size else ', or one shape and a size to bring them to (--size)'}."
    )


def _size(path: Path) -> tuple[int, int]:
    turned = 5  # from this EXIF orientation on, width and height are swapped
    return _opened(path, lambda i: i.size[::-1] if i.getexif().get(ORIENTATION, 1) >= turned else i.size)


def _opened(path: Path, use: Callable[[Image.Image], Any]) -> Any:
    try:
        with Image.open(path) as image:
            return use(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what the decoders raise
        raise PairError(f"{path} cannot be read as a picture ({error}). Remove its pair, or save it again.") from None
