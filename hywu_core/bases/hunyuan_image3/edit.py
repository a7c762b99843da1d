"""An edit request: what the node HunyuanImage-3 Edit puts into a CONDITIONING, and how pictures and text become it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence as Many
from typing import NamedTuple

import comfy.model_patcher
import torch
from torch import Tensor

from ...errors import ConditionError
from . import vision
from .config import BaseConfig
from .sequence import Grid, Request, Sequence, SequenceBuilder, SourcePicture, Start
from .sizes import AUTO, Size, buckets, fit, nearest, parse_size
from .vae import LatentVAE

KEY = "hunyuan_image3"  # of a CONDITIONING's options
MOST_PICTURES = 3


class Encoder(NamedTuple):
    """Everything that reads an instruction and its pictures; HYWU_HI3_ENCODER between nodes."""

    builder: SequenceBuilder
    config: BaseConfig
    tower: comfy.model_patcher.ModelPatcher
    tower_dtype: torch.dtype
    vae: LatentVAE
    system_prompt: str | None  # None: the base's folder has none


class Edit(NamedTuple):
    """One row of guidance: the request, and its pictures as the model reads them."""

    latents: tuple[Tensor, ...]  # (1, C, 1, h, w), as the autoencoder gives them
    vision: tuple[Tensor, ...]  # (1, slots, H)
    request: Request
    builder: SequenceBuilder
    config: BaseConfig
    unconditional: bool = False
    size: Size | None = None  # of the image; None: as the model chooses
    batch: int = 1  # images to make of it

    @property
    def default_size(self) -> Size:
        """The first picture's bucket, or a square."""
        side = self.config.image_base_size
        pictures = self.request.pictures
        return buckets(side)[pictures[0].ratio] if pictures else Size(side, side)

    def latent(self, size: Size) -> Tensor:
        """An empty latent of that many pixels, for the whole batch: (batch, C, 1, h, w)."""
        factor = self.config.vae.ffactor_spatial
        return torch.zeros(self.batch, self.config.vae.latent_channels, 1, size.height // factor, size.width // factor)

    def sequence(self, grid: Grid) -> Sequence:
        """The image pass for a latent of this grid.

        Raises:
            ConditionError: if the sequence is longer than the model's positions.
        """
        pixels = Size(*(side * self.config.vae.ffactor_spatial for side in grid))
        ratio = nearest(pixels, self.config.image_base_size)
        return self._checked(self.builder.image(self.request, ratio, grid, self.unconditional))

    def prefix_length(self) -> int:
        """Tokens before the image, whatever its size; the sequence's length is only checked where the size is known."""
        return self.builder.image(self.request, 0, (1, 1)).layout.image.image.start

    def ratio_sequence(self) -> Sequence:
        """The pass that the ratio and a generator's condition come from."""
        return self._checked(self.builder.ratio(self.request))

    def reason_sequence(self, start: Start) -> Sequence:
        """The pass that reasoning goes on from."""
        return self._checked(self.builder.reason(self.request, start))

    def _checked(self, sequence: Sequence) -> Sequence:
        most = min(self.config.max_position_embeddings, self.config.sampling.max_length)
        if sequence.layout.length > most:
            raise ConditionError(
                f"The edit takes {sequence.layout.length} tokens, but the model reads at most {most}. Use fewer pictures, "
                "a shorter reasoning text, or a smaller size."
            )
        return sequence


class Wishes(NamedTuple):
    """What an artist may ask for beside the instruction and the pictures."""

    reasoning: str | None = None  # in <think> and <recaption> tags
    size: str = AUTO  # see `sizes.parse_size`
    fit: str = AUTO  # how pictures come to their bucket; auto: stretched where the size is automatic, as the reference
    seed: int = 0  # of latents drawn from their posterior
    reference_compatible: bool = False  # draw latents; write an empty reasoning as an empty answer
    batch: int = 1
    system_prompt: str | None = None  # another than the base's own


FITS = (AUTO, "crop", "stretch")


def make_edit(
    encoder: Encoder,
    prompt: str,
    pictures: Many[Tensor],
    wishes: Wishes | None = None,
    source: torch.Generator | None = None,
) -> Edit:
    """Encode an instruction and its source pictures; the conditional row.

    Args:
        pictures: IMAGEs (B, H, W, 3) in [0, 1], together up to 3 pictures.
        source: of random numbers, instead of one of the wishes' seed.
    Raises:
        ConditionError: for no instruction, too many pictures, or a size that is none.
    """
    wishes = wishes or Wishes()
    pictures = [picture[index : index + 1, ..., :3] for picture in pictures for index in range(len(picture))]
    if not prompt.strip():
        raise ConditionError("The instruction is empty. Write what is to be changed.")
    if len(pictures) > MOST_PICTURES:
        raise ConditionError(f"There are {len(pictures)} source pictures, but the model reads at most {MOST_PICTURES}.")
    config, compatible = encoder.config, wishes.reference_compatible
    system_prompt = encoder.system_prompt if wishes.system_prompt is None else wishes.system_prompt
    if system_prompt is None:
        raise ConditionError(
            "The base's folder has no system_prompt.py, and the generator was trained with that prompt. Copy it from "
            "the repository of HunyuanImage-3.0-Instruct, or write a system prompt of your own (or a system_prompt.txt)."
        )
    bucket = parse_size(wishes.size, config.image_base_size)
    stretch = wishes.fit == "stretch" or (wishes.fit == AUTO and bucket is None)
    source = (source or torch.Generator().manual_seed(wishes.seed)) if compatible else None
    read = [_read_picture(encoder, picture, stretch, source) for picture in pictures]
    reasoning = wishes.reasoning if compatible or (wishes.reasoning or "").strip() else None
    request = Request(prompt, tuple(facts for facts, _, _ in read), reasoning, system_prompt)
    return Edit(
        tuple(latent for _, latent, _ in read),
        tuple(tokens for _, _, tokens in read),
        request,
        encoder.builder,
        config,
        size=None if bucket is None else buckets(config.image_base_size)[bucket],
        batch=wishes.batch,
    )


def for_sampler(edit: Edit) -> tuple[list, list, dict[str, Tensor]]:
    """Positive and negative CONDITIONING, and an empty LATENT: of the size asked for, else of the first picture's bucket."""
    latent = {"samples": edit.latent(edit.size or edit.default_size)}
    return to_conditioning(edit), to_conditioning(edit._replace(unconditional=True)), latent


def to_conditioning(edit: Edit) -> list:
    """A CONDITIONING of the host. Everything is in the options; its tensor only shows what other nodes did to it."""
    return [[_seal(edit), {KEY: edit}]]


def opened(tensor: Tensor, edit: Edit) -> Edit:
    """The edit of a CONDITIONING's entry. Zeroed out, it is the one without the instruction.

    Raises:
        ConditionError: if the entry was averaged or joined with another, which the options do not show.
    """
    if not tensor.any():
        return edit._replace(unconditional=True)
    if tensor.shape[-2:] != (1, 1) or not torch.all(tensor.cpu().float() == _seal(edit)):
        raise ConditionError(
            "A CONDITIONING of HunyuanImage-3 Edit cannot be averaged or joined with another one: the model reads one "
            "instruction with its pictures. Say it all in one prompt, and wire that node's outputs directly."
        )
    return edit


def from_conditioning(conditioning: list) -> Edit:
    """The edit in a CONDITIONING.

    Raises:
        ConditionError: if there is none, or more than one.
    """
    found = [opened(tensor, options[KEY]) for tensor, options in conditioning if KEY in options]
    if len(found) != 1 or len(conditioning) != 1 or found[0].unconditional:
        raise ConditionError(
            "This needs one CONDITIONING from the node HunyuanImage-3 Edit (its positive output, as it is), not the negative "
            "one, and not combined with others or zeroed out."
        )
    return found[0]


def _seal(edit: Edit) -> Tensor:
    """(1, 1, 1), another number for another request, and never 0."""
    told = repr((edit.request, edit.unconditional)).encode()
    return torch.tensor(1 + zlib.crc32(told) / 2**32).view(1, 1, 1)


def _read_picture(
    encoder: Encoder, picture: Tensor, stretch: bool, source: torch.Generator | None
) -> tuple[SourcePicture, Tensor, Tensor]:
    config, vae = encoder.config, encoder.vae
    ratio = nearest(Size(*picture.shape[1:3]), config.image_base_size)
    fitted = fit(picture, buckets(config.image_base_size)[ratio], stretch)
    latent = vae.encode(fitted) if source is None else vae.sample_posterior(fitted, source)
    pixels, patches = vision.preprocess(picture, config)
    tokens = vision.look(encoder.tower, pixels, encoder.tower_dtype)
    return SourcePicture(tuple(latent.shape[-2:]), patches, ratio), latent.float(), tokens
