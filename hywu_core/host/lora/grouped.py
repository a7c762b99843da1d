"""Rows that are sorted by expert: how many each expert has, and products with one matrix for each.

Letters: B samples of a batch · L tokens of each · k experts of a token · E experts · R rank · rows = B * L * k
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import comfy.model_management
import torch
import torch.nn.functional as F
from torch import Tensor

# compute capabilities for which torch has a kernel; elsewhere its own loop waits for the device
FAST_GROUPED = (9, 10)


class Routing:
    """Which rows an expert has: they are sorted by expert, and for each expert by sample.

    Args:
        sizes: (E, B) rows of each expert and sample, where the rows are.
        order: (rows,) which of the B * L * k choices each row is.
        first: number of the first of these experts in its bank.
        counts: the sizes, if they are known here.
    """

    def __init__(self, sizes: Tensor, order: Tensor, first: int = 0, counts: list[list[int]] | None = None):
        self.sizes, self.order, self.first = sizes, order, first
        self._counts = counts

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> Routing:
        """Of chosen experts (B, L, k). Sorts once; does not wait for the device."""
        samples = torch.arange(chosen.shape[0], device=chosen.device).view(-1, 1, 1)
        places = (chosen * chosen.shape[0] + samples).flatten()
        sizes = places.new_zeros(experts * chosen.shape[0]).scatter_add_(0, places, torch.ones_like(places))
        return cls(sizes.view(experts, -1), places.argsort(stable=True))

    @property
    def counts(self) -> list[list[int]]:
        """The sizes. The first question waits for the device, so it is to be asked before there is much work on it."""
        if self._counts is None:
            self._counts = self.sizes.cpu().tolist()
        return self._counts

    def wait(self) -> None:
        """Wait for the counts."""
        _ = self.counts

    @property
    def offsets(self) -> Tensor:
        """(E,) where each expert's rows end, where the rows are."""
        return self.sizes.sum(1).cumsum(0).to(torch.int32)

    def parts(self) -> Iterator[tuple[int, slice]]:
        """(expert, its rows) of those that have some."""
        start = 0
        for expert, samples in enumerate(self.counts, start=self.first):
            stop = start + sum(samples)
            if stop > start:
                yield expert, slice(start, stop)
            start = stop

    def parts_of_samples(self) -> Iterator[tuple[int, int, slice]]:
        """(expert, sample, their rows) of those that have some."""
        start = 0
        for expert, samples in enumerate(self.counts, start=self.first):
            for sample, count in enumerate(samples):
                if count:
                    yield expert, sample, slice(start, start + count)
                start += count

    def chunks(self, most: int) -> Iterator[Routing]:
        """The rows in about equal pieces of about `most` rows at most. An expert's rows stay together."""
        total = self.order.shape[0]
        if total <= most:
            yield self
            return
        pieces = -(-total // most)
        first = start = stop = closed = 0
        for last, samples in enumerate(self.counts, start=1):
            stop += sum(samples)
            if stop * pieces >= total * (closed + 1):
                yield Routing(
                    self.sizes[first:last], self.order[start:stop], self.first + first, self.counts[first:last]
                )
                first, start, closed = last, stop, stop * pieces // total


def grouped_is_fast(x: Tensor) -> bool:
    """Whether torch multiplies rows of this kind with all experts at once, without waiting for their numbers."""
    management = comfy.model_management
    nvidia = management.is_nvidia() and management.is_device_cuda(x.device)
    if x.dtype is not torch.bfloat16 or not nvidia or sys.platform != "linux":
        return False
    return torch.get_device_module(x.device).get_device_capability(x.device)[0] in FAST_GROUPED


def grouped_linear(x: Tensor, weight: Tensor, routing: Routing) -> Tensor:
    """x (rows, in), weight (E of the whole bank, out, in) -> (rows, out), by torch's kernel."""
    own = weight[routing.first : routing.first + len(routing.sizes)]
    return F.grouped_mm(x, own.mT, offs=routing.offsets)


def add_low_rank(y: Tensor, x: Tensor, down: Tensor, up: Tensor, routing: Routing) -> Tensor:
    """y + (x . A^T) . B^T in place: y (rows, out), x (rows, in), down (E, R, in), up (E, out, R)."""
    if grouped_is_fast(x):
        return y.add_(grouped_linear(grouped_linear(x, down, routing), up, routing))
    for expert, part in routing.parts():
        y[part].addmm_(x[part] @ down[expert].mT, up[expert].mT)
    return y
