"""Weights as the host maps their files: under dynamic VRAM it knows then where in which file each of them is, reads it from
there to the device instead of through the pages of a mapping, and can give those pages back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import comfy.memory_management
import comfy.utils
from torch import Tensor


def mapped_by_host(path: Path) -> Mapping[str, Tensor] | None:
    """A safetensors file's tensors, which nobody may write to; None where the host has no use for a mapping of its own. What
    is wrong with a file is to be found before: the host says it less clearly.
    """
    return comfy.utils.load_safetensors(str(path))[0] if comfy.memory_management.aimdo_enabled else None
