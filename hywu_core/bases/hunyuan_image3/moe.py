"""The mixture of experts of HunyuanImage-3: a router, a shared expert, and two banks that hold the routed experts.

Letters: B batch · L length · H hidden size · M intermediate size · E experts · k experts per token · rows = B * L * k

An expert computes down(x1 * silu(x2)) with (x1, x2) the halves of gate_and_up(x). The experts' weights are stacked, one bank
for each projection, and each bank runs once per forward on rows sorted by expert, so that what stands beside a linear layer
(an adapter) can stand beside a bank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routing(NamedTuple):
    """How rows that are sorted by expert came about."""

    counts: list[int]  # (E) rows of each expert
    samples: Tensor  # (rows,) which sample of the batch each row belongs to


class ExpertBank(nn.Module, comfy.ops.CastWeightBiasOp):
    """One projection of all experts: weight (E, out, in), no bias."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, device=None, dtype=None):
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        empty = torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x (rows, in) sorted by expert -> (rows, out)."""
        weight, bias, stream = comfy.ops.cast_bias_weight(self, x, offloadable=True)
        try:
            parts = [
                F.linear(rows, weight[expert]) for expert, rows in enumerate(x.split(routing.counts)) if rows.shape[0]
            ]
            return torch.cat(parts)
        finally:
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)


class Experts(nn.Module):
    """The routed experts as two banks."""

    def __init__(self, num_experts: int, hidden: int, intermediate: int, **factory: Any):
        super().__init__()
        self.gate_and_up_proj = ExpertBank(num_experts, hidden, 2 * intermediate, **factory)
        self.down_proj = ExpertBank(num_experts, intermediate, hidden, **factory)

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """x (B, L, H), weights and chosen experts (B, L, k) -> (B, L, H)."""
        batch, length, hidden = x.shape
        k = chosen.shape[-1]
        order = torch.argsort(chosen.flatten(), stable=True)
        token = order // k
        counts = torch.bincount(chosen.flatten(), minlength=self.down_proj.num_experts).tolist()
        routing = Routing(counts, token // length)
        first, second = self.gate_and_up_proj(x.reshape(-1, hidden)[token], routing).chunk(2, dim=-1)
        rows = self.down_proj(first * F.silu(second), routing) * weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).view(-1, hidden).index_add_(0, token, rows.to(x.dtype)).view_as(x)


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

    def __init__(self, hidden: int, num_experts: int, top_k: int, operations: Any, **factory: Any):
        super().__init__()
        self.wg = operations.Linear(hidden, num_experts, bias=False, **factory)
        self.top_k = top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, H) -> weights and chosen experts, both (B, L, k)."""
        shares = self.wg(x).float().softmax(dim=-1)
        weights, chosen = shares.topk(self.top_k, dim=-1)
        return (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype), chosen


class MixtureOfExperts(nn.Module):
    """Shared expert plus routed experts."""

    def __init__(self, hidden: int, intermediate: int, num_experts: int, top_k: int, operations: Any, **factory: Any):
        super().__init__()
        self.gate = Router(hidden, num_experts, top_k, operations, **factory)
        self.shared_mlp = SharedExpert(hidden, intermediate, operations, **factory)
        self.experts = Experts(num_experts, hidden, intermediate, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, H) -> (B, L, H)."""
        return self.shared_mlp(x) + self.experts(x, *self.gate(x))
