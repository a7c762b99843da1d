"""Conditions: what a generator reads about the picture and the instruction, in the parts and the order it was trained with.

A generator names its parts in `config.hywu["condition"]`: [{"kind": "conditioning", "width": 64}, ...]. The released
generator names none; it reads one part, the base's last hidden states, of width `input_dim`. Parts of a condition follow
each other along the length; each has its own range of the width, zero elsewhere, so that `hidden_in` holds one projection
for each part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import GeneratorConfig
from .errors import ConditionError

CONDITIONING = "conditioning"  # what the host's text encoder gives
CLIP_VISION = "clip_vision"  # patch features of a CLIP-Vision or SigLIP model
HIDDEN_STATES = "hidden_states"  # the base's own last hidden states (the released way)
POCKET_VISION = "pocket_vision"  # patches of the source picture itself, for small encoders trained with the generator


class ConditionPart(NamedTuple):
    """One sequence of features."""

    kind: str
    tokens: Tensor  # (B, length, width)


class Condition(NamedTuple):
    """The parts of a condition. Tuples of tensors, so that hosts that count cached memory see them."""

    parts: tuple[ConditionPart, ...]
    instruction: str = ""  # for the LoRA's metadata, where it is known

    @property
    def batch(self) -> int:
        """How many instances this describes."""
        return max((part.tokens.shape[0] for part in self.parts), default=0)


def expected_parts(config: GeneratorConfig) -> tuple[tuple[str, int], ...]:
    """(kind, width) of every part that a generator reads, in its order."""
    named = config.hywu.get("condition")
    if not named:
        return ((HIDDEN_STATES, config.input_dim),)
    parts = tuple((part["kind"], part["width"]) for part in named)
    if sum(width for _, width in parts) != config.input_dim:
        raise ConditionError(
            f"The generator's condition parts {parts} do not add up to its input_dim {config.input_dim}."
        )
    return parts


def assemble(condition: Condition, config: GeneratorConfig) -> Tensor:
    """Lay the parts out as one generator reads them: (B, sum of lengths, input_dim).

    Raises:
        ConditionError: naming both what is there and what is expected.
    """
    given, batch = _check(condition, config), condition.batch
    first = next(iter(given.values()))
    laid, start = [], 0
    for tokens in given.values():
        stop = start + tokens.shape[-1]
        padded = F.pad(tokens.to(first), (start, config.input_dim - stop))
        laid.append(padded.expand(batch, -1, -1))
        start = stop
    return torch.cat(laid, dim=1)


def _check(condition: Condition, config: GeneratorConfig) -> dict[str, Tensor]:
    """{kind: tokens} in the order of the generator."""
    expected, given = expected_parts(config), {part.kind: part.tokens for part in condition.parts}
    if "condition" not in config.hywu and len(condition.parts) == 1:  # a released generator: the width must tell
        given = {expected[0][0]: condition.parts[0].tokens}
    fits = {kind: tokens.shape[-1] for kind, tokens in given.items()} == dict(expected)
    fits = fits and all(tokens.ndim == 3 and tokens.shape[1] for tokens in given.values())
    if not fits:
        found = ", ".join(f"{part.kind} {tuple(part.tokens.shape)}" for part in condition.parts) or "nothing"
        wanted = ", ".join(f"{kind} (batch, length, {width})" for kind, width in expected)
        raise ConditionError(
            f"The condition holds {found}, but this generator reads {wanted}. "
            "Wire the inputs that it was trained with, through a HY-WU Condition node."
        )
    batches = {kind: tokens.shape[0] for kind, tokens in given.items()}
    if len(set(batches.values()) - {1}) > 1:
        raise ConditionError(f"The parts of the condition have different batch sizes: {batches}.")
    return {kind: given[kind] for kind, _ in expected}
