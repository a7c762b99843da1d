"""The adapter bank: the factors of one applied LoRA as modules that the host loads, offloads and counts.

Each adapter computes strength * scale * (x . A^T) . B^T beside a layer's forward. Per-sample factors repeat over the batch:
the host stacks the positive and the negative rows of one latent batch behind each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import MatchError
from .grouped import Routing, add_low_rank
from .matching import Match
from .pages import has_a_page


class Factor(torch.nn.Module, comfy.ops.CastWeightBiasOp):
    """One factor as a weight of the host's kind: cast and streamed to where it is used."""

    def __init__(self, tensor: Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(tensor, requires_grad=False)
        self.register_parameter("bias", None)

    @contextmanager
    def near(self, x: Tensor) -> Iterator[Tensor]:
        """The factor on x's device in x's dtype, in memory of its own. The buffers that the host streams weights through hold
        one weight each, and a bank of experts may stand in them while its adapters run.
        """
        if not has_a_page(self):
            yield comfy.model_management.cast_to(self.weight, x.dtype, x.device)
            return
        weight, bias, stream = comfy.ops.cast_bias_weight(self, x, offloadable=True)
        try:
            yield weight
        finally:
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)


class Adapter(torch.nn.Module):
    def __init__(self, match: Match, scale: float, factor: Callable[[Tensor], Any] = Factor):
        super().__init__()
        self.down, self.up = factor(match.pair.down), factor(match.pair.up)
        self.path, self.scale = match.module, scale
        self.start, self.length = match.start, match.length
        self.grouped, self.instances = match.pair.grouped, match.pair.down.shape[0]
        self.channels_first = match.channels_first

    def add_to(self, y: Tensor, x: Tensor, strength: float, routing: Any = None) -> Tensor:
        """The layer's output with this adapter's added: y (..., out), x (..., in); of a convolution (B, out, ...).
        Without a graph, y itself is changed.
        """
        if self.channels_first:
            y, x = y.movedim(1, -1), x.movedim(1, -1)
        plain = self.instances == 1 and not (self.grouped or self.channels_first or torch.is_grad_enabled())
        with self.down.near(x) as down, self.up.near(x) as up:
            if plain and y.is_contiguous() and y.dtype is x.dtype:
                hidden = F.linear(x.reshape(-1, x.shape[-1]), down[0])
                rows = self._rows(y.view(-1, y.shape[-1]))
                rows.addmm_(hidden, up[0].mT, alpha=strength * self.scale)
                return y
            down = down * (strength * self.scale)  # the smallest of the tensors that it could be multiplied into
            delta = grouped_delta(x, down, up, routing) if self.grouped else delta_of(x, down, up)
        if self.length is None:
            y = y + delta
        elif torch.is_grad_enabled():
            before, rows, behind = y.tensor_split((self.start, self.start + self.length), dim=-1)
            y = torch.cat((before, rows + delta, behind), dim=-1)
        else:
            self._rows(y).add_(delta)
        return y.movedim(-1, 1) if self.channels_first else y

    def _rows(self, y: Tensor) -> Tensor:
        """Those that it changes, of y (..., out)."""
        return y if self.length is None else y.narrow(-1, self.start, self.length)


def add_parts(y: Tensor, x: Tensor, parts: list[tuple[Adapter, float]], routing: Routing | None = None) -> Tensor:
    """A layer's output with what adapters add, each at its strength. y may be used up."""
    together = [part for part in parts if part[0].grouped and part[0].instances == 1 and not torch.is_grad_enabled()]
    if together:
        y = _add_together(y, x, together, routing)
    for adapter, strength in (part for part in parts if part not in together):
        y = adapter.add_to(y, x, strength, routing)
    return y


def _add_together(y: Tensor, x: Tensor, parts: list[tuple[Adapter, float]], routing: Routing) -> Tensor:
    """All adapters of one bank of experts as one, of the ranks' sum: its factors are brought once, and each expert takes two
    products.
    """
    with ExitStack() as held:
        downs = [held.enter_context(adapter.down.near(x))[0] for adapter, _ in parts]
        ups = [held.enter_context(adapter.up.near(x))[0] for adapter, _ in parts]
        rank = sum(up.shape[-1] for up in ups)
        joined, first = x.new_zeros(len(ups[0]), y.shape[-1], rank), 0
        for (adapter, strength), up in zip(parts, ups, strict=True):
            rows = slice(adapter.start, adapter.start + up.shape[1])
            torch.mul(up, strength * adapter.scale, out=joined[:, rows, first : first + up.shape[-1]])
            first += up.shape[-1]
        return add_low_rank(y, x, downs[0] if len(downs) == 1 else torch.cat(downs, dim=1), joined, routing)


class Bank(torch.nn.Module):
    """All adapters of one applied LoRA."""

    def __init__(self, matches: tuple[Match, ...], scale: float):
        super().__init__()
        self.adapters = torch.nn.ModuleList(Adapter(match, scale) for match in matches)


def bank_patcher(
    matches: tuple[Match, ...], scale: float, device: torch.device, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """A bank under the host's memory management. It can be made again, for another GPU and for a clone of the MODEL without
    dynamic memory.
    """
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(
        Bank(matches, scale), load_device=device, offload_device=comfy.model_management.unet_offload_device()
    )
    patcher.cached_patcher_init = (bank_patcher, (matches, scale, device))
    return patcher


def delta_of(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """(x . A^T) . B^T: x (N, ..., in), down (B, r, in), up (B, out, r), N a multiple of B -> (N, ..., out).

    Raises:
        MatchError: if the rows of x cannot be shared out among the LoRA's instances.
    """
    if down.shape[0] == 1:
        return F.linear(F.linear(x, down[0]), up[0])
    copies = _copies(x.shape[0], down.shape[0])
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    hidden = torch.bmm(rows, down.repeat(copies, 1, 1).mT)
    return torch.bmm(hidden, up.repeat(copies, 1, 1).mT).reshape(*x.shape[:-1], up.shape[1])


def grouped_delta(x: Tensor, down: Tensor, up: Tensor, routing: Routing) -> Tensor:
    """The same inside a bank of experts: x (rows, in) sorted by expert, down (B, E, r, in), up (B, E, out, r)."""
    delta, instances = x.new_empty(x.shape[0], up.shape[2]), down.shape[0]
    for expert, sample, part in routing.parts_of_samples():
        instance = sample % instances
        delta[part] = F.linear(F.linear(x[part], down[instance, expert]), up[instance, expert])
    return delta


def _copies(rows: int, instances: int) -> int:
    if rows % instances:
        raise MatchError(
            f"The LoRA holds {instances} instances, one for each picture of a batch, but the model runs {rows} rows. "
            f"Use a latent batch of {instances}, or choose one instance."
        )
    return rows // instances
