"""The inference path of a generator: the same branches as `Block.forward`, applied in place to chunks of the token grid.

What exists at any time is the grid itself (B, N, S, d), the condition's keys and values, one layer's keys and values, and
what one chunk of rows needs. No tensor of the size of all tokens times 4 d exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .errors import GenerationError
from .generator import Block, Generator, Tables
from .lora import InstanceLora, LoraFactor

MEBIBYTE = 2**20
# What a row of a chunk costs in units of d elements: the normed input, the feed-forward's 4 d before and after SiLU, the
# result. Attention stays below that: q, k, v, their rotated copies in float32, the result.
ROW_COST = 10


def default_chunk_bytes(grid_bytes: int) -> int:
    """Half of the grid, between 16 and 256 MiB: small beside the grid, large enough to keep a matrix product busy."""
    return min(256 * MEBIBYTE, max(16 * MEBIBYTE, grid_bytes // 2))


def memory_required(
    generator: Generator, batch: int, length: int, dtype: torch.dtype, chunk_bytes: int | None = None
) -> int:
    """Bytes that `generate` needs on its device beside the weights, for a condition (batch, length, input_dim)."""
    config = generator.config
    tables = Tables(config, torch.device("cpu"))
    row = config.d_model * dtype.itemsize
    grid = batch * tables.num_layers * tables.positions * row
    condition = batch * length * (config.input_dim * dtype.itemsize + 4 * row)
    layer_keys_values = 2 * batch * tables.positions * row
    return grid + condition + layer_keys_values + (chunk_bytes or default_chunk_bytes(grid))


@torch.no_grad()
def generate_chunked(
    generator: Generator,
    condition: Tensor,
    dtype: torch.dtype | None,
    result_device: torch.device,
    result_dtype: torch.dtype | None,
    chunk_bytes: int | None,
    progress: Callable[[int, int], None] | None,
) -> InstanceLora:
    """See `Generator.generate`."""
    model, config = generator.model, generator.config
    dtype = dtype or next(generator.parameters()).dtype
    context = generator.context(condition.to(dtype))
    tables = Tables(config, context.device)
    batch, num_layers = context.shape[0], tables.num_layers

    x = context.new_empty(batch, num_layers, tables.positions, config.d_model)
    for layer in range(num_layers):
        x[:, layer] = model.initial_tokens(x.device, dtype, slice(layer, layer + 1))[:, 0]

    chunk_bytes = chunk_bytes or default_chunk_bytes(x.nbytes)
    rows = max(1, chunk_bytes // (ROW_COST * batch * config.d_model * x.element_size()))
    counter = _Progress(progress, total=len(model.blocks) * (num_layers + 1) + num_layers)
    for block in model.blocks:
        _advance(block, x, context, tables, rows, counter)

    layers = []
    for layer in range(num_layers):
        tokens = model.project(x[:, layer : layer + 1])[:, 0]
        layers.append(_deliver(generator, layer, tokens, result_device, result_dtype))
        counter.step()
    return generator.assemble(layers)


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


def _deliver(
    generator: Generator, layer: int, tokens: Tensor, device: torch.device, dtype: torch.dtype | None
) -> dict[str, LoraFactor]:
    """One layer's factors on their way out, each in a storage of its own, so that no padding is kept alive."""
    if not torch.isfinite(tokens).all():  # asked once for the layer: every question waits for the device
        raise GenerationError(
            f"The generated LoRA is not finite in layer {layer}. The generator's weights or the condition hold NaN or "
            "infinity, or the computation overflowed: try bfloat16 or float32 weights."
        )

    def own(factor: Tensor) -> Tensor:
        return torch.empty_like(factor, device=device, dtype=dtype or factor.dtype).copy_(factor)

    return {name: LoraFactor(own(down), own(up)) for name, (down, up) in generator.layer_factors(tokens).items()}


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
