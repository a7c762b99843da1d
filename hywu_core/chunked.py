"""The inference path of a generator: the same branches as `Block.forward`, applied in place to chunks of the token grid.

What exists at any time is the grid itself (B, N, S, d), the condition's keys and values, one layer's heads, and what one
chunk of rows needs. No tensor of the size of all tokens times 4 d exists. Each block is held while it works, so that its
weights are fetched once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import equal_part, row_bytes
from .transformer import Block, Fused, Rotary, Rotation, Tables, TokenTransformer


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch says that a device's memory is used up."""
    return isinstance(error, torch.OutOfMemoryError)


class Engine(NamedTuple):
    """What the owner of a device brings to a run; as it stands, plain torch."""

    # gives a block whose weights are on the device until the context ends: the block itself, or one of plain layers
    hold: Callable[[Block], AbstractContextManager[Block]] = nullcontext
    rotation: Rotation | None = None  # None: torch's, with complex numbers where the device has them
    is_out_of_memory: Callable[[BaseException], bool] = is_out_of_memory


def generate_layers(
    model: TokenTransformer,
    context: Tensor,
    tables: Tables,
    chunk_bytes: int,
    progress: Callable[[int, int], None] | None = None,
    engine: Engine = Engine(),  # noqa: B008 (a value, never changed)
) -> Iterator[Tensor]:
    """The tokens (B, T, r, token_dim) of one layer after the other, for a context (B, L, d). Call it without a graph.

    Args:
        chunk_bytes, progress, engine: see `Generator.generate`.
    """
    batch, num_layers, width = context.shape[0], tables.num_layers, context.shape[-1]
    x = context.new_empty(batch, num_layers, tables.positions, width)
    positions = model.positions(x.device, x.dtype)
    for layer in range(num_layers):
        x[:, layer] = model.layer_tokens(positions, slice(layer, layer + 1))[:, 0]
    del positions

    rows = chunk_bytes // row_bytes(batch, width, x.dtype)
    counter = _Progress(progress, total=(len(model.blocks) * 3 + 1) * num_layers * tables.positions)
    _Run(x, context, tables, _Chunks(rows, counter, engine.is_out_of_memory)).advance(model.blocks, engine.hold)
    for layer in range(num_layers):
        yield model.project(x[:, layer : layer + 1])[:, 0]
        counter.step(tables.positions)


class _Run:
    """The state of one run: the grid x, which the blocks change in place, and the room for one layer's heads."""

    def __init__(self, x: Tensor, context: Tensor, tables: Tables, chunks: _Chunks):
        self.x, self.context, self.tables, self.chunks = x, context, tables, chunks

    def advance(self, blocks: list[Block], hold: Callable[[Block], AbstractContextManager[Block]]) -> None:
        """All blocks, one after the other."""
        (batch, _, positions, width), heads = self.x.shape, blocks[0].self_attn_n.heads

        def heads_of(rows: int, count: int) -> list[Tensor]:
            return [self.x.new_empty(batch, heads, rows, width // heads) for _ in range(count)]

        layer_heads, condition_heads = heads_of(positions, 3), heads_of(self.context.shape[1], 2)
        for block in blocks:
            with hold(block) as held:
                self._over_layers(held)
                self._over_tokens(held, layer_heads)
                self._over_condition_and_feed(held, condition_heads)

    def _over_layers(self, block: Block) -> None:
        num_layers, positions = self.x.shape[1:3]
        rotary, fused = self.tables.layers(), block.self_attn_n.fused()

        def work(part: slice) -> None:
            chunk = self.x[:, :, part]
            chunk.add_(block.over_layers(chunk, rotary, fused))

        self.chunks.run(positions, work, rows_each=num_layers)

    def _over_tokens(self, block: Block, layer_heads: list[Tensor]) -> None:
        rotary, fused = self.tables.tokens(), block.self_attn_hw.fused()
        for layer in self.x.unbind(1):
            self._layer(block, layer, layer_heads, rotary, fused)

    def _layer(self, block: Block, layer: Tensor, heads: list[Tensor], rotary: Rotary, fused: Fused | None) -> None:
        """One layer (B, S, d): first the heads of all its positions, then what each attends to."""

        def gather(part: slice) -> None:
            own = block.token_heads(layer[:, part], rotary.rows(part), fused)
            for whole, found in zip(heads, own, strict=True):
                whole[:, :, part] = found

        def work(part: slice) -> None:
            queries, keys, values = heads
            layer[:, part].add_(block.over_tokens(queries[:, :, part], keys, values))

        self.chunks.run(layer.shape[1], gather, counted=False)
        self.chunks.run(layer.shape[1], work)

    def _over_condition_and_feed(self, block: Block, heads: list[Tensor]) -> None:
        """Neither asks which layer a row is of, so chunks may cross from one layer into the next."""
        rotary, rows = self.tables.condition(self.context.shape[1]), self.x.flatten(1, 2)

        def gather(part: slice) -> None:
            found = block.self_attn_cross.keys_values(self.context[:, part], rotary.rows(part))
            for whole, own in zip(heads, found, strict=True):
                whole[:, :, part] = own

        def attend(part: slice) -> None:
            chunk = rows[:, part]
            chunk.add_(block.over_condition(chunk, heads, self.tables.grid(part.start, part.stop)))

        def feed(part: slice) -> None:
            chunk = rows[:, part]
            chunk.add_(block.feed(chunk))

        self.chunks.run(self.context.shape[1], gather, counted=False)
        self.chunks.run(rows.shape[1], attend, feed)


class _Chunks:
    """Splits work into equal chunks, and into smaller ones from the moment that memory runs out."""

    def __init__(self, rows: int, counter: _Progress, is_out_of_memory: Callable[[BaseException], bool]):
        self.rows, self.counter, self.is_out_of_memory = rows, counter, is_out_of_memory

    def run(self, total: int, *works: Callable[[slice], None], rows_each: int = 1, counted: bool = True) -> None:
        """Do all works on each chunk of `total` places of `rows_each` rows.

        A work changes something in its last step only, which allocates nothing, so that it can be done again.
        """
        start = 0
        while start < total:
            part = slice(start, start + equal_part(total - start, self.rows // rows_each))
            for work in works:
                self.counter.check()
                self._split(work, part, rows_each)
            start = part.stop
            if counted:
                self.counter.step((part.stop - part.start) * rows_each)

    def _split(self, work: Callable[[slice], None], part: slice, rows_each: int) -> None:
        """The work on a chunk, or on its halves where it does not fit."""
        try:
            return work(part)
        except Exception as error:
            size = part.stop - part.start
            if size == 1 or not self.is_out_of_memory(error):
                raise
        # outside the handler, whose traceback would keep the tensors of the failed try
        half = -(-size // 2)
        self.rows = min(self.rows, half * rows_each)
        for start in (part.start, part.start + half):
            self._split(work, slice(start, min(start + half, part.stop)), rows_each)


class _Progress:
    """Counts rows for a callback, which may raise to cancel."""

    def __init__(self, callback: Callable[[int, int], None] | None, total: int):
        self.callback, self.total, self.done = callback, total, 0

    def check(self) -> None:
        """Give the callback a chance to cancel."""
        if self.callback:
            self.callback(self.done, self.total)

    def step(self, rows: int) -> None:
        """So many more rows are done."""
        self.done += rows
        self.check()
