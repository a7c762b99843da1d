"""Conditions from what the host's nodes already computed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..condition import CLIP_VISION, CONDITIONING, REFERENCE_LATENT, Condition, ConditionPart
from ..errors import ConditionError


def from_host(conditioning: list, clip_vision_output: Any | None = None, instruction: str = "") -> Condition:
    """The condition that a CONDITIONING, and optionally a CLIP_VISION_OUTPUT, stand for. The CONDITIONING's first reference
    latent, if it has one, comes along for generators that read the source picture from it.

    Raises:
        ConditionError: if the CONDITIONING holds more than one entry, or the vision output no patch features.
    """
    tokens, options = _single(conditioning)
    parts = [ConditionPart(CONDITIONING, tokens)]
    if options.get("reference_latents"):
        parts.append(ConditionPart(REFERENCE_LATENT, options["reference_latents"][0]))
    if clip_vision_output is not None:
        parts.append(ConditionPart(CLIP_VISION, _patches(clip_vision_output)))
    return Condition(tuple(parts), instruction)


def _single(conditioning: list) -> tuple[Tensor, dict[str, Any]]:
    if len(conditioning) != 1:
        raise ConditionError(
            f"The CONDITIONING holds {len(conditioning)} entries (combined or area prompts), but a generator reads one "
            "instruction. Wire the text encoder's output directly."
        )
    return conditioning[0][0], conditioning[0][1]


def _patches(output: Any) -> Tensor:
    hidden = output["last_hidden_state"]
    if hidden is None:
        raise ConditionError(
            "The CLIP_VISION_OUTPUT has no patch features (last_hidden_state). Encode the picture again."
        )
    return hidden
