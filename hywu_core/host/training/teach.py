"""One new edit for a generator that stays with what it knows; and a generator from LoRA files. Behind nodes and scripts.

Both are sessions like any other: they can be cancelled, go on bit for bit, and leave a generator whenever they end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_patcher
import torch
from torch import Tensor

from ...files.atomic import atomic_write
from ...files.text import read_text
from ...lineage import instructions as as_kept
from ...messages import Message
from ...training import SessionOptions, TrainConfig
from ...training.recall import Recall
from ..conditions import from_host
from ..memory import GeneratorHandle
from ..new_generator import check_fits
from .frozen import refuse_untrainable
from .lessons import Asked, Encoding, HostLesson, LessonError, Picture, ask, encode_text, kept, remembering, some, table
from .lora_lessons import collect, learning
from .pair_lists import PICTURES, PairError
from .pairs_of_lists import HostPairs, host_pairs
from .session import Front, Session, Task

# as measured in docs/evidence.md: what the base predicts tells a change that is seen from one that is not, so that the
# distance in weight space need not be held as small everywhere
TEACH = TrainConfig(
    steps=240, batch=8, learning_rate=3e-4, warmup=24, memory=2.0, memory_batch=8, prediction=20.0, prediction_batch=8
)
LEARN = TrainConfig(steps=600, batch=8, learning_rate=1e-3, warmup=30, diffusion=0.0, loras=1.0)
FEW = 8  # pairs below which a new edit is rarely learned
ASKED_ABOUT = 64  # pictures at most
WORDINGS = 8  # of a new edit, that each of its pairs meets at most
REPORT = "report.txt"  # in a run's folder
SHOWN = 5  # old instructions on a card
AS_TRAINED, TOLD, BLIND = "as the generator was trained", "told", "blind"


class Result(NamedTuple):
    """What teaching gives."""

    handle: GeneratorHandle
    report: Message
    summary: Message  # the same with the edits that changed most, for a card
    losses: list[float]
    steps: int


class NewEdit(NamedTuple):
    """Pictures before and after one edit, each (1, H, W, 3 or more) in [0, 1], and what asks for it, in several words."""

    before: Sequence[Tensor]
    after: Sequence[Tensor]
    wordings: Sequence[str]


class Studio(NamedTuple):
    """The base, and what encodes for it."""

    model: comfy.model_patcher.ModelPatcher
    clip: Any
    vae: Any = None
    clip_vision: Any = None
    text_sees_source: bool = False

    def encoding(self) -> Encoding:
        """What reads instructions."""
        return Encoding(self.clip, self.model, self.text_sees_source)

    def picture(self, pixels: Tensor) -> Picture:
        """A picture (1, H, W, C) as instructions are asked about it."""
        pixels = pixels[..., :3]
        with torch.inference_mode(False), torch.no_grad():
            latent = self.vae.encode(pixels.clone()).clone()
            seen = None if self.clip_vision is None else self.clip_vision.encode_image(pixels)
        return Picture(latent, pixels, seen)


def prepare_teaching(
    studio: Studio,
    handle: GeneratorHandle,
    new: NewEdit,
    old: Sequence[str] = (),
    pictures: Sequence[Tensor] = (),
    config: TrainConfig = TEACH,
    options: SessionOptions = SessionOptions(),  # noqa: B008 (a value, never changed)
    regime: str = AS_TRAINED,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Task, HostPairs]:
    """What a session of teaching is about, everything checked that can be wrong.

    Args:
        old: instructions to keep; by default those that the generator's file names.
        pictures: to ask them about in weight space, (1, H, W, C) each; by default those of the new edit.
        regime: whether the base reads the instruction.
    Raises:
        LessonError: without old instructions, or if the new one is among them. PairError: for pairs that cannot be used.
        MatchError: if generator and base do not fit, or the base cannot be trained on.
    """
    check_fits(studio.model.model, handle.config)
    refuse_untrainable(studio.model.model)
    if not config.memory:
        raise LessonError(
            "With a memory of 0 the old edits would be forgotten. Give it a weight, or use Train HY-WU Generator instead."
        )
    wordings = as_kept(new.wordings)
    texts = old_instructions(handle, old, wordings)
    _check_pairs(new)
    sources = [studio.picture(pixels) for pixels in new.before]
    targets = [studio.picture(pixels).latent for pixels in new.after]
    told = _told(handle, regime)
    pairs = _pairs(studio, handle, _worded(wordings, sources, targets), told)
    about = [studio.picture(pixels) for pixels in pictures[:ASKED_ABOUT]] if len(pictures) else sources[:ASKED_ABOUT]
    asked = ask(texts, about, studio.encoding(), handle.config, progress=progress)
    lesson = remembering(handle, handle.config, asked, config, options.precision)
    provenance = {"regime": TOLD if told else BLIND}
    recall = None
    if config.prediction:
        # the sources stand for what the old edits make of them, under noise: nobody has those pictures
        shown = [(text, picture, picture.latent) for n, text in enumerate(texts) for picture in some(sources, n)]
        recall = Recall(
            _pairs(studio, handle, shown, told), lesson.lesson.teacher, config.prediction, config.prediction_batch
        )
    identity = {**pairs.identity(), **provenance}
    task = Task(
        studio.model,
        handle,
        pairs,
        None,
        identity,
        provenance,
        instructions=wordings,
        known=texts,
        lessons=(lesson,),
        recall=recall,
        kind="taught",
    )
    return task, pairs


def prepare_learning(
    studio: Studio,
    handle: GeneratorHandle,
    folder: Path,
    pictures: Sequence[Tensor],
    config: TrainConfig = LEARN,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Task:
    """What a session of learning from LoRA files is about.

    Args:
        folder: see `lora_lessons`. pictures: to ask their instructions about, for a generator that reads pictures.
    Raises:
        LessonError: naming every file that cannot be used, and why. MatchError: if generator and base do not fit.
    """
    check_fits(studio.model.model, handle.config)
    if len(pictures) and studio.vae is None:
        raise LessonError(
            "The pictures cannot be encoded without a VAE. Wire the base's VAE, or leave the pictures out."
        )
    lesson, texts = lora_lesson(
        studio.model,
        handle,
        folder,
        [studio.picture(pixels) for pixels in pictures[:ASKED_ABOUT]],
        studio.encoding(),
        config,
        progress,
    )
    return Task(
        studio.model, handle, None, None, {}, {}, instructions=texts, lessons=(lesson,), kind="learned from LoRAs"
    )


def lora_lesson(
    model: comfy.model_patcher.ModelPatcher,
    handle: GeneratorHandle,
    folder: Path,
    pictures: Sequence[Picture],
    encoding: Encoding,
    config: TrainConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[HostLesson, tuple[str, ...]]:
    """The lesson of a folder of LoRAs, and their instructions.

    Raises:
        LessonError: naming every file that cannot be used, and why.
    """
    loras = collect(folder, model.model, handle.config)
    texts = [text for found in loras for text in found.instructions]
    keys = [found.path.name for found in loras for _ in found.instructions]
    asked = ask(texts, pictures, encoding, handle.config, keys, progress)
    return learning(loras, asked, config), tuple(texts)


def old_instructions(handle: GeneratorHandle, given: Sequence[str], new: Sequence[str] = ()) -> tuple[str, ...]:
    """The instructions to keep: those given, or those that the generator's file names.

    Args:
        new: those to be taught, which must be others.
    Raises:
        LessonError: if there are none, or a new one is among them, or the new one is empty.
    """
    texts = as_kept(given) or as_kept(handle.config.hywu.get("instructions", ()))
    if not texts:
        raise LessonError(
            f"There are no old instructions to keep: the file of {handle.name} names none, and none were given. Write the "
            "instructions that it knows into old_instructions, one on each line."
        )
    known = {text.casefold() for text in texts}
    twice = [text for text in new if text.casefold() in known]
    if twice:
        raise LessonError(
            f"{twice[0]!r} is among the old instructions, so it would be kept as it is and taught anew at once. Word the new "
            "edit otherwise, or give the old instructions without it."
        )
    return texts


def do(task: Task, config: TrainConfig, options: SessionOptions, folder: Path, front: Front, name: str) -> Result:
    """Do the rest of a session of teaching or learning, and report.

    Raises:
        StoppedError, TrainingError, SaveError: see `Session`.
    """
    with torch.inference_mode(False), torch.enable_grad():
        session = Session(task, config, options, folder, front)
        try:
            session.run()
            session.load()
            with session.averaged():
                report, summary = _reports(session)
            with atomic_write(folder / REPORT) as temporary:
                temporary.write_text(report, encoding="utf-8")
            return Result(session.result(name), report, summary, session.losses, session.trainer.done)
        finally:
            session.release()


def _reports(session: Session) -> tuple[Message, Message]:
    """What the session did to new and old, edit by edit; and the same in short."""
    (found,) = session.task.lessons
    asked: Asked = found.lesson.samples
    pupil, teacher = session.trainer.trainable, found.lesson.teacher
    rows = list(zip(asked.texts, kept(asked, pupil, teacher), strict=True))
    if not session.objective:
        whole, short = (table(rows, Message("instruction, against its LoRA"), most) for most in (None, SHOWN))
        return whole, short
    measured = [session.losses_of(one) for one in (None, teacher, pupil)]
    losses = "\t".join([session.task.instructions[0], *(f"{loss:.5f}" for loss in measured)])
    whole, short = (
        Message(
            "new edit\tloss of the base\tbefore\tnow\n{losses}\n\n{old}",
            losses=losses,
            old=table(rows, Message("old instruction, against before"), most),
        )
        for most in (None, SHOWN)
    )
    return whole, short


def _check_pairs(new: NewEdit) -> None:
    count = len(new.before)
    if not as_kept(new.wordings):
        raise PairError("The new edit has no instruction. Write what asks for it, another wording on each line.")
    if count != len(new.after):
        raise PairError(
            f"There are {count} pictures before the edit but {len(new.after)} after it. Each needs exactly one."
        )
    if count < 2:
        raise PairError(
            f"There {'is one pair' if count else 'are no pairs'} of the new edit, which says nothing of what the edit is on "
            f"other pictures. Give at least {FEW}."
        )
    for number, (before, after) in enumerate(zip(new.before, new.after, strict=True), 1):
        if before.shape[1:3] != after.shape[1:3]:
            sizes = [f"{picture.shape[2]} x {picture.shape[1]}" for picture in (before, after)]
            raise PairError(
                f"Pair {number} is {sizes[0]} before and {sizes[1]} after the edit. Scale both to one size."
            )
    if all(torch.equal(before[..., :3], after[..., :3]) for before, after in zip(new.before, new.after, strict=True)):
        raise PairError(
            "In every pair, both pictures are the same: nothing is edited. Wire the edited pictures into after."
        )
    if count < FEW:
        logging.warning("HY-WU: %d pairs are few for a new edit; %d to 64 are right.", count, FEW)


Shown = tuple[str, Picture, Tensor]  # an instruction, a source, and the latent of the edited picture


def _worded(wordings: Sequence[str], sources: Sequence[Picture], targets: Sequence[Tensor]) -> list[Shown]:
    """Every pair in some of the wordings, others for every pair."""
    return [
        (wordings[(number + place) % len(wordings)], source, target)
        for number, (source, target) in enumerate(zip(sources, targets, strict=True))
        for place in range(min(WORDINGS, len(wordings)))
    ]


def _pairs(studio: Studio, handle: GeneratorHandle, shown: Sequence[Shown], told: bool) -> HostPairs:
    """What is shown as pairs; `told`: the base reads the instruction."""
    encode = partial(encode_text, studio.clip)
    if not studio.text_sees_source:
        encode = cache(encode)
    latents, positive, reads = [], [], []
    for text, source, edited in shown:
        seen = (source.pixels,) if studio.text_sees_source else ()
        words, extra = encode(text, *seen)
        silent = (words, extra) if told else encode("", *seen)
        here = {"reference_latents": [source.latent]}
        latents.append({"samples": edited})
        positive.append([[silent[0], silent[1] | here]])
        reads.append(_reads([words, extra | here], source))
    return host_pairs(studio.model, handle.config, latents, positive, reads)


def _told(handle: GeneratorHandle, regime: str) -> bool:
    if regime == AS_TRAINED:
        training = handle.config.hywu.get("training")
        regime = training.get("regime", TOLD) if isinstance(training, dict) else TOLD
    return regime != BLIND


def _reads(entry: list, source: Picture) -> Any:
    """What the generator reads of a pair: CONDITIONING, or a whole condition where there is more."""
    return [entry] if source.vision is None else from_host([entry], source.vision)


def lines(texts: Sequence[str]) -> list[str]:
    """Texts of several lines as single ones."""
    return [line for text in texts for line in text.splitlines()]


def read_lines(file: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        LessonError: if it cannot be read.
    """
    return read_text(file, LessonError, "Save it as UTF-8.").splitlines()


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder.

    Raises:
        PairError: if there are none.
    """
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURES)
    if not found:
        raise PairError(f"There are no pictures in {folder}.")
    return found


def with_steps(config: TrainConfig, **changes: Any) -> TrainConfig:
    """Defaults with some settings changed. What follows from others does so, unless it is given: a warm-up of a tenth of
    the steps, and as many old instructions as pairs.
    """
    changed = replace(config, **changes)
    following = {"warmup": changed.steps // 10, "memory_batch": changed.batch, "prediction_batch": changed.batch}
    return replace(changed, **{name: value for name, value in following.items() if name not in changes})
