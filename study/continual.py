"""What a generator forgets when edits arrive one lot after the other, and what a memory in weight space keeps of them.

The first lot of edits is trained, then the second one alone, from the same generator each time: plainly, with a memory of a
given weight, or with a replay of the old pairs themselves. All are measured on test cases of both lots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hywu_core.errors import HywuError
from hywu_core.files.safetensors import open_safetensors, write_safetensors
from hywu_core.generator import Generator
from hywu_core.host.training.objective import DiffusionObjective
from hywu_core.training import GeneratorTrainable, Sample, TrainConfig, Trainer
from hywu_core.training.weight_space import Lesson, WeightSpace

from . import bases, evaluation
from .comparison import SIZE, VARIANTS, composed
from .edits import EIGHT, Edit
from .methods import generator_config
from .task import Case, EditingTask

OLD, NEW = EIGHT[:4], EIGHT[4:]
CASES = 32  # test cases of each lot
FIRST, PLAIN, MEMORY, REPLAY = "first", "plain", "memory", "replay"


class Step(NamedTuple):
    """One training run: the first lot, or the second one in some way."""

    way: str
    seed: int = 0
    weight: float = 0.0  # of a memory
    asked: int = 8  # old instructions of a step, of a memory
    steps: int = 240
    rate: float = 1e-3

    @property
    def name(self) -> str:
        """A file name, and a key of the results."""
        return self.way + (f" {self.weight:g}" + (f" x{self.asked}" if self.asked != 8 else "")) * (self.way == MEMORY)

    def config(self) -> TrainConfig:
        """The same for all ways."""
        return TrainConfig(steps=self.steps, batch=8, learning_rate=self.rate, warmup=self.steps // 10, seed=self.seed)


class Asked(Sequence):
    """Every wording of a task's edits on every of its pictures, as a memory asks for them; the key names the edit."""

    def __init__(self, task: EditingTask):
        self.task = task
        self.cases = [
            Case(picture, edit, wording)
            for picture in range(len(task.pictures))
            for edit, words in enumerate(task.words)
            for wording in range(len(words))
        ]

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Sample:
        case = self.cases[index]
        return Sample(torch.empty(0), None, self.task.condition([case])[0], self.task.edits[case.edit].name)


class Continual:
    """The base, the pictures, and what was trained so far.

    Args:
        work: folder of trained generators.
    """

    def __init__(self, work: Path):
        self.work, self.model = work, bases.load_model(bases.FIRST)
        self.clip = bases.load_clip(bases.FIRST)

    def train(self, step: Step) -> Generator:
        """The generator after a step; trained if it is not there yet."""
        path = self.work / f"s{step.seed} {step.name}.safetensors"
        if path.exists():
            return self._read(path)
        if step.way == FIRST:
            generator = Generator(generator_config(), dtype=torch.float32).initialize(step.seed)
        else:
            generator = self.train(Step(FIRST, step.seed, steps=step.steps, rate=step.rate))
        edits = {FIRST: OLD, REPLAY: EIGHT}.get(step.way, NEW)
        config = step.config()
        if step.way == REPLAY:
            config = replace(config, batch=2 * config.batch)  # as many new pairs as the others, and as many old ones
        objective = DiffusionObjective(self.model)
        objective.prepare()
        task = self.task(edits, "train", VARIANTS)
        lessons = WeightSpace(self._lessons(step, task), step.seed)
        Trainer(GeneratorTrainable(generator), objective, task, config, lessons=lessons).run()
        write_safetensors(path, {name: p.detach() for name, p in generator.named_parameters()}, {"step": step.name})
        return generator

    def score(self, generator: Generator | None) -> dict[str, list[float]]:
        """PSNR in dB of every test case of both lots; without a generator the base's own."""
        return {"old": self._score(generator, OLD), "new": self._score(generator, NEW)}

    def task(self, edits: Sequence[Edit], split: str, variants: int = 1) -> EditingTask:
        """The pairs of some edits, of which the base is told nothing."""
        return EditingTask(self.clip, *composed(split, SIZE, variants), edits, generator_config(), "blind")

    def _lessons(self, step: Step, new: EditingTask) -> list[Lesson]:
        if step.way != MEMORY:
            return []
        old = EditingTask(self.clip, new.pictures, new.names, OLD, new.config, "blind")
        teacher = self.train(Step(FIRST, step.seed, steps=step.steps, rate=step.rate)).requires_grad_(False)
        return [Lesson(MEMORY, Asked(old), GeneratorTrainable(teacher), step.weight, step.asked)]

    def _score(self, generator: Generator | None, edits: Sequence[Edit]) -> list[float]:
        task = self.task(edits, "test")
        cases = task.balanced_cases(CASES)
        write = (lambda part: evaluation.write(generator, task, part)) if generator else (lambda part: None)
        return [round(value, 3) for value in evaluation.score(self.model, task, cases, write).tolist()]

    def _read(self, path: Path) -> Generator:
        generator = Generator(generator_config(), dtype=torch.float32)
        with open_safetensors(path, HywuError) as handle:
            generator.load_state_dict({name: handle.get_tensor(name) for name in handle.keys()})
        return generator


def gates(found: dict[str, dict[str, list[float]]], way: str) -> dict[str, Any]:
    """What a way of teaching keeps and costs, from one seed's scores by step: the share of what plain training loses on old
    edits that it keeps, in dB above the base, and how far it is from plain training on new ones.
    """

    def mean(name: str, lot: str) -> float:
        return sum(found[name][lot]) / len(found[name][lot])

    lost = mean(FIRST, "old") - mean(PLAIN, "old")
    return {
        "kept_share": (mean(way, "old") - mean(PLAIN, "old")) / lost,
        "new_against_plain": mean(way, "new") - mean(PLAIN, "new"),
        "old_against_first": mean(way, "old") - mean(FIRST, "old"),
    }
