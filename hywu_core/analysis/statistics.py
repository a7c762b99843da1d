"""Paired comparisons with intervals."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 10_000


class Interval(NamedTuple):
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def bootstrap(values: Tensor, seed: int = 0) -> Interval:
    """The mean of values and how far it can be trusted.

    Args:
        values: (N,) of one run, or (seeds, N) of several on the same N items. Items are resampled and, with several runs, the
            runs too, so that neither the choice of pictures nor that of the seed is taken for certain.
    """
    values = values.double().reshape(-1, values.shape[-1])
    source = torch.Generator().manual_seed(seed)
    runs, items = values.shape
    chosen_items = torch.randint(items, (RESAMPLES, items), generator=source)
    if runs == 1:
        means = values[0][chosen_items].mean(1)
    else:
        chosen_runs = torch.randint(runs, (RESAMPLES, runs), generator=source)
        by_run = torch.stack([run[chosen_items].mean(1) for run in values], dim=1)  # (RESAMPLES, runs)
        means = by_run.gather(1, chosen_runs).mean(1)
    low, high = torch.quantile(means, means.new_tensor([0.025, 0.975])).tolist()
    return Interval(float(values.mean()), low, high)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures (B, ...) in [0, 1]: (B,). Equal pictures give 100 dB."""
    error = (a - b).double().square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()
