"""What is trained on, and in which order.

Order, noise and noise levels depend on nothing but (seed, step, place in the batch). So a resumed run draws what the
uninterrupted one would have drawn, and several processes draw what one would have drawn.

Where pairs have several sizes, those of one size come together, so that a batch can pass through base and generator at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import ConfigError


class Sample(NamedTuple):
    latent: Tensor  # of the edited picture, as the host's VAE gives it: (C, ..., H, W)
    conditioning: Any  # one entry of the host's CONDITIONING: what the base sees, with its reference latents
    condition: Tensor  # what the generator reads: (L, input_dim)
    key: str = ""  # names the sample in errors and logs


class SampleSource(Protocol):
    """Training pairs by index. May compute them on the fly, from the index and the generator of random numbers given."""

    def __len__(self) -> int: ...

    def sample(self, index: int, source: torch.Generator) -> Sample:
        """The pair at an index. `source` is seeded for this draw alone."""


@runtime_checkable
class Sized(Protocol):
    """A `SampleSource` that knows its pairs' sizes without computing them."""

    def sizes(self) -> Sequence[tuple[int, ...]]:
        """Of every pair, in a unit that is the same for all: equal ones have latents of one shape."""


class Draw(NamedTuple):
    """A sample, and the source of its noise."""

    sample: Sample
    source: torch.Generator


def batch_of(
    data: SampleSource, seed: int, step: int, batch: int, share: slice, buckets: Tensor | None = None
) -> list[Draw]:
    """The part `share` of the batch of one step. Every epoch goes through all pairs once, in an order of its own.

    Args:
        buckets: (pairs,) a number for each pair, equal where their sizes are; see `epoch_order`.
    Raises:
        ConfigError: if there are no pairs.
    """
    count = len(data)
    if count < 1:
        raise ConfigError("There are no training pairs. Give at least one picture with its instruction and its edit.")
    draws, orders = [], {}
    for place in range(batch)[share]:
        epoch, position = divmod(step * batch + place, count)
        if epoch not in orders:
            orders[epoch] = epoch_order(seed, epoch, count, batch, buckets)
        source = source_of(seed, step, 1 + place)
        draws.append(Draw(data.sample(int(orders[epoch][position]), source), source))
    return draws


def buckets_of(data: SampleSource) -> Tensor | None:
    """(pairs,) the number of each pair's size, or None where all have one, or it is not known."""
    sizes = list(data.sizes()) if isinstance(data, Sized) else []
    numbers = {size: number for number, size in enumerate(sorted(set(sizes)))}
    return torch.tensor([numbers[size] for size in sizes]) if len(numbers) > 1 else None


def epoch_order(seed: int, epoch: int, count: int, batch: int, buckets: Tensor | None = None) -> Tensor:
    """(count,) the pairs of an epoch, each once.

    With buckets, batches are of one bucket as far as its pairs fill them. What is left over comes last, bucket by bucket, so
    that at most as many batches of an epoch are mixed as there are buckets. The first pairs of an epoch that fill up the last
    batch of the one before are of any bucket.
    """
    order = torch.randperm(count, generator=source_of(seed, epoch, 0))
    if buckets is None:
        return order
    head = -epoch * count % batch
    first, order = order[:head], order[head:]
    mine = buckets[order]
    # the pairs of a bucket in their order, cut into batches: each comes where its last pair is
    places = torch.empty_like(order)
    for number in mine.unique().tolist():
        (own,) = (mine == number).nonzero(as_tuple=True)
        whole = len(own) // batch * batch
        places[own[:whole]] = own[:whole].view(-1, batch)[:, -1:].expand(-1, batch).reshape(-1)
        places[own[whole:]] = count + number
    return torch.cat([first, order[places.argsort(stable=True)]])


def source_of(*numbers: int) -> torch.Generator:
    mixed = 0
    for number in numbers:  # a different stream for every tuple: multiply by a large odd number, add, keep 63 bits
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(mixed)
