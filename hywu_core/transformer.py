"""The network of a generator (paper Fig. 5): blocks over a grid of query tokens, rotary tables, output heads.

Letters:
    B batch · N layers of the base's stack · T tokens of one layer (A tokens first, then B tokens) · r rank
    S = T * r / dim_accumulation, positions of one layer · d d_model · h heads · L length of the condition

    hw_pos + layer_pos -- norm_tokens --> x (B, N, S, d)
    num_pg_layers times:  x += attention over N · x += attention over S · x += attention to context · x += feed-forward
    norm_final -- proj_out_A | proj_out_B --> token grid (B, N, T, r, token_dim)

A generator for several stacks of the base has one grid a stack. All weights but the learned positions are shared: blocks see
rows of d, whatever their number, and heads see tokens, whose shape is common. What tells the stacks apart is
    learned positions   hw_pos and layer_pos hold rows of their own for each stack, one stack after the other, so that equal
                        places of two stacks begin as different tokens
    rotary positions    only the attention to the condition compares a grid with something outside of it; for it, layers are
                        counted through all stacks, and the condition lies behind the tokens of the largest layer
Grids do not attend to each other: their sizes differ, and each reads the whole condition. So a grid costs what it costs
alone, and one stack is what it was, bit for bit and name by name.

Parameter names are those of the released checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import GeneratorConfig
from .layout import layers_before, token_counts

ROPE_THETA = 10_000.0
NORM_EPS = 1e-6
# Fused attention kernels index with 32 bits and map the leading axis to a grid axis of 65,535.
MOST_SEQUENCES = 65_535
MOST_PADDED = 2**31
NO_COMPLEX = ("mps", "privateuseone")  # types of devices without complex numbers


def rotary(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, the axes sharing the head evenly.

    Args:
        positions: (rows, axes) integer positions; head_dim / axes must be even.
    Returns:
        two tensors (rows, head_dim / 2), float32, on the CPU.
    """
    width = head_dim // positions.shape[-1]
    # float64 as long as the angle is large: position 10,000 has no exact fraction of a turn left in float32
    steps = torch.arange(0, width, 2, dtype=torch.float64) / width
    angles = positions.double().unsqueeze(-1) * ROPE_THETA**-steps
    angles = angles.flatten(-2)
    return angles.cos().float(), angles.sin().float()


class Rotation(NamedTuple):
    """How neighbouring pairs of a head are turned; the host may bring a kernel of its own."""

    table: Callable[[Tensor, Tensor], Tensor]  # cosines and sines (rows, head_dim / 2) -> (rows, head_dim / 2, ...)
    turn: Callable[[Tensor, Tensor], Tensor]  # heads (..., h, rows, head_dim) and a table -> heads


def turn_complex(x: Tensor, table: Tensor) -> Tensor:
    """One product a pair, in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def matrices(cos: Tensor, sin: Tensor) -> Tensor:
    """(rows, head_dim / 2) each -> 2 x 2 matrices (rows, head_dim / 2, 2, 2) that turn a pair."""
    return torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))


def turn_real(x: Tensor, table: Tensor) -> Tensor:
    """The same without complex numbers."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 1, 2))
    turned = torch.addcmul(table[..., 0] * wide[..., 0], table[..., 1], wide[..., 1])
    return turned.flatten(-2).to(x.dtype)


COMPLEX, REAL = Rotation(torch.complex, turn_complex), Rotation(matrices, turn_real)


class Rotary(NamedTuple):
    """Turns heads (..., h, rows, head_dim) by the angles of their rows."""

    table: Tensor  # (rows, head_dim / 2, ...)
    turn: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, heads: Tensor) -> Tensor:
        return self.turn(heads, self.table)

    def rows(self, part: slice) -> Rotary:
        """The same for some of the rows."""
        return self._replace(table=self.table[part])


Fused = tuple[Tensor, Tensor]  # the weights and biases of queries, keys and values, one below the other


class Attention(nn.Module):
    """Multi-head attention with rotary positions; keys and values may come from elsewhere.

    Heads are (..., h, rows, head_dim).
    """

    def __init__(self, d_model: int, heads: int, operations: Any, **factory):
        super().__init__()
        self.heads = heads
        self.W_q = operations.Linear(d_model, d_model, **factory)
        self.W_k = operations.Linear(d_model, d_model, **factory)
        self.W_v = operations.Linear(d_model, d_model, **factory)
        self.W_o = operations.Linear(d_model, d_model, **factory)

    def fused(self) -> Fused | None:
        """Queries, keys and values as one product; None where a layer is more than its weight (casts, quantisation)."""
        layers = (self.W_q, self.W_k, self.W_v)
        if any(type(layer) is not nn.Linear or type(layer.weight.data) is not Tensor for layer in layers):
            return None
        return torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])

    def queries(self, x: Tensor, rotary: Rotary) -> Tensor:
        """x (..., rows, d) -> heads."""
        return rotary(self._split(self.W_q(x)))

    def keys_values(self, context: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """context (..., rows, d) -> heads of each."""
        return rotary(self._split(self.W_k(context))), self._split(self.W_v(context))

    def queries_keys_values(self, x: Tensor, rotary: Rotary, fused: Fused | None = None) -> tuple[Tensor, ...]:
        """x (..., rows, d) -> heads of each."""
        if fused is None:
            return self.queries(x, rotary), *self.keys_values(x, rotary)
        queries, keys, values = (self._split(part) for part in F.linear(x, *fused).chunk(3, dim=-1))
        return rotary(queries), rotary(keys), values

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Heads of each -> (..., rows, d)."""
        # fused kernels take one leading axis; with two, all scores would be written out
        flat = [heads.flatten(0, -4) for heads in (queries, keys, values)]
        most = _most_sequences(flat[0], flat[1])
        pieces = zip(*(heads.split(most) for heads in flat), strict=True)
        attended = [F.scaled_dot_product_attention(*piece) for piece in pieces]
        whole = attended[0] if len(attended) == 1 else torch.cat(attended)
        return self.W_o(whole.view_as(queries).transpose(-2, -3).flatten(-2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)


def _most_sequences(queries: Tensor, keys: Tensor) -> int:
    """How many sequences of (n, h, rows, head_dim) one attention kernel may take, forward and backward."""
    heads, rows, width = queries.shape[1:]
    padded = -(-max(rows, keys.shape[-2]) // 128) * 128
    return max(1, min(MOST_SEQUENCES, MOST_PADDED // (heads * padded * max(width, 32))))


class FeedForward(nn.Module):
    """Linear, SiLU, Linear; four times as wide inside."""

    def __init__(self, d_model: int, operations: Any, **factory):
        super().__init__()
        self.fc1 = operations.Linear(d_model, 4 * d_model, **factory)
        self.fc2 = operations.Linear(4 * d_model, d_model, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        hidden = self.fc1(x)
        return self.fc2(F.silu(hidden, inplace=not hidden.requires_grad))


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

    def over_layers(self, x: Tensor, rotary: Rotary, fused: Fused | None = None) -> Tensor:
        """x (B, N, s, d), any s positions: each attends to itself in all layers."""
        x = self.norm1(x.transpose(1, 2).contiguous())
        return self.self_attn_n.attend(*self.self_attn_n.queries_keys_values(x, rotary, fused)).transpose(1, 2)

    def token_heads(self, x: Tensor, rotary: Rotary, fused: Fused | None = None) -> tuple[Tensor, ...]:
        """x (..., rows, d), any rows of a layer: queries, keys and values of `over_tokens`."""
        return self.self_attn_hw.queries_keys_values(self.norm2(x), rotary, fused)

    def over_tokens(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Heads of any positions, keys and values of all positions of their layer -> (..., rows, d)."""
        return self.self_attn_hw.attend(queries, keys, values)

    def over_condition(self, x: Tensor, keys_values: tuple[Tensor, Tensor], rotary: Rotary) -> Tensor:
        """x (B, rows, d), any rows of layers x positions: each attends to the whole condition."""
        return self.self_attn_cross.attend(self.self_attn_cross.queries(self.norm3(x), rotary), *keys_values)

    def feed(self, x: Tensor) -> Tensor:
        """x (..., d), any rows."""
        return self.feed_forward(self.norm4(x))

    def forward(self, x: Tensor, context: Tensor, tables: Tables) -> Tensor:
        """x (B, N, S, d), context (B, L, d) -> x. The whole grid at once, graph kept."""
        x = x + self.over_layers(x, tables.layers())
        x = x + self.over_tokens(*self.token_heads(x, tables.tokens()))
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

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """x (B, L, d) -> x."""
        x = x + self.self_attn.attend(*self.self_attn.queries_keys_values(self.norm1(x), rotary))
        return x + self.feed_forward(self.norm2(x))


class Tables:
    """Rotary tables of the axes of one stack's grid, the first one's. Every distinct angle is computed once and kept on the
    device.
    """

    def __init__(self, config: GeneratorConfig, device: torch.device, rotation: Rotation | None = None):
        self.config, self.device, self.head_dim = config, device, config.head_dim
        self.rotation = rotation or (REAL if device.type in NO_COMPLEX else COMPLEX)
        self.rows_per_token = config.rank // config.dim_accumulation
        tokens = [sum(token_counts(config, stack)) for stack in range(len(config.stacks))]
        self.behind_tokens = max(*tokens, self.rows_per_token)
        self._kept: dict[tuple, Tensor] = {}
        self._choose(0)

    def of_stack(self, stack: int) -> Tables:
        """The tables of another stack's grid. What both have in common is kept once."""
        other = copy.copy(self)
        other._choose(stack)
        return other

    def _choose(self, stack: int) -> None:
        self.stack = stack
        self.num_layers = self.config.stacks[stack].num_base_model_layers
        self.first_layer = layers_before(self.config, stack)
        self.positions = sum(token_counts(self.config, stack)) * self.rows_per_token

    def layers(self) -> Rotary:
        """One axis: the layer."""
        index = torch.arange(self.num_layers).unsqueeze(-1)
        return self._rotary(self._keep(("layers", self.stack), index, self.head_dim))

    def tokens(self) -> Rotary:
        """Two axes: the token, and the row group inside it. The positions of one layer."""
        index = torch.arange(self.positions)
        index = torch.stack((index // self.rows_per_token, index % self.rows_per_token), dim=-1)
        return self._rotary(self._keep(("tokens", self.stack), index, self.head_dim))

    def grid(self, start: int = 0, stop: int | None = None) -> Rotary:
        """Two axes: the layer, counted through all stacks, and the position inside it. Rows start to stop of layers x
        positions.
        """
        rows = self.num_layers * self.positions
        stop = rows if stop is None else stop
        if (start, stop) == (0, rows):
            # one for all blocks, whose graphs keep what they were given
            if ("grid", self.stack) not in self._kept:
                self._kept["grid", self.stack] = self._grid(start, stop)
            return self._rotary(self._kept["grid", self.stack])
        return self._rotary(self._grid(start, stop))

    def _grid(self, start: int, stop: int) -> Tensor:
        half, size = self.head_dim // 2, self.positions
        numbers = torch.arange(self.first_layer, self.first_layer + self.num_layers).unsqueeze(-1)
        layers = self._keep(("layer half", self.stack), numbers, half)
        positions = self._keep(("position half", self.stack), torch.arange(size).unsqueeze(-1), half)
        pieces = []
        for layer in range(start // size, -(-stop // size)):
            own = positions[max(start - layer * size, 0) : stop - layer * size]
            pieces.append(torch.cat((layers[layer].expand_as(own), own), dim=1))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def condition(self, length: int) -> Rotary:
        """Two axes, on their diagonal, behind every token position: condition token l sits at (o + l, o + l). The same for
        all stacks.
        """
        index = torch.arange(self.behind_tokens, self.behind_tokens + length)
        return self._rotary(self._keep(("condition", length), torch.stack((index, index), dim=-1), self.head_dim))

    def _keep(self, name: tuple, positions: Tensor, width: int) -> Tensor:
        if name not in self._kept:
            self._kept[name] = self.rotation.table(*rotary(positions, width)).to(self.device)
        return self._kept[name]

    def _rotary(self, table: Tensor) -> Rotary:
        return Rotary(table, self.rotation.turn)


class _Places(NamedTuple):
    """Of one stack: its rows of the learned positions, and its tokens."""

    layers: slice  # of layer_pos
    rows: slice  # of hw_pos, one for each row of a token
    num_a: int  # tokens of a layer that hold A factors
    tokens: int  # of a layer


def _places(config: GeneratorConfig) -> Iterator[_Places]:
    row = 0
    for number, stack in enumerate(config.stacks):
        num_a, num_b = token_counts(config, number)
        first, rows = layers_before(config, number), (num_a + num_b) * config.rank
        layers = slice(first, first + stack.num_base_model_layers)
        yield _Places(layers, slice(row, row + rows), num_a, num_a + num_b)
        row += rows


class TokenTransformer(nn.Module):
    """Learned positions, blocks and output heads."""

    def __init__(self, config: GeneratorConfig, operations: Any, **factory):
        super().__init__()
        self.places = tuple(_places(config))
        self.rank, self.accumulation = config.rank, config.dim_accumulation
        part = config.d_model // config.dim_accumulation
        self.hw_pos = operations.Embedding(self.places[-1].rows.stop, part, **factory)
        self.layer_pos = operations.Embedding(self.places[-1].layers.stop, part, **factory)
        self.norm_input = operations.RMSNorm(config.d_model, eps=NORM_EPS, **factory)
        self.norm_tokens = operations.RMSNorm(config.d_model, eps=NORM_EPS, **factory)
        self.norm_final = operations.RMSNorm(config.d_model, eps=NORM_EPS, **factory)
        self.blocks = nn.ModuleList(Block(config, operations, **factory) for _ in range(config.num_pg_layers))
        self.proj_out_A = operations.Linear(part, config.output_dim, **factory)
        self.proj_out_B = operations.Linear(part, config.output_dim, **factory)

    def positions(self, device: torch.device, dtype: torch.dtype, stack: int = 0) -> Tensor:
        """The learned positions inside a layer, (T * r, d / dim_accumulation)."""
        rows = self.places[stack].rows
        return self.hw_pos(torch.arange(rows.start, rows.stop, device=device)).to(dtype)

    def initial_tokens(self, device: torch.device, dtype: torch.dtype, stack: int = 0) -> Tensor:
        """The query tokens before the first block, which carry no condition: (1, N, S, d)."""
        return self.layer_tokens(self.positions(device, dtype, stack), stack=stack)

    def layer_tokens(self, positions: Tensor, layers: slice = slice(None), stack: int = 0) -> Tensor:
        """The query tokens of the chosen layers of a stack, (1, n, S, d)."""
        of_stack = self.places[stack].layers
        index = torch.arange(of_stack.start, of_stack.stop, device=positions.device)[layers]
        x = positions + self.layer_pos(index).to(positions.dtype).unsqueeze(1)  # (n, T * r, part)
        return self.norm_tokens(x.view(1, len(index), -1, self.accumulation * positions.shape[-1]))

    def project(self, x: Tensor, stack: int = 0) -> Tensor:
        """x (B, n, S, d) of a stack -> tokens (B, n, T, r, token_dim), through the head of each half."""
        place = self.places[stack]
        x = self.norm_final(x).reshape(*x.shape[:2], place.tokens, self.rank, -1)
        down, up = x[:, :, : place.num_a], x[:, :, place.num_a :]
        return torch.cat((self.proj_out_A(down), self.proj_out_B(up)), dim=2)
