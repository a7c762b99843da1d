"""The mixture of experts of HunyuanImage-3: a router, a shared expert, and two banks that hold the routed experts.

Letters: B batch · L length · H hidden size · M intermediate size · E experts · k experts per token · rows = B * L * k

An expert computes down(x1 * silu(x2)) with (x1, x2) the halves of gate_and_up(x). The experts' weights are stacked, one bank
for each projection, and each bank runs once per forward on rows sorted by expert, so that what stands beside a linear layer
(an adapter) can stand beside a bank.
"""

from __future__ import annotations

from typing import Any

import comfy.memory_management
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...host.lora.experts import make_bank
from ...host.lora.grouped import Routing, grouped_is_fast

# about that many rows of a forward at once: those of two images of 1024x1024, a step with guidance
ROWS_AT_ONCE = 8 * 9216


class Experts(nn.Module):
    """The routed experts as two banks."""

    def __init__(self, gate_and_up_proj: nn.Module, down_proj: nn.Module):
        super().__init__()
        self.gate_and_up_proj, self.down_proj = gate_and_up_proj, down_proj

    def stored_bytes(self) -> int:
        """What the banks take as they are stored, quantised or not."""
        return comfy.memory_management.vram_aligned_size([self.gate_and_up_proj.weight, self.down_proj.weight])

    def route(self, x: Tensor, chosen: Tensor) -> Routing:
        """Sort chosen experts (B, L, k). How many rows each has is asked for here, before any product, so that afterwards the
        CPU runs ahead of the device; torch's own grouped products need not know.
        """
        routing = Routing.of(chosen, self.down_proj.num_experts)
        if not grouped_is_fast(x):
            routing.wait()
        return routing

    def forward(self, x: Tensor, weights: Tensor, routing: Routing) -> Tensor:
        """x (B, L, H), weights (B, L, k) of the chosen experts -> (B, L, H)."""
        flat, shares = x.reshape(-1, x.shape[-1]), weights.flatten()
        summed, few = torch.zeros_like(flat), 2 * shares.numel() <= self.down_proj.num_experts
        with self.gate_and_up_proj.on_hand(x, few), self.down_proj.on_hand(x, few):
            for chunk in routing.chunks(ROWS_AT_ONCE):
                token = chunk.order // weights.shape[-1]
                rows = self.down_proj(_gated(self.gate_and_up_proj(flat[token], chunk)), chunk)
                share = shares[chunk.order].unsqueeze(-1)
                rows = rows * share if rows.requires_grad else rows.mul_(share)
                summed.index_add_(0, token, rows.to(x.dtype))
        return summed.view_as(x)


def _gated(x: Tensor) -> Tensor:
    """(rows, 2 M) -> (rows, M); what it is given is used up where no graph needs it."""
    linear, gate = x.chunk(2, dim=-1)
    return linear * F.silu(gate) if x.requires_grad else linear.mul_(F.silu(gate, inplace=True))


class SharedExpert(nn.Module):
    """The expert that every token passes."""

    def __init__(self, hidden: int, intermediate: int, operations: Any, **factory: Any):
        super().__init__()
        self.gate_and_up_proj = operations.Linear(hidden, 2 * intermediate, bias=False, **factory)
        self.down_proj = operations.Linear(intermediate, hidden, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, H) -> (B, L, H)."""
        first, second = self.gate_and_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(first * F.silu(second))


class Router(nn.Module):
    """Softmax over all experts, the best k renormalised to sum to one."""

    def __init__(self, wg: nn.Module, top_k: int):
        super().__init__()
        self.wg, self.top_k = wg, top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, H) -> weights and chosen experts, both (B, L, k)."""
        shares = self.wg(x).float().softmax(dim=-1)
        weights, chosen = shares.topk(self.top_k, dim=-1)
        return (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype), chosen


class MixtureOfExperts(nn.Module):
    def __init__(
        self,
        hidden: int,
        intermediate: int,
        num_experts: int,
        top_k: int,
        operations: Any,
        shared_intermediate: int | None = None,
        **factory: Any,
    ):
        super().__init__()
        self.gate = Router(operations.Linear(hidden, num_experts, bias=False, **factory), top_k)
        self.shared_mlp = SharedExpert(hidden, shared_intermediate or intermediate, operations, **factory)
        self.experts = Experts(
            make_bank(operations, num_experts, hidden, 2 * intermediate, **factory),
            make_bank(operations, num_experts, intermediate, hidden, **factory),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, H) -> (B, L, H)."""
        weights, chosen = self.gate(x)
        routing = self.experts.route(x, chosen)
        return self.shared_mlp(x) + self.experts(x, weights, routing)
