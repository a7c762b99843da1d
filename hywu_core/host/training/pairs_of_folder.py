"""Training pairs from a folder: pictures before and after an edit, and the instruction that asks for it.

`pair_lists` says which. Every picture and every instruction is encoded by the host's VAE and text encoder once and kept in a
file named by its content, so that neither is needed while the base trains, nor when a run goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...condition import Condition, assemble
from ...config import GeneratorConfig
from ...files.safetensors import open_safetensors, write_safetensors
from ...lora import finite
from ...training.data import Sample
from .. import pictures
from ..conditions import from_host
from .buckets import nearest
from .pair_lists import PairError, Row, refuse, rows_of

SAME_SHAPE = 0.01  # relative difference of aspect ratios up to which pictures are cut to one size
OPTIONS = "options"  # of a kept file's metadata: what a CONDITIONING holds beside tensors
SOURCE, TARGET, TEXT = "source", "target", "text"  # what kept files hold, the first word of their names
SILENCE = "silence"  # the text of nothing, where the base is not told the instruction
LATENT, VISION = "latent", "vision"  # tensors in those of pictures


class Pair(NamedTuple):
    """A picture, what is asked for, and what is right."""

    source: Path
    target: Path
    instruction: str
    where: str  # file and line that name it
    others: tuple[str, ...]  # further wordings of the instruction
    source_digest: str  # of the file's bytes
    target_digest: str
    size: tuple[int, int]  # width and height of the source picture, in pixels

    @property
    def key(self) -> str:
        """A short name for errors and logs."""
        return f"{self.source.name} -> {self.target.name}"

    @property
    def wordings(self) -> tuple[str, ...]:
        """Every way in which it is asked for."""
        return self.instruction, *self.others


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
    background: str = pictures.BACKGROUND  # colour under transparent pixels
    buckets: bool = False  # with a size: cut to shapes of about so many pixels instead of squares
    caption_dropout: float = 0.0  # share of the draws in which the base is not told; the generator always is

    def size_of(self, pair: Pair) -> tuple[int, int]:
        """(width, height) to which both pictures of a pair are brought."""
        if not self.size:
            return pair.size
        return nearest(self.size, *pair.size) if self.buckets else (self.size, self.size)


def read_pairs(folder: Path, size: int = 0, background: str = pictures.BACKGROUND) -> list[Pair]:
    """All pairs of a folder, every picture looked at.

    Args:
        size, background: see `Reading`; without a size, both pictures of a pair must have one size.
    Raises:
        PairError: naming file and line of every pair that cannot be used, or for fewer than two.
        ConfigError: for a background that is no colour.
    """
    pictures.colour(background)
    rows, problems = rows_of(folder)
    facts: dict[Path, pictures.Facts] = {}
    pairs = []
    for row in rows:
        problem = _problem(row, facts, size)
        if problem:
            problems.append(problem)
        else:
            pairs.append(_pair(row, facts[row.source], facts[row.target]))
    refuse(problems)
    if len(pairs) < 2:
        raise PairError(
            f"{folder} names {'one pair' if pairs else 'no pairs'}. A generator learns what tells edits apart, so it needs "
            "at least two, and hundreds to be useful. Add more."
        )
    transparent = sum(fact.transparent for fact in facts.values())
    if transparent:
        logging.warning("%d pictures with transparency are laid over %s (background).", transparent, background)
    return pairs


def hold_out(pairs: Sequence[Pair], share: float) -> tuple[list[Pair], list[Pair]]:
    """(for training, for validation). Whole source pictures are held out, always the same ones, whatever else is added.

    A picture that is there under several names is one.
    """
    names: dict[str, str] = {}
    for pair in sorted(pairs, key=lambda pair: pair.source.name):
        names.setdefault(pair.source_digest, hashlib.sha256(pair.source.name.encode()).hexdigest())
    order = sorted(names, key=lambda digest: (names[digest], digest))
    chosen = set(order[: min(len(order) - 1, max(1, round(share * len(order))))]) if share else set()
    return [p for p in pairs if p.source_digest not in chosen], [p for p in pairs if p.source_digest in chosen]


def fingerprint(pairs: Sequence[Pair]) -> str:
    """Of the pictures' bytes and the instructions, in their order: what decides which pair a step of a run sees."""
    return _digest([[pair.source_digest, pair.target_digest, *pair.wordings] for pair in pairs])[:16]


class EncodedPairs:
    """Pairs as training data, each read from its files when it is its turn. See `hywu_core.training.SampleSource`.

    Args:
        kept: folder of what is encoded.
        base: tells apart what other encoders made of the same pictures.
    """

    config: GeneratorConfig  # of the generator that reads the conditions; needed for `sample`

    def __init__(self, pairs: Sequence[Pair], kept: Path, base: str, reading: Reading):
        self.pairs, self.kept, self.base, self.reading = list(pairs), kept, base, reading

    def __len__(self) -> int:
        return len(self.pairs)

    def sizes(self) -> list[tuple[int, int]]:
        """See `hywu_core.training.data.Sized`: in pixels."""
        return [self.reading.size_of(pair) for pair in self.pairs]

    def missing(self) -> list[int]:
        """Indices of the pairs of which something is not encoded yet."""
        there = {path.name for path in self.kept.glob("*.safetensors")}
        return [
            index
            for index, pair in enumerate(self.pairs)
            if not {path.name for path in (*self._latents(pair), *self._texts(pair).values())} <= there
        ]

    def encode(self, indices: Sequence[int], encoders: Encoders, progress: Callable[[int, int], None]) -> None:
        """Encode what is missing of pairs and keep it.

        Raises:
            PairError: for pictures that are too small for the VAE, or one that cannot be read or encoded.
            SaveError: if there is no room.
        """
        _refuse_small(self.pairs, encoders.vae, self.reading)
        for done, index in enumerate(indices):
            self._encode(self.pairs[index], encoders)
            progress(done + 1, len(indices))

    def sample(self, index: int, source: torch.Generator) -> Sample:
        """The pair at an index. Drawn are the wording, where there are several, and whether the base is told."""
        pair, (tensors, options) = self.pairs[index], self._kept(index)
        wording = TEXT
        if pair.others:
            wording = _wording(int(torch.randint(len(pair.wordings), (), generator=source)))
        dropped = self.reading.caption_dropout
        told = self.reading.regime != "blind"
        if told and dropped:
            told = float(torch.rand((), generator=source)) >= dropped
        entry = _entry(tensors, options, wording if told else SILENCE, self.reading)
        condition = assemble(self._condition(tensors, options, wording), self.config)[0]
        return Sample(tensors[TARGET][0], entry, condition, pair.key)

    def sources(self, count: int) -> list[tuple[Tensor, Tensor | None, Any]]:
        """(latent, pixels where the text encoder sees them, what a vision model gave) of at most so many source pictures."""
        first = {pair.source_digest: index for index, pair in reversed(list(enumerate(self.pairs)))}
        found = []
        for index in sorted(first.values())[:count]:
            pair, (tensors, _) = self.pairs[index], self._kept(index)
            pixels = _picture(pair.source, pair, self.reading) if self.reading.text_sees_source else None
            vision = {"last_hidden_state": tensors[VISION]} if VISION in tensors else None
            found.append((tensors[SOURCE], pixels, vision))
        return found

    def entries(self, index: int) -> tuple[dict[str, Tensor], list, list]:
        """(LATENT of the edited picture, CONDITIONING that the base reads, CONDITIONING that a generator reads)."""
        tensors, options = self._kept(index)
        silent = SILENCE if self.reading.regime == "blind" else TEXT
        told, read = (_entry(tensors, options, part, self.reading) for part in (silent, TEXT))
        return {"samples": tensors[TARGET]}, [told], [read]

    def condition(self, index: int) -> Condition:
        """What there is for a generator to read."""
        return self._condition(*self._kept(index))

    def _condition(self, tensors: dict[str, Tensor], options: dict[str, Any], wording: str = TEXT) -> Condition:
        vision = {"last_hidden_state": tensors[VISION]} if VISION in tensors else None
        return from_host([_entry(tensors, options, wording, self.reading)], vision)

    def _latents(self, pair: Pair) -> tuple[Path, Path]:
        return self._file(pair, SOURCE, pair.source_digest), self._file(pair, TARGET, pair.target_digest)

    def _texts(self, pair: Pair) -> dict[str, Path]:
        """{part: file}: one for each instruction, unless the encoder sees the picture as well."""
        seen = [pair.source_digest] if self.reading.text_sees_source else []
        return {part: self._file(pair, TEXT, text, *seen) for part, text in self._words(pair).items()}

    def _words(self, pair: Pair) -> dict[str, str]:
        """{part: text}."""
        words = {_wording(number): text for number, text in enumerate(pair.wordings)}
        silent = self.reading.regime == "blind" or self.reading.caption_dropout
        return words | ({SILENCE: ""} if silent else {})

    def _file(self, pair: Pair, kind: str, *content: str) -> Path:
        looks = kind != TEXT or self.reading.text_sees_source
        size = self.reading.size_of(pair) if self.reading.buckets else self.reading.size
        how = [size, self.reading.background] if looks else []
        return self.kept / f"{kind}-{_digest([self.base, *how, *content])[:24]}.safetensors"

    def _encode(self, pair: Pair, encoders: Encoders) -> None:
        source, target = self._latents(pair)
        with torch.no_grad():
            if not source.exists():
                picture = _picture(pair.source, pair, self.reading)
                tensors = {LATENT: _latent(encoders.vae, picture, pair.source, pair)}
                if encoders.clip_vision is not None:
                    tensors[VISION] = encoders.clip_vision.encode_image(picture)["last_hidden_state"]
                write_safetensors(source, tensors)
            if not target.exists():
                picture = _picture(pair.target, pair, self.reading)
                write_safetensors(target, {LATENT: _latent(encoders.vae, picture, pair.target, pair)})
            words = self._words(pair)
            for part, file in self._texts(pair).items():
                if not file.exists():
                    sees = self.reading.text_sees_source
                    shown = {"images": [_picture(pair.source, pair, self.reading)]} if sees else {}
                    tokens = encoders.clip.tokenize(words[part], **shown)
                    tensors, options = _split(encoders.clip.encode_from_tokens(tokens, return_dict=True), pair)
                    write_safetensors(file, tensors, {OPTIONS: json.dumps(options)})

    def _kept(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """({"source", "target", "vision", "<part>.<name>": tensor}, {part: what else its CONDITIONING holds})."""
        pair = self.pairs[index]
        (source, _), (target, _) = (_read(file) for file in self._latents(pair))
        tensors, options = {SOURCE: source.pop(LATENT), TARGET: target[LATENT]} | source, {}
        for part, file in self._texts(pair).items():
            found, options[part] = _read(file)
            tensors |= {f"{part}.{name}": tensor for name, tensor in found.items()}
        return tensors, options


def _problem(row: Row, facts: dict[Path, pictures.Facts], size: int) -> str:
    """What is wrong with a pair's pictures; what is found about them is kept in `facts`."""
    for path in (row.source, row.target):
        if path not in facts:
            try:
                facts[path] = pictures.look(path)
            except pictures.PictureError as error:
                return f"{row.where}: {error}"
    before, after = facts[row.source], facts[row.target]
    shapes = before.width / before.height, after.width / after.height
    same = (before.width, before.height) == (after.width, after.height)
    if same or (size and abs(shapes[0] / shapes[1] - 1) <= SAME_SHAPE):
        return ""
    return (
        f"{row.where}: {row.source.name} has {before.width} x {before.height} pixels, but {row.target.name} has "
        f"{after.width} x {after.height}. Both pictures of a pair must show the same place: give them one size"
        f"{'' if size else ', or one shape and a size to bring them to (size)'}."
    )


def _pair(row: Row, before: pictures.Facts, after: pictures.Facts) -> Pair:
    return Pair(*row, before.digest, after.digest, (before.width, before.height))


def _wording(number: int) -> str:
    """The part of a pair's tensors that one of its wordings is."""
    return f"{TEXT}{number or ''}"


def _refuse_small(pairs: Sequence[Pair], vae: Any, reading: Reading) -> None:
    sides = [min(reading.size_of(pair)) for pair in pairs]
    probe = torch.zeros(1, 1, 1, 3)
    nothing = {side for side in set(sides) if not vae.vae_encode_crop_pixels(probe.expand(1, side, side, 3)).numel()}
    if nothing and reading.size:
        raise PairError(
            f"size {reading.size} brings pictures to {max(nothing)} pixels, of which this base's VAE makes an empty latent. "
            "Give a larger size."
        )
    refuse(
        [
            f"{pair.where}: a picture is only {side} pixels wide or high, too few for this base's VAE. "
            "Use a larger picture, or remove the pair."
            for pair, side in zip(pairs, sides, strict=True)
            if side in nothing
        ]
    )


def _picture(path: Path, pair: Pair, reading: Reading) -> Tensor:
    try:
        return pictures.read(path, reading.size_of(pair) if reading.size else 0, reading.background)
    except pictures.PictureError as error:
        raise PairError(f"{pair.where}: {error}") from None


def _latent(vae: Any, picture: Tensor, path: Path, pair: Pair) -> Tensor:
    latent = vae.encode(picture)
    if not latent.numel() or not finite(latent):
        raise PairError(
            f"{pair.where}: the VAE makes {'nothing' if not latent.numel() else 'NaN or infinity'} of {path}. "
            "Use another picture, or a VAE in float32."
        )
    return latent


def _split(found: dict[str, Any], pair: Pair) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a text encoder gives as (tensors, options that JSON holds)."""
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    options = {name: value for name, value in found.items() if name not in tensors}
    for name, value in options.items():
        if not (value is None or isinstance(value, (bool, int, float, str))):
            raise PairError(
                f"{pair.where}: this text encoder gives {name} as {type(value).__name__}, which cannot be kept in a file. "
                "Train for this base with the Train HY-WU Generator node."
            )
    return tensors, options


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with open_safetensors(file, PairError) as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}
        return tensors, json.loads((handle.metadata() or {}).get(OPTIONS, "{}"))


def _entry(tensors: dict[str, Tensor], options: dict, part: str, reading: Reading) -> list:
    """An entry of the host's CONDITIONING, with the source picture as its reference latent."""
    own = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
    own |= {name: value for name, value in options[part].items() if value is not None}
    own |= {"guidance": reading.guidance} if reading.guidance else {}
    return [own.pop("cond"), own | {"reference_latents": [tensors[SOURCE]]}]


def _digest(content: list) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
