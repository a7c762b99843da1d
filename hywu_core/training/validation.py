"""The loss on pairs that are not trained on, with the same noise every time, so that only the generator makes it move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .data import SampleSource, batch_of
from .trainer import Trainer


def validation_loss(
    trainer: Trainer, held_out: SampleSource, limit: int, seed: int = 0, base_alone: bool = False
) -> float:
    """Mean loss over at most `limit` held-out pairs, always the same ones, shared out among the processes. Averaged weights
    are used where the run has them. `base_alone`: the base's own loss on the same pairs and noise.

    The trainer's objective must have `evaluate(lora, draws)`, as `hywu_core.host.training.DiffusionObjective` does.
    """
    communication, count = trainer.communication, min(limit, len(held_out))
    first, last = (count * rank // communication.processes for rank in (communication.rank, communication.rank + 1))
    size = trainer.config.micro_batch or max(1, trainer.config.batch // communication.processes)
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad(), averaged_weights(trainer):
        for start in range(first, last, size):
            trainer.between()
            draws = batch_of(held_out, seed, 0, count, slice(start, min(start + size, last)))
            lora = None if base_alone else trainer.lora([draw.sample for draw in draws])
            total += trainer.objective.evaluate(lora, draws).double().sum()
    communication.average([total])  # a mean of sums: times the processes it is the sum
    return float(total) * communication.processes / count


def base_loss(trainer: Trainer, step: int) -> float:
    """The base's own loss on the pairs and noise of one step."""
    draws, total = trainer.draws(step), torch.zeros((), dtype=torch.float64)
    size = trainer.config.micro_batch or len(draws)
    for start in range(0, len(draws), size):
        trainer.between()
        total += trainer.objective.evaluate(None, draws[start : start + size]).double().sum()
    found = total / len(draws)
    trainer.communication.average([found])
    return float(found)


@contextmanager
def averaged_weights(trainer: Trainer) -> Iterator[None]:
    """The run's averaged weights in the parameters' place, for the time of the block."""
    kept = {name: trainer.parameters[name].detach().clone() for name in trainer.averaged}
    try:
        _copy(trainer, trainer.averaged)
        yield
    finally:
        _copy(trainer, kept)


def _copy(trainer: Trainer, values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            trainer.parameters[name].copy_(value)
