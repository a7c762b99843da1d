"""One run on several devices or machines, through Hugging Face accelerate: an extra, imported only when it is used."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..errors import HywuError
from .trainer import Trainer

BUCKET = 2**25  # elements sent at once: few large messages are much faster than one for each tensor


class Accelerated:
    """The processes that `accelerate launch` started; one process if it started none. See `trainer.Communication`.

    Args:
        cpu: keep to the CPU, whatever the machine has.
    Raises:
        HywuError: if accelerate is not installed.
    """

    def __init__(self, cpu: bool = False):
        self._accelerate = _import_accelerate()
        state = self._accelerate.PartialState(cpu=cpu)
        self.rank, self.processes, self.device = state.process_index, state.num_processes, state.device
        self.local_rank = max(0, state.local_process_index)  # among the processes of this machine
        self.local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", self.processes)) if self.processes > 1 else 1
        self._state = state

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over the processes, in place."""
        self._exchange(tensors, lambda flat: self._accelerate.utils.reduce(flat, "mean"))

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by that of the first process, in place."""
        self._exchange(tensors, self._accelerate.utils.broadcast)

    def wait(self) -> None:
        """Until all processes are here."""
        self._state.wait_for_everyone()

    def close(self) -> None:
        """Leave the other processes."""
        if self.processes > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def _exchange(self, tensors: Sequence[Tensor], send: Callable[[Tensor], Tensor]) -> None:
        if self.processes == 1:
            return
        with torch.no_grad():
            for bucket in buckets(tensors):
                sent = send(_flat(bucket, self.device))
                for tensor, part in zip(bucket, sent.split([t.numel() for t in bucket]), strict=True):
                    tensor.copy_(part.view_as(tensor))


def buckets(tensors: Sequence[Tensor], elements: int = BUCKET) -> Iterator[list[Tensor]]:
    """Tensors in order, in groups of at most that many elements; a larger tensor is a group of its own."""
    group: list[Tensor] = []
    for tensor in tensors:
        if group and sum(t.numel() for t in group) + tensor.numel() > elements:
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


def share_state(trainer: Trainer, communication: Accelerated) -> None:
    """Have all processes start from the first one's parameters, optimizer and progress: only that one needs the file."""
    done = torch.tensor(float(trainer.done), dtype=torch.float64)
    communication.broadcast([done])
    trainer.done = int(done)
    communication.broadcast(list(chain(trainer.parameters.values(), trainer.averaged.values())))
    if not trainer.done:
        return
    for parameter in trainer.parameters.values():
        state = trainer.optimizer.state[parameter]
        for moment in ("exp_avg", "exp_avg_sq"):
            state.setdefault(moment, torch.zeros_like(parameter))
        state["step"] = torch.tensor(float(trainer.done))
        communication.broadcast([state["exp_avg"], state["exp_avg_sq"]])


def _flat(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """One vector. Half precision is sent as float32, so that a mean over many processes loses nothing."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return torch.cat([t.detach().reshape(-1).to(device, dtype) for t in tensors])


def _import_accelerate() -> Any:
    try:
        import accelerate
        import accelerate.utils
    except ImportError:
        raise HywuError(
            "Training outside the server needs Hugging Face accelerate, which is not installed. Run: pip install accelerate"
        ) from None
    return accelerate
