"""Shapes of about equal area, so that pictures of several shapes train in one run with little of them cut off."""

from __future__ import annotations

import math
from functools import cache

STEP = 64  # pixels: sides are multiples of this, or of an eighth of the size where that is less
LONGEST = 2.0  # sides are at most so many times each other


@cache
def shapes(size: int) -> tuple[tuple[int, int], ...]:
    """(width, height) of all shapes with at most `size` x `size` pixels, the tallest first. Every width has the largest
    height that fits.
    """
    step = max(1, min(STEP, size // 8))
    found = []
    for width in range(step, int(size * math.sqrt(LONGEST)) + step, step):
        height = size * size // width // step * step
        if height and max(width, height) <= LONGEST * min(width, height):
            found.append((width, height))
    return tuple(found)


def nearest(size: int, width: int, height: int) -> tuple[int, int]:
    """The shape of which a picture loses least."""
    return min(shapes(size), key=lambda shape: abs(math.log(shape[0] * height / (shape[1] * width))))
