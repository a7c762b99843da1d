"""Three ways to train a generator, at the same cost (paper Fig. 2): from collected LoRAs alone (a), from them and the
task's own loss (b), and end to end (c). Collecting, a LoRA for each edit, is part of the cost of (a) and (b).

R1: the base is told nothing. Costs are seconds of the processor: those of a step are measured first, in turn, and give the
numbers of steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hywu_core.generator import Generator
from hywu_core.host.training.objective import DiffusionObjective
from hywu_core.lora import InstanceLora, LoraFactor
from hywu_core.training import GeneratorTrainable, Sample, SharedLora, TrainConfig, Trainer
from hywu_core.training.options import FALLING
from hywu_core.training.trainable import concatenate, leaves
from hywu_core.training.weight_space import Lesson, WeightSpace, likeness

from . import bases, evaluation
from .comparison import SIZE, VARIANTS, composed
from .continual import Asked
from .edits import EIGHT, Edit
from .methods import ALPHA_PER_RANK, RANK, generator_config
from .stored import trained_once
from .task import EditingTask

COLLECTED, RECONSTRUCTED, BOTH, END_TO_END = "one LoRA for each edit", "(a) reconstructed", "(b) both", "(c) end to end"
WAYS = (RECONSTRUCTED, BOTH, END_TO_END)
BATCH = 8
RATE, LORA_RATE = 2e-3, 1e-2  # those of what ships
COLLECTING = 0.5  # of the whole cost of (a) and (b)
WEIGHT = 0.5  # of the distance to the collected LoRAs at the beginning of (b); it falls to zero at its end
CASES = 64
ROUNDS, ROUND = 3, 4  # of measuring what a step costs, and steps of one


class Cost(NamedTuple):
    """Seconds of the processor for one step of each kind."""

    collecting: float
    reconstructing: float
    both: float
    end_to_end: float


class Steps(NamedTuple):
    """How many steps each kind gets."""

    collecting: int  # for each edit
    reconstructing: int
    both: int
    end_to_end: int


def shared_out(cost: Cost, end_to_end: int, edits: int) -> Steps:
    """The steps that cost in all what so many steps end to end cost."""
    whole = end_to_end * cost.end_to_end
    rest = whole * (1 - COLLECTING)
    return Steps(
        max(1, round(whole * COLLECTING / edits / cost.collecting)),
        max(1, round(rest / cost.reconstructing)),
        max(1, round(rest / cost.both)),
        end_to_end,
    )


class OfEdits:
    """Collected LoRAs by the names of their edits; see `hywu_core.training.weight_space.Teacher`."""

    def __init__(self, loras: Sequence[InstanceLora], edits: Sequence[Edit]):
        self.loras = {edit.name: lora for edit, lora in zip(edits, loras, strict=True)}

    def lora(self, samples: Sequence[Sample]) -> InstanceLora:
        """One instance for each sample, whose key names the edit."""
        return concatenate([self.loras[sample.key] for sample in samples])


class Paradigms:
    """The base, the edits, and what was trained so far.

    Args:
        work: folder of trained parameters.
    """

    def __init__(self, work: Path, edits: Sequence[Edit] = EIGHT, size: int = SIZE):
        self.work, self.edits, self.size = work, edits, size
        self.model, self.clip = bases.load(bases.FIRST)
        self.objective = DiffusionObjective(self.model)
        self.objective.prepare()

    def cost(self) -> Cost:
        """Measured in turn, so that what else the machine does falls on all alike; the least of each counts."""
        loras = [leaves(self._shared(0).lora()) for _ in self.edits]
        trainers = [
            self._lora_trainer(self._shared(0), self.edits[0], 0, ROUNDS * ROUND),
            *(self._trainer(way, self._generator(0), 0, ROUNDS * ROUND, loras) for way in WAYS),
        ]
        seconds: list[list[float]] = [[] for _ in trainers]
        for _ in range(ROUNDS):
            for trainer, found in zip(trainers, seconds, strict=True):
                start = time.process_time()
                for _ in range(ROUND):
                    trainer.step()
                found.append((time.process_time() - start) / ROUND)
        return Cost(*(min(found) for found in seconds))

    def collected(self, seed: int, steps: int) -> list[InstanceLora]:
        """A LoRA for each edit, trained on that edit alone."""
        loras = []
        for edit in self.edits:
            shared = self._shared(seed)
            trainer = self._lora_trainer(shared, edit, seed, steps)
            trained_once(self.work / f"s{seed} {edit.name} {steps}.safetensors", shared, trainer.run)
            loras.append(leaves(shared.lora()).map(lambda pair: LoraFactor(pair.down.detach(), pair.up.detach())))
        return loras

    def trained(self, way: str, seed: int, steps: int, loras: Sequence[InstanceLora]) -> Generator:
        """A generator, trained in one of WAYS."""
        generator = self._generator(seed)
        trainer = self._trainer(way, generator, seed, steps, loras)
        name = f"s{seed} {way.strip('()').replace(') ', ' ')} {steps}.safetensors"
        trained_once(self.work / name, trainer.trainable, trainer.run)
        return generator

    def score(self, generator: Generator | None) -> list[float]:
        """PSNR in dB of every test case; without a generator the base's own."""
        task = self._task("test")
        write = (lambda part: evaluation.write(generator, task, part)) if generator else (lambda part: None)
        return self._rounded(task, write)

    def score_collected(self, loras: Sequence[InstanceLora]) -> list[float]:
        """The same where the right LoRA of each edit is chosen by hand."""
        return self._rounded(self._task("test"), lambda part: concatenate([loras[case.edit] for case in part]))

    def likeness(self, generator: Generator, loras: Sequence[InstanceLora]) -> dict[str, float]:
        """How like what it writes on test cases is to the collected LoRAs."""
        task = self._task("test")
        cases = task.balanced_cases(CASES)
        with torch.no_grad():
            written = evaluation.write_all(generator, task, cases)
            return likeness(written, concatenate([loras[case.edit] for case in cases]))._asdict()

    def _rounded(self, task: EditingTask, write: Any) -> list[float]:
        found = evaluation.score(self.model, task, task.balanced_cases(CASES), write)
        return [round(value, 3) for value in found.tolist()]

    def _generator(self, seed: int) -> Generator:
        return Generator(generator_config(), dtype=torch.float32).initialize(seed)

    def _shared(self, seed: int) -> SharedLora:
        return SharedLora(generator_config(), RANK, ALPHA_PER_RANK * RANK, seed)

    def _lora_trainer(self, shared: SharedLora, edit: Edit, seed: int, steps: int) -> Trainer:
        how = TrainConfig(steps=steps, batch=BATCH, learning_rate=LORA_RATE, warmup=steps // 10, seed=seed)
        return Trainer(shared, self.objective, self._task("train", [edit]), how)

    def _trainer(self, way: str, generator: Generator, seed: int, steps: int, loras: Sequence[InstanceLora]) -> Trainer:
        task, alone = self._task("train"), way == RECONSTRUCTED
        schedule = {} if alone else {"schedule": FALLING}
        lesson = Lesson("loras", Asked(task), OfEdits(loras, self.edits), 1.0 if alone else WEIGHT, BATCH, **schedule)
        how = TrainConfig(
            steps=steps,
            batch=BATCH,
            learning_rate=RATE,
            warmup=steps // 10,
            seed=seed,
            diffusion=0.0 if alone else 1.0,
            loras=1.0,
        )
        lessons = WeightSpace([] if way == END_TO_END else [lesson], seed)
        objective, data = (None, None) if alone else (self.objective, task)
        return Trainer(GeneratorTrainable(generator), objective, data, how, lessons=lessons)

    def _task(self, split: str, edits: Sequence[Edit] | None = None) -> EditingTask:
        pictures = composed(split, self.size, VARIANTS if split == "train" else 1)
        return EditingTask(self.clip, *pictures, edits or self.edits, generator_config(), "blind")
