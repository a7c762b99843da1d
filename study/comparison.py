"""One run of the comparison from beginning to end: train, score on the validation split, score on the test split."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hywu_core.analysis.geometry import centred, cosines, gram, separation
from hywu_core.errors import HywuError
from hywu_core.files.safetensors import open_safetensors, write_safetensors
from hywu_core.training import SharedLora, Trainer
from hywu_core.training.trainable import GeneratorTrainable, leaves

from . import bases, evaluation
from .edits import SUITES
from .methods import LoraForEachEdit, Run, build, generator_config
from .pictures import compose
from .task import EditingTask

SIZE = 32  # pixels, of the comparison
VARIANTS = 4  # of every training tile
VALIDATION_CASES, TEST_CASES = 64, 128


class Trained(NamedTuple):
    """A trained method: the MODEL that it edits with, and what writes or is its LoRA."""

    model: Any
    trainable: Any
    objective: Any


def task_of(run: Run, split: str, size: int = SIZE, variants: int = 1) -> EditingTask:
    """The run's pairs over the pictures of a split."""
    pictures, names = composed(split, size, variants)
    clip = bases.load_clip(run.base)
    return EditingTask(clip, pictures, names, SUITES[run.suite], generator_config(), run.regime)


def prepare(run: Run) -> Trained:
    """A run before its first step, on a base of its own."""
    model = bases.load_model(run.base)
    trainable, objective = build(run, model)
    objective.prepare()
    return Trained(model, trainable, objective)


def train(run: Run, weights: Path, on_step: Callable | None = None) -> dict[str, Any]:
    """Train a run, keep its parameters in `weights` and say how long it took. A run that diverges is a result too."""
    trained = prepare(run)
    trainer = Trainer(trained.trainable, trained.objective, task_of(run, "train", variants=VARIANTS), run.config())
    start, failure = time.process_time(), None  # what other programs do does not count
    try:
        trainer.run(on_step)
    except HywuError as error:
        failure = str(error)
    seconds = time.process_time() - start
    write_safetensors(weights, {name: p.detach() for name, p in trainer.parameters.items()}, {"run": run.name})
    return {"seconds_per_step": seconds / max(1, trainer.done), "failure": failure}


def restore(run: Run, weights: Path) -> Trained:
    """A trained run from its parameters."""
    trained = prepare(run)
    with open_safetensors(weights, HywuError) as handle, torch.no_grad():
        for name, parameter in trained.trainable.named_parameters().items():
            parameter.copy_(handle.get_tensor(name))
    return trained


def validate(run: Run, trained: Trained) -> float:
    """Mean PSNR on the validation split, which chooses the learning rate."""
    task = task_of(run, "validation")
    return float(_scores(trained, task, task.balanced_cases(VALIDATION_CASES), controls=False)["matched"].mean())


def test(run: Run, trained: Trained) -> dict[str, Any]:
    """Everything that is measured of a run on the test split; lists follow the cases."""
    task = task_of(run, "test")
    cases = task.balanced_cases(TEST_CASES)
    scores = _scores(trained, task, cases, controls=True)
    found: dict[str, Any] = {"psnr": {name: [round(v, 3) for v in values.tolist()] for name, values in scores.items()}}
    found["edits"] = [task.edits[case.edit].name for case in cases]
    if isinstance(trained.trainable, GeneratorTrainable):
        found["geometry"] = geometry(trained, task, cases)
    if isinstance(trained.trainable, SharedLora):
        cosine = cosines(evaluation.gradient_products(trained.objective, leaves(trained.trainable.lora()), task))
        pairs = range(0, len(task.edits), 2)
        found["opposite_gradient_cosine"] = [round(float(cosine[pair, pair + 1]), 3) for pair in pairs]
    return found


def base_scores(run: Run) -> list[float]:
    """The frozen base's PSNR on the same cases."""
    task, model = task_of(run, "test"), bases.load_model(run.base)
    return [round(v, 3) for v in evaluation.score(model, task, task.balanced_cases(TEST_CASES)).tolist()]


def geometry(trained: Trained, task: EditingTask, cases: list) -> dict[str, Any]:
    """How the generated dW lie: cosines within and across edits, raw and centred, and the purity of nearest neighbours."""
    products = gram(evaluation.write_all(trained.trainable.generator, task, cases)).double()
    groups = [case.edit for case in cases]
    raw, free = separation(cosines(products), groups), separation(cosines(centred(products)), groups)
    return {"raw": raw._asdict(), "centred": free._asdict()}


@lru_cache(maxsize=4)  # the same for every run of a process
def composed(split: str, size: int, variants: int) -> tuple[Tensor, list[str]]:
    """The pictures of a split, and their names; see `pictures.compose`."""
    return compose(split, size, variants)


def _scores(trained: Trained, task: EditingTask, cases: list, controls: bool) -> dict[str, Tensor]:
    if isinstance(trained.trainable, GeneratorTrainable):
        generator = trained.trainable.generator
        if controls:
            return evaluation.score_generator(generator, trained.model, task, cases)
        write = evaluation.write
        return {"matched": evaluation.score(trained.model, task, cases, lambda part: write(generator, task, part))}
    if isinstance(trained.trainable, LoraForEachEdit):
        return {"matched": evaluation.score(trained.model, task, cases, trained.trainable.chosen)}
    if isinstance(trained.trainable, SharedLora):
        lora = trained.trainable.lora().map(lambda pair: type(pair)(pair.down.detach(), pair.up.detach()))
        return {"matched": evaluation.score(trained.model, task, cases, lambda part: lora)}
    return {"matched": evaluation.score(trained.model, task, cases)}
