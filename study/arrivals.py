"""Edits that arrive two at a time: what each method knows of all of them after each arrival.

R1: the base is told nothing. Every method takes the same number of steps for an arrival, from what it was after the one
before; `ALL` sees everything from the start, and takes as many steps as all arrivals together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hywu_core.training import GeneratorTrainable, Sample, TrainConfig, Trainer
from hywu_core.training.recall import Recall
from hywu_core.training.trainable import leaves
from hywu_core.training.weight_space import Lesson, WeightSpace

from . import bases, evaluation
from .comparison import SIZE, VARIANTS, composed
from .continual import Asked
from .edits import SIXTEEN, Edit
from .methods import Run, build, generator_config
from .stored import trained_once
from .task import EditingTask

SHARED, FULL, PLAIN, MEMORY, REPLAY, ALL = "shared LoRA", "fine-tuning", "plain", "memory", "replay", "all at once"
RECALL = "memory and predictions"
METHODS = (SHARED, FULL, PLAIN, MEMORY, RECALL, REPLAY, ALL)
KINDS = {SHARED: "shared", FULL: "full"}  # the others are generators
RATES = {SHARED: 1e-2, FULL: 1e-3}
RATE = 1e-3  # of generators, as of Teach
PREDICTION = 20.0  # weight of what the base predicts, as of Teach
AT_ONCE = 2  # edits of an arrival
BATCH = 8
CASES_OF_AN_EDIT = 4


class How(NamedTuple):
    """What all methods of a curve share."""

    edits: tuple[Edit, ...] = SIXTEEN
    steps: int = 120  # of an arrival
    seed: int = 0
    weight: float = 2.0  # of the memory
    asked: int = 16  # old instructions of a step of the memory

    @property
    def arrivals(self) -> int:
        """How many there are."""
        return len(self.edits) // AT_ONCE


class Mixed:
    """Pairs of two tasks, half of them new ones; see `hywu_core.training.SampleSource`."""

    def __init__(self, new: EditingTask, old: EditingTask):
        self.new, self.old = new, old

    def __len__(self) -> int:
        return 2 * max(len(self.new), len(self.old))

    def sample(self, index: int, source: torch.Generator) -> Sample:
        """Pair `index`: new ones are even."""
        task = (self.new, self.old)[index % 2]
        return task.sample(index // 2 % len(task), source)


class Unedited:
    """Instructions on pictures as nobody has edited them, as Teach asks about them."""

    def __init__(self, task: EditingTask):
        self.task = task

    def __len__(self) -> int:
        return len(self.task)

    def sample(self, index: int, source: torch.Generator) -> Sample:
        """Pair `index`, with its source as the picture under noise."""
        sample = self.task.sample(index, source)
        return sample._replace(latent=sample.conditioning[1]["reference_latents"][0][0])


class Arrivals:
    """What was trained so far.

    Args:
        work: folder of trained parameters.
    """

    def __init__(self, work: Path, how: How, size: int = SIZE):
        self.work, self.how, self.size = work, how, size
        self.base, self.clip = bases.load(bases.FIRST)

    def score_base(self) -> dict[str, list[float]]:
        """PSNR in dB of the base's test cases, edit by edit."""
        return self._score(self.base, lambda task, part: None)

    def score(self, method: str, arrival: int) -> dict[str, list[float]]:
        """PSNR in dB of test cases of all edits, those that have not arrived too, after an arrival (the first is 0)."""
        model, trainable, _ = self._after(method, arrival)
        if isinstance(trainable, GeneratorTrainable):
            return self._score(model, lambda task, part: evaluation.write(trainable.generator, task, part))
        lora = None if method == FULL else leaves(trainable.lora(()))
        return self._score(model, lambda task, part: lora)

    def _after(self, method: str, arrival: int) -> tuple[Any, Any, Any]:
        """(MODEL, trainable, objective) after an arrival; trained if it is not there yet."""
        how, last = self.how, self.how.arrivals - 1
        if method == ALL:
            arrival = last
        # fine-tuning changes its base
        model = bases.load_model(bases.FIRST) if method == FULL else self.base
        if arrival and method != ALL:
            _, trainable, objective = built = self._after(method, arrival - 1)
            model = built[0]
        else:
            trainable, objective = build(Run("blind", "sixteen", KINDS.get(method, "generator"), 0.0, how.seed), model)
            objective.prepare()
        weight = f" {how.weight:g}" if method in (MEMORY, RECALL) and how.weight != How().weight else ""
        path = self.work / f"s{how.seed} {method}{weight} {how.steps} {arrival + 1} of {how.arrivals}.safetensors"
        trained_once(path, trainable, lambda: self._train(method, arrival, trainable, objective))
        return model, trainable, objective

    def _train(self, method: str, arrival: int, trainable: Any, objective: Any) -> None:
        how, recall = self.how, None
        old, new = how.edits[: arrival * AT_ONCE], how.edits[arrival * AT_ONCE : (arrival + 1) * AT_ONCE]
        steps, batch, lessons = how.steps, BATCH, []
        task: Any = self._task("train", how.edits if method == ALL else new)
        if method == ALL:
            steps *= how.arrivals
        elif method == REPLAY and old:
            # as many new pairs as the others, and as many old ones
            task, batch = Mixed(task, self._task("train", old)), 2 * BATCH
        elif method in (MEMORY, RECALL) and old:
            _, teacher, _ = self._after(method, arrival - 1)
            asked = self._task("train", old)
            in_weight_space = BATCH if method == RECALL else how.asked
            lessons = [Lesson(MEMORY, Asked(asked), teacher, how.weight, in_weight_space)]
            if method == RECALL:
                recall = Recall(Unedited(asked), teacher, PREDICTION, BATCH)
        config = TrainConfig(
            steps=steps, batch=batch, learning_rate=RATES.get(method, RATE), warmup=steps // 10, seed=how.seed
        )
        Trainer(trainable, objective, task, config, lessons=WeightSpace(lessons, how.seed), recall=recall).run()

    def _score(self, model: Any, write: Any) -> dict[str, list[float]]:
        task = self._task("test", self.how.edits)
        cases = task.balanced_cases(CASES_OF_AN_EDIT * len(task.edits))
        found = evaluation.score(model, task, cases, lambda part: write(task, part)).tolist()
        scores: dict[str, list[float]] = {edit.name: [] for edit in task.edits}
        for case, value in zip(cases, found, strict=True):
            scores[task.edits[case.edit].name].append(round(value, 3))
        return scores

    def _task(self, split: str, edits: Sequence[Edit]) -> EditingTask:
        pictures = composed(split, self.size, VARIANTS if split == "train" else 1)
        return EditingTask(self.clip, *pictures, edits, generator_config(), "blind")


def known(scores: dict[str, list[float]], edits: Sequence[Edit], arrival: int) -> dict[str, float]:
    """Mean PSNR after an arrival: of what arrived before (`kept`), of what just did (`learned`), and of both (`all`)."""

    def mean(some: Sequence[Edit]) -> float:
        values = [value for edit in some for value in scores[edit.name]]
        return sum(values) / len(values) if values else float("nan")

    begin, end = arrival * AT_ONCE, (arrival + 1) * AT_ONCE
    return {"kept": mean(edits[:begin]), "learned": mean(edits[begin:end]), "all": mean(edits[:end])}
