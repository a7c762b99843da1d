"""One objective in weight space: how far the dW that a generator writes is from a wanted one, from the factors alone.

It serves three uses, which differ in where the wanted LoRA comes from:
    memory        the generator before it was taught something new, on old instructions and any pictures
    collected     LoRA files with their instructions (paper Fig. 2a; beside the diffusion loss, Fig. 2b)
    distillation  a larger generator
No base, no target picture and no pair is needed: a step costs the generator's own pass, and the teacher's.

Letters: B batch · r rank. The distance is of the products B.A, which many factor pairs share, never of A and B themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import HywuError, LoraError
from ..lora import InstanceLora, LoraFactor
from .data import Sample, source_of
from .options import CONSTANT, FALLING
from .trainable import Trainable

MEMORY_STREAM = 2**20  # the place in a batch from which these draws take their random numbers, far behind any sample's


def weight_distance(written: InstanceLora, wanted: InstanceLora) -> Tensor:
    """sum ||dW - dW'||^2 / sum ||dW'||^2 over all targets, for each instance: (B,), differentiable in both, in float32 or
    what is finer of the factors' types.

    0 where both are equal, 1 for a LoRA that changes nothing, 4 for the opposite one. A wanted LoRA that changes nothing
    has no length to measure by: the squared norm itself is given there. Ranks may differ.

    Raises:
        LoraError: if the two do not have the same targets, shapes and batch.
    """
    return _distance(inner_products(written, wanted))


class Products(NamedTuple):
    """Inner products of dW and dW', all targets as one vector; each (B,)."""

    own: Tensor  # <dW, dW>
    both: Tensor  # <dW, dW'>
    other: Tensor  # <dW', dW'>


def inner_products(written: InstanceLora, wanted: InstanceLora) -> Products:
    """What the two are to each other, from the factors alone, graph kept.

    Raises:
        LoraError: see `weight_distance`.
    """
    return _products(written, wanted, lambda pair: pair)


class Likeness(NamedTuple):
    """How like two LoRAs are."""

    distance: float  # see `weight_distance`: 0 is the same
    cosine: float  # of their dW: 1 is the same direction, 0 nothing in common
    strength: float  # ||dW|| / ||dW'||


def likeness(written: InstanceLora, wanted: InstanceLora) -> Likeness:
    """The means over the instances of what each is to the wanted one, taken in float64 on the CPU, target by target.

    Raises:
        LoraError: see `weight_distance`.
    """
    own, both, other = products = _products(written, wanted, _fine)
    tiny = torch.finfo(own.dtype).tiny
    cosine = both / (own * other).clamp(min=tiny).sqrt()
    strength = (own / other.clamp(min=tiny)).sqrt()
    return Likeness(*(float(value.mean()) for value in (_distance(products), cosine, strength)))


class Teacher(Protocol):
    """Gives the LoRA that is wanted for samples."""

    def lora(self, samples: Sequence[Sample]) -> InstanceLora:
        """One instance for each sample. A graph of its own is not followed."""


class Lesson(NamedTuple):
    """What of the weight-space objective a step does."""

    name: str  # in logs and progress
    samples: Sequence[Sample]  # their conditions are read; latents and conditioning are not
    teacher: Teacher
    weight: float  # of the mean distance, beside the diffusion loss
    batch: int  # samples of a step, over all processes
    schedule: str = CONSTANT

    def weight_at(self, share: float) -> float:
        """The weight when a share of all steps is done."""
        return self.weight * (1 - share) if self.schedule == FALLING else self.weight


class WeightSpace:
    """Adds the gradient of `weight` x the mean distance to what is trained, on samples drawn by (seed, step, place).

    Args:
        lessons: any number, such as a memory and a folder of LoRAs.
    Raises:
        HywuError: for a lesson without samples.
    """

    def __init__(self, lessons: Sequence[Lesson], seed: int):
        self.lessons, self.seed = tuple(lessons), seed
        for lesson in self.lessons:
            if not len(lesson.samples):
                raise HywuError(
                    f"There is nothing to learn for {lesson.name}: give at least one instruction and one picture."
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the lessons."""
        return tuple(lesson.name for lesson in self.lessons)

    def loss(self, distances: Sequence[float], step: int, steps: int) -> float:
        """What the lessons' mean distances add to the loss of a step."""
        weights = (lesson.weight_at(step / steps) for lesson in self.lessons)
        return sum(weight * distance for weight, distance in zip(weights, distances, strict=True))

    def backward(self, trainable: Trainable, step: int, steps: int, rank: int, processes: int) -> list[float]:
        """Leave this process's share of the gradients on the parameters, so that their mean over the processes is the whole.

        Returns:
            of every lesson this process's share of the mean distance, before its weight; likewise.
        """
        return [
            self._one(index, lesson.weight_at(step / steps), trainable, step, (rank, processes))
            for index, lesson in enumerate(self.lessons)
        ]

    def _one(self, index: int, weight: float, trainable: Trainable, step: int, among: tuple[int, int]) -> float:
        lesson, (rank, processes) = self.lessons[index], among
        samples = []
        for place in range(lesson.batch * rank // processes, lesson.batch * (rank + 1) // processes):
            source = source_of(self.seed, step, MEMORY_STREAM * (1 + index) + place)
            samples.append(lesson.samples[int(torch.randint(len(lesson.samples), (), generator=source))])
        if not samples:
            return 0.0
        at_once, total = trainable.graphs_at_once(samples) or len(samples), 0.0
        for start in range(0, len(samples), at_once):
            part = samples[start : start + at_once]
            written = trainable.lora(part)
            with torch.no_grad():
                wanted = lesson.teacher.lora(part).to(written.pairs[0].down.device)
            distance = weight_distance(written, wanted).sum() * processes / lesson.batch
            (weight * distance).backward()
            total += float(distance.detach())
        return total


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


def _products(written: InstanceLora, wanted: InstanceLora, prepared: Callable[[LoraFactor], LoraFactor]) -> Products:
    """See `inner_products`; of the factors as `prepared` gives them."""
    _check(written, wanted)
    others, total = wanted.factors, None
    for name, pair in written.factors.items():
        ours, theirs = _scaled(prepared(pair), written.scale), _scaled(prepared(others[name]), wanted.scale)
        found = torch.stack([_inner(ours, ours), _inner(ours, theirs), _inner(theirs, theirs)])
        total = found if total is None else total + found
    return Products(*total)


def _distance(products: Products) -> Tensor:
    """See `weight_distance`."""
    # the three terms cancel to rounding where both are equal
    distance = (products.own - 2 * products.both + products.other).clamp(min=0)
    return torch.where(products.other > 0, distance / torch.where(products.other > 0, products.other, 1.0), distance)


def _fine(pair: LoraFactor) -> LoraFactor:
    """In float64, where the terms of equal LoRAs cancel to nothing; on the CPU, as not every device has it."""
    return LoraFactor(*(tensor.to("cpu", torch.float64) for tensor in pair))


def _scaled(pair: LoraFactor, scale: float) -> LoraFactor:
    return LoraFactor(pair.down, pair.up * scale)


def _inner(a: LoraFactor, b: LoraFactor) -> Tensor:
    """<B_a A_a, B_b A_b> (B,), over a bank's experts too, as fine as the factors are."""
    wide = torch.promote_types(torch.promote_types(a.up.dtype, b.up.dtype), torch.float32)
    ups = a.up.to(wide).mT @ b.up.to(wide)
    downs = a.down.to(wide) @ b.down.to(wide).mT
    return (ups * downs).flatten(1).sum(-1)
