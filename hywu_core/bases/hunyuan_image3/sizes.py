"""The sizes of pictures: 37 buckets of a base size, how a request chooses one, and how a source picture is brought to one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import comfy.utils
from torch import Tensor

from ...errors import ConditionError

EXTRA = ((1024, 768), (1280, 720), (768, 1024), (720, 1280))  # appended, whatever the base size
AUTO = "auto"
NEAR_ENOUGH = 0.01  # difference of two ratios


class Size(NamedTuple):
    height: int
    width: int

    @property
    def ratio(self) -> float:
        """Height over width."""
        return self.height / self.width


def buckets(base: int) -> tuple[Size, ...]:
    """The sizes that the model knows, in the order of its ratio tokens: h/w rising, then four that were added later."""
    step = base // 16
    short, long = base // 2, base * 2
    sizes = {Size(base, base)}
    height, width = base, base
    while (height, width) != (long, short):  # towards portrait, one side moving at a time once the other has stopped
        height, width = min(height + step, long), max(width - step, short)
        sizes |= {Size(height, width), Size(width, height)}
    ordered = sorted(sizes, key=lambda size: size.ratio)
    return (*ordered, *(Size(*extra) for extra in EXTRA if extra not in sizes))


def nearest(size: Size, base: int) -> int:
    """Index of the bucket whose ratio is nearest; of equals, the first."""
    distances = [abs(bucket.ratio - size.ratio) for bucket in buckets(base)]
    return distances.index(min(distances))


def parse_size(text: str, base: int) -> int | None:
    """Index of the bucket that a request stands for, or None for "auto".

    Args:
        text: "auto", "HxW" in pixels, "W:H" as a ratio, or "<img_ratio_i>" as the model names it.
    Raises:
        ConditionError: for anything else.
    """
    text = text.strip().lower()
    if text == AUTO:
        return None
    if found := re.fullmatch(r"<img_ratio_(\d+)>", text):
        index = int(found[1])
        if index < len(buckets(base)):
            return index
    elif (found := re.fullmatch(r"(\d+)\s*x\s*(\d+)", text)) and int(found[1]) and int(found[2]):
        return nearest(Size(int(found[1]), int(found[2])), base)
    elif (found := re.fullmatch(r"(\d+)\s*:\s*(\d+)", text)) and int(found[1]) and int(found[2]):
        return nearest(Size(int(found[2]), int(found[1])), base)
    raise ConditionError(
        f"{text!r} is no size. Write auto, height x width in pixels (1024x768), width : height as a ratio (3:4), or "
        f"<img_ratio_0> to <img_ratio_{len(buckets(base)) - 1}>."
    )


def fit(picture: Tensor, size: Size, stretch: bool = False) -> Tensor:
    """Bring a picture (B, H, W, C) in [0, 1] to a size: cover and crop around the centre, or stretch.

    As the reference: 8-bit pixels, Pillow's Lanczos, and Python's rounding of the covering size and of the crop.
    """
    height, width = picture.shape[1:3]
    covering = size
    if not stretch and height / width < size.ratio:
        covering = Size(size.height, round(size.height / height * width))
    elif not stretch:
        covering = Size(round(size.width / width * height), size.width)
    if covering != (height, width):
        picture = resize(picture, covering)
    top, left = (round((have - want) / 2) for have, want in zip(covering, size, strict=True))
    return picture[:, top : top + size.height, left : left + size.width]


def aligned_size(output: Size, sources: Iterable[Size], base: int) -> Size:
    """The size that an output of automatic size is brought to: the ratio of the first source picture that has its bucket, at
    the base's area, or the output's own where that is near enough.
    """
    index = nearest(output, base)
    for source in sources:
        if nearest(source, base) != index:
            continue
        if abs(source.ratio - buckets(base)[index].ratio) < NEAR_ENOUGH:
            return output
        scale = math.sqrt(base * base / (source.width * source.height))
        return Size(round(source.height * scale), round(source.width * scale))
    return output


def resize(picture: Tensor, size: Size) -> Tensor:
    """A picture (B, H, W, C) in [0, 1] by Pillow's Lanczos on 8-bit pixels."""
    steps = (
        picture + 0.25 / 255
    )  # the host truncates to 8 bits, and what was computed with may lie just below its level
    return comfy.utils.lanczos(steps.movedim(-1, 1), size.width, size.height).movedim(1, -1)
