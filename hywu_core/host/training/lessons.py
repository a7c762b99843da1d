"""Lessons in weight space with the host: old instructions on any pictures, encoded by its text encoder, and who teaches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import comfy.model_patcher
import torch
from torch import Tensor

from ...condition import CLIP_VISION, HIDDEN_STATES, REFERENCE_LATENT, Condition, assemble, expected_parts
from ...config import GeneratorConfig
from ...errors import HywuError, MatchError
from ...layout import all_targets
from ...messages import Message
from ...training import GeneratorTrainable, Sample, TrainConfig
from ...training.options import PRECISIONS
from ...training.recall import NAME as RECALL
from ...training.weight_space import Lesson, Likeness, Teacher, likeness
from .. import memory
from ..conditions import from_host
from ..memory import GeneratorHandle
from .identity import digest

MEMORY, LORAS = "memory", "loras"  # names of lessons, in logs
SHOWN_AS = {MEMORY: Message("memory"), LORAS: Message("loras"), RECALL: Message("predictions")}
LOOKED_AT = (
    4  # pictures on which a report compares, and on which an instruction is asked where each costs an encoder's pass
)


class LessonError(HywuError):
    """There is nothing to keep or to learn, or it is not what it must be."""


class Picture(NamedTuple):
    """Something to ask an instruction about."""

    latent: Tensor | None = None  # (1, C, ..., H, W)
    pixels: Tensor | None = None  # (1, H, W, 3), where an encoder is to see it
    vision: Any = None  # the host's CLIP_VISION_OUTPUT


class Encoding(NamedTuple):
    """What reads instructions and pictures."""

    clip: Any
    model: comfy.model_patcher.ModelPatcher | None = None  # for generators that read the base's hidden states
    text_sees_source: bool = False


class Asked(Sequence):
    """Instructions on pictures, each laid out as a generator reads it only when it is its turn.

    Args:
        texts: of the instructions.
        conditions: for each of them, the same number of conditions, one for a picture.
        keys: of the instructions, for a teacher to know them by; by default their texts.
    """

    def __init__(
        self,
        texts: Sequence[str],
        conditions: Sequence[Sequence[Condition]],
        config: GeneratorConfig,
        keys: Sequence[str] | None = None,
    ):
        self.texts, self.conditions, self.config = tuple(texts), conditions, config
        self.keys, self.pictures = tuple(keys or texts), len(conditions[0]) if conditions else 0

    def __len__(self) -> int:
        return len(self.texts) * self.pictures

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        text, picture = divmod(index, self.pictures)
        tokens = assemble(self.conditions[text][picture], self.config)[0]
        return Sample(torch.empty(0), None, tokens.float().cpu(), self.keys[text])

    def of(self, text: int) -> list[Sample]:
        """One instruction on some of the pictures."""
        count = min(LOOKED_AT, self.pictures)
        return [self[text * self.pictures + place * self.pictures // count] for place in range(count)]

    def digest(self) -> str:
        """Of what is asked, to know a run's lessons again."""
        parts = {id(part.tokens): part.tokens for row in self.conditions for found in row for part in found.parts}
        return digest([self.texts, self.keys, self.pictures, *parts.values()])


class HostLesson(NamedTuple):
    """A lesson, and what the host must hold for it."""

    lesson: Lesson
    patchers: tuple[comfy.model_patcher.ModelPatcher, ...]
    identity: dict[str, Any]  # see `session.Task`


def ask(
    texts: Sequence[str],
    pictures: Sequence[Picture],
    encoding: Encoding,
    config: GeneratorConfig,
    keys: Sequence[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Asked:
    """Instructions on pictures, for a generator.

    Where the text encoder sees the picture, or the base is to be run, every instruction is asked on a few pictures only.

    Args:
        progress: called with (done, total) after every instruction; what it raises ends the work.
    Raises:
        ConditionError: if a generator reads what cannot be made of these.
        LessonError: without any picture for a generator that reads one.
    """
    kinds = {kind for kind, _ in expected_parts(config)}
    if kinds & {REFERENCE_LATENT, CLIP_VISION, HIDDEN_STATES} and not pictures:
        raise LessonError("This generator reads a picture beside the instruction. Give at least one, of anything.")
    pictures = list(pictures) or [Picture()]
    looks = HIDDEN_STATES in kinds
    rows = []
    with torch.inference_mode(False), torch.no_grad():
        for number, text in enumerate(texts):
            shown = some(pictures, number) if looks or encoding.text_sees_source else pictures
            words: Tensor | None = None
            row = []
            for picture in shown:
                if words is None or encoding.text_sees_source:
                    words = encode_text(encoding.clip, text, picture.pixels if encoding.text_sees_source else None)[0]
                row.append(_condition(words, picture, encoding.model if looks else None))
            rows.append(row)
            progress(number + 1, len(texts))
        asked = Asked(texts, rows, config, keys)
        if len(asked):
            # what does not fit the generator is said before the first step
            asked[0]
    return asked


def encode_text(clip: Any, text: str, pixels: Tensor | None = None) -> list:
    """An instruction as an entry of the host's CONDITIONING, with tensors that may take part in a backward pass."""
    with torch.inference_mode(False), torch.no_grad():
        tokens = clip.tokenize(text) if pixels is None else clip.tokenize(text, images=[pixels])
        found = clip.encode_from_tokens(tokens, return_dict=True)
        own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in found.items()}
    return [own.pop("cond"), own]


def remembering(
    teacher: GeneratorHandle, pupil: GeneratorConfig, asked: Asked, config: TrainConfig, precision: str
) -> HostLesson:
    """The lesson to write for what is asked what a teacher writes: the generator before, or a larger one. The teacher is a
    frozen copy.

    Raises:
        MatchError: if the two do not write for the same weights, or do not read the same.
    """
    check_teacher(teacher, pupil)
    copy = memory.trainable_copy(teacher)
    patcher = memory.manage_training(copy)
    copy.requires_grad_(False)
    lesson = Lesson(
        MEMORY,
        asked,
        GeneratorTrainable(copy, PRECISIONS[precision]),
        config.memory,
        config.memory_batch,
        config.memory_schedule,
    )
    return HostLesson(lesson, (patcher,), {"teacher": teacher.fingerprint, "old_instructions": asked.digest()})


def check_teacher(teacher: GeneratorHandle, pupil: GeneratorConfig) -> None:
    """Make sure that a generator can learn from another. Sizes and ranks may differ.

    Raises:
        MatchError: naming what differs.
    """
    ours, theirs = (_weights(config) for config in (pupil, teacher.config))
    if ours != theirs:
        apart = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise MatchError(
            f"{teacher.name} cannot teach this generator: they write for other weights, such as {apart[0]} "
            f"({theirs.get(apart[0], 'none')} and {ours.get(apart[0], 'none')}; {len(apart)} differ). Both must be made for "
            "the same base and the same targets; only size and rank may differ."
        )
    parts = [config.hywu.get("condition", config.input_dim) for config in (pupil, teacher.config)]
    if parts[0] != parts[1]:
        raise MatchError(
            f"{teacher.name} cannot teach this generator: it reads {parts[1]}, this one {parts[0]}. Both must be made with "
            "the same condition_source for the same base."
        )


def kept(asked: Asked, pupil: Teacher, teacher: Teacher) -> list[Likeness]:
    """For every instruction, how like what the pupil writes is to what the teacher writes."""
    found = []
    with torch.no_grad():
        for text in range(len(asked.texts)):
            samples = asked.of(text)
            found.append(likeness(pupil.lora(samples), teacher.lora(samples)))
    return found


def table(rows: Sequence[tuple[str, Likeness]], heading: Message, most: int | None = None) -> Message:
    """Likenesses as tab-separated text, the least kept first; at most so many of them, and how many are left out."""
    lines = [
        f"{text}\t{found.distance:.4f}\t{found.cosine:.4f}\t{found.strength:.3f}"
        for text, found in sorted(rows, key=lambda row: -row[1].distance)
    ]
    shown: str = "\n".join(lines[:most])
    if len(lines[:most]) < len(lines):
        left = len(lines) - len(lines[:most])
        shown = Message("{rows}\n... and {count} that changed less: see report.txt", rows=shown, count=left)
    return Message("{heading}\tdistance\tcosine\tstrength\n{rows}", heading=heading, rows=shown)


def some(pictures: Sequence[Picture], number: int) -> list[Picture]:
    """As many as are affordable, others for every instruction."""
    return [pictures[(number * LOOKED_AT + place) % len(pictures)] for place in range(LOOKED_AT)]


def _condition(words: Tensor, picture: Picture, model: comfy.model_patcher.ModelPatcher | None) -> Condition:
    options = {} if picture.latent is None else {"reference_latents": [picture.latent]}
    return from_host([[words, options]], picture.vision, model=model)


def _weights(config: GeneratorConfig) -> dict[str, tuple[int, ...]]:
    """{target of every layer: the shape of its weight, experts first}."""
    return {name: (*target.up_shape(1)[:-1], target.in_features) for name, target in all_targets(config)}
