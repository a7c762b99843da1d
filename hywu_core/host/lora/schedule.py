"""When in the sampling a LoRA acts, and how strongly."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from ...errors import MatchError

HALVINGS = 40  # of the sampling, to find how far it is: finer than any sampler's steps


class Curve(Protocol):
    """The host's CURVE."""

    @property
    def points(self) -> list[tuple[float, float]]: ...

    def interp(self, x: float) -> float:
        """Its value at x in [0, 1]."""


class Schedule(NamedTuple):
    """A part of the sampling, and a curve over all of it.

    Args:
        start, end: fractions of the sampling between which a LoRA acts.
        curve: what its strength is multiplied by, over the fraction of the sampling that is done.
    """

    start: float = 0.0
    end: float = 1.0
    curve: Curve | None = None

    @property
    def whole(self) -> bool:
        """Whether a LoRA acts all the time, always as strongly."""
        return self.start <= 0 and self.end >= 1 and self.curve is None

    def check(self) -> Schedule:
        """Raises:
        MatchError: if a LoRA would never act, or the curve has no points.
        """
        if self.start > self.end:
            raise MatchError(
                f"The LoRA would start at {self.start:g} of the sampling and end at {self.end:g}, so it would never act. "
                "Make the start smaller than the end."
            )
        if self.curve is not None and not self.curve.points:
            raise MatchError("The curve has no points. Give it some, or take it away.")
        return self

    def share(self, model_sampling: Any, sigma: torch.Tensor) -> float:
        """What a LoRA's strength is multiplied by at this noise level; 0: it does not act."""
        if self.whole:
            return 1.0
        now = float(sigma.max())
        if not model_sampling.percent_to_sigma(self.end) <= now <= model_sampling.percent_to_sigma(self.start):
            return 0.0
        return 1.0 if self.curve is None else float(self.curve.interp(done_of(model_sampling, now)))


def done_of(model_sampling: Any, sigma: float) -> float:
    """The fraction of the sampling that is done at a noise level: where the host's percent_to_sigma gives it."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if model_sampling.percent_to_sigma(middle) > sigma:
            low = middle
        else:
            high = middle
    return high
