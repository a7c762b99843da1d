"""HunyuanImage-3.0-Instruct as a model of the host: what ComfyUI lacks to use the released generator.

`loader` reads its folder, `edit` makes CONDITIONINGs, `text_mode` reads conditions, `reason` writes reasoning; the stock
sampler does the rest.
"""

from __future__ import annotations

from ...host.conditions import OWN_READERS
from .edit import FITS, KEY, Edit, Encoder, Wishes, for_sampler, from_conditioning, make_edit
from .loader import load
from .reason import MODES, Choice, reason
from .text_mode import read_edit

OWN_READERS[KEY] = "HunyuanImage-3", "HunyuanImage-3 Condition"

__all__ = [
    "FITS",
    "MODES",
    "Choice",
    "Edit",
    "Encoder",
    "Wishes",
    "for_sampler",
    "from_conditioning",
    "load",
    "make_edit",
    "read_edit",
    "reason",
]
