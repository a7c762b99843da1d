"""What a generator costs before it runs: bytes beside its weights, bytes that must be brought to the device, work.

Everything is arithmetic over the configuration; nothing is allocated. Letters as in transformer.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .config import GeneratorConfig
from .layout import lora_elements, token_counts
from .messages import Message

MEBIBYTE = 2**20
LEAST_CHUNK, USUAL_CHUNK = 16 * MEBIBYTE, 256 * MEBIBYTE
ANGLE_BYTES = 8  # a cosine and a sine


class Plan(NamedTuple):
    """What one `generate` costs."""

    parameters: int
    weights: int  # bytes of all weights, as they are kept
    peak: int  # bytes that a run takes beside the weights
    streamed: int  # bytes of weights that a run brings to the device, within the budget
    flops: int  # of matrix products and attention
    chunk: int  # bytes of what is worked on at once; part of the peak
    block: int  # bytes of one block in the type to compute in: what holding it takes where its weights lie elsewhere


class Grid(NamedTuple):
    """The token grid of one stack of the base as a sequence."""

    layers: int
    each: int  # positions of one layer

    @property
    def all(self) -> int:
        """Rows of d elements."""
        return self.layers * self.each


class Positions(NamedTuple):
    """The token grids of one sample."""

    grids: tuple[Grid, ...]  # one for each stack

    @property
    def each(self) -> int:
        """Positions of the largest layer."""
        return max(grid.each for grid in self.grids)

    @property
    def all(self) -> int:
        """Rows of d elements, of all grids."""
        return sum(grid.all for grid in self.grids)


def positions(config: GeneratorConfig) -> Positions:
    """How many positions the token grids of one sample have."""
    rows = config.rank // config.dim_accumulation
    grids = (
        Grid(stack.num_base_model_layers, sum(token_counts(config, number)) * rows)
        for number, stack in enumerate(config.stacks)
    )
    return Positions(tuple(grids))


def block_matrices(config: GeneratorConfig) -> int:
    """Elements of the matrices of one block: three attentions of four, and the feed-forward's two."""
    return 20 * config.d_model**2


def block_parameters(config: GeneratorConfig) -> int:
    """Elements of one block: its matrices, their biases, four norms."""
    return block_matrices(config) + 21 * config.d_model


def parameters(config: GeneratorConfig) -> int:
    d, part = config.d_model, config.d_model // config.dim_accumulation
    encoder = config.encoder_layers * (12 * d * d + 11 * d)
    grids = positions(config).grids
    embeddings = sum(grid.each * config.dim_accumulation + grid.layers for grid in grids) * part
    heads = 2 * (part + 1) * config.output_dim
    ends = (config.input_dim + 1) * d + encoder + embeddings + heads + 3 * d
    return config.num_pg_layers * block_parameters(config) + ends


def weight_bytes(config: GeneratorConfig, dtype: torch.dtype, matrix_bytes: int | None = None) -> int:
    """Bytes of all weights; `matrix_bytes` for an element of a block's matrices where those are quantised."""
    matrices = config.num_pg_layers * block_matrices(config)
    each = dtype.itemsize if matrix_bytes is None else matrix_bytes
    return (parameters(config) - matrices) * dtype.itemsize + matrices * each


def equal_part(total: int, most: int) -> int:
    """The size of equal chunks of which none is larger than `most`."""
    return -(-total // -(-total // max(1, most)))


def row_bytes(batch: int, width: int, dtype: torch.dtype) -> int:
    """What a row of a chunk costs, in all samples: eight times its `width` elements (the normed input; q, k and v as one; two
    of them rotated; what was attended, and the result), and two more where rotating needs wider numbers. The
    feed-forward stays below that.
    """
    return (8 if dtype.itemsize >= 4 else 10) * batch * width * dtype.itemsize


def plan(
    config: GeneratorConfig,
    batch: int,
    length: int | Sequence[int],
    dtype: torch.dtype,
    *,
    matrix_bytes: int | None = None,
    budget: int | None = None,
    chunk_bytes: int | None = None,
) -> Plan:
    """What a generate of a condition (batch, length, input_dim) in `dtype` costs.

    Args:
        length: of the condition of every sample, or of each of them.
        matrix_bytes: see `weight_bytes`.
        budget: bytes of the device for weights and work; None: enough for both.
        chunk_bytes: as given to `Generator.generate`; None: what it chooses.
    """
    lengths = Counter([length] * batch if isinstance(length, int) else length)
    row, grids = config.d_model * dtype.itemsize, positions(config)
    # of the samples of one length, as they are worked on: the heads of one layer, and those of their condition
    layer = max(lengths.values()) * grids.each
    condition = max(count * each for each, count in lengths.items())
    contexts = sum(count * each for each, count in lengths.items()) * (config.input_dim * dtype.itemsize + row)
    fixed = batch * grids.all * row + contexts + (2 * condition + 3 * layer) * row
    tables = sum(2 * grid.each for grid in grids.grids) + sum(lengths)
    fixed += 3 * (config.d_model + 1) * row + tables * config.head_dim // 2 * ANGLE_BYTES
    block = block_parameters(config) * dtype.itemsize
    weights, each_row = weight_bytes(config, dtype, matrix_bytes), row_bytes(1, config.d_model, dtype)
    if chunk_bytes is None:
        free = None if budget is None else budget - weights - fixed
        chunk_bytes = _chunk_bytes(batch * grids.all * row, layer * each_row, free)
    most = max(lengths.values()) * each_row
    chunk = most * equal_part(grids.each, chunk_bytes // most)
    peak = fixed + chunk
    streamed = 0 if budget is None or weights + peak <= budget else min(weights, weights + peak + block - budget)
    return Plan(parameters(config), weights, peak, streamed, _flops(config, lengths), chunk, block)


def summary(config: GeneratorConfig, weights: int) -> Message:
    """One line for an artist: how large a generator is, and what it writes. `weights`: bytes of its weights."""
    grids = " + ".join(f"{grid.each:,} x {grid.layers}" for grid in positions(config).grids)
    return Message(
        "{parameters} M parameters ({size} GB), {grids} positions, LoRA {numbers} M",
        parameters=f"{parameters(config) / 1e6:,.1f}",
        size=f"{weights / 1e9:,.2f}",
        grids=grids,
        numbers=f"{lora_elements(config) / 1e6:,.1f}",
    )


def _chunk_bytes(grid: int, layer: int, free: int | None) -> int:
    """Half of the grid, between 16 and 256 MiB; where it is known what is free, that, up to a whole layer, which is large
    enough to keep any device busy.
    """
    if free is None:
        return min(USUAL_CHUNK, max(LEAST_CHUNK, grid // 2))
    return min(max(USUAL_CHUNK, layer), max(LEAST_CHUNK, free))


def _flops(config: GeneratorConfig, lengths: Counter[int]) -> int:
    """For so many samples of each length of a condition."""
    d, grids, total = config.d_model, positions(config), 0
    for length, batch in lengths.items():
        rows = batch * grids.all
        products = 36 * rows * d**2 + 4 * batch * length * d**2
        attention = sum(4 * batch * grid.all * d * (grid.layers + grid.each + length) for grid in grids.grids)
        encoder = config.encoder_layers * batch * length * (24 * d**2 + 4 * length * d)
        ends = 2 * batch * length * config.input_dim * d + 2 * rows * d * config.output_dim
        total += config.num_pg_layers * (products + attention) + encoder + ends
    return total
