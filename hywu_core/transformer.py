"""The network of a generator (paper Fig. 5): blocks over a grid of query tokens, rotary tables, output heads.

Letters:
    B batch · N layers of the base's stack · T tokens of one layer (A tokens first, then B tokens) · r rank
    S = T * r / dim_accumulation, positions of one layer · d d_model · h heads · L length of the condition

    hw_pos + layer_pos ── norm_tokens ──► x (B, N, S, d)
    num_pg_layers times:  x += attention over N · x += attention over S · x += attention to context · x += feed-forward
    norm_final ── proj_out_A | proj_out_B ──► token grid (B, N, T, r, token_dim)

Parameter names are those of the released checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import GeneratorConfig
from .layout import token_counts

ROPE_THETA = 10_000.0
NORM_EPS = 1e-6


def rotary(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, the axes sharing the head evenly.

    Args:
        positions: (rows, axes) integer positions; head_dim / axes must be even.
    Returns:
        two tensors (rows, head_dim / 2), float32.
    """
    width = head_dim // positions.shape[-1]
    # float64 as long as the angle is large: position 10,000 has no exact fraction of a turn left in float32
    steps = torch.arange(0, width, 2, dtype=torch.float64) / width
    angles = positions.cpu().double().unsqueeze(-1) * ROPE_THETA**-steps
    angles = angles.flatten(-2)
    return angles.cos().float().to(positions.device), angles.sin().float().to(positions.device)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn neighbouring pairs of each head of x (..., h, rows, head_dim) by the table's angles (rows, head_dim / 2)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    turn = torch.complex(*(part.to(wide.dtype) for part in table))
    pairs = torch.view_as_complex(
        wide.unflatten(-1, (-1, 2)).contiguous()
    )  # one product a pair, not four and their sums
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with rotary positions; keys and values may come from elsewhere."""

    def __init__(self, d_model: int, heads: int, operations: Any, **factory):
        super().__init__()
        self.heads = heads
        self.W_q = operations.Linear(d_model, d_model, **factory)
        self.W_k = operations.Linear(d_model, d_model, **factory)
        self.W_v = operations.Linear(d_model, d_model, **factory)
        self.W_o = operations.Linear(d_model, d_model, **factory)

    def keys_values(self, context: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """context (..., rows, d) -> two of (..., h, rows, head_dim)."""
        return rotate(self._split(self.W_k(context)), table), self._split(self.W_v(context))

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], table: tuple[Tensor, Tensor]) -> Tensor:
        """x (..., rows, d) -> (..., rows, d)."""
        queries = rotate(self._split(self.W_q(x)), table)
        # fused kernels take one leading axis; with two, all scores would be written out
        attended = F.scaled_dot_product_attention(*(t.flatten(0, -4) for t in (queries, *keys_values)))
        return self.W_o(attended.view_as(queries).transpose(-2, -3).flatten(-2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)


class FeedForward(nn.Module):
    """Linear, SiLU, Linear; four times as wide inside."""

    def __init__(self, d_model: int, operations: Any, **factory):
        super().__init__()
        self.fc1 = operations.Linear(d_model, 4 * d_model, **factory)
        self.fc2 = operations.Linear(4 * d_model, d_model, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return self.fc2(F.silu(self.fc1(x)))


class Block(nn.Module):
    """One block of Fig. 5: four pre-normed residual branches, each a method from its input rows to what is added to them."""

    def __init__(self, config: GeneratorConfig, operations: Any, **factory):
        super().__init__()
        d, heads = config.d_model, config.heads
        self.norm1 = operations.RMSNorm(d, eps=NORM_EPS, **factory)
        self.norm2 = operations.RMSNorm(d, eps=NORM_EPS, **factory)
        self.norm3 = operations.RMSNorm(d, eps=NORM_EPS, **factory)
        self.norm4 = operations.RMSNorm(d, eps=NORM_EPS, **factory)
        self.self_attn_n = Attention(d, heads, operations, **factory)
        self.self_attn_hw = Attention(d, heads, operations, **factory)
        self.self_attn_cross = Attention(d, heads, operations, **factory)
        self.feed_forward = FeedForward(d, operations, **factory)

    def over_layers(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, N, s, d), any s positions: each attends to itself in all layers."""
        x = self.norm1(x).transpose(1, 2)
        keys_values = self.self_attn_n.keys_values(x, table)
        return self.self_attn_n(x, keys_values, table).transpose(1, 2)

    def layer_keys_values(self, x: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """x (B, n, S, d), whole layers: what `over_tokens` attends to."""
        return self.self_attn_hw.keys_values(self.norm2(x), table)

    def over_tokens(self, x: Tensor, keys_values: tuple[Tensor, Tensor], table: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, n, s, d), any positions: each attends to all positions of its own layer."""
        return self.self_attn_hw(self.norm2(x), keys_values, table)

    def over_condition(self, x: Tensor, keys_values: tuple[Tensor, Tensor], table: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, rows, d), any rows of layers x positions: each attends to the whole condition."""
        return self.self_attn_cross(self.norm3(x), keys_values, table)

    def feed(self, x: Tensor) -> Tensor:
        """x (..., d), any rows."""
        return self.feed_forward(self.norm4(x))

    def forward(self, x: Tensor, context: Tensor, tables: Tables) -> Tensor:
        """x (B, N, S, d), context (B, L, d) -> x. The whole grid at once, graph kept."""
        x = x + self.over_layers(x, tables.layers())
        x = x + self.over_tokens(x, self.layer_keys_values(x, tables.tokens()), tables.tokens())
        keys_values = self.self_attn_cross.keys_values(context, tables.condition(context.shape[1]))
        x = x + self.over_condition(x.flatten(1, 2), keys_values, tables.grid()).view_as(x)
        return x + self.feed(x)


class EncoderLayer(nn.Module):
    """A pre-normed transformer layer over the condition, for generators that are trained with an encoder of their own."""

    def __init__(self, config: GeneratorConfig, operations: Any, **factory):
        super().__init__()
        self.norm1 = operations.RMSNorm(config.d_model, eps=NORM_EPS, **factory)
        self.norm2 = operations.RMSNorm(config.d_model, eps=NORM_EPS, **factory)
        self.self_attn = Attention(config.d_model, config.heads, operations, **factory)
        self.feed_forward = FeedForward(config.d_model, operations, **factory)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, L, d) -> x."""
        normed = self.norm1(x)
        x = x + self.self_attn(normed, self.self_attn.keys_values(normed, table), table)
        return x + self.feed_forward(self.norm2(x))


class Tables:
    """Rotary tables of the grid's axes, computed for the rows asked for, so that no table of the whole grid need exist."""

    def __init__(self, config: GeneratorConfig, device: torch.device):
        self.device, self.head_dim = device, config.head_dim
        self.num_layers = config.num_base_model_layers
        self.num_tokens = sum(token_counts(config))
        self.rows_per_token = config.rank // config.dim_accumulation
        self.positions = self.num_tokens * self.rows_per_token

    def layers(self) -> tuple[Tensor, Tensor]:
        """One axis: the layer."""
        return self._table(torch.arange(self.num_layers).unsqueeze(-1))

    def tokens(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Two axes: the token, and the row group inside it. Positions start to stop of one layer."""
        index = torch.arange(start, self.positions if stop is None else stop)
        return self._table(torch.stack((index // self.rows_per_token, index % self.rows_per_token), dim=-1))

    def grid(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Two axes: the layer, and the position inside it. Rows start to stop of layers x positions."""
        index = torch.arange(start, self.num_layers * self.positions if stop is None else stop)
        return self._table(torch.stack((index // self.positions, index % self.positions), dim=-1))

    def condition(self, length: int) -> tuple[Tensor, Tensor]:
        """Two axes, on their diagonal, behind every token position: condition token l sits at (o + l, o + l)."""
        offset = max(self.num_tokens, self.rows_per_token)
        index = torch.arange(offset, offset + length)
        return self._table(torch.stack((index, index), dim=-1))

    def _table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rotary(positions, self.head_dim)
        return cos.to(self.device), sin.to(self.device)


class TokenTransformer(nn.Module):
    """Learned positions, blocks and output heads."""

    def __init__(self, config: GeneratorConfig, operations: Any, **factory):
        super().__init__()
        part = config.d_model // config.dim_accumulation
        self.num_a = token_counts(config)[0]
        self.grid = (config.num_base_model_layers, sum(token_counts(config)), config.rank, part)
        self.accumulation = config.dim_accumulation
        self.hw_pos = operations.Embedding(self.grid[1] * config.rank, part, **factory)
        self.layer_pos = operations.Embedding(config.num_base_model_layers, part, **factory)
        self.norm_input = operations.RMSNorm(config.d_model, eps=NORM_EPS, **factory)
        self.norm_tokens = operations.RMSNorm(config.d_model, eps=NORM_EPS, **factory)
        self.norm_final = operations.RMSNorm(config.d_model, eps=NORM_EPS, **factory)
        self.blocks = nn.ModuleList(Block(config, operations, **factory) for _ in range(config.num_pg_layers))
        self.proj_out_A = operations.Linear(part, config.output_dim, **factory)
        self.proj_out_B = operations.Linear(part, config.output_dim, **factory)

    def initial_tokens(self, device: torch.device, dtype: torch.dtype, layers: slice = slice(None)) -> Tensor:
        """The query tokens before the first block, which carry no condition: (1, n, S, d) of the chosen layers."""
        num_layers, tokens, rank, part = self.grid
        index = torch.arange(num_layers, device=device)[layers]
        rows = self.hw_pos(torch.arange(tokens * rank, device=device)).to(dtype)
        x = rows + self.layer_pos(index).to(dtype).unsqueeze(1)  # (n, T * r, part)
        x = x.view(1, len(index), -1, self.accumulation * part)
        return self.norm_tokens(x)

    def project(self, x: Tensor) -> Tensor:
        """x (B, n, S, d) -> tokens (B, n, T, r, token_dim), through the head of each half."""
        _, tokens, rank, part = self.grid
        x = self.norm_final(x).reshape(*x.shape[:2], tokens, rank, part)
        return torch.cat((self.proj_out_A(x[:, :, : self.num_a]), self.proj_out_B(x[:, :, self.num_a :])), dim=2)
