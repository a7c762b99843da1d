"""Which weights receive a LoRA, what shapes the factors have, and how they lie in the token grid (paper Fig. 4).

This file is the one owner of a target's name, shape, order and row slice.

A generator may write for several stacks of a base, each with targets and a token grid of its own: functions that are about
one layer take the number of its stack, 0 for the one that the released keys describe.

Letters: B batch · E experts · r rank · T tokens of one layer · D token_dim
    down factor A   (B, r, in)    or, grouped, (B, E, r, in)
    up factor B     (B, out, r)   or, grouped, (B, E, out, r)
    token           (r, D): r * D consecutive elements of one flattened factor, the last one padded
    token order     every A of the layer in mapping order, then every B
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import GROUPED, GeneratorConfig
from .errors import LoraError


class Target(NamedTuple):
    """A weight of one layer that receives a LoRA."""

    name: str  # module path below the layer, "self_attn.qkv_proj"; may end in a row slice, "linear1[0:128/512]"
    in_features: int
    out_features: int
    experts: int | None = None  # of a grouped target

    def down_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of A without the batch: (r, in) or (E, r, in)."""
        return (*self._lead, rank, self.in_features)

    def up_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of B without the batch: (out, r) or (E, out, r)."""
        return (*self._lead, self.out_features, rank)

    @property
    def _lead(self) -> tuple[int, ...]:
        return () if self.experts is None else (self.experts,)


class TokenSpan(NamedTuple):
    """The tokens of a layer that hold one factor."""

    key: str  # "<target>.lora_A" or "<target>.lora_B"
    shape: tuple[int, ...]  # of the factor, without the batch
    tokens: int

    @property
    def elements(self) -> int:
        """Elements of the factor, without padding."""
        return math.prod(self.shape)


class LayerPlace(NamedTuple):
    """One layer that receives LoRAs."""

    stack: int
    layer: int  # of its stack


def layer_places(config: GeneratorConfig) -> tuple[LayerPlace, ...]:
    """Every layer that receives LoRAs, stack by stack."""
    return tuple(
        LayerPlace(number, layer)
        for number, stack in enumerate(config.stacks)
        for layer in range(stack.num_base_model_layers)
    )


def targets(config: GeneratorConfig, stack: int = 0) -> tuple[Target, ...]:
    """The targets of one layer in mapping order; a grouped entry gives one target for each of its sub-weights."""
    return tuple(_expand(config.stacks[stack].pg_mapping))


def all_targets(config: GeneratorConfig) -> tuple[tuple[str, Target], ...]:
    """Every target with its full name, stack by stack and layer by layer."""
    of_stack = [targets(config, stack) for stack in range(len(config.stacks))]
    return tuple(
        (full_name(config, layer, target.name, stack), target)
        for stack, layer in layer_places(config)
        for target in of_stack[stack]
    )


def target_names(config: GeneratorConfig) -> tuple[str, ...]:
    """The full names of all targets, stack by stack and layer by layer: "<prefix><layer>.<target>"."""
    return tuple(name for name, _ in all_targets(config))


def full_name(config: GeneratorConfig, layer: int, target: str, stack: int = 0) -> str:
    """The name of one target of one layer, which is its module path in the base."""
    return f"{config.stacks[stack].prefix}{layer}.{target}"


def layers_before(config: GeneratorConfig, stack: int) -> int:
    """Layers of all stacks that come before one."""
    return sum(before.num_base_model_layers for before in config.stacks[:stack])


def token_spans(config: GeneratorConfig, stack: int = 0) -> tuple[TokenSpan, ...]:
    """How the factors of one layer follow each other in the token axis: every A, then every B."""
    per_layer, size = targets(config, stack), config.rank * config.token_dim
    shapes = [(f"{t.name}.lora_A", t.down_shape(config.rank)) for t in per_layer]
    shapes += [(f"{t.name}.lora_B", t.up_shape(config.rank)) for t in per_layer]
    return tuple(TokenSpan(key, shape, -(-math.prod(shape) // size)) for key, shape in shapes)


def token_counts(config: GeneratorConfig, stack: int = 0) -> tuple[int, int]:
    """Tokens of one layer that hold A factors, and that hold B factors. (719, 660) for the released generator."""
    spans = token_spans(config, stack)
    half = len(spans) // 2
    return sum(s.tokens for s in spans[:half]), sum(s.tokens for s in spans[half:])


def lora_elements(config: GeneratorConfig) -> int:
    """Elements of one instance's LoRA over all layers. 722,993,152 for the released generator."""
    return sum(
        stack.num_base_model_layers * sum(span.elements for span in token_spans(config, number))
        for number, stack in enumerate(config.stacks)
    )


def tokenize(state: Mapping[str, Tensor], config: GeneratorConfig, stack: int = 0) -> Tensor:
    """Lay the factors of one layer into its tokens (paper Fig. 4).

    Args:
        state: {"<target>.lora_A": (B, ...), "<target>.lora_B": (B, ...)} with the shapes of `token_spans`.
    Returns:
        (B, T, r, D), NaN where a token is padded.
    Raises:
        LoraError: for a missing, unexpected or mis-shaped factor.
    """
    spans = token_spans(config, stack)
    unexpected = sorted(state.keys() - {span.key for span in spans})
    if unexpected:
        raise LoraError(f"Factors that the layout does not have: {', '.join(unexpected)}.")
    rows = []
    for span in spans:
        factor = state.get(span.key)
        if factor is None:
            raise LoraError(f"The factor {span.key} is missing.")
        if tuple(factor.shape[1:]) != span.shape:
            raise LoraError(f"{span.key} has the shape {tuple(factor.shape)}, expected (batch, *{span.shape}).")
        padded = span.tokens * config.rank * config.token_dim
        flat = factor.flatten(1)
        rows.append(torch.nn.functional.pad(flat, (0, padded - span.elements), value=float("nan")))
    return torch.cat(rows, dim=1).view(rows[0].shape[0], -1, config.rank, config.token_dim)


def detokenize(tokens: Tensor, config: GeneratorConfig, stack: int = 0) -> dict[str, Tensor]:
    """Read the factors of one layer back from its tokens; the exact inverse of `tokenize`.

    Args:
        tokens: (B, T, r, D).
    Returns:
        {"<target>.lora_A": (B, ...), "<target>.lora_B": (B, ...)}, views of `tokens` where it is contiguous.
    Raises:
        LoraError: if `tokens` has not the layout's shape.
    """
    spans = token_spans(config, stack)
    expected = (sum(span.tokens for span in spans), config.rank, config.token_dim)
    if tokens.ndim != 4 or tuple(tokens.shape[1:]) != expected:
        raise LoraError(f"Tokens have the shape {tuple(tokens.shape)}, expected (batch, *{expected}).")
    state, start = {}, 0
    for span in spans:
        flat = tokens[:, start : start + span.tokens].flatten(1)
        state[span.key] = flat[:, : span.elements].unflatten(1, span.shape)
        start += span.tokens
    return state


class Placement(NamedTuple):
    """Where the rows of a target's up factor land in the base."""

    module: str  # path of the module that owns the weight
    start: int = 0  # first output row
    length: int | None = None  # number of output rows; None: all of them
    total: int | None = None  # output rows of the whole weight, where the name tells


_SLICE = re.compile(r"^(?P<module>.+)\[(?P<start>\d+):(?P<stop>\d+)/(?P<total>\d+)\]$")


def place(name: str, out_features: int, grouped: bool = False) -> Placement:
    """Find the module and the rows that a target's name stands for.

    A plain name is a module path. "path[a:b/n]" is rows a to b of a fused weight with n rows. The sub-weights of grouped
    experts live in two banks: `gate_and_up_proj`, whose first half is w3 and second half the silu-gated w1, and
    `down_proj`, which is w2 (the released layout).
    """
    sliced = _SLICE.match(name)
    if sliced:
        start, stop, total = (int(sliced[key]) for key in ("start", "stop", "total"))
        if stop - start != out_features or stop > total:
            raise LoraError(
                f"{name} names rows {start} to {stop} of {total}, but its up factor has {out_features} rows."
            )
        return Placement(sliced["module"], start, out_features, total)
    if grouped:
        experts, _, part = name.rpartition(".")
        banks = {
            "w3": Placement(f"{experts}.gate_and_up_proj", 0, out_features, 2 * out_features),
            "w1": Placement(f"{experts}.gate_and_up_proj", out_features, out_features, 2 * out_features),
            "w2": Placement(f"{experts}.down_proj"),
        }
        return banks.get(part, Placement(name))  # any other name is a whole bank
    return Placement(name)


def _expand(mapping: Mapping[str, dict[str, Any]]) -> Iterator[Target]:
    for name, entry in mapping.items():
        if entry.get("type") == GROUPED:
            for part, dims in entry["sub_weights"].items():
                yield Target(f"{name}.{part}", dims["lora_A_dim"], dims["lora_B_dim"], entry["num_experts"])
        else:
            yield Target(name, entry["lora_A_dim"], entry["lora_B_dim"])
