"""A new generator's configuration, read off the base that it is to write for."""

from __future__ import annotations

from typing import Any

import torch

from ..condition import REFERENCE_LATENT, REMEDIES, SOURCES, Condition, part_entry
from ..config import GeneratorConfig
from ..errors import MatchError
from ..layout import full_name
from ..layout import targets as targets_of
from ..lora import InstanceLora, LoraFactor
from .lora.matching import match
from .model import ATTENTION_AND_FEED_FORWARD, LARGEST, StackError, choose_stack, choose_targets, patch_size

SIZES = {  # name -> (d_model, head_dim, blocks, rows of a token at one position)
    "small": (128, 32, 2, 2),
    "medium": (512, 64, 6, 4),
    "large": (1024, 64, 12, 4),
}


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
        size: one of SIZES; targets, target_names: see `choose_targets`; stack: see `choose_stack`; source: one of SOURCES.
    Raises:
        StackError, ConfigError: see there.
    """
    chosen = choose_stack(base, stack)
    layers = choose_targets(chosen, targets, target_names)
    d_model, head_dim, blocks, most = SIZES[size]
    accumulation = next(rows for rows in (most, 2, 1) if rank % rows == 0)
    token_dim = _token_dim(layers, d_model // accumulation)
    parts = _parts(base, example, source)
    return GeneratorConfig(
        d_model=d_model,
        head_dim=head_dim,
        num_pg_layers=blocks,
        input_dim=sum(part["width"] for part in parts),
        output_dim=token_dim,
        num_base_model_layers=chosen.blocks,
        rank=rank,
        alpha=alpha,
        token_dim=token_dim,
        dim_accumulation=accumulation,
        pg_mapping={name: {"lora_A_dim": columns, "lora_B_dim": rows} for name, (columns, rows) in layers.items()},
        prefix=f"{chosen.path}.",
        hywu={"base": type(base).__name__, "condition": parts, "encoder_layers": encoder_layers},
    )


def check_fits(base: Any, config: GeneratorConfig) -> None:
    """Make sure that a base has every target of a generator, before any work is done.

    Raises:
        MatchError: naming what is missing or has another shape.
    """
    factors = {}
    for layer in range(config.num_base_model_layers):
        for target in targets_of(config):
            shapes = target.down_shape(config.rank), target.up_shape(config.rank)
            empty = (torch.zeros(()).expand(1, *shape) for shape in shapes)  # of any size, and takes no memory
            factors[full_name(config, layer, target.name)] = LoraFactor(*empty)
    found = match(InstanceLora(factors, metadata={"base": config.hywu.get("base")}), base)
    if found.missing:
        raise MatchError(
            f"The generator was made for another model ({found}). Use the one that it was made for, or make a new one."
        )


def _token_dim(layers: dict[str, tuple[int, int]], largest: int) -> int:
    """The width of a token that leaves least of the tokens empty; of equals, the largest. A factor fills in/token_dim or
    out/token_dim tokens.
    """
    sides = [side for shape in layers.values() for side in shape]

    def wasted(width: int) -> float:
        return sum(-side % width for side in sides) / sum(sides)

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
                f"{', '.join(given) or 'nothing'}. {REMEDIES[kind]}"
            )
        if kind == REFERENCE_LATENT:
            side = patch_size(base)
            parts.append(part_entry(kind, given[kind].shape[1] * side * side, side))
        else:
            parts.append(part_entry(kind, given[kind].shape[-1]))
    return parts
