"""What a generator has met in training, as its file keeps it, and how far from that a condition is.

A condition's text is described by the least and the largest value of every feature over its tokens: what a rare word puts
into one token shows in them, and the length of the sentence does not. More than WIDTH such numbers are projected onto WIDTH
directions of random signs, which keep distances (Achlioptas 2003, "Database-friendly random projections").

The file holds the descriptions of the conditions that were trained on. How far the nearest other one of them is says how far
a condition may be: a threshold that a new condition like those passes with a probability of FALSE_ALARMS (conformal
prediction; Vovk et al. 2005), or 1 in n + 1 where n is too small for that.

Of the configuration's `hywu.knows`, every entry of it optional:

    width     K, at most WIDTH
    centre    K float32, little-endian, in base64: the mean of the points
    points    N x K bfloat16, little-endian, in base64: the descriptions, without the centre; N at most POINTS
    length    the most tokens of an instruction
    sizes     [[width, height], ...] of the pictures, in pixels, at most SIZES of them
    cell      pixels of a picture along one cell of its latent

N points · K numbers of a point · B batch · L tokens · D features
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import ConfigError

KEY = "knows"
WIDTH, POINTS, SIZES = 128, 256, 32
LEAST = 4  # points from which on a distance says something
SAME = 0.01  # spreads a number that a kept description may be off: it was rounded, and is the same condition's
FALSE_ALARMS = 0.05
FAR = 1.5  # times larger or smaller than all sides that were trained on
TOLD, BLIND = "told", "blind"
LARGEST_SIDE = 2**20


class Points(NamedTuple):
    """Descriptions of conditions that were trained on."""

    values: Tensor  # (N, K) float32

    @property
    def spread(self) -> Tensor:
        """By what every number is divided before distances are taken: its standard deviation, (K,)."""
        spread = self.values.std(0)
        return torch.where(spread > 0, spread, torch.ones_like(spread))

    @property
    def threshold(self) -> float:
        """The distance that a condition like these exceeds with a probability of FALSE_ALARMS."""
        apart = self.distances_of_others(self.values).amin(1).sort().values
        return float(apart[min(len(apart), math.ceil((len(apart) + 1) * (1 - FALSE_ALARMS))) - 1])

    def distances_of_others(self, described: Tensor) -> Tensor:
        """(B, K) -> (B, N): how far each is from every point; infinitely from those that are the same condition."""
        apart = self._apart(described)
        return torch.where(apart <= SAME * math.sqrt(self.values.shape[1]), torch.inf, apart)

    def distances(self, described: Tensor) -> Tensor:
        """How far each of (B, K) is from the nearest point: (B,)."""
        return self._apart(described).amin(1)

    def _apart(self, described: Tensor) -> Tensor:
        return torch.cdist(described.float() / self.spread, self.values / self.spread)


def describe(tokens: Tensor) -> Tensor:
    """(B, L, D) -> (B, K): see the top of this file."""
    tokens = tokens.detach().cpu().float()
    described = torch.cat([tokens.amax(1), tokens.amin(1)], dim=-1)
    width = described.shape[-1]
    return described if width <= WIDTH else described @ _signs(width) / math.sqrt(width)


def gathered(
    hywu: Mapping[str, Any], texts: Iterable[Tensor], sizes: Iterable[Sequence[int]] = (), cell: int = 1
) -> dict[str, Any]:
    """The `hywu` part of a generator that was trained on these conditions, beside what it has met before.

    Args:
        texts: of every condition, or of a sample of them, the tokens (L, D) that carry the instruction.
        sizes: (width, height) of the pictures, in pixels.
        cell: pixels along one cell of their latents.
    """
    before = hywu.get(KEY, {})
    texts = list(texts)
    new = [found for found in (describe(tokens.unsqueeze(0)) for tokens in texts) if torch.isfinite(found).all()]
    length = max((len(tokens) for tokens in texts), default=0)
    known = points(hywu)
    if known and new and known.values.shape[1] == new[0].shape[1]:
        everything = Points(torch.cat([known.values, *new]))
        met_again = everything.distances_of_others(known.values)[:, len(known.values) :].isinf().any(1)
        new = [known.values[~met_again], *new]
    entries = {**before, **(_kept(torch.unique(torch.cat(new), dim=0)) if new else {})}
    if length:
        entries["length"] = max(length, before.get("length", 0))
    seen = sorted({(int(size[0]), int(size[1])) for size in (*before.get("sizes", ()), *sizes)})
    if seen:
        entries |= {"sizes": [list(size) for size in _sample(seen, SIZES)], "cell": int(cell)}
    return {**hywu, **({KEY: entries} if entries else {})}


def points(hywu: Mapping[str, Any]) -> Points | None:
    """What a generator's file keeps of its conditions, if it does."""
    kept = hywu.get(KEY, {})
    if "points" not in kept:
        return None
    centre = torch.frombuffer(bytearray(base64.b64decode(kept["centre"])), dtype=torch.float32)
    values = torch.frombuffer(bytearray(base64.b64decode(kept["points"])), dtype=torch.bfloat16)
    return Points(values.view(-1, kept["width"]).float() + centre)


def reads(hywu: Mapping[str, Any]) -> str | None:
    """TOLD or BLIND: what the base read in training, where the file says it."""
    training = hywu.get("training")
    said = training.get("regime") if isinstance(training, dict) else None
    return said if said in (TOLD, BLIND) else None


def unknown(hywu: Mapping[str, Any], tokens: Tensor) -> bool:
    """Whether a condition's text (B, L, D) is farther from everything trained on than such conditions are from each other;
    False where the file does not say.
    """
    known = points(hywu)
    if known is None or len(known.values) < LEAST:
        return False
    described = describe(tokens)
    if described.shape[1] != known.values.shape[1]:
        return False
    return bool((known.distances(described) > known.threshold).any())


def longer(hywu: Mapping[str, Any], tokens: Tensor) -> bool:
    """Whether a condition's text (B, L, D) is far longer than all that were trained on, as joined ones are."""
    length = hywu.get(KEY, {}).get("length", 0)
    return bool(length) and tokens.shape[1] > FAR * length


def picture_size(hywu: Mapping[str, Any], rows: int, columns: int) -> tuple[int, int]:
    """(width, height) in pixels of a picture whose latent has so many rows and columns."""
    cell = hywu.get(KEY, {}).get("cell", 1)
    return columns * cell, rows * cell


def strange_size(hywu: Mapping[str, Any], size: Sequence[int]) -> bool:
    """Whether a picture (width, height) is far smaller, larger or longer than all that were trained on."""
    sizes = hywu.get(KEY, {}).get("sizes", ())
    if not sizes:
        return False
    shapes = [width / height for width, height in sizes]
    sides = [math.sqrt(width * height) for width, height in sizes]
    return _outside(math.sqrt(size[0] * size[1]), sides) or _outside(size[0] / size[1], shapes)


def check(hywu: Mapping[str, Any]) -> None:
    """Raises:
    ConfigError: for entries that are not what this file says.
    """
    kept = hywu.get(KEY, {})
    if not isinstance(kept, dict):
        raise ConfigError(f"hywu.{KEY} must be an object.")
    sizes = kept.get("sizes", [])
    if not isinstance(sizes, (list, tuple)) or len(sizes) > SIZES or not all(map(_is_size, sizes)):
        raise ConfigError(f"hywu.{KEY}.sizes must be at most {SIZES} pairs of sides in pixels.")
    for name in ("cell", "length"):
        if name in kept and not _is_size((kept[name], 1)):
            raise ConfigError(f"hywu.{KEY}.{name} must be a whole number from 1 to {LARGEST_SIDE:,}.")
    if not {"width", "centre", "points"} & kept.keys():
        return
    width = kept.get("width")
    if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= WIDTH:
        raise ConfigError(f"hywu.{KEY}.width must be a whole number from 1 to {WIDTH}.")
    centre = _numbers(kept.get("centre"), "centre", torch.float32, 1, width)
    values = _numbers(kept.get("points"), "points", torch.bfloat16, POINTS, width)
    if len(centre) != 1 or not torch.isfinite(centre).all() or not torch.isfinite(values).all():
        raise ConfigError(f"hywu.{KEY} must hold finite numbers.")


def _numbers(text: Any, name: str, dtype: torch.dtype, most: int, width: int) -> Tensor:
    row = width * dtype.itemsize
    try:
        if not isinstance(text, str) or len(text) > 4 * (most * row + 2) // 3 + 4:
            raise ValueError
        data = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raise ConfigError(f"hywu.{KEY}.{name} must be at most {most} rows of {width} numbers, in base64.") from None
    if not data or len(data) % row or len(data) > most * row:
        raise ConfigError(f"hywu.{KEY}.{name} must be at most {most} rows of {width} numbers, in base64.")
    return torch.frombuffer(bytearray(data), dtype=dtype).view(-1, width)


def _is_size(size: Any) -> bool:
    whole = isinstance(size, (list, tuple)) and len(size) == 2 and all(type(side) is int for side in size)
    return whole and all(0 < side <= LARGEST_SIDE for side in size)


def _kept(values: Tensor) -> dict[str, Any]:
    values = torch.stack(_sample(list(values), POINTS))
    centre = values.mean(0)
    rest = (values - centre).bfloat16().contiguous()
    return {
        "width": values.shape[1],
        "centre": base64.b64encode(centre.numpy().tobytes()).decode(),
        "points": base64.b64encode(rest.view(torch.int16).numpy().tobytes()).decode(),
    }


def _sample(values: list, most: int) -> list:
    """At most so many of them, evenly chosen."""
    return values if len(values) <= most else [values[place * len(values) // most] for place in range(most)]


def _outside(value: float, known: Sequence[float]) -> bool:
    return not min(known) / FAR <= value <= max(known) * FAR


def _signs(width: int) -> Tensor:
    """(width, WIDTH) of 1 and -1, the same everywhere."""
    bits = hashlib.shake_256(b"hywu.knows").digest(width * WIDTH // 8)
    bytes_ = torch.frombuffer(bytearray(bits), dtype=torch.uint8)
    ones = bytes_.unsqueeze(1).bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and(1)
    return ones.view(width, WIDTH).float() * 2 - 1
