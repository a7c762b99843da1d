"""The inference path of a generator: the same branches as `Block.forward`, applied in place to chunks of the token grid.

What exists at any time is the grid itself (B, N, S, d), the condition's keys and values, one layer's keys and values, and
what one chunk of rows needs. No tensor of the size of all tokens times 4 d exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .config import GeneratorConfig
from .transformer import Block, Tables, TokenTransformer

MEBIBYTE = 2**20
# What a row of a chunk costs in units of d elements: the normed input, the feed-forward's 4 d before and after SiLU, the
# result. Attention stays below that: q, k, v, their rotated copies in float32, the result.
ROW_COST = 10


def default_chunk_bytes(grid_bytes: int) -> int:
    """Half of the grid, between 16 and 256 MiB: small beside the grid, large enough to keep a matrix product busy."""
    return min(256 * MEBIBYTE, max(16 * MEBIBYTE, grid_bytes // 2))


def memory_required(
    config: GeneratorConfig, batch: int, length: int, dtype: torch.dtype, chunk_bytes: int | None = None
) -> int:
    """Bytes that `generate` needs on its device beside the weights, for a condition (batch, length, input_dim)."""
    tables = Tables(config, torch.device("cpu"))
    row = config.d_model * dtype.itemsize
    grid = batch * tables.num_layers * tables.positions * row
    condition = batch * length * (config.input_dim * dtype.itemsize + 4 * row)
    layer_keys_values = 2 * batch * tables.positions * row
    return grid + condition + layer_keys_values + (chunk_bytes or default_chunk_bytes(grid))


def generate_layers(
    model: TokenTransformer,
    context: Tensor,
    tables: Tables,
    chunk_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """The tokens (B, T, r, token_dim) of one layer after the other, for a context (B, L, d). Call it without a graph.

    Args:
        chunk_bytes, progress: see `Generator.generate`.
    """
    batch, num_layers, dtype = context.shape[0], tables.num_layers, context.dtype
    x = context.new_empty(batch, num_layers, tables.positions, context.shape[-1])
    for layer in range(num_layers):
        x[:, layer] = model.initial_tokens(x.device, dtype, slice(layer, layer + 1))[:, 0]

    chunk_bytes = chunk_bytes or default_chunk_bytes(x.nbytes)
    rows = max(1, chunk_bytes // (ROW_COST * batch * x.shape[-1] * x.element_size()))
    counter = _Progress(progress, total=len(model.blocks) * (num_layers + 1) + num_layers)
    for block in model.blocks:
        _advance(block, x, context, tables, rows, counter)
    for layer in range(num_layers):
        yield model.project(x[:, layer : layer + 1])[:, 0]
        counter.step()


def _advance(block: Block, x: Tensor, context: Tensor, tables: Tables, rows: int, counter: _Progress) -> None:
    """One block in place. `rows` is how many rows of d elements (for each sample) a chunk may have."""
    num_layers, positions = x.shape[1:3]
    for part in _chunks(positions, max(1, rows // num_layers)):
        counter.check()
        x[:, :, part] += block.over_layers(x[:, :, part], tables.layers())
    counter.step()

    keys_values = block.self_attn_cross.keys_values(context, tables.condition(context.shape[1]))
    for layer in range(num_layers):
        whole = x[:, layer]
        layer_keys_values = _layer_keys_values(block, whole, tables, rows)
        for part in _chunks(positions, rows):
            counter.check()
            chunk = whole[:, part]
            chunk += block.over_tokens(chunk, layer_keys_values, tables.tokens(part.start, part.stop))
            first = layer * positions
            chunk += block.over_condition(chunk, keys_values, tables.grid(first + part.start, first + part.stop))
            chunk += block.feed(chunk)
        counter.step()


def _layer_keys_values(block: Block, layer: Tensor, tables: Tables, rows: int) -> tuple[Tensor, Tensor]:
    """layer (B, S, d) -> keys and values (B, h, S, head_dim), computed by chunks: rotating in float32 takes room."""
    parts = [
        block.layer_keys_values(layer[:, part], tables.tokens(part.start, part.stop))
        for part in _chunks(layer.shape[1], rows)
    ]
    return tuple(torch.cat(column, dim=-2) for column in zip(*parts, strict=True))


def _chunks(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


class _Progress:
    """Counts steps for a callback, which may raise to cancel."""

    def __init__(self, callback: Callable[[int, int], None] | None, total: int):
        self.callback, self.total, self.done = callback, total, 0

    def check(self) -> None:
        """Give the callback a chance to cancel."""
        if self.callback:
            self.callback(self.done, self.total)

    def step(self) -> None:
        """One more unit is done."""
        self.done += 1
        self.check()
