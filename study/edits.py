"""Edits with a known right answer, in conflicting pairs, and how one asks for them.

An edit is a function of pictures (B, 3, H, W) in [0, 1]. Neighbours in a suite undo each other, so that no one change of the
weights serves both. In the suite `instance` the right edit also depends on the picture: "balance the exposure" darkens a
bright picture and brightens a dark one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
REFERENCE_SIDE = 32  # pixels; blurs grow with the picture


class Edit(NamedTuple):
    """What is asked for, in several words, and what is right."""

    name: str
    apply: Callable[[Tensor], Tensor]
    wordings: tuple[str, ...]  # all of them are trained on; the first is the one that is tested, unless said otherwise

    def __call__(self, pictures: Tensor) -> Tensor:
        """The edited pictures, in [0, 1]."""
        return self.apply(pictures).clamp(0, 1)


def luma(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)."""
    return (x * x.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)


def gauss(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, sigma in pixels of a picture whose shorter side is 32; borders are mirrored."""
    sigma *= min(x.shape[-2:]) / REFERENCE_SIDE
    reach = min(int(3 * sigma + 0.5), min(x.shape[-2:]) - 1)
    offsets = torch.arange(-reach, reach + 1, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), "reflect"), kernel.unsqueeze(2), groups=x.shape[1])
    return F.conv2d(F.pad(x, (0, 0, reach, reach), "reflect"), kernel.unsqueeze(3), groups=x.shape[1])


def _shift(*amounts: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x + x.new_tensor(amounts).view(3, 1, 1)


def _saturation(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: luma(x) + factor * (x - luma(x))


def _contrast(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: 0.5 + factor * (x - 0.5)


def _radius(x: Tensor) -> Tensor:
    rows, columns = (torch.linspace(-1, 1, n, dtype=x.dtype) for n in x.shape[-2:])
    return (rows.view(-1, 1) ** 2 + columns**2).sqrt() / 2**0.5  # 0 in the centre, 1 in the corners


def _average(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)  # (B, 3, 1, 1)


def _balance(factor: float) -> Callable[[Tensor], Tensor]:
    """Move the average colour towards grey (positive) or away from it."""
    return lambda x: x + factor * (luma(_average(x)) - _average(x))


def _exposure(factor: float) -> Callable[[Tensor], Tensor]:
    """Move the average brightness towards the middle (positive) or away from it."""
    return lambda x: x + factor * (0.5 - luma(_average(x)))


def _warm_side(sign: float) -> Callable[[Tensor], Tensor]:
    """Warm the brighter half, left or right, and cool the other (or the other way round)."""

    def edit(x: Tensor) -> Tensor:
        left, right = luma(x).chunk(2, dim=-1)
        brighter = torch.where(left.mean((2, 3), keepdim=True) > right.mean((2, 3), keepdim=True), 1.0, -1.0)
        side = torch.where(torch.arange(x.shape[-1]) < x.shape[-1] // 2, 1.0, -1.0)
        return x + sign * 0.2 * brighter * side * x.new_tensor((1, 0, -1)).view(3, 1, 1)

    return edit


def _invert_if(dark: bool) -> Callable[[Tensor], Tensor]:
    def edit(x: Tensor) -> Tensor:
        is_dark = luma(_average(x)) < 0.5
        return torch.where(is_dark == dark, 1 - x, x)

    return edit


EIGHT = (
    Edit("brighten", lambda x: 0.45 + 0.55 * x, ("brighten the picture", "make it brighter", "more light please")),
    Edit("darken", lambda x: 0.55 * x, ("darken the picture", "make it darker", "less light please")),
    Edit("warm", _shift(0.2, 0, -0.2), ("make the colours warm", "warmer tones", "add golden warmth")),
    Edit("cool", _shift(-0.2, 0, 0.2), ("make the colours cool", "colder tones", "add icy blue")),
    Edit("saturate", _saturation(2.2), ("saturate the colours", "make it vivid", "more vibrant colours")),
    Edit("desaturate", _saturation(0.05), ("desaturate the colours", "make it gray", "turn it monochrome")),
    Edit("sharpen", lambda x: x + 2 * (x - gauss(x, 1.2)), ("sharpen the picture", "crisper edges", "more detail")),
    Edit("blur", lambda x: gauss(x, 1.6), ("blur the picture", "softer edges", "less detail")),
)
SIXTEEN = (
    *EIGHT,
    Edit("contrast", _contrast(2.0), ("more contrast", "make it punchy", "dramatic contrast")),
    Edit("fade", _contrast(0.4), ("fade the picture", "less contrast", "a matte washed look")),
    Edit("magenta", _shift(0.15, -0.15, 0.15), ("tint it magenta", "shift to purple", "a pink tint")),
    Edit("green", _shift(-0.15, 0.15, -0.15), ("tint it green", "shift to green", "a green tint")),
    Edit("hue-forth", lambda x: x.roll(1, 1), ("rotate the hue right", "cycle the hues up", "turn the hue right")),
    Edit("hue-back", lambda x: x.roll(-1, 1), ("rotate the hue left", "cycle the hues down", "turn the hue left")),
    Edit("vignette", lambda x: x * (1 - 0.9 * _radius(x)), ("add a vignette", "dark corners", "shade the border")),
    Edit("spotlight", lambda x: x * (0.2 + 0.8 * _radius(x)), ("bright corners", "shade the centre", "dim the middle")),
)
INSTANCE = (
    Edit("even", _exposure(1.0), ("balance the exposure", "balance the brightness", "light to the middle")),
    Edit("uneven", _exposure(-1.5), ("push the exposure", "push the brightness", "light from the middle")),
    Edit("neutral", _balance(1.0), ("balance the colours", "natural colours", "remove the dominant tint")),
    Edit("tinted", _balance(-1.5), ("push the main colour", "boost the dominant tint", "more of the main hue")),
    Edit("warm-bright", _warm_side(1), ("warm the bright half", "warm light and cool shadow", "golden bright half")),
    Edit("cool-bright", _warm_side(-1), ("cool the bright half", "cool light and warm shadow", "icy bright half")),
    Edit("invert-dark", _invert_if(True), ("invert the dark photo", "night to day", "make the dark photo negative")),
    Edit(
        "invert-bright",
        _invert_if(False),
        ("invert the bright photo", "day to night", "make the bright photo negative"),
    ),
)
SUITES: dict[str, tuple[Edit, ...]] = {
    "eight": EIGHT,
    "sixteen": SIXTEEN,
    "instance": INSTANCE,
    "all": (*SIXTEEN, *INSTANCE),
}

# What the base itself learns: none of the edits above, so that they are new to it. Told nothing, it copies.
BASE_EDITS = (
    Edit("copy", lambda x: x, ("", "keep the picture", "copy it", "leave the image as it is")),
    Edit("swap", lambda x: x.flip(1), ("swap red and blue", "change red to blue", "red and blue swapped")),
    Edit("mirror", lambda x: x.flip(3), ("mirror the picture", "flip it horizontal", "mirrored left and right")),
    Edit("flip", lambda x: x.flip(2), ("turn it upside down", "flip it vertical", "flipped up and down")),
)


def opposite(suite: tuple[Edit, ...], index: int) -> int:
    """The edit that undoes another."""
    if not 0 <= index < len(suite):
        raise IndexError(f"The suite has {len(suite)} edits, there is no number {index}.")
    return index ^ 1
