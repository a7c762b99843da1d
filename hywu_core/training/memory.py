"""One objective in weight space: how far the dW that a generator writes is from a wanted one, from the factors alone.

It serves three uses, which differ in where the wanted LoRA comes from:
    memory        the generator before it was taught something new, on old instructions and any pictures
    collected     LoRA files with their instructions (paper Fig. 2a; beside the diffusion loss, Fig. 2b)
    distillation  a larger generator
No base, no target picture and no pair is needed: a step costs the generator's own pass, and the teacher's.

Letters: B batch · r rank. The distance is of the products B.A, which many factor pairs share, never of A and B themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import HywuError, LoraError
from ..lora import InstanceLora, LoraFactor, inner
from .data import Sample, source_of
from .trainable import Trainable

MEMORY_STREAM = 2**20  # the place in a batch from which these draws take their random numbers, far behind any sample's


def weight_distance(written: InstanceLora, wanted: InstanceLora) -> Tensor:
    """sum ||dW - dW'||^2 / sum ||dW'||^2 over all targets, for each instance: (B,), in float64, differentiable in both.

    0 where both are equal, 1 for a LoRA that changes nothing, 4 for the opposite one. A wanted LoRA that changes nothing
    has no length to measure by: the squared norm itself is given there.

    Raises:
        LoraError: if the two do not have the same targets, shapes and batch.
    """
    _check(written, wanted)
    distance = length = 0.0
    for name, ours in written.factors.items():
        ours, theirs = _scaled(ours, written.scale), _scaled(wanted.factors[name], wanted.scale)
        own, other = inner(ours, ours), inner(theirs, theirs)
        distance = distance + _over_experts(own - 2 * inner(ours, theirs) + other)
        length = length + _over_experts(other)
    distance = distance.clamp(min=0)  # the three terms cancel to rounding where both are equal
    return torch.where(length > 0, distance / torch.where(length > 0, length, 1.0), distance)


class Teacher(Protocol):
    """Gives the LoRA that is wanted for samples."""

    def lora(self, samples: Sequence[Sample]) -> InstanceLora:
        """One instance for each sample, without a graph."""


class Lesson(NamedTuple):
    """What of the weight-space objective a step does."""

    samples: Sequence[Sample]  # their conditions are read; latents and conditioning are not
    teacher: Teacher
    weight: float  # of the mean distance, beside the diffusion loss
    batch: int  # samples of a step


class WeightSpace:
    """Adds the gradient of `weight` x the mean distance to what is trained, on samples drawn by (seed, step, place).

    Args:
        lessons: any number, such as a memory and a folder of LoRAs.
    Raises:
        HywuError: for a lesson without samples.
    """

    def __init__(self, lessons: Sequence[Lesson], seed: int):
        self.lessons, self.seed = tuple(lessons), seed
        if any(not lesson.samples for lesson in self.lessons):
            raise HywuError("There is nothing to remember: give at least one instruction and one picture.")

    def backward(self, trainable: Trainable, step: int, share: slice) -> tuple[float, ...]:
        """Leave the gradients on the parameters; the mean distance of every lesson, before its weight.

        Args:
            share: which places of the batch this process does, as in `data.batch_of`.
        """
        return tuple(self._one(index, lesson, trainable, step, share) for index, lesson in enumerate(self.lessons))

    def _one(self, index: int, lesson: Lesson, trainable: Trainable, step: int, share: slice) -> float:
        samples = []
        for place in range(lesson.batch)[share]:
            source = source_of(self.seed, step, MEMORY_STREAM * (1 + index) + place)
            samples.append(lesson.samples[int(torch.randint(len(lesson.samples), (), generator=source))])
        if not samples:
            return 0.0
        with torch.no_grad():
            wanted = lesson.teacher.lora(samples)
        distance = weight_distance(trainable.lora(samples), wanted).mean()
        (lesson.weight * distance).backward()
        return float(distance.detach())


def _check(written: InstanceLora, wanted: InstanceLora) -> None:
    if set(written.names) != set(wanted.names):
        only = sorted(set(written.names) ^ set(wanted.names))
        raise LoraError(
            f"Both LoRAs must have the same targets to be compared, but {only[0]} is in one of them only "
            f"({len(written.names)} and {len(wanted.names)} targets). They belong to different bases or generators."
        )
    for name, ours in written.factors.items():
        theirs = wanted.factors[name]
        shapes = [(*pair.down.shape[:-2], pair.up.shape[-2], pair.down.shape[-1]) for pair in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise LoraError(
                f"{name}: the LoRA that is written changes a weight of shape {shapes[0]} (batch first), the wanted one "
                f"{shapes[1]}. They belong to different bases, or hold different numbers of instances."
            )


def _scaled(pair: LoraFactor, scale: float) -> LoraFactor:
    return LoraFactor(pair.down, pair.up * scale)


def _over_experts(values: Tensor) -> Tensor:
    return values.sum(-1) if values.ndim == 2 else values
