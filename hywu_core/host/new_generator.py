"""A new generator's configuration, read off the base that it is to write for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from ..condition import REFERENCE_LATENT, REMEDIES, SOURCES, Condition, part_entry
from ..config import FURTHER_STACKS, STACK_KEYS, GeneratorConfig
from ..errors import MatchError
from ..layout import all_targets
from ..lora import InstanceLora, LoraFactor
from .lora.matching import match
from .model import (
    ATTENTION_AND_FEED_FORWARD,
    LARGEST,
    Stack,
    StackError,
    choose_stacks,
    choose_targets,
    patch_size,
)

SIZES = {  # name -> (d_model, head_dim, blocks, rows of a token at one position)
    "small": (128, 32, 2, 2),
    "medium": (512, 64, 6, 4),
    "large": (1024, 64, 12, 4),
}

Shapes = dict[str, tuple[int, int]]  # {target: (in, out)}


def generator_config(
    base: Any,
    example: Condition,
    size: str = "small",
    targets: str = ATTENTION_AND_FEED_FORWARD,
    target_names: str = "",
    stack: str = LARGEST,
    rank: int = 16,
    alpha: float = 32.0,
    source: str = "instruction and source picture",
    encoder_layers: int = 1,
) -> GeneratorConfig:
    """The configuration of a generator for a base.

    Args:
        base: the host's BaseModel.
        example: a condition as training will give them; parts and widths are read off it.
        size: one of SIZES; targets, target_names: see `choose_targets`; stack: see `choose_stacks`; source: one of SOURCES.
    Raises:
        StackError, ConfigError: see there.
    """
    stacks = choose_stacks(base, stack)
    shapes = [choose_targets(chosen, targets, target_names) for chosen in stacks]
    d_model, head_dim, blocks, most = SIZES[size]
    accumulation = next(rows for rows in (most, 2, 1) if rank % rows == 0)
    token_dim = _token_dim(_of_every_layer(stacks, shapes), d_model // accumulation)
    parts = _parts(base, example, source)
    first, *further = (_entry(*each) for each in zip(stacks, shapes, strict=True))
    return GeneratorConfig(
        d_model=d_model,
        head_dim=head_dim,
        num_pg_layers=blocks,
        input_dim=sum(part["width"] for part in parts),
        output_dim=token_dim,
        rank=rank,
        alpha=alpha,
        token_dim=token_dim,
        dim_accumulation=accumulation,
        hywu={"base": type(base).__name__, "condition": parts, "encoder_layers": encoder_layers}
        | ({FURTHER_STACKS: further} if further else {}),
        **first,
    )


def check_fits(base: Any, config: GeneratorConfig) -> None:
    """Make sure that a base has every target of a generator, before any work is done.

    Raises:
        MatchError: naming what is missing or has another shape.
    """
    factors = {}
    for name, target in all_targets(config):
        shapes = target.down_shape(config.rank), target.up_shape(config.rank)
        factors[name] = LoraFactor(*(torch.zeros(()).expand(1, *shape) for shape in shapes))  # takes no memory
    found = match(InstanceLora(factors, metadata={"base": config.hywu.get("base")}), base)
    if found.missing:
        raise MatchError(
            f"The generator was made for another model ({found}). Use the one that it was made for, or make a new one."
        )


def _of_every_layer(stacks: Sequence[Stack], shapes: Sequence[Shapes]) -> Shapes:
    return {
        f"{stack.path}.{layer}.{name}": shape
        for stack, of_layer in zip(stacks, shapes, strict=True)
        for layer in range(stack.blocks)
        for name, shape in of_layer.items()
    }


def _entry(stack: Stack, shapes: Shapes) -> dict[str, Any]:
    """A stack and its targets in the words of a configuration."""
    mapping = {name: {"lora_A_dim": columns, "lora_B_dim": rows} for name, (columns, rows) in shapes.items()}
    return dict(zip(STACK_KEYS, (f"{stack.path}.", stack.blocks, mapping), strict=True))


def _token_dim(layers: Shapes, largest: int) -> int:
    """The width of a token that leaves least of the tokens empty; of equals, the largest. A factor fills in/token_dim or
    out/token_dim tokens.
    """
    sides = Counter(side for shape in layers.values() for side in shape)
    elements = sum(count * side for side, count in sides.items())

    def wasted(width: int) -> float:
        return sum(count * (-side % width) for side, count in sides.items()) / elements

    widths = range(max(4, min(largest // 4, *sides)), largest + 1)
    return min(widths, key=lambda width: (round(wasted(width), 2), -width))


def _parts(base: Any, example: Condition, source: str) -> list[dict]:
    given = {part.kind: part.tokens for part in example.parts}
    kinds = SOURCES[source] or tuple(given)
    parts = []
    for kind in kinds:
        if kind not in given:
            raise StackError(
                f"The generator is to read {source!r}, but the example condition has no {kind}: it has "
                f"{', '.join(given) or 'nothing'}. {REMEDIES[kind]} Or choose another source."
            )
        if kind == REFERENCE_LATENT:
            side = patch_size(base)
            parts.append(part_entry(kind, given[kind].shape[1] * side * side, side))
        else:
            parts.append(part_entry(kind, given[kind].shape[-1]))
    return parts
