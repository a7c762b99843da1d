"""A LoRA in memory as a hook of the host: its own nodes then put it on one conditioning, on a mask, or on a schedule."""

from __future__ import annotations

import comfy.hooks

from ...errors import LoraError
from ...files.lora_files import grouped_targets
from ...lora import InstanceLora
from .store import for_the_host


def hook_of(
    lora: InstanceLora, strength: float, previous: comfy.hooks.HookGroup | None = None
) -> comfy.hooks.HookGroup:
    """What the host's Create Hook LoRA makes of a LoRA's saved file.

    Args:
        previous: hooks that it joins; they stay as they are.
    Raises:
        LoraError: if it holds several instances, or nothing that hooks can hold.
    """
    if lora.batch > 1:
        raise LoraError(
            f"A hook holds one LoRA, but this one holds {lora.batch} instances. Choose one with Pick Instance LoRA."
        )
    if lora.names and grouped_targets(lora) == len(lora.names) and not lora.parts:
        raise LoraError("All of this LoRA is on banks of experts, which hooks cannot change. Use Apply Instance LoRA.")
    previous = previous or comfy.hooks.HookGroup()
    if strength == 0:
        return previous.clone()
    return previous.clone_and_combine(comfy.hooks.create_hook_lora(for_the_host(lora), strength, 0.0))
