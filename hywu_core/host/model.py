"""What of a MODEL can receive generated LoRAs: its stacks of like blocks, and the linear layers in them.

A stack is a list of blocks of one class. Its targets are the linear layers that all of its blocks have, in equal shapes: the
last block of some models lacks a few.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch

from ..errors import HywuError

LARGEST = "largest"  # the default stack
SHOWN = 6

ATTENTION, ATTENTION_AND_FEED_FORWARD, ALL = "attention", "attention and feed-forward", "all linear layers"
PRESETS = (ATTENTION_AND_FEED_FORWARD, ATTENTION, ALL)
_MODULATION = re.compile(r"(^|[._])(\w*mod|\w*modulation|ada_?ln\w*|\w*norm\w*|\w*emb\w*)([._]|$)", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention|(^|[._])(qkv|to_[qkv]|to_out)([._]|$)", re.IGNORECASE)


class StackError(HywuError):
    """A MODEL has no stack that a generator can write for, or not the one that was asked for."""


class Stack(NamedTuple):
    """Like blocks that follow each other."""

    path: str  # below diffusion_model: "double_blocks"
    blocks: int
    linears: dict[str, tuple[int, int]]  # {path below a block: (in, out)}

    @property
    def elements(self) -> int:
        """Weights of all its linear layers."""
        return self.blocks * sum(columns * rows for columns, rows in self.linears.values())


def find_stacks(base: Any) -> tuple[Stack, ...]:
    """Every stack of a base, in the order of its modules; none inside another.

    Args:
        base: the host's BaseModel, `patcher.model`.
    """
    found: list[Stack] = []
    for path, module in base.diffusion_model.named_modules():
        inside = any(path.startswith(f"{stack.path}.") for stack in found)
        if isinstance(module, torch.nn.ModuleList) and not inside and (stack := _stack(path, module)):
            found.append(stack)
    return tuple(found)


def choose_stack(base: Any, name: str = LARGEST) -> Stack:
    """The stack of a name, or the largest.

    Raises:
        StackError: if there is none, naming those that there are.
    """
    stacks = find_stacks(base)
    if not stacks:
        raise StackError(
            f"This model ({type(base).__name__}) has no stack of like blocks with linear layers, so no generator can be "
            "made for it. Use a transformer, such as Flux, Qwen-Image, Z-Image, Wan or SD3."
        )
    if name.strip() in ("", LARGEST):
        return max(stacks, key=lambda stack: stack.elements)
    for stack in stacks:
        if stack.path == name.strip().rstrip("."):
            return stack
    known = ", ".join(f"{stack.path} ({stack.blocks} blocks)" for stack in stacks)
    raise StackError(f"This model ({type(base).__name__}) has no stack {name!r}. It has: {known}.")


def choose_targets(stack: Stack, preset: str, names: str = "") -> dict[str, tuple[int, int]]:
    """The linear layers that receive a LoRA: {path below a block: (in, out)}.

    Args:
        preset: one of PRESETS. Modulation, norms and embeddings are in none but ALL.
        names: patterns separated by commas, such as "img_attn.*, img_mlp.*"; they replace the preset.
    Raises:
        StackError: if nothing of the stack is chosen, naming what it has.
    """
    patterns = [pattern.strip() for pattern in names.split(",") if pattern.strip()]
    if patterns:
        chosen = [name for name in stack.linears if any(fnmatchcase(name, pattern) for pattern in patterns)]
    else:
        chosen = [name for name in stack.linears if _in_preset(name, preset)]
    if not chosen:
        wanted = f"matches {', '.join(patterns)}" if patterns else f"belongs to {preset!r}"
        raise StackError(
            f"No linear layer of {stack.path} {wanted}. Its blocks have {_some(list(stack.linears))}. Choose "
            f"{ALL!r}, or name some of these."
        )
    return {name: stack.linears[name] for name in chosen}


def patch_size(base: Any) -> int:
    """The side of the base's own patches, in latent pixels."""
    side = getattr(base.diffusion_model, "patch_size", 1)
    return int(side[-1] if isinstance(side, Sequence) else side or 1)


def _stack(path: str, blocks: torch.nn.ModuleList) -> Stack | None:
    if len(blocks) < 2 or len({type(block) for block in blocks}) > 1:
        return None
    first, *others = (_linears(block) for block in blocks)
    shared = {name: shape for name, shape in first.items() if all(other.get(name) == shape for other in others)}
    worth_it = any(_in_preset(name, ATTENTION_AND_FEED_FORWARD) for name in shared)  # not embeddings alone, as in UNets
    return Stack(path, len(blocks), shared) if worth_it else None


def _linears(block: torch.nn.Module) -> dict[str, tuple[int, int]]:
    modules = block.named_modules()
    return {name: (m.in_features, m.out_features) for name, m in modules if isinstance(m, torch.nn.Linear) and name}


def _in_preset(name: str, preset: str) -> bool:
    if preset == ALL:
        return True
    if _MODULATION.search(name):
        return False
    return preset == ATTENTION_AND_FEED_FORWARD or bool(_ATTENTION.search(name))


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
