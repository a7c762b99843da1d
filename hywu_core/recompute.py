"""A generator's blocks computed again in the backward pass, so that little of them is remembered.

A small block is computed again as a whole. Of a large one, a second time the input of each branch is remembered only, and
each branch is computed again in parts of its rows: at no time is there more than the grids between the blocks, those between
the branches of one block, and what one part of one branch needs. Letters as in transformer.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .plan import USUAL_CHUNK, equal_part
from .transformer import Block, Tables

# elements of d that a row of a branch costs while it is computed with its graph: the feed-forward's are most
ROW_COST = 16


def recomputed(block: Block, x: Tensor, context: Tensor, tables: Tables, chunk: int = USUAL_CHUNK) -> Tensor:
    """x (B, N, S, d), context (B, L, d) -> x, as the block gives it.

    Args:
        chunk: bytes that a part of a branch may take.
    """
    rows = max(1, chunk // (ROW_COST * x.shape[0] * x.shape[-1] * x.element_size()))
    if rows >= x.shape[1] * x.shape[2]:
        return _again(block, x, context, tables)
    return _again(_by_branches, block, x, context, tables, rows)


def _by_branches(block: Block, x: Tensor, context: Tensor, tables: Tables, rows: int) -> Tensor:
    """The block, each branch in parts of at most so many rows (for each sample)."""
    num_layers, positions = x.shape[1:3]
    layers, tokens = tables.layers(), tables.tokens()
    keys_values = block.self_attn_cross.keys_values(context, tables.condition(context.shape[1]))

    def over_tokens(part: Tensor) -> Tensor:
        return block.over_tokens(*block.token_heads(part, tokens))

    def over_condition(part: Tensor, start: int) -> Tensor:
        return block.over_condition(part, keys_values, tables.grid(start, start + part.shape[1]))

    x = x + _in_parts(lambda part, _: block.over_layers(part, layers), x, 2, rows // num_layers)
    x = x + _in_parts(lambda part, _: over_tokens(part), x, 1, rows // positions)
    x = x + _in_parts(over_condition, x.flatten(1, 2), 1, rows).view_as(x)
    return x + _in_parts(lambda part, _: block.feed(part), x.flatten(1, 2), 1, rows).view_as(x)


def _in_parts(branch: Callable[[Tensor, int], Tensor], x: Tensor, axis: int, most: int) -> Tensor:
    size = equal_part(x.shape[axis], max(1, most))
    starts = range(0, x.shape[axis], size)
    return torch.cat([_again(branch, x.narrow(axis, s, min(size, x.shape[axis] - s)), s) for s in starts], dim=axis)


def _again(function: Callable, *args: Any) -> Tensor:
    return checkpoint(function, *args, use_reentrant=False)
