"""A training session outside the server, from its description to the saved generator, in one or several processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ...condition import SOURCES, Condition
from ...config import GeneratorConfig
from ...errors import ConfigError, HywuError
from ...files.text import read_text
from ...lineage import instructions as as_kept
from ...training import SampleSource, TrainingError
from ...training.distributed import Accelerated, share_state
from ...training.options import RunConfig
from ...training.trainer import anywhere
from .. import memory
from ..memory import GeneratorHandle
from ..new_generator import generator_config
from . import base_files
from .frozen import refuse_untrainable
from .identity import digest
from .lessons import Encoding, HostLesson, Picture, ask, remembering
from .pairs_of_folder import EncodedPairs, Encoders, Pair, Reading, hold_out, read_pairs
from .session import RECENT, Front, Progress, Session, StoppedError, Task
from .teach import ASKED_ABOUT, lora_lesson, read_lines

# in a run's folder, beside its state and logs
GENERATOR, KEPT = "generator", "encoded"
SHOW_AGAIN = 10.0  # seconds
ENCODED_AGAIN = 50  # pairs


class Base(NamedTuple):
    model: Any
    encoders: Callable[[], Encoders]
    files: list[Path]
    name: str


class Pairs(Protocol):
    identity: dict[str, Any]  # see `Task`
    origin: str  # for the generator's file
    instructions: tuple[str, ...]  # of all pairs, each once

    def encode(self, progress: Callable[[int, int], None], communication: Accelerated) -> None:
        """Whatever must be done once before the first step; every process of a machine does its share."""

    def example(self) -> Condition:
        """A condition, from which a new generator learns what it will read."""

    def sources(self, config: GeneratorConfig) -> tuple[SampleSource, SampleSource | None]:
        """To train on, and held out, for a generator."""

    def pictures(self, count: int) -> list[Picture]:
        """At most so many sources, to ask instructions about; always the same."""


def train_on_folder(
    run: RunConfig,
    communication: Accelerated,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
    base_of: Callable[[RunConfig], Base] | None = None,
    pairs_of: Callable[[RunConfig, Base], Pairs] | None = None,
) -> Path:
    """Do the rest of a run and save its generator.

    Args:
        stop: asked after every step whether this process wants to end.
        base_of, pairs_of: where base and pairs come from; by default from the files and the folder that the run names.
    Returns:
        the generator's folder.
    Raises:
        StoppedError: after state and generator were written.
        HywuError: for bad input, or a loss that is not finite; what was reached is kept.
    """
    say = say if communication.main else lambda text: None
    front = ScriptFront(Path(run.output), stop, say)
    session = _prepare(run, communication, front, base_of or base_from_files, pairs_of or PairsOfFolder)
    try:
        share_state(session.trainer, communication)
        held_out = session.task.held_out or ()
        say(f"{len(session.task.pairs)} pairs, {len(held_out)} held out, {communication.processes} processes")
        try:
            session.run()
        except (StoppedError, TrainingError):
            # or the launcher would end the process that still writes the state
            communication.wait()
            raise
    finally:
        session.release()
    say(f"saved {front.generator_file(None)}")
    communication.wait()
    return front.generator_file(None)


class ScriptFront(Front):
    """A terminal."""

    def __init__(self, folder: Path, stop: Callable[[], bool], say: Callable[[str], None]):
        self.folder, self.stop, self.say_line = folder, stop, say
        self._next, self._first = 0.0, True

    def generator_file(self, step: int | None) -> Path:
        return self.folder / (GENERATOR if step is None else f"{GENERATOR}-{step:06}")

    def say(self, text: str) -> None:
        self.say_line(text)

    def show(self, progress: Progress) -> None:
        last = progress.done == progress.steps
        if self._first or last or progress.done % RECENT == 0 or time.monotonic() >= self._next:
            self._next, self._first = time.monotonic() + SHOW_AGAIN, False
            self.say_line(str(progress))

    def asked_to_stop(self) -> bool:
        return self.stop()

    def encoded(self, done: int, total: int) -> None:
        """After every pair that was encoded."""
        if done % ENCODED_AGAIN == 0 or done in (1, total) or time.monotonic() >= self._next:
            self._next = time.monotonic() + SHOW_AGAIN
            self.say_line(f"encoded {done}/{total} pairs")
        if self.stop():
            raise StoppedError("Stopped while encoding pairs. The same command goes on.")


class PairsOfFolder:
    """The pairs of a folder, or of two. See `Pairs`.

    Raises:
        ConfigError: if the run names none. PairError: naming file and line, for pairs that cannot be used.
    """

    def __init__(self, run: RunConfig, base: Base):
        refuse_untrainable(base.model.model)  # before hours of encoding
        pairs, held_out = _read(run)
        reading = Reading(
            run.side, run.regime, run.text_sees_source, run.guidance, run.background, run.buckets, run.caption_dropout
        )
        encoders = base_files.encoders_fingerprint(base.files, run.clip_type)
        self.base = base
        kept, measured = Path(run.output) / KEPT, reading._replace(caption_dropout=0.0)
        self.sets = [EncodedPairs(pairs, kept, encoders, reading), EncodedPairs(held_out, kept, encoders, measured)]
        self.identity = {"encoders": encoders, **_identity(pairs), "held_out": digest(_identity(held_out).items())}
        self.origin = f"{len(pairs) + len(held_out)} pairs {self.identity['pictures']}"
        self.instructions = as_kept(text for pair in pairs for text in pair.wordings)

    def encode(self, progress: Callable[[int, int], None], communication: Accelerated) -> None:
        encoders = None
        for some in self.sets:
            mine = [i for i in some.missing() if i % communication.local_processes == communication.local_rank]
            if mine:
                encoders = encoders or self.base.encoders()
                some.encode(mine, encoders, progress)

    def example(self) -> Condition:
        return self.sets[0].condition(0)

    def sources(self, config: GeneratorConfig) -> tuple[SampleSource, SampleSource | None]:
        for some in self.sets:
            some.config = config
        return self.sets[0], self.sets[1] if len(self.sets[1]) else None

    def pictures(self, count: int) -> list[Picture]:
        return [Picture(*found) for found in self.sets[0].sources(count)]


def base_from_files(run: RunConfig) -> Base:
    """The base whose files a run names.

    Raises:
        CheckpointError: naming a file that is missing or that the host cannot read.
    """
    base_files.check_files(run)
    name = Path(run.model or run.checkpoint).name
    return Base(base_files.load_model(run), lambda: base_files.load_encoders(run), base_files.base_files(run), name)


def _prepare(
    run: RunConfig, communication: Accelerated, front: ScriptFront, base_of: Callable, pairs_of: Callable
) -> Session:
    """Everything before the first step. Processes agree after each stage, so that none waits for one that failed."""

    def read() -> tuple[Base, Pairs]:
        base = base_of(run)
        return base, pairs_of(run, base)

    def session() -> Session:
        handle = _generator(run, base.model, pairs)
        sources = pairs.sources(handle.config)
        provenance = {"regime": run.regime, "data": pairs.origin, "base": base.name}
        identity = {**pairs.identity, **run.identity()}
        lessons, known, learned = _lessons(run, base, pairs, handle)
        texts = (*(pairs.instructions if run.training.diffusion else ()), *learned)
        task = Task(base.model, handle, *sources, identity, provenance, texts, known, lessons)
        return Session(task, run.training, run.session(), Path(run.output), front, communication)

    base, pairs = _together(communication, read)
    _together(communication, lambda: pairs.encode(front.encoded, communication))
    return _together(communication, session)


def _lessons(
    run: RunConfig, base: Base, pairs: Pairs, handle: GeneratorHandle
) -> tuple[tuple[HostLesson, ...], tuple[str, ...], tuple[str, ...]]:
    """The lessons in weight space that a run asks for, the instructions of its memory, and those of LoRA files."""
    config = run.training
    if not (config.memory or config.loras):
        return (), (), ()
    pictures = pairs.pictures(ASKED_ABOUT)
    encoding = Encoding(base.encoders().clip, base.model, run.text_sees_source)
    lessons, known, learned = [], (), ()
    if config.memory:
        teacher = memory.load(Path(run.teacher)) if run.teacher else handle
        given = read_lines(Path(run.old_instructions)) if run.old_instructions else ()
        known = as_kept(given) or as_kept(teacher.config.hywu.get("instructions", ())) or pairs.instructions
        asked = ask(known, pictures, encoding, handle.config)
        lessons.append(remembering(teacher, handle.config, asked, config, run.dtype))
    if config.loras:
        lesson, learned = lora_lesson(base.model, handle, Path(run.lora_files), pictures, encoding, config)
        lessons.append(lesson)
    return tuple(lessons), known, learned


def _read(run: RunConfig) -> tuple[list[Pair], list[Pair]]:
    if not run.pairs:
        raise ConfigError("There is nothing to train on. Give a folder of pairs (--pairs).")
    pairs = read_pairs(Path(run.pairs), run.side, run.background)
    if run.held_out:
        return pairs, read_pairs(Path(run.held_out), run.side, run.background)
    return hold_out(pairs, run.held_out_share)


def _identity(pairs: Sequence[Pair]) -> dict[str, str]:
    return {
        "pictures": digest([[pair.source_digest, pair.target_digest] for pair in pairs]),
        "instructions": digest([list(pair.wordings) if pair.others else pair.instruction for pair in pairs]),
    }


def _generator(run: RunConfig, model: Any, pairs: Pairs) -> GeneratorHandle:
    """The generator to go on from, or a new one."""
    path = Path(run.generator)
    if run.generator and path.suffix != ".json":
        return memory.load(path)
    if run.generator:
        config = GeneratorConfig.from_json(read_text(path, ConfigError, ""), str(path))
    else:
        config = _new_config(run, model, pairs.example())
    return memory.new(config, run.training.seed)


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
