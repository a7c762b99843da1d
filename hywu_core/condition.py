"""Conditions: what a generator reads about the picture and the instruction, in the parts and the order it was trained with.

A generator names its parts in `config.hywu["condition"]`: [{"kind": "conditioning", "width": 64}, ...]. The released
generator names none; it reads one part, the base's last hidden states, of width `input_dim`. Parts of a condition follow
each other along the length; each has its own range of the width, zero elsewhere, so that `hidden_in` holds one projection
for each part. What of them was computed by others is frozen; `hidden_in`, and the encoder layers that a configuration may ask
for, are trained with the generator.
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
REFERENCE_LATENT = "reference_latent"  # patches of the source picture's latent, for encoders trained with the generator

OF_THE_BASE = "hidden states of the base"  # the source for which the base is run
SOURCES = {  # what a generator reads -> the parts of a condition, in their order; None: all there are
    "instruction and source picture": (CONDITIONING, REFERENCE_LATENT),
    "instruction": (CONDITIONING,),
    "instruction and CLIP Vision": (CONDITIONING, CLIP_VISION),
    OF_THE_BASE: (HIDDEN_STATES,),
    "everything wired in": None,
}
REMEDIES = {  # what to do where a part is missing
    CONDITIONING: "Wire the text encoder's CONDITIONING.",
    REFERENCE_LATENT: "Put the source picture on the CONDITIONING with Set Reference Latent.",
    CLIP_VISION: "Wire a CLIP_VISION_OUTPUT into HY-WU Condition.",
    HIDDEN_STATES: "Wire the MODEL into HY-WU Condition.",
}


class ConditionPart(NamedTuple):
    """One sequence of features."""

    kind: str
    tokens: Tensor  # (B, length, width); of a reference latent (B, C, ..., H, W), cut into patches as a generator asks


class Condition(NamedTuple):
    """The parts of a condition. Tuples of tensors, so that hosts that count cached memory see them."""

    parts: tuple[ConditionPart, ...]
    instruction: str = ""  # for the LoRA's metadata, where it is known

    @property
    def batch(self) -> int:
        return max((part.tokens.shape[0] for part in self.parts), default=0)


def part_entry(kind: str, width: int, patch: int | None = None) -> dict:
    """How a generator's configuration names a part. `patch` is the side of a reference latent's patches."""
    return {"kind": kind, "width": width} | ({"patch": patch} if patch else {})


def expected_parts(config: GeneratorConfig) -> tuple[tuple[str, int], ...]:
    """(kind, width) of every part that a generator reads, in its order."""
    named = config.hywu.get("condition")
    if not named:
        return ((HIDDEN_STATES, config.input_dim),)
    return tuple((part["kind"], part["width"]) for part in named)


def assemble(condition: Condition, config: GeneratorConfig) -> Tensor:
    """Lay the parts out as one generator reads them: (B, sum of lengths, input_dim).

    Raises:
        ConditionError: naming both what is there and what is expected.
    """
    given = _check(condition, config)
    batch = max(tokens.shape[0] for tokens in given.values())
    first = next(iter(given.values()))
    laid, start = [], 0
    for tokens in given.values():
        stop = start + tokens.shape[-1]
        padded = F.pad(tokens.to(first), (start, config.input_dim - stop))
        laid.append(padded.expand(batch, -1, -1))
        start = stop
    return torch.cat(laid, dim=1)


def text_of(assembled: Tensor, config: GeneratorConfig) -> Tensor | None:
    """Of an assembled condition (B, L, input_dim), the tokens (B, l, width) that carry the instruction; None if none do."""
    start = 0
    for kind, width in expected_parts(config):
        if kind in (CONDITIONING, HIDDEN_STATES):
            tokens = assembled[..., start : start + width]
            rows = tokens.ne(0).any(-1).any(0)
            return tokens[:, rows] if bool(rows.any()) else None
        start += width
    return None


def patches(latent: Tensor, side: int) -> Tensor:
    """A latent (B, C, H, W) or (B, C, T, H, W) -> its patches (B, length, C * side * side), row by row; padded at the end."""
    latent = latent.unsqueeze(2) if latent.ndim == 4 else latent
    rows, columns = latent.shape[-2:]
    latent = F.pad(latent, (0, -columns % side, 0, -rows % side, 0, 0))
    cut = latent.unflatten(-1, (-1, side)).unflatten(-3, (-1, side))  # (B, C, T, h, side, w, side)
    return cut.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def _check(condition: Condition, config: GeneratorConfig) -> dict[str, Tensor]:
    """{kind: tokens} in the order of the generator."""
    expected, given = expected_parts(config), _as_tokens(condition, config)
    if "condition" not in config.hywu and len(given) == 1:  # a released generator: the width must tell
        given = dict(zip((expected[0][0],), given.values(), strict=True))
    fits = {kind: tokens.shape[-1] for kind, tokens in given.items()} == dict(expected)
    fits = fits and all(tokens.ndim == 3 and tokens.shape[1] for tokens in given.values())
    if not fits:
        found = ", ".join(f"{part.kind} {tuple(part.tokens.shape)}" for part in condition.parts) or "nothing"
        wanted = ", ".join(f"{kind} (batch, length, {width})" for kind, width in expected)
        raise ConditionError(
            f"The condition holds {found}, but this generator reads {wanted}. {_remedy(given, expected)}"
        )
    batches = {kind: tokens.shape[0] for kind, tokens in given.items()}
    if len(set(batches.values()) - {1}) > 1:
        raise ConditionError(f"The parts of the condition have different batch sizes: {batches}.")
    return {kind: given[kind] for kind, _ in expected}


def _remedy(given: dict[str, Tensor], expected: tuple[tuple[str, int], ...]) -> str:
    missing = [REMEDIES[kind] for kind, _ in expected if kind not in given and kind in REMEDIES]
    wrong = [kind for kind, width in expected if kind in given and given[kind].shape[-1] != width]
    if wrong:
        missing.insert(
            0, f"Its {wrong[0]} comes from an encoder of another base: take those of the generator's own base."
        )
    return " ".join(missing) or (
        "Wire the inputs that it was trained with, through HY-WU Condition or the base's own condition node."
    )


def _as_tokens(condition: Condition, config: GeneratorConfig) -> dict[str, Tensor]:
    """{kind: tokens}. A reference latent rides along with every CONDITIONING; who does not read it does not get it."""
    given = {part.kind: part.tokens for part in condition.parts}
    side = next((p.get("patch") for p in config.hywu.get("condition", ()) if p["kind"] == REFERENCE_LATENT), None)
    latent = given.pop(REFERENCE_LATENT, None)
    return given if side is None or latent is None else given | {REFERENCE_LATENT: patches(latent, side)}
