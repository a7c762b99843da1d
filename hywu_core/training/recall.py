"""What the base is to go on predicting: with the LoRAs that a generator writes for old instructions, what it predicted with a
teacher's.

Unlike the distance of the LoRAs themselves (`weight_space`), it costs passes through the base; but it tells which changes of
a weight are seen: a thousandth of a LoRA can be a change of all colours. No old pair is needed: the base is asked about noisy
source pictures, and what is right is what it predicts with the teacher's LoRA (as in learning without forgetting,
arXiv 1606.09282).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..lora import InstanceLora
from .data import Draw, SampleSource, batch_of
from .weight_space import Teacher

NAME = "prediction"  # in logs
STREAM = 2**40  # between the seeds of these draws and those of the pairs


class Recall(NamedTuple):
    """Old instructions on pictures, and who shows what to do about them."""

    data: SampleSource  # latents are any pictures', such as the sources'
    teacher: Teacher
    weight: float  # of the mean difference, beside the diffusion loss
    batch: int  # samples of a step, over all processes

    def draws(self, seed: int, step: int, rank: int, processes: int) -> list[Draw]:
        """This process's part of a step's samples; they depend on seed, step and place alone."""
        part = slice(self.batch * rank // processes, self.batch * (rank + 1) // processes)
        return batch_of(self.data, seed + STREAM, step, self.batch, part)

    def backward(self, objective, lora: InstanceLora | None, draws: Sequence[Draw], share: float) -> Tensor:
        """See `hywu_core.training.trainer.Objective.backward`, the teacher's LoRA being what is followed."""
        with torch.no_grad():
            wanted = self.teacher.lora([draw.sample for draw in draws])
        return objective.backward(lora, draws, share, wanted)
