"""Sequences: the instruct template as token ids, and what each stretch of them is.

    <bos> system \n\n User: [picture ...] instruction \n\n Assistant: [reasoning] tail

A picture is <boi><size><ratio><timestep> latent-tokens <separator> vision-slots <eoi>. The tail is one of three: an image to
be generated, the question for its ratio (also the pass that a generator's condition is read from), or the start of reasoning.
Text is encoded segment by segment. Source: reference facts 3.1 and 3.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from .tokenizer import Tokenizer

Grid = tuple[int, int]  # rows, columns
Start = Literal["think", "recaption"]
_TAGGED = re.compile(r"<(?P<tag>think|recaption)>(?P<inner>.*?)</(?P=tag)>", re.DOTALL)


class Span(NamedTuple):
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


class SourcePicture(NamedTuple):
    """What the sequence needs to know of a source picture."""

    latent: Grid  # of its latent
    patches: Grid  # that the vision tower sees
    ratio: int  # index of its bucket


class PictureRun(NamedTuple):
    """Where a source picture lies."""

    timestep: int
    latent: Span
    vision: Span  # all slots, used or not
    latent_grid: Grid
    patch_grid: Grid

    @property
    def joint(self) -> Span:
        """What attends to each other in both directions."""
        return Span(self.latent.start, self.vision.stop)


class ImageRun(NamedTuple):
    """Where the image that is generated lies."""

    timestep: int
    guidance: int | None
    timestep_r: int | None
    image: Span
    grid: Grid


class Layout(NamedTuple):
    """What the tokens of a sequence are; the same for the conditional and the unconditional row."""

    length: int
    pictures: tuple[PictureRun, ...]
    image: ImageRun | None

    def without_tail(self) -> Layout:
        """Only what the generated image depends on: nothing that follows it."""
        return self if self.image is None else self._replace(length=self.image.image.stop)


class Sequence(NamedTuple):
    """Token ids and their layout."""

    ids: tuple[int, ...]
    layout: Layout


class Request(NamedTuple):
    """An edit as the model reads it."""

    prompt: str
    pictures: tuple[SourcePicture, ...] = ()
    reasoning: str | None = None  # None: nothing; "" is an empty answer, as the reference writes it
    system_prompt: str = ""


class _Builder:
    """Appends segments, and remembers where pictures lie."""

    def __init__(self, tokenizer: Tokenizer, slots: int, unconditional: bool):
        self._tokenizer, self._slots, self._unconditional = tokenizer, slots, unconditional
        self.ids = [tokenizer.special.bos]
        self.pictures: list[PictureRun] = []
        self.image: ImageRun | None = None

    def text(self, text: str, instruction: bool = False) -> None:
        """A segment; the unconditional row has placeholders for what belongs to the instruction."""
        ids = self._tokenizer.encode(text)
        if instruction and self._unconditional:
            ids = [self._tokenizer.special.cfg] * len(ids)
        self.ids += ids

    def token(self, *ids: int) -> int:
        """Special tokens; where the last one is."""
        self.ids += ids
        return len(self.ids) - 1

    def run(self, token: int, length: int) -> Span:
        """The same token many times."""
        start = len(self.ids)
        self.ids += [token] * length
        return Span(start, len(self.ids))

    def picture(self, picture: SourcePicture) -> None:
        special = self._tokenizer.special
        timestep = self.token(special.boi, special.size, special.ratios[picture.ratio], special.timestep)
        latent = self.run(special.image, picture.latent[0] * picture.latent[1])
        self.token(special.separator)
        vision = self.run(special.image, self._slots)
        self.token(special.eoi)
        self.pictures.append(PictureRun(timestep, latent, vision, picture.latent, picture.patches))

    def generated(self, ratio: int, grid: Grid, distilled: bool) -> None:
        """The image that is to be generated, as an answer."""
        special = self._tokenizer.special
        timestep = self.token(special.answer, special.boi, special.size, special.ratios[ratio], special.timestep)
        guidance = self.token(special.guidance) if distilled else None
        timestep_r = self.token(special.timestep_r) if distilled else None
        image = self.run(special.image, grid[0] * grid[1])
        self.token(special.eoi, special.answer_end)
        self.text("\n\n")
        self.image = ImageRun(timestep, guidance, timestep_r, image, grid)

    def built(self) -> Sequence:
        return Sequence(tuple(self.ids), Layout(len(self.ids), tuple(self.pictures), self.image))


class SequenceBuilder(NamedTuple):
    tokenizer: Tokenizer
    slots: int  # of the vision tower for each picture
    distilled: bool = False
    drop_think: bool = False

    def image(self, request: Request, ratio: int, grid: Grid, unconditional: bool = False) -> Sequence:
        """The pass that generates an image of a bucket, whose latent has this grid."""
        builder = self._start(request, unconditional)
        builder.generated(ratio, grid, self.distilled)
        return builder.built()

    def ratio(self, request: Request) -> Sequence:
        """The pass whose last token predicts the ratio, and whose hidden states are a generator's condition."""
        builder = self._start(request, unconditional=False)
        special = self.tokenizer.special
        builder.token(special.answer, special.boi, special.size)
        return builder.built()

    def reason(self, request: Request, start: Start) -> Sequence:
        """The pass that reasoning goes on from."""
        builder = self._start(request, unconditional=False)
        builder.token(getattr(self.tokenizer.special, start))
        return builder.built()

    def _start(self, request: Request, unconditional: bool) -> _Builder:
        builder = _Builder(self.tokenizer, self.slots, unconditional)
        if request.system_prompt:
            builder.text(request.system_prompt)
            builder.text("\n\n")
        builder.text("User: ")
        for picture in request.pictures:
            builder.picture(picture)
        builder.text(request.prompt, instruction=True)
        builder.text("\n\n")
        builder.text("Assistant: ")
        if request.reasoning is not None:
            self._reasoning(builder, request.reasoning)
        return builder

    def _reasoning(self, builder: _Builder, text: str) -> None:
        special = self.tokenizer.special
        pieces = list(split_reasoning(text))
        if all(tag is None for tag, _ in pieces):  # no complete pair of tags: an answer of its own, and one segment
            builder.text(f"<answer>{text}</answer>", instruction=True)
            return
        for tag, inner in pieces:
            if tag == "think" and self.drop_think:
                continue
            if tag is not None:
                builder.token(getattr(special, tag))
            builder.text(inner, instruction=True)
            if tag is not None:
                builder.token(getattr(special, f"{tag}_end"))


def split_reasoning(text: str) -> Iterable[tuple[str | None, str]]:
    """Reasoning as (tag, text) pieces in their order; what stands outside tags has none."""
    end = 0
    for found in _TAGGED.finditer(text):
        if found.start() > end:
            yield None, text[end : found.start()]
        yield found["tag"], found["inner"]
        end = found.end()
    if end < len(text):
        yield None, text[end:]
