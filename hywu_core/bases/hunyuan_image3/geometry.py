"""Positions and attention of a sequence: where each token stands in two dimensions, and which tokens it attends to.

Text stands on the diagonal (y = x = index). The tokens of a picture stand on their grid, centred on the diagonal.
Attention is causal, except that the tokens of a source picture attend to each other, and so do those of the generated image.
Source: reference facts 3.4 and 3.5.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .sequence import Grid, Layout, Span


class Rows(NamedTuple):
    """Queries start to stop; they see every key before `start`, and of their own either all or those before themselves."""

    start: int
    stop: int
    causal: bool


def positions(layout: Layout, device: torch.device | None = None) -> Tensor:
    """(length, 2): y and x of every token, whole numbers."""
    indices = torch.arange(layout.length, device=device)
    found = torch.stack((indices, indices), dim=1)
    for span, grid in _grids(layout):
        found[span.start : span.start + grid[0] * grid[1]] = _on_grid(span.start, grid, device)
    return found


def rotary(places: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine (length, head_dim) in float32: pair k turns with y where k is even, with x where it is odd.

    Args:
        places: (length, 2), of `positions`.
    """
    pairs = torch.arange(0, head_dim, 2, device=places.device, dtype=torch.float32)
    frequencies = 1.0 / theta ** (pairs / head_dim)
    axis = torch.arange(head_dim // 2, device=places.device) % 2
    angles = places.float()[:, axis] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (k, k + half) of the last dimension: x (B, heads, length, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attention_rows(layout: Layout) -> tuple[Rows, ...]:
    """The sequence cut into stretches of queries that a kernel can run without a mask as large as the sequence squared."""
    rows, start = [], 0
    for block in _bidirectional(layout):
        if block.start > start:
            rows.append(Rows(start, block.start, causal=True))
        rows.append(Rows(block.start, block.stop, causal=False))
        start = block.stop
    if start < layout.length:
        rows.append(Rows(start, layout.length, causal=True))
    return tuple(rows)


def dense_mask(layout: Layout) -> Tensor:
    """(length, length) bool, True where a query (row) attends to a key (column); what `attention_rows` stands for."""
    mask = torch.ones(layout.length, layout.length, dtype=torch.bool).tril()
    for block in _bidirectional(layout):
        mask[block.start : block.stop, block.start : block.stop] = True
    return mask


def _bidirectional(layout: Layout) -> list[Span]:
    blocks = [picture.joint for picture in layout.pictures]
    return blocks if layout.image is None else [*blocks, layout.image.image]


def _grids(layout: Layout) -> Iterable[tuple[Span, Grid]]:
    for picture in layout.pictures:
        yield picture.latent, picture.latent_grid
        yield picture.vision, picture.patch_grid
    if layout.image is not None:
        yield layout.image.image, layout.image.grid


def _on_grid(start: int, grid: Grid, device: torch.device | None) -> Tensor:
    rows, columns = grid
    index = torch.arange(rows * columns, device=device)
    top, left = start + (columns * rows - rows) / 2, start + (columns * rows - columns) / 2
    y, x = top + index // columns, left + index % columns
    return torch.stack((y, x), dim=1).long()  # half positions are truncated, as in the reference
