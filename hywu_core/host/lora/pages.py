"""What the host's memory says about a module's weights: whether the device has them, and where they may be copied from."""

from __future__ import annotations

import comfy.memory_management
import comfy.pinned_memory
import comfy_aimdo.model_vbar
from torch import Tensor, nn


def has_a_page(module: nn.Module) -> bool:
    """Whether the host's dynamic memory has room for the weights on the device: they are there, or come with the next use and
    stay.
    """
    page = getattr(module, "_v", None)
    return page is not None and comfy_aimdo.model_vbar.vbar_fault(page) is not None


def pinned(module: nn.Module) -> Tensor | None:
    """The module's weight in pinned memory, if the host has put it there: it is copied to the device from there without
    waiting.
    """
    pins = (comfy.pinned_memory.get_pin(module, subset=subset) for subset in ("weights", "weights-loaded"))
    pin = next((pin for pin in pins if pin is not None), None)
    if pin is None:
        return None
    return comfy.memory_management.interpret_gathered_like([module.weight, module.bias], pin)[0]
