"""Banks of experts: the stacked weights of one projection of every expert of a mixture, run on rows sorted by expert, so that
what stands beside a linear layer (an adapter) can stand beside a bank.

Letters: B batch · L length · E experts · k experts per token · rows = B * L * k
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import comfy.model_management
import comfy.ops
import comfy.weight_adapter
import torch
import torch.nn.functional as F
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from .grouped import Routing, grouped_is_fast, grouped_linear
from .pages import has_a_page, pinned


class ForeignMixture(NamedTuple):
    """How another pack keeps a mixture of experts whose banks a base of ours has below `experts`. Its banks are never called,
    so a mixture of ours runs in its place while a LoRA acts.
    """

    # name below `experts` -> name beside the router
    banks: Mapping[str, str]
    # their mixture -> one of ours over its modules, with the banks below `experts`
    borrow: Callable[[nn.Module], nn.Module]


_foreign: list[ForeignMixture] = []


def register_foreign(mixture: ForeignMixture) -> None:
    """Called once by the base that knows it."""
    _foreign.append(mixture)


def other_place(path: str) -> str:
    """Where another pack keeps the bank at a path of ours; the same path if nobody does."""
    mixture, _, bank = path.rpartition(".experts.")
    return next((f"{mixture}.{known.banks[bank]}" for known in _foreign if bank in known.banks), path)


def foreign_bank(path: str) -> tuple[ForeignMixture, str] | None:
    """Of another pack's bank: whose it is, and its name below our `experts`."""
    name = path.rpartition(".")[2]
    for known in _foreign:
        for ours, theirs in known.banks.items():
            if theirs == name:
                return known, ours
    return None


class Rows:
    """How a bank of the host's kind runs on rows, whatever its weights are stored as."""

    _singly = False

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x (rows, in) sorted by expert -> (rows, out)."""
        if self._singly or x.requires_grad or not self._dense():
            linear = self._expert_alone if self._singly else self.expert_linear
            return torch.cat([linear(x[part], expert) for expert, part in routing.parts()])
        if grouped_is_fast(x) and (whole := self._matrices()) is not None:
            return grouped_linear(x, whole, routing)
        y = x.new_empty(x.shape[0], self.out_features)
        for expert, part in routing.parts():
            torch.mm(x[part], self._matrix(expert).mT, out=y[part])
        return y

    @contextmanager
    def on_hand(self, x: Tensor, few: bool) -> Iterator[None]:
        """For the time of the block, the bank is where x is; or, for a few rows of a bank that is elsewhere, only the experts
        that they need are brought, one by one: a token of text needs an eighth of what an image does.
        """
        if few and self._is_elsewhere(x):
            self._singly = True
            try:
                yield
            finally:
                self._singly = False
        else:
            with self.bank_resident(x):
                yield

    def _expert_of(self, weight: Tensor, expert: int) -> Tensor:
        """(out, in) of one expert of a whole bank."""
        return self._expert_qt_from(weight, expert) if isinstance(weight, QuantizedTensor) else weight[expert]

    def _dense(self) -> bool:
        """Whether `_matrix` may be asked while the bank is on hand; else only `expert_linear` knows how to multiply."""
        return False

    def _matrix(self, expert: int) -> Tensor:
        """(out, in) of one expert, where the rows are, in their dtype."""
        raise NotImplementedError

    def _matrices(self) -> Tensor | None:
        """(E, out, in) likewise, where nothing has to be computed for it."""
        return None

    def _is_elsewhere(self, x: Tensor) -> bool:
        """Patches that are added on the way want the whole bank; and under dynamic memory its weight always says that it is
        on the CPU, so the host is asked.
        """
        patched = self.weight_function or getattr(self, "weight_lowvram_function", None)
        return self.weight.device != x.device and not patched and not has_a_page(self)

    def _expert_alone(self, x: Tensor, expert: int) -> Tensor:
        kept = pinned(self)
        weight = self._expert_of(self.weight if kept is None else kept, expert)
        weight = weight.to(x.device, non_blocking=comfy.model_management.device_supports_non_blocking(x.device))
        weight = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        return F.linear(x, weight.to(x.dtype))


class ExpertBank(Rows, nn.Module, comfy.ops.CastWeightBiasOp):
    """One projection of all experts, not quantised: weight (E, out, in), no bias. Used as the host's bank is."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, bias=False, device=None, dtype=None):
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        empty = torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.register_parameter("bias", None)
        self._resident: Tensor | None = None

    @contextmanager
    def bank_resident(self, x: Tensor) -> Iterator[None]:
        """For the time of the block, the whole bank is where x is."""
        with _cast(self, x) as (weight, _):
            # not as one more parameter of the module
            object.__setattr__(self, "_resident", weight)
            try:
                yield
            finally:
                self._resident = None

    def expert_linear(self, x: Tensor, expert: int) -> Tensor:
        """x (rows, in) -> (rows, out) of one expert, inside `bank_resident`."""
        return F.linear(x, self._resident[expert])

    def expert_weight(self, expert: int) -> Tensor:
        """(out, in) of one expert, where the bank is."""
        return self.weight[expert]

    def _dense(self) -> bool:
        return True

    def _matrix(self, expert: int) -> Tensor:
        return self._resident[expert]

    def _matrices(self) -> Tensor:
        return self._resident


class QuantizedRows(Rows):
    """Beside the host's own bank."""

    @contextmanager
    def bank_resident(self, x: Tensor) -> Iterator[None]:
        """See the host's MoEExperts."""
        with _cast(self, x) as self._resident_bank:
            try:
                yield
            finally:
                self._resident_bank = None

    def _dense(self) -> bool:
        weight = self._resident_bank[0]
        fast = isinstance(weight, QuantizedTensor) and weight.layout_cls.supports_fast_matmul()
        return self._full_precision_mm or not fast

    def _matrix(self, expert: int) -> Tensor:
        weight = self._expert_of(self._resident_bank[0], expert)
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


@contextmanager
def _cast(bank: nn.Module, x: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weight and bias on x's device. The host streams each through the head of a stream's buffer, and a layer uses two banks
    at once: where there is only one stream, a bank comes into memory of its own.
    """
    if comfy.model_management.NUM_STREAMS == 1 and not hasattr(bank, "_v"):
        yield comfy.ops.cast_bias_weight(bank, x)
        return
    weight, bias, stream = comfy.ops.cast_bias_weight(bank, x, offloadable=True)
    try:
        yield weight, bias
    finally:
        comfy.ops.uncast_bias_weight(bank, weight, bias, stream)


def make_bank(operations: Any, num_experts: int, in_features: int, out_features: int, **factory: Any) -> nn.Module:
    """A bank of the host's own kind where its operations have one (quantised files), else a plain one."""
    hosts = getattr(operations, "MoEExperts", None)
    kind = ExpertBank if hosts is None else type("QuantizedExpertBank", (QuantizedRows, hosts), {})
    return kind(num_experts, in_features, out_features, bias=False, **factory)


class ExpertLoraAdapter(comfy.weight_adapter.LoRAAdapter):
    """The host's LoRA patch for a bank of experts: weights (up (E, out, r), down (E, r, in), alpha, None, None, None)."""

    name = "hywu_experts"

    def calculate_weight(
        self,
        weight,
        key,
        strength,
        strength_model,
        offset,
        function,
        intermediate_dtype=torch.float32,
        original_weight=None,
    ):
        """W + strength * alpha / r * B . A for every expert, one at a time: a whole bank's product may not fit."""
        up, down, alpha = self.weights[:3]
        for expert in range(weight.shape[0]):
            factors = (
                comfy.model_management.cast_to_device(part[expert], weight.device, intermediate_dtype)
                for part in (up, down)
            )
            delta = torch.mm(*factors) * (strength * alpha / down.shape[1])
            weight[expert] += function(delta.type(weight.dtype))
        return weight
