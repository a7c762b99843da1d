"""The bridge to ComfyUI: memory, adapter bank, matching, folders. Beside `bases`, the only place that imports comfy."""

import comfy.utils

from ..files import safetensors


def _mapping_allowed() -> bool:
    return not comfy.utils.DISABLE_MMAP  # --disable-mmap


safetensors.keep_mapped = _mapping_allowed
