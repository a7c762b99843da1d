"""The training loop: one generator pass, the base in micro-batches, two-stage backward, and a run that resumes exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import HywuError
from ..lora import InstanceLora
from .data import Draw, Sample, SampleSource, batch_of, buckets_of
from .options import TrainConfig
from .recall import NAME as RECALL
from .recall import Recall
from .state import load_state, save_state
from .trainable import Trainable, concatenate, diversity_loss, instances, leaves
from .weight_space import WeightSpace

# (LoRA, draws, share) -> losses (B,); see `Objective.backward`
ThroughBase = Callable[[InstanceLora | None, Sequence[Draw], float], Tensor]


class TrainingError(HywuError):
    """Training cannot go on; the last good state is kept."""


class Objective(Protocol):
    """How well a LoRA does on samples."""

    def backward(
        self, lora: InstanceLora | None, draws: Sequence[Draw], share: float, followed: InstanceLora | None = None
    ) -> Tensor:
        """Run the base on the samples, each with its own instance, and add the gradients of `share` x the sum of the
        losses to the LoRA's factors (or to the base's parameters). Returns the losses (B,), detached.

        Args:
            followed: with it, what is right is not the samples' picture, but what the base predicts with that LoRA.
        """


class Communication(Protocol):
    """How several processes share one step."""

    rank: int
    processes: int

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over the processes, in place."""


class Alone:
    rank, processes = 0, 1

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Nothing to share."""


def anywhere(communication: Communication, happened: bool) -> bool:
    """Whether it happened in any of the processes; all of them must ask."""
    share = torch.tensor(float(happened))
    communication.average([share])
    return float(share) > 0


class StepReport(NamedTuple):
    step: int  # the first is 0
    loss: float  # mean over all samples of the step; without a diffusion loss the lessons' own, weighted
    rate: float
    gradient_norm: float
    distances: tuple[float, ...] = ()  # of every lesson in weight space, its mean; then the recall's mean difference


class Trainer:
    """Trains parameters on samples. `step` does one optimizer step; `run` does the rest of them.

    Args:
        trainable: see `Trainable`.
        objective, data: see `Objective`, and pairs by index; both None for lessons in weight space alone.
        config: see `TrainConfig`.
        communication: with other processes; the batch is shared out among them evenly.
        between: called between micro-batches; what it raises ends the step and leaves the parameters as they were.
        lessons: in weight space, beside the diffusion loss.
        recall: what the base is to go on predicting; only beside the diffusion loss.
    Raises:
        TrainingError: if the batch cannot be shared out.
    """

    def __init__(
        self,
        trainable: Trainable,
        objective: Objective | None,
        data: SampleSource | None,
        config: TrainConfig,
        communication: Communication | None = None,
        between: Callable[[], None] = lambda: None,
        lessons: WeightSpace | None = None,
        recall: Recall | None = None,
    ):
        self.trainable, self.objective, self.data, self.config = trainable, objective, data, config
        self.between, self.lessons, self.recall = between, lessons or WeightSpace((), config.seed), recall
        self.communication = communication or Alone()
        for batch in (config.batch, *([recall.batch] if recall else [])):
            if batch % self.communication.processes:
                raise TrainingError(
                    f"A batch of {batch} cannot be shared out evenly among {self.communication.processes} processes."
                )
        self.parameters = trainable.named_parameters()
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self.averaged = {n: p.detach().clone() for n, p in self.parameters.items()} if config.ema else {}
        self.buckets = None if data is None else buckets_of(data)
        self.done = 0  # optimizer steps

    @property
    def names(self) -> tuple[str, ...]:
        """Of the distances that a step reports."""
        return (*self.lessons.names, *([RECALL] if self.recall else ()))

    def run(
        self,
        on_step: Callable[[StepReport], Any] | None = None,
        save_to: Path | None = None,
        save_every: int = 0,
    ) -> None:
        """Train to the end of the schedule, or until `on_step` returns True. Whatever ends it early (`on_step` may raise to
        cancel), the state after the last whole step is written first, if `save_to` is given.
        """
        begun = self.done
        try:
            while self.done < self.config.steps:
                report = self.step()
                if save_to and save_every and self.done % save_every == 0:
                    self.save(save_to)
                if on_step and on_step(report) is True:
                    break
        finally:
            if save_to and self.done > begun:
                self.save(save_to)

    def step(self) -> StepReport:
        """One optimizer step.

        Raises:
            TrainingError: naming step and sample for a loss that is not finite. No parameter was changed then.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss, *distances = self._share(self._try_backward())
        if self.objective is None:
            loss = self.lessons.loss(distances, self.done, self.config.steps)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip or float("inf"))
        if not torch.isfinite(norm):
            raise TrainingError(
                f"The gradient is not finite in step {self.done}. Lower the learning rate, or compute in float32."
            )
        rate = self.config.rate(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        for name, average in self.averaged.items():
            average.lerp_(self.parameters[name].detach(), 1 - self.config.ema)
        self.done += 1
        return StepReport(self.done - 1, loss, rate, float(norm), tuple(distances))

    def use_averaged(self) -> None:
        """Replace the parameters by their averages, if the run keeps any. For the end of a run: the optimizer knows nothing
        of it.
        """
        with torch.no_grad():
            for name, average in self.averaged.items():
                self.parameters[name].copy_(average)

    def save(self, path: Path) -> None:
        """Write the run's state atomically: parameters, optimizer, averages, progress."""
        save_state(path, self.parameters, self.optimizer, self.averaged, self.done, self.config)

    def resume(self, path: Path) -> None:
        """Go on where a run stopped: what follows is what would have followed, bit for bit on the CPU.

        Raises:
            TrainingError: if the file is of another run.
        """
        self.done = load_state(path, self.parameters, self.optimizer, self.averaged, self.config)

    def draws(self, step: int | None = None) -> list[Draw]:
        """This process's part of the batch of a step, by default the next one. Of equal shapes side by side, so that they
        can pass through the base at once.
        """
        share = self.config.batch // self.communication.processes
        first = share * self.communication.rank
        step = self.done if step is None else step
        part = slice(first, first + share)
        found = batch_of(self.data, self.config.seed, step, self.config.batch, part, self.buckets)
        return sorted(found, key=lambda draw: tuple(draw.sample.latent.shape))

    def _try_backward(self) -> Tensor:
        """[the mean loss of this process's samples, its share of every lesson's distance, and of the recall's]; gradients are
        left on the parameters. A process that fails takes the others along, which would wait for it for ever.
        """
        found, failure = torch.zeros(1 + len(self.names)), None
        try:
            if self.objective is not None:
                found[0] = self._backward(self.draws()).mean()
            found[1:] = torch.tensor([*self._learn(), *self._recalled()])
        except Exception as error:
            failure = error
        if anywhere(self.communication, failure is not None):
            raise failure or TrainingError(
                f"Another process failed in step {self.done}; it says why. The parameters are as after the step before."
            )
        return found

    def _learn(self) -> list[float]:
        """The lessons in weight space; a graph of their own, after that of the diffusion loss is gone."""
        if self.lessons.lessons:
            self.between()
        among = self.communication.rank, self.communication.processes
        return self.lessons.backward(self.trainable, self.done, self.config.steps, *among)

    def _recalled(self) -> list[float]:
        """The recall, where there is one; in graphs of its own likewise."""
        if self.recall is None:
            return []
        self.between()
        among = self.communication.rank, self.communication.processes
        draws = self.recall.draws(self.config.seed, self.done, *among)
        through_base = partial(self.recall.backward, self.objective)
        return [float(self._through_base(draws, through_base, self.recall.weight).mean())]

    def _share(self, found: Tensor) -> list[float]:
        """Average gradients and numbers over the processes; every one sends the same list, whatever its samples reached."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.communication.average([*(p.grad for p in self.parameters.values()), found])
        return found.tolist()

    def _backward(self, draws: list[Draw]) -> Tensor:
        """The diffusion losses (B,), with their gradients and those of diversity."""
        return self._through_base(draws, self.objective.backward, self.config.diffusion, self.config.diversity)

    def _through_base(
        self, draws: list[Draw], through_base: ThroughBase, weight: float, diversity: float = 0.0
    ) -> Tensor:
        """The losses (B,); gradients of `weight` x their mean are left on the parameters, the same as those of one graph.

        Where the graphs of all samples are too large to stay while the base is run, micro-batch by micro-batch, unless
        samples are compared with each other: what does not need to be there at the same time is not.
        """
        at_once = self.trainable.graphs_at_once([draw.sample for draw in draws])
        stay = at_once is None or at_once >= len(draws)
        size = self.config.micro_batch or len(draws)
        group = len(draws) if stay or diversity else size
        groups = [draws[start : start + group] for start in range(0, len(draws), group)]
        stages = partial(self._stages, through_base, weight / len(draws), diversity)
        return torch.cat([stages(some, size, None if stay else at_once) for some in groups])

    def _stages(
        self,
        through_base: ThroughBase,
        share: float,
        diversity: float,
        draws: list[Draw],
        size: int,
        at_once: int | None,
    ) -> Tensor:
        """The LoRA; then the base, `size` samples at a time, which leaves gradients on its factors alone; then from the
        factors through whatever wrote them. With `at_once`, the LoRA is written without a graph, and once more for the last
        stage, so many samples at a time.
        """
        samples = [draw.sample for draw in draws]
        lora = self.trainable.lora(samples) if at_once is None else self.lora(samples)
        leaf = None if lora is None else leaves(lora)
        losses = []
        for start in range(0, len(draws), size):
            self.between()
            part = slice(start, start + size)
            found = through_base(None if leaf is None else instances(leaf, part), draws[part], share)
            self._check(found, draws[part])
            losses.append(found)
        if leaf is not None:
            if diversity:
                (diversity * diversity_loss(leaf)).backward()
            if at_once is None:
                _through(lora, leaf, slice(None))
            else:
                for start in range(0, len(samples), at_once):
                    self.between()
                    part = slice(start, start + at_once)
                    _through(self.trainable.lora(samples[part]), leaf, part)
        return torch.cat(losses)

    def lora(self, samples: Sequence[Sample]) -> InstanceLora | None:
        """The samples' LoRA without a graph, in as little memory as the trainable asks for."""
        with torch.no_grad():
            at_once = self.trainable.graphs_at_once(samples) or len(samples)
            parts = [self.trainable.lora(samples[start : start + at_once]) for start in range(0, len(samples), at_once)]
            return parts[0] if len(parts) == 1 else concatenate(parts)

    def _check(self, losses: Tensor, draws: Sequence[Draw]) -> None:
        for loss, draw in zip(losses.tolist(), draws, strict=True):
            if loss - loss != 0:  # NaN or infinite
                raise TrainingError(
                    f"The loss is {loss} in step {self.done}, sample {draw.sample.key or 'without a name'!r}. The "
                    "parameters are as after the step before. Look at that sample, or lower the learning rate."
                )


def _through(lora: InstanceLora, leaf: InstanceLora, part: slice) -> None:
    """One backward pass from the factors of some samples, whose gradients the leaves have, through what wrote them."""
    written = [factor for pair in lora.pairs for factor in pair]
    met = [factor.grad for pair in leaf.pairs for factor in pair]
    # a base may not use all
    reached = [
        (w, gradient[part].to(w.dtype)) for w, gradient in zip(written, met, strict=True) if gradient is not None
    ]
    torch.autograd.backward(*zip(*reached, strict=True))
