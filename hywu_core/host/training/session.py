"""One training session, the same behind the node and behind the script: what it is about, its loop, held-out pairs, going on
where a run stopped, and its result.

In a run's folder: run.json (what it is about), state.safetensors, log.csv, validation.csv, and the generator as it was when
the run ended or was ended. A file named `finish` put there ends the run after the step that is being done, as if that had
been its last.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher
import torch

from ... import knowledge
from ...condition import text_of
from ...errors import HywuError, SaveError
from ...files.checkpoint import save_generator
from ...lineage import continued
from ...lora import InstanceLora
from ...messages import Message
from ...plan import summary
from ...training import (
    GeneratorTrainable,
    RunLog,
    Sample,
    SampleSource,
    SessionOptions,
    StepReport,
    TrainConfig,
    Trainer,
)
from ...training.data import Sized, batch_of
from ...training.log import STATE
from ...training.memory import graph_bytes
from ...training.options import PRECISIONS
from ...training.recall import Recall
from ...training.trainer import Alone, Communication, anywhere
from ...training.validation import averaged_weights, base_loss, validation_loss
from ...training.weight_space import WeightSpace
from .. import memory
from ..engine import refuse_beyond
from ..memory import GeneratorHandle
from ..new_generator import check_fits
from .identity import begun, claim, digest_of_base
from .lessons import SHOWN_AS, HostLesson
from .objective import DiffusionObjective

FINISH = "finish"
RECENT = 50  # steps whose losses are averaged for show, and after which the base's own loss is measured again
DIGESTS = 12  # of the data, that a step of a generator's life names
MET = 512  # conditions, of those trained on, that are looked at for what the generator's file keeps of them
COPIES = 5  # of a generator's weights while it is trained: itself, gradients, two moments, averages


class StoppedError(HywuError):
    """The run was asked to stop before its end; the same command goes on."""


class Task(NamedTuple):
    """What a session trains, for what, and on what."""

    model: comfy.model_patcher.ModelPatcher
    handle: GeneratorHandle  # a copy is trained
    pairs: SampleSource | None  # None: lessons in weight space alone
    held_out: SampleSource | None
    identity: dict[str, Any]  # digests of the pairs, and how they are read, as JSON holds them
    provenance: dict[str, Any]  # what else the trained generator's file says
    instructions: tuple[str, ...] = ()  # of the pairs, for the generator's file; as far as they are known as text
    known: tuple[str, ...] = ()  # instructions that it knew before, which its file may not name
    lessons: tuple[HostLesson, ...] = ()
    recall: Recall | None = None
    kind: str = "trained"  # of this step of the generator's life


class Progress(NamedTuple):
    done: int
    steps: int
    loss: float  # mean over the last steps
    seconds: float  # of a step
    at: tuple[float, float] | None  # the last measured step's loss, and the base's own on the same pairs and noise
    held_out: tuple[float, float] | None  # the same of the held-out pairs
    distances: dict[str, float] = {}  # of every lesson in weight space, in the last step
    losses: Sequence[float] = ()  # one for each step, those before a resume included

    def __str__(self) -> str:
        text = f"step {self.done}/{self.steps}: loss {self.loss:.4g}"
        if self.at:
            text += f" (last measured {self.at[0]:.4g}, without a LoRA {self.at[1]:.4g})"
        if self.held_out:
            text += f", held out {self.held_out[0]:.4g} (without a LoRA {self.held_out[1]:.4g})"
        for name, distance in self.distances.items():
            text += f", {name}: distance {distance:.3g}"
        return f"{text}, {self.seconds:.2f} s a step" + (f", {self.left} left" if self.done < self.steps else "")

    @property
    def left(self) -> Message:
        """The time that it still takes."""
        return _time((self.steps - self.done) * self.seconds)

    def rows(self) -> tuple[tuple[str, str], ...]:
        """The same as names and values."""
        found = [("Step", step_of(self.done, self.steps))]
        if self.done < self.steps:
            left = Message("{left}, {seconds} s a step", left=self.left, seconds=f"{self.seconds:.2f}")
            found.append(("Time left", left))
        mean = Message("{loss}, mean of the last {count} steps", loss=f"{self.loss:.4g}", count=min(RECENT, self.done))
        found.append(("Loss", mean))
        for name, measured in (("Last measured", self.at), ("Held-out pairs", self.held_out)):
            if measured:
                loss, base = (f"{number:.4g}" for number in measured)
                found.append((name, Message("{loss}; without a LoRA {base}", loss=loss, base=base)))
        for name, distance in self.distances.items():
            found.append((Message("Distance, {lesson}", lesson=SHOWN_AS[name]), f"{distance:.3g}"))
        return tuple(found)


class Front:
    """Where a session runs. Methods do nothing by default."""

    def generator_file(self, step: int | None) -> Path:
        """Where the generator goes: as it is after a step, or at the end."""
        raise NotImplementedError

    def say(self, text: Message) -> None:
        """A line for whoever waits."""

    def stopped(self, text: Message) -> None:
        """When it ended before its last step: what is kept, and how to go on."""
        self.say(text)

    def show(self, progress: Progress) -> None:
        """After every step."""

    def preview(self, session: Session) -> None:
        """Show what the generator does now, after a validation. The averaged weights are in place."""

    def check(self) -> None:
        """Between micro-batches and after every step. What it raises cancels the run."""

    def asked_to_stop(self) -> bool:
        """After every step: whether to end with a StoppedError."""
        return False


class Session:
    """A run, with everything that it holds in memory.

    Args:
        folder: of the run; it is claimed by the first process.
    Raises:
        MatchError: if generator and model do not fit, or the model cannot be trained on.
        TrainingError: if the folder holds another run. SaveError: if it cannot be written to.
        GenerationError: if it needs more memory than there is.
    """

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        options: SessionOptions,
        folder: Path,
        front: Front,
        communication: Communication | None = None,
    ):
        self.task, self.options, self.folder, self.front = task, options, folder, front
        communication = communication or Alone()
        self.main = communication.rank == 0
        check_fits(task.model.model, task.handle.config)
        learns = task.pairs is not None and config.diffusion > 0
        self.objective = DiffusionObjective(task.model, options.checkpoint_stack) if learns else None
        self.generator = memory.trainable_copy(task.handle)
        self.generator.checkpoint_blocks = options.checkpoint_generator
        self.patcher = memory.manage_training(self.generator)
        self.trainer: Trainer | None = None
        self.log: RunLog | None = None
        try:
            self._begin(config, communication)
        except Exception:
            self.release()
            raise
        self._at: tuple[float, float] | None = None
        self._held_out: tuple[float, float] | None = None
        self._began: tuple[float, int] | None = None
        self._met: dict[str, Any] | None = None

    def _begin(self, config: TrainConfig, communication: Communication) -> None:
        goes_on = self.main and claim(self.folder, self._identity(config), self.options)
        self.begun = begun(self.folder) if self.main else ""
        trainable = GeneratorTrainable(self.generator, PRECISIONS[self.options.precision])
        pairs = self.task.pairs if self.objective else None
        processes = communication.processes
        self._room = self._needed(trainable, config, processes)
        size = summary(self.generator.config, self.patcher.model_size())
        needed = Message(
            "{generator}, about {room} GB of memory beside the base while it is trained.",
            generator=size,
            room=f"{self._room / 1e9:.1f}",
        )
        self.front.say(needed)
        refuse_beyond(
            self.patcher.load_device,
            self._room,
            f"Training with {config.micro_batch or _share(config.batch, processes)} pairs at a time",
            "Set micro_batch to a smaller number than batch_size: the same steps, less at a time. Or use smaller pictures.",
        )
        self.load()
        lessons = WeightSpace([found.lesson for found in self.task.lessons], config.seed)
        recall = self.task.recall if self.objective else None
        self.trainer = Trainer(
            trainable, self.objective, pairs, config, communication, self.front.check, lessons, recall
        )
        if goes_on:
            self.trainer.resume(self.folder / STATE)
            at = {"folder": self.folder, "step": self.trainer.done}
            self.front.say(Message("The run in {folder} goes on after step {step}.", **at))

    def load(self) -> None:
        """Have the host load everything, with room for what training needs beside it. The base may be offloaded."""
        patchers = [self.patcher, *self._teachers, *(self.objective.patchers if self.objective else ())]
        comfy.model_management.load_models_gpu(patchers, memory_required=self._room)

    def run(self) -> None:
        """All steps that are left. Whatever ends it early, state and generator of the last whole step are kept.

        Raises:
            StoppedError: if the front asked to stop. TrainingError: for a loss that is not finite.
        """
        trainer, begun, whole = self.trainer, self.trainer.done, False
        if trainer.done > trainer.config.steps:
            beyond = Message(
                "The run has {done} steps already, and {steps} are asked for: the generator is given as it is, and the state "
                "is kept.",
                done=trainer.done,
                steps=trainer.config.steps,
            )
            self.front.say(beyond)
        self.log = RunLog(self.folder, trainer.done, trainer.names) if self.main else None
        self._began = time.monotonic(), begun
        try:
            trainer.run(self._after_step, self.folder / STATE if self.main else None, self.options.save_every)
            whole = True
        finally:
            if self.main and (trainer.done > begun or whole):
                self.keep(self.front.generator_file(None))
            if self.main and not whole and trainer.done:
                kept = Message(
                    "Stopped after step {done} of {steps}. The state is kept in {folder}: start the run again to go on, or "
                    "with at most {done} steps to take the generator as it is. It is also in {file}.",
                    done=trainer.done,
                    steps=trainer.config.steps,
                    folder=self.folder,
                    file=self.front.generator_file(None),
                )
                self.front.stopped(kept)

    def keep(self, path: Path) -> None:
        """Write the generator as it is now; the averaged weights, where there are such.

        Raises:
            SaveError: if it cannot be written.
        """
        self.generator.config = replace(self.task.handle.config, hywu=self._hywu())
        with averaged_weights(self.trainer):
            save_generator(self.generator, path)

    def result(self, name: str) -> GeneratorHandle:
        """The trained generator: the averaged weights, where there are such."""
        state = self.trainer.averaged or self.generator.state_dict()
        return memory.from_state(replace(self.task.handle.config, hywu=self._hywu()), state, name)

    @property
    def losses(self) -> list[float]:
        """One for each step, those before a resume included."""
        return list(self.log.losses) if self.log else []

    def lora(self, sample: Sample) -> InstanceLora:
        """What the generator writes now. Base and VAE may have taken its room meanwhile."""
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        condition = sample.condition.unsqueeze(0).to(self.patcher.load_device)
        return self.generator.generate(condition, dtype=PRECISIONS[self.options.precision])

    def averaged(self) -> AbstractContextManager[None]:
        """The generator as it would be given now, for the time of the block."""
        return averaged_weights(self.trainer)

    def release(self) -> None:
        """Give back the memory that only this run needed."""
        objective, only_ours = self.objective, [self.patcher, *self._teachers]
        if objective:
            own_base = objective.patcher.model is not self.task.model.model
            only_ours += [*objective.banks, *([objective.patcher] if own_base else [])]
        if self.trainer:
            self.trainer.optimizer.zero_grad(set_to_none=True)
        if self.log:
            self.log.close()
        for patcher in only_ours:
            # by name: what an error's traceback still holds would be called a leak
            comfy.model_management.unload_model_and_clones(patcher, unload_additional_models=False)
        self.trainer = self.generator = self.patcher = self.objective = self.log = None
        gc.collect()
        comfy.model_management.cleanup_models_gc()
        comfy.model_management.soft_empty_cache()

    def losses_of(self, trainable: GeneratorTrainable | None) -> float:
        """The mean loss over at most `held_out_limit` pairs of what a generator writes, or of the base alone, always with the
        same noise.
        """
        config, pairs = self.trainer.config, self.task.pairs
        count = min(self.options.held_out_limit, len(pairs))
        size, total = config.micro_batch or config.batch, 0.0
        with torch.no_grad():
            for start in range(0, count, size):
                draws = batch_of(pairs, config.seed, 0, count, slice(start, min(start + size, count)))
                lora = trainable.lora([draw.sample for draw in draws]) if trainable else None
                total += float(self.objective.evaluate(lora, draws).double().sum())
        return total / count

    @property
    def _teachers(self) -> list[comfy.model_patcher.ModelPatcher]:
        return [patcher for found in self.task.lessons for patcher in found.patchers]

    def _needed(self, trainable: GeneratorTrainable, config: TrainConfig, processes: int) -> int:
        """Bytes beside the weights of one process, for the largest pair of a run, or for lessons in weight space alone."""
        weights = sum(p.numel() * p.element_size() for p in self.generator.parameters())
        task, micro = self.task, config.micro_batch
        # of what passes through the base: (pairs, samples of a step)
        passing = [(task.pairs, _share(config.batch, processes))] if self.objective else []
        passing += [(task.recall.data, _share(task.recall.batch, processes))] if self.objective and task.recall else []
        largest = [(_largest(pairs), count) for pairs, count in passing]
        samples = [*(pair for pair, _ in largest), *(found.lesson.samples[0] for found in task.lessons)]
        length = max(sample.condition.shape[0] for sample in samples)
        graph = graph_bytes(self.generator.config, length, trainable.dtype, self.generator.checkpoint_blocks)
        most = max([count for _, count in largest] + [_share(found.lesson.batch, processes) for found in task.lessons])
        graphs = graph * min(most, trainable.graphs_at_once(samples))
        rooms = [self.objective.room(pair, min(micro or count, count)) for pair, count in largest]
        return COPIES * weights + graphs + max(rooms, default=0)

    def _identity(self, config: TrainConfig) -> Mapping[str, Any]:
        task = self.task
        digests = {"generator": task.handle.fingerprint, "base": digest_of_base(task.model)}
        digests |= {"pairs": len(task.pairs)} if task.pairs is not None else {}
        for found in task.lessons:
            digests |= found.identity
        return {**task.identity, **digests, "precision": self.options.precision, **config.identity()}

    def _hywu(self) -> dict[str, Any]:
        """The generator's own part of its configuration, with how it was trained."""
        losses, config = self.log.losses if self.log else [], self.trainer.config
        tenth = len(losses) // 10 or 1
        about = {
            "steps": self.trainer.done,
            "pairs": len(self.task.pairs) if self.task.pairs is not None else 0,
            "precision": self.options.precision,
            "first_loss": _mean(losses[:tenth]),
            "last_loss": _mean(losses[-tenth:]),
        }
        if self._met is None:
            self._met = self._with_what_it_meets(self.task.handle.config.hywu)
        # what the base reads stays known where this run does not say it, as with lessons of LoRA files alone
        told = knowledge.reads(self.task.handle.config.hywu)
        before = {"regime": told} if told else {}
        hywu = {**self._met, "training": before | asdict(config) | self.task.provenance | about}
        step = {"kind": self.task.kind, "from": self.task.handle.fingerprint, "begun": self.begun, **self._learned()}
        return continued(hywu, step, self.task.instructions, self.task.known)

    def _with_what_it_meets(self, hywu: Mapping[str, Any]) -> dict[str, Any]:
        """The generator's own part with the conditions and picture sizes of this session, a bounded sample of them."""
        pairs, config, cell = self.task.pairs, self.task.handle.config, _cell(self.task.model)
        met = [] if pairs is None else [pairs.sample(i, torch.Generator().manual_seed(i)) for i in _some(len(pairs))]
        asked = [found.lesson.samples[i] for found in self.task.lessons for i in _some(len(found.lesson.samples))]
        texts = [text_of(sample.condition.unsqueeze(0), config) for sample in (*met, *asked)]
        sizes = [(sample.latent.shape[-1] * cell, sample.latent.shape[-2] * cell) for sample in met]
        return knowledge.gathered(hywu, [text[0] for text in texts if text is not None], sizes, cell)

    def _learned(self) -> dict[str, Any]:
        """What a step of the generator's life says of its data."""
        identity = {**self.task.identity}
        for found in self.task.lessons:
            identity |= found.identity
        digests = {name: value for name, value in identity.items() if isinstance(value, str) and len(value) <= 64}
        return {"steps": self.trainer.done, **dict(list(digests.items())[:DIGESTS])}

    def _after_step(self, report: StepReport) -> bool:
        """Log, measure, keep and show; returns whether to finish."""
        trainer, options = self.trainer, self.options
        done, last = trainer.done, trainer.done == trainer.config.steps
        if self.log:
            self.log.step(report)
        if self.objective and (last or done % RECENT == 0 or done == self._began[1] + 1):
            self._at = report.loss, base_loss(trainer, report.step)
        if options.validate_every and (last or done % options.validate_every == 0):
            self._validate(report.step)
        if self.main and options.keep_every and done % options.keep_every == 0:
            self._keep_snapshot(self.front.generator_file(done))
        if self.main:
            recent = self.log.losses[-RECENT:]
            seconds = (time.monotonic() - self._began[0]) / (done - self._began[1])
            mean = sum(recent) / len(recent)
            distances = dict(zip(trainer.names, report.distances, strict=True))
            about = self._at, self._held_out, distances, self.log.losses
            self.front.show(Progress(done, trainer.config.steps, mean, seconds, *about))
        self.front.check()
        if not last and anywhere(trainer.communication, self.front.asked_to_stop()):
            raise StoppedError(f"Stopped after step {done}. The same command goes on.")
        return anywhere(trainer.communication, self.main and self._asked_to_finish())

    def _keep_snapshot(self, path: Path) -> None:
        """One that is held by another program does not end the run."""
        try:
            self.keep(path)
        except SaveError as error:
            logging.warning("HY-WU: %s The run goes on.", error)

    def _validate(self, step: int) -> None:
        trainer, held_out, limit = self.trainer, self.task.held_out, self.options.held_out_limit
        if held_out and self.objective:
            seed = trainer.config.seed
            # the base stays, and so does its loss
            base = (
                self._held_out[1]
                if self._held_out
                else validation_loss(trainer, held_out, limit, seed, base_alone=True)
            )
            self._held_out = validation_loss(trainer, held_out, limit, seed), base
            if self.log:
                self.log.validation(step, *self._held_out)
        if self.objective:
            with self.averaged():
                self.front.preview(self)

    def _asked_to_finish(self) -> bool:
        asked = (self.folder / FINISH).exists()
        (self.folder / FINISH).unlink(missing_ok=True)
        return asked


def _share(batch: int, processes: int) -> int:
    """The most that one process has of a batch."""
    return -(-batch // processes)


def _cell(model: comfy.model_patcher.ModelPatcher) -> int:
    """Pixels of a picture along one cell of its latent."""
    return int(model.get_model_object("latent_format").spacial_downscale_ratio)


def _some(count: int) -> list[int]:
    """At most MET indices of so many, evenly chosen."""
    return [place * count // MET for place in range(MET)] if count > MET else list(range(count))


def _largest(pairs: SampleSource) -> Sample:
    """The pair that needs most memory, as far as their sizes are known."""
    sizes = [math.prod(size) for size in pairs.sizes()] if isinstance(pairs, Sized) else [0]
    return pairs.sample(sizes.index(max(sizes)), torch.Generator())


def _mean(losses: list[float]) -> float | None:
    """To as many digits as the log keeps, so that a resumed run says the same."""
    return float(f"{sum(float(f'{loss:.6g}') for loss in losses) / len(losses):.6g}") if losses else None


def step_of(done: int, steps: int) -> Message:
    """How far a run is."""
    return Message("{done} of {steps}", done=done, steps=steps)


def _time(seconds: float) -> Message:
    minutes = round(seconds / 60)
    if minutes < 2:
        return Message("{seconds} s", seconds=f"{seconds:.0f}")
    if minutes < 120:
        return Message("{minutes} min", minutes=minutes)
    return Message("{hours} h {minutes} min", hours=minutes // 60, minutes=f"{minutes % 60:02}")
