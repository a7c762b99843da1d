"""A training run outside the server, from its description to the saved generator, in one or several processes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from study import methods, pictures
from study.edits import SUITES
from study.task import EditingTask

from ...bases import pocket
from ...condition import SOURCES, Condition
from ...config import GeneratorConfig
from ...errors import ConfigError, HywuError
from ...files.checkpoint import load_generator, save_generator
from ...files.safetensors import atomic_write
from ...generator import Generator
from ...training import GeneratorTrainable, RunLog, SampleSource, StepReport, Trainer, TrainingError
from ...training.distributed import Accelerated, share_state
from ...training.log import STATE
from ...training.run import RunConfig
from ...training.trainer import anywhere
from ...training.validation import averaged_weights, validation_loss
from ..new_generator import check_fits, generator_config
from . import base_files
from .objective import DiffusionObjective, refuse_quantised
from .pairs_of_folder import EncodedPairs, Encoders, Reading, fingerprint, hold_out, read_pairs

GENERATOR, RUN, KEPT = "generator", "run.json", "encoded"  # in a run's folder, beside its state and logs
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
POCKET_SIZE, SHOW_EVERY = 32, 50


class StoppedError(HywuError):
    """The run was asked to stop before its end; the same command goes on."""


class Task(NamedTuple):
    """What a run trains on and for."""

    model: Any
    generator: Generator
    train: SampleSource
    held_out: SampleSource | None
    origin: str  # of the data, for provenance and for the check when a run goes on


def train(
    run: RunConfig,
    communication: Accelerated,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
) -> Path:
    """Do the rest of a run and save its generator.

    Args:
        stop: asked after every step whether this process wants to end.
    Returns:
        the generator's folder.
    Raises:
        StoppedError: after the state was written.
        HywuError: for bad input, or a loss that is not finite; what was reached is kept.
    """
    say = say if communication.main else lambda text: None
    folder = Path(run.output)
    trainer, task = _prepare(run, communication, stop, say)
    share_state(trainer, communication)
    say(f"{len(task.train)} pairs, {len(task.held_out or ())} held out, {communication.processes} processes")
    log = RunLog(folder, trainer.done) if communication.main else None
    on_step = _on_step(run, trainer, task, log, stop, say)
    try:
        trainer.run(on_step, folder / STATE if communication.main else None, run.save_every)
    except (StoppedError, TrainingError):
        communication.wait()  # or the launcher would end the process that still writes the state
        raise
    if communication.main:
        _save(run, trainer, task)
        say(f"saved {folder / GENERATOR}")
    communication.wait()
    return folder / GENERATOR


def _prepare(
    run: RunConfig, communication: Accelerated, stop: Callable[[], bool], say: Callable[[str], None]
) -> tuple[Trainer, Task]:
    """Everything before the first step. Processes agree after each stage, so that none waits for one that failed."""
    if run.pocket and not run.pairs:
        task = _together(communication, lambda: _pocket_task(run))
    else:
        looked, encoded = (_progress(stop, say, word) for word in ("looked at", "encoded"))
        model, sources, origin = _together(communication, lambda: _read(run, looked))
        _together(communication, lambda: _encode(run, sources, communication, encoded))
        task = _together(communication, lambda: _pairs_task(run, model, sources, origin))
    return _together(communication, lambda: _trainer(run, task, communication)), task


def _trainer(run: RunConfig, task: Task, communication: Accelerated) -> Trainer:
    check_fits(task.model.model, task.generator.config)
    objective = DiffusionObjective(task.model, run.checkpoint_stack or None)
    generator = task.generator.to(objective.patcher.load_device)
    generator.checkpoint_blocks = run.checkpoint_generator
    trainable = GeneratorTrainable(generator, DTYPES[run.dtype])
    trainer = Trainer(trainable, objective, task.train, run.training, communication)
    if communication.main:
        _resume(run, trainer, task)
    objective.prepare()
    return trainer


def _pocket_task(run: RunConfig) -> Task:
    """The pictures that ship, with the edits of a suite."""
    model, clip, _ = pocket.load_pocket_editor()
    generator, size = _generator(run, model, None), run.size or POCKET_SIZE

    def pairs(split: str, variants: int) -> EditingTask:
        composed, names = pictures.compose(split, size, variants)
        return EditingTask(clip, composed, names, SUITES[run.suite], generator.config, run.regime)

    held_out = pairs("validation", 1) if run.held_out_share else None
    return Task(model, generator, pairs("train", run.variants), held_out, f"shipped pictures, suite {run.suite}")


def _read(run: RunConfig, progress: Callable[[int, int], None]) -> tuple[Any, list[EncodedPairs], str]:
    """The base, the pairs to train on and those that are held out, and what tells them from others."""
    if not run.pairs:
        raise ConfigError("There is nothing to train on. Give a folder of pairs (--pairs), or --pocket.")
    pairs = read_pairs(Path(run.pairs), run.size, run.background, progress)
    train_pairs, held_out = hold_out(pairs, 0 if run.held_out else run.held_out_share)
    if run.held_out:
        held_out = read_pairs(Path(run.held_out), run.size, run.background, progress)
    if not run.pocket:
        base_files.check_files(run)
    model = pocket.load_pocket_editor()[0] if run.pocket else base_files.load_model(run)
    refuse_quantised(model.model)  # before hours of encoding
    base = base_files.fingerprint(list(pocket.pocket_files()) if run.pocket else base_files.base_files(run))
    reading = Reading(run.size, run.regime, run.text_sees_source, run.guidance, run.background)
    kept = Path(run.output) / KEPT
    sources = [EncodedPairs(some, kept, base, reading) for some in (train_pairs, held_out)]
    return model, sources, f"{len(pairs)} pairs {fingerprint(pairs)}"


def _pairs_task(run: RunConfig, model: Any, sources: list[EncodedPairs], origin: str) -> Task:
    generator = _generator(run, model, sources[0].condition(0))
    for source in sources:
        source.config = generator.config
    return Task(model, generator, sources[0], sources[1] if len(sources[1]) else None, origin)


def _encode(run: RunConfig, sources: list[EncodedPairs], communication: Accelerated, progress: Callable) -> None:
    """What is not encoded yet; every process of a machine does its share."""
    encoders = None
    for source in sources:
        mine = [i for i in source.missing() if i % communication.local_processes == communication.local_rank]
        if mine:
            encoders = encoders or (_pocket_encoders() if run.pocket else base_files.load_encoders(run))
            source.encode(mine, encoders, progress)


def _progress(stop: Callable[[], bool], say: Callable[[str], None], did: str) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done % SHOW_EVERY == 0 or done == total:
            say(f"{did} {done}/{total} pairs")
        if stop():
            raise StoppedError("Stopped before the first step. The same command goes on.")

    return progress


def _pocket_encoders() -> Encoders:
    return Encoders(*pocket.load_pocket_editor()[1:])


def _generator(run: RunConfig, model: Any, example: Condition | None) -> Generator:
    """The generator to go on from, or a new one."""
    path = Path(run.generator)
    if run.generator and path.suffix != ".json":
        return load_generator(path)
    if run.generator:
        try:
            config = GeneratorConfig.from_json(path.read_text(encoding="utf-8-sig"), str(path))
        except OSError as error:
            raise ConfigError(f"The generator's configuration {path} cannot be read ({error.strerror}).") from None
    elif run.pocket:
        config = methods.generator_config()
    else:
        config = _new_config(run, model, example)
    return Generator(config, dtype=torch.float32).initialize(run.training.seed)


def _new_config(run: RunConfig, model: Any, example: Condition) -> GeneratorConfig:
    if run.source not in SOURCES:
        raise ConfigError(f"source must be one of {', '.join(SOURCES)}, found {run.source!r}.")
    return generator_config(
        model.model,
        example,
        run.generator_size,
        target_names=run.targets,
        stack=run.stack,
        rank=run.rank,
        alpha=run.alpha,
        source=run.source,
        encoder_layers=run.encoder_layers,
    )


def _resume(run: RunConfig, trainer: Trainer, task: Task) -> None:
    """Go on with the run of this folder if it was begun, and only with that one."""
    folder = Path(run.output)
    now = {"run": run.identity(), "data": task.origin}
    if (folder / STATE).exists():
        _check_same(folder / RUN, now)
        trainer.resume(folder / STATE)
        return
    with atomic_write(folder / RUN) as temporary:
        temporary.write_text(json.dumps(now, indent=2), encoding="utf-8")


def _check_same(file: Path, now: dict[str, Any]) -> None:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        before = stored["run"] | stored["run"]["training"] | {"data": stored["data"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file.parent} holds a run's state, but {file.name} does not say of which ({error!r}). Use a new folder."
        ) from None
    after = now["run"] | now["run"]["training"] | {"data": now["data"]}
    changed = [name for name in after if name != "training" and before.get(name) != after[name]]
    if changed:
        name = changed[0]
        raise ConfigError(
            f"{file.parent} holds a run with {name} {before.get(name)!r}, now it is {after[name]!r}. A run goes on with "
            "what it was started with; use a new folder (--output) for other settings."
        )


def _on_step(
    run: RunConfig, trainer: Trainer, task: Task, log: RunLog | None, stop: Callable[[], bool], say: Callable
) -> Callable[[StepReport], None]:
    start = time.monotonic(), trainer.done

    def on_step(report: StepReport) -> None:
        if log:
            log.step(report)
        last = trainer.done == run.training.steps
        if task.held_out and run.validate_every and (last or trainer.done % run.validate_every == 0):
            found = validation_loss(trainer, task.held_out, run.held_out_limit, run.training.seed)
            say(f"step {trainer.done}: loss on held-out pairs {found:.5g}")
            if log:
                log.validation(report.step, found)
        if log and (last or trainer.done % SHOW_EVERY == 0):
            recent = log.losses[-SHOW_EVERY:]
            seconds = (time.monotonic() - start[0]) / (trainer.done - start[1])
            say(
                f"step {trainer.done}/{run.training.steps}: loss {sum(recent) / len(recent):.5g}, {seconds:.2f} s a step"
            )
        if not last and anywhere(trainer.communication, stop()):
            raise StoppedError(f"Stopped after step {trainer.done}. The same command goes on.")

    return on_step


def _save(run: RunConfig, trainer: Trainer, task: Task) -> None:
    generator, how = task.generator, run.training
    provenance = {
        "steps": how.steps,
        "batch": how.batch,
        "learning_rate": how.learning_rate,
        "seed": how.seed,
        "regime": run.regime,
        "data": task.origin,
        "base": Path(run.model or run.checkpoint or "pocket editor").name,
    }
    generator.config = replace(generator.config, hywu=generator.config.hywu | {"training": provenance})
    with averaged_weights(trainer):
        save_generator(generator, Path(run.output) / GENERATOR)


def _together(communication: Accelerated, work: Callable[[], Any]) -> Any:
    """Do what every process does for itself; if one fails, all end, instead of waiting for it."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    if anywhere(communication, failure is not None):
        raise failure or HywuError("Another process could not start; it says why.")
    return result
