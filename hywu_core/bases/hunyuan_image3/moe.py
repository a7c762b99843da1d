"""The mixture of experts of HunyuanImage-3: a router, a shared expert, and two banks that hold the routed experts.

Letters: B batch · L length · H hidden size · M intermediate size · E experts · k experts per token · rows = B * L * k

An expert computes down(x1 * silu(x2)) with (x1, x2) the halves of gate_and_up(x). The experts' weights are stacked, one bank
for each projection, and each bank runs once per forward on rows sorted by expert, so that what stands beside a linear layer
(an adapter) can stand beside a bank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...host.lora.experts import Routing, make_bank

TOKENS_AT_ONCE = 4096  # of a forward; bounds what the rows of a long sequence take, while the banks stay where they are


class Experts(nn.Module):
    """The routed experts as two banks."""

    def __init__(self, gate_and_up_proj: nn.Module, down_proj: nn.Module):
        super().__init__()
        self.gate_and_up_proj, self.down_proj = gate_and_up_proj, down_proj

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """x (B, L, H), weights and chosen experts (B, L, k) -> (B, L, H)."""
        flat, shares, experts = x.reshape(-1, x.shape[-1]), weights.flatten(0, 1), chosen.flatten(0, 1)
        summed, few = torch.zeros_like(flat), 2 * experts.numel() <= self.down_proj.num_experts
        with self.gate_and_up_proj.on_hand(x, few), self.down_proj.on_hand(x, few):
            for start in range(0, len(flat), TOKENS_AT_ONCE):
                part = slice(start, start + TOKENS_AT_ONCE)
                self._add(summed[part], flat[part], shares[part], experts[part], first=start, length=x.shape[1])
        return summed.view_as(x)

    def _add(self, summed: Tensor, x: Tensor, shares: Tensor, chosen: Tensor, first: int, length: int) -> None:
        """Add what the chosen experts give to `summed` (tokens, H), for tokens `first` and on of sequences of a length."""
        k = chosen.shape[-1]
        order = torch.argsort(chosen.flatten(), stable=True)
        token = order // k
        counts = torch.bincount(chosen.flatten(), minlength=self.down_proj.num_experts).tolist()
        routing = Routing(counts, (token + first) // length)
        linear, gated = self.gate_and_up_proj(x[token], routing).chunk(2, dim=-1)
        rows = self.down_proj(linear * F.silu(gated), routing) * shares.flatten()[order].unsqueeze(-1)
        summed.index_add_(0, token, rows.to(x.dtype))


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
    """Shared expert plus routed experts."""

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
        return self.shared_mlp(x) + self.experts(x, *self.gate(x))
