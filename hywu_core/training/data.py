"""What is trained on, and in which order.

Order, noise and noise levels depend on nothing but (seed, step, place in the batch). So a resumed run draws what the
uninterrupted one would have drawn, and several processes draw what one would have drawn.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

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


class Draw(NamedTuple):
    """A sample, and the source of its noise."""

    sample: Sample
    source: torch.Generator


def batch_of(data: SampleSource, seed: int, step: int, batch: int, share: slice) -> list[Draw]:
    """The part `share` of the batch of one step. Every epoch goes through all pairs once, in an order of its own.

    Raises:
        ConfigError: if there are no pairs.
    """
    count = len(data)
    if count < 1:
        raise ConfigError("There are no training pairs. Give at least one picture with its instruction and its edit.")
    draws = []
    for place in range(batch)[share]:
        epoch, position = divmod(step * batch + place, count)
        index = int(torch.randperm(count, generator=source_of(seed, epoch, 0))[position])
        source = source_of(seed, step, 1 + place)
        draws.append(Draw(data.sample(index, source), source))
    return draws


def source_of(*numbers: int) -> torch.Generator:
    mixed = 0
    for number in numbers:  # a different stream for every tuple: multiply by a large odd number, add, keep 63 bits
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(mixed)
