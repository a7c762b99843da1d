"""HunyuanImage-3 as another node pack builds it: recognised by its module tree, and read through our own forward.

Such a MODEL has the same layers under the same names, except that the banks of experts lie beside the router
(`mlp.experts_gate_up_proj`, `mlp.experts_down_proj`), that their own forward is never called, and that the norm and head for
the next token may be absent. Its modules are borrowed, never changed; its memory stays with its own patcher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...host.lora.experts import ForeignMixture, Rows, register_foreign
from .config import BaseConfig
from .moe import Experts, MixtureOfExperts, Router
from .transformer import HunyuanImage3

OPTIONAL = ("lm_head", "model.ln_f")
# name below `experts` -> name beside the router
BANKS = {"gate_and_up_proj": "experts_gate_up_proj", "down_proj": "experts_down_proj"}


class BorrowedBank(Rows, nn.Module):
    """Somebody's bank of the host's kind, which has no forward of its own."""

    def __init__(self, bank: nn.Module):
        super().__init__()
        self.bank = bank
        self.num_experts, self.in_features, self.out_features = bank.num_experts, bank.in_features, bank.out_features

    @property
    def weight(self) -> Tensor | None:
        """Somebody's, whatever it is stored as."""
        return getattr(self.bank, "weight", None)

    def bank_resident(self, x: Tensor) -> Any:
        """See the host's MoEExperts."""
        return self.bank.bank_resident(x)

    def expert_linear(self, x: Tensor, expert: int) -> Tensor:
        """See the host's MoEExperts."""
        return self.bank.expert_linear(x, expert)

    def _is_elsewhere(self, x: Tensor) -> bool:
        return False  # how it brings single experts is its own affair


def is_foreign(mlp: nn.Module) -> bool:
    """Whether a mixture of experts keeps its banks as the other pack does."""
    fits = all(hasattr(getattr(mlp, bank, None), "expert_linear") for bank in BANKS.values())
    return fits and hasattr(getattr(mlp, "gate", None), "wg") and hasattr(mlp, "shared_mlp") and hasattr(mlp, "top_k")


def borrow_mixture(mlp: nn.Module) -> MixtureOfExperts:
    """Our forward over somebody's mixture of experts (see `is_foreign`)."""
    mixture = MixtureOfExperts.__new__(MixtureOfExperts)
    nn.Module.__init__(mixture)
    mixture.gate, mixture.shared_mlp = Router(mlp.gate.wg, mlp.top_k), mlp.shared_mlp
    mixture.experts = Experts(*(BorrowedBank(getattr(mlp, bank)) for bank in BANKS.values()))
    return mixture


def borrow_decoder(theirs: nn.Module, config: BaseConfig) -> HunyuanImage3 | None:
    """Our decoder over somebody's modules, or None if their tree is another.

    It is built of torch's own layers, which show which modules own weights: the host's may have none before they are
    loaded. What they lack of OPTIONAL is left out: hidden states can be read, the next token cannot.
    """
    ours = HunyuanImage3(config, getattr(theirs, "dtype", None), torch.device("meta"), nn)
    modules = dict(theirs.named_modules())
    for index, layer in enumerate(ours.model.layers):
        mlp = modules.get(f"model.layers.{index}.mlp")
        if mlp is None or not is_foreign(mlp):
            return None
        layer.mlp = borrow_mixture(mlp)
    for path, module in list(ours.named_modules()):
        if ".mlp." in path and path.startswith("model.layers.") or not _is_leaf(module):
            continue
        found = modules.get(path)
        if found is None and path not in OPTIONAL:
            return None
        parent, _, name = path.rpartition(".")
        setattr(ours.get_submodule(parent) if parent else ours, name, found)
    return ours


def _is_leaf(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


register_foreign(ForeignMixture(BANKS, borrow_mixture))
