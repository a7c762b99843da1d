"""The adapter bank: the factors of one applied LoRA as modules that the host loads, offloads and counts.

Each adapter computes strength * scale * (x . A^T) . B^T beside a layer's forward. Per-sample factors repeat over the batch:
the host stacks the positive and the negative rows of one latent batch behind each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy_aimdo.model_vbar
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import MatchError
from .matching import Match


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
        if not self._has_a_page():
            yield comfy.model_management.cast_to(self.weight, x.dtype, x.device)
            return
        weight, bias, stream = comfy.ops.cast_bias_weight(self, x, offloadable=True)
        try:
            yield weight
        finally:
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)

    def _has_a_page(self) -> bool:
        """Whether the host's dynamic memory has room for it on the device."""
        page = getattr(self, "_v", None)
        return page is not None and comfy_aimdo.model_vbar.vbar_fault(page) is not None


class Adapter(torch.nn.Module):
    """The factor pair of one target."""

    def __init__(self, match: Match, scale: float, factor: Callable[[Tensor], Any] = Factor):
        super().__init__()
        self.down, self.up = factor(match.pair.down), factor(match.pair.up)
        self.path, self.scale = match.module, scale
        self.start, self.length = match.start, match.length
        self.grouped = match.pair.grouped
        self.channels_first = match.channels_first

    def add_to(self, y: Tensor, x: Tensor, strength: float, routing: Any = None) -> Tensor:
        """The layer's output with this adapter's added: y (..., out), x (..., in); of a convolution (B, out, ...)."""
        if self.channels_first:
            y, x = y.movedim(1, -1), x.movedim(1, -1)
        with self.down.near(x) as down, self.up.near(x) as up:
            down = down * (strength * self.scale)  # the smallest of the tensors that it could be multiplied into
            delta = grouped_delta(x, down, up, routing) if self.grouped else delta_of(x, down, up)
        y = y + delta if self.length is None else self._add_to_rows(y, delta)
        return y.movedim(-1, 1) if self.channels_first else y

    def _add_to_rows(self, y: Tensor, delta: Tensor) -> Tensor:
        before, rows, behind = y.tensor_split((self.start, self.start + self.length), dim=-1)
        return torch.cat((before, rows + delta, behind), dim=-1)


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


def grouped_delta(x: Tensor, down: Tensor, up: Tensor, routing: Any) -> Tensor:
    """The same inside a bank of experts: x (rows, in) sorted by expert, down (B, E, r, in), up (B, E, out, r)."""
    delta = x.new_empty(x.shape[0], up.shape[2])
    instances = down.shape[0]
    counts = routing.counts.tolist() if isinstance(routing.counts, Tensor) else routing.counts
    start = 0
    for expert, count in enumerate(counts):
        part = slice(start, start + count)
        start += count
        if instances == 1:
            delta[part] = F.linear(F.linear(x[part], down[0, expert]), up[0, expert])
            continue
        owner = routing.samples[part] % instances
        for instance in range(instances):
            rows = torch.nonzero(owner == instance).squeeze(-1) + part.start
            delta[rows] = F.linear(F.linear(x[rows], down[instance, expert]), up[instance, expert])
    return delta


def _copies(rows: int, instances: int) -> int:
    if rows % instances:
        raise MatchError(
            f"The LoRA holds {instances} instances, one for each picture of a batch, but the model runs {rows} rows. "
            f"Use a latent batch of {instances}, or choose one instance."
        )
    return rows // instances
