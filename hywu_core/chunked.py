"""The inference path of a generator: the same branches as `Block.forward`, applied in place to chunks of token grids.

There is one grid (B, N, S, d) for each stack of the base and each length of a condition. What exists at any time is the grids
themselves, the keys and values of one condition, one layer's heads, and what one chunk of rows needs. No tensor of the size
of all tokens times 4 d exists. Each block is held while it works on all grids, so that its weights are fetched once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    contexts: Sequence[Tensor],
    tables: Tables,
    chunk_bytes: int,
    progress: Callable[[int, int], None] | None = None,
    engine: Engine = Engine(),  # noqa: B008 (a value, never changed)
) -> Iterator[Tensor]:
    """The tokens (B, T, r, token_dim) of one layer after the other, stack by stack. Call it without a graph.

    Args:
        contexts: each (b, L, d) with samples of one length; B is all of their samples in this order.
        chunk_bytes, progress, engine: see `Generator.generate`.
    """
    by_stack = [tables.of_stack(stack) for stack in range(len(model.places))]
    grids = [_Grid(_first(model, context, own), context, own) for own in by_stack for context in contexts]
    ends = sum(context.shape[0] * own.num_layers * own.positions for own in by_stack for context in contexts)
    counter = _Progress(progress, total=(len(model.blocks) * 3 + 1) * ends)
    rows = chunk_bytes // row_bytes(1, contexts[0].shape[-1], contexts[0].dtype)
    _Run(grids, _Chunks(rows, counter, engine.is_out_of_memory)).advance(model.blocks, engine.hold)
    for own in by_stack:
        of_stack = [grid.x for grid in grids if grid.tables is own]
        for layer in range(own.num_layers):
            parts = [model.project(x[:, layer : layer + 1], own.stack)[:, 0] for x in of_stack]
            yield parts[0] if len(parts) == 1 else torch.cat(parts)
            counter.step(own.positions * sum(x.shape[0] for x in of_stack))


class _Grid(NamedTuple):
    """The grid of one stack for samples whose conditions are of one length. Blocks change x in place."""

    x: Tensor  # (B, N, S, d)
    context: Tensor  # (B, L, d)
    tables: Tables  # of its stack


def _first(model: TokenTransformer, context: Tensor, tables: Tables) -> Tensor:
    """A grid before the first block."""
    x = context.new_empty(context.shape[0], tables.num_layers, tables.positions, context.shape[-1])
    positions = model.positions(x.device, x.dtype, tables.stack)
    for layer in range(tables.num_layers):
        x[:, layer] = model.layer_tokens(positions, slice(layer, layer + 1), tables.stack)[:, 0]
    return x


class _Run:
    """The state of one run: the grids, and the room for one layer's heads and one condition's."""

    def __init__(self, grids: Sequence[_Grid], chunks: _Chunks):
        self.grids, self.chunks = grids, chunks

    def advance(self, blocks: Sequence[Block], hold: Callable[[Block], AbstractContextManager[Block]]) -> None:
        """All blocks, one after the other, each on all grids."""
        most_layer = max(grid.x[:, 0].numel() for grid in self.grids)
        most_context = max(grid.context.numel() for grid in self.grids)
        of_layer = self.grids[0].x.new_empty(3, most_layer)
        of_condition = self.grids[0].x.new_empty(2, most_context)
        for block in blocks:
            with hold(block) as held:
                self._over_layers(held)
                self._over_tokens(held, of_layer)
                self._over_conditions_and_feed(held, of_condition)

    def _over_layers(self, block: Block) -> None:
        fused = block.self_attn_n.fused()
        for grid in self.grids:
            self._over_layers_of(grid, block, fused)

    def _over_layers_of(self, grid: _Grid, block: Block, fused: Fused | None) -> None:
        batch, num_layers, positions = grid.x.shape[:3]
        rotary = grid.tables.layers()

        def work(part: slice) -> None:
            chunk = grid.x[:, :, part]
            chunk.add_(block.over_layers(chunk, rotary, fused))

        self.chunks.run(positions, work, rows_each=batch * num_layers)

    def _over_tokens(self, block: Block, room: Tensor) -> None:
        fused = block.self_attn_hw.fused()
        for grid in self.grids:
            rotary, heads = grid.tables.tokens(), _heads(room, grid.x[:, 0], block)
            for layer in grid.x.unbind(1):
                self._layer(block, layer, heads, rotary, fused)

    def _layer(self, block: Block, layer: Tensor, heads: list[Tensor], rotary: Rotary, fused: Fused | None) -> None:
        """One layer (B, S, d): first the heads of all its positions, then what each attends to."""
        batch, positions = layer.shape[:2]

        def gather(part: slice) -> None:
            own = block.token_heads(layer[:, part], rotary.rows(part), fused)
            for whole, found in zip(heads, own, strict=True):
                whole[:, :, part] = found

        def work(part: slice) -> None:
            queries, keys, values = heads
            layer[:, part].add_(block.over_tokens(queries[:, :, part], keys, values))

        self.chunks.run(positions, gather, rows_each=batch, counted=False)
        self.chunks.run(positions, work, rows_each=batch)

    def _over_conditions_and_feed(self, block: Block, room: Tensor) -> None:
        """What one condition gives is made once for the grids of all stacks."""
        for context in {id(grid.context): grid.context for grid in self.grids}.values():
            of_context = [grid for grid in self.grids if grid.context is context]
            heads = _heads(room, context, block)
            self._gather_condition(block, context, of_context[0].tables.condition(context.shape[1]), heads)
            for grid in of_context:
                self._over_condition_and_feed(block, grid, heads)

    def _gather_condition(self, block: Block, context: Tensor, rotary: Rotary, heads: list[Tensor]) -> None:
        def gather(part: slice) -> None:
            found = block.self_attn_cross.keys_values(context[:, part], rotary.rows(part))
            for whole, own in zip(heads, found, strict=True):
                whole[:, :, part] = own

        self.chunks.run(context.shape[1], gather, rows_each=context.shape[0], counted=False)

    def _over_condition_and_feed(self, block: Block, grid: _Grid, heads: list[Tensor]) -> None:
        """Neither asks which layer a row is of, so chunks may cross from one layer into the next."""
        rows = grid.x.flatten(1, 2)

        def attend(part: slice) -> None:
            chunk = rows[:, part]
            chunk.add_(block.over_condition(chunk, heads, grid.tables.grid(part.start, part.stop)))

        def feed(part: slice) -> None:
            chunk = rows[:, part]
            chunk.add_(block.feed(chunk))

        self.chunks.run(rows.shape[1], attend, feed, rows_each=rows.shape[0])


def _heads(room: Tensor, like: Tensor, block: Block) -> list[Tensor]:
    """Room for as many heads (B, h, rows, head_dim) of `like` (B, rows, d) as it has rows."""
    (batch, rows, width), heads = like.shape, block.self_attn_n.heads
    return [kept[: like.numel()].view(batch, heads, rows, width // heads) for kept in room]


class _Chunks:
    """Splits work into equal chunks, and into smaller ones from the moment that memory runs out."""

    def __init__(self, rows: int, counter: _Progress, is_out_of_memory: Callable[[BaseException], bool]):
        self.rows, self.counter, self.is_out_of_memory = rows, counter, is_out_of_memory

    def run(self, total: int, *works: Callable[[slice], None], rows_each: int, counted: bool = True) -> None:
        """Do all works on each chunk of `total` places, each of `rows_each` rows of d elements.

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
