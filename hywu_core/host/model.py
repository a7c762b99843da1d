"""What of a MODEL can carry a LoRA: linear layers, 1x1 convolutions, banks of experts; and its stacks of like blocks.

This file is the one owner of that question, and asks for what a module can do, never for its class: the host's quantised
layers and those of other packs are no `torch.nn.Linear`. It also owns the names: a module's path is what a checkpoint calls
it, also while a block is compiled or replaced by an object patch.

A stack is a list of blocks of one class. Its targets are the linear layers that all of its blocks have, in equal shapes: the
last block of some models lacks a few.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from ..errors import HywuError

LARGEST = "largest"  # the default stack
EVERY = "all stacks"
SHOWN = 6
COMPILED = "_orig_mod"  # where torch.compile keeps the module that it stands for

ATTENTION, ATTENTION_AND_FEED_FORWARD, ALL = "attention", "attention and feed-forward", "all linear layers"
PRESETS = (ATTENTION_AND_FEED_FORWARD, ATTENTION, ALL)
_MODULATION = re.compile(r"(^|[._])(\w*mod|\w*modulation|ada_?ln\w*|\w*norm\w*|\w*emb\w*)([._]|$)", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention|(^|[._])(qkv|to_[qkv]|to_out)([._]|$)", re.IGNORECASE)


class StackError(HywuError):
    """A MODEL has no stack that a generator can write for, or not the one that was asked for."""


class Layer(NamedTuple):
    module: nn.Module
    in_features: int
    out_features: int
    # of a bank
    experts: int | None = None
    # a 1x1 convolution: features lie in the second axis, not in the last
    channels_first: bool = False


class Stack(NamedTuple):
    """Like blocks that follow each other."""

    path: str  # below diffusion_model: "double_blocks"
    blocks: int
    linears: dict[str, tuple[int, int]]  # {path below a block: (in, out)}

    @property
    def elements(self) -> int:
        return self.blocks * sum(columns * rows for columns, rows in self.linears.values())


def layer_of(module: nn.Module) -> Layer | None:
    """What of a module a LoRA can change, or None."""
    sizes = _whole(module, "in_features"), _whole(module, "out_features")
    if all(sizes) and _has_a_weight(module):
        return Layer(module, *sizes, experts=_whole(module, "num_experts"))
    channels = _whole(module, "in_channels"), _whole(module, "out_channels")
    if all(channels) and _works_on_single_pixels(module):
        return Layer(module, *channels, channels_first=True)
    return None


def layers(root: nn.Module) -> dict[str, Layer]:
    """Everything below a module that can carry a LoRA: {path: layer}."""
    found = ((path, layer_of(module)) for path, module in named_modules(root))
    return {path: layer for path, layer in found if layer is not None}


def named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As torch's own, but with the paths of a checkpoint. Of a compiled module both come, the one it stands for last."""
    for path, module in root.named_modules():
        yield clean(path), module


def submodule(root: nn.Module, path: str) -> nn.Module:
    """The module at a path of a checkpoint; of a compiled one the module that it stands for.

    Raises:
        AttributeError: if there is none.
    """
    module = uncompiled(root)
    for name in path.split("."):
        module = uncompiled(module.get_submodule(name))
    return module


def clean(path: str) -> str:
    """A path in the live tree as a checkpoint has it."""
    return ".".join(name for name in path.split(".") if name != COMPILED)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that a compiled one stands for; any other as it is."""
    while COMPILED in module._modules:
        module = module._modules[COMPILED]
    return module


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile stands for it or for something in it."""
    return any(COMPILED in part._modules for part in module.modules())


def find_stacks(base: Any) -> tuple[Stack, ...]:
    """Every stack of a base, in the order of its modules; none inside another.

    Args:
        base: the host's BaseModel, `patcher.model`.
    """
    found: list[Stack] = []
    for path, module in named_modules(base.diffusion_model):
        inside = any(path.startswith(f"{stack.path}.") for stack in found)
        if isinstance(module, nn.ModuleList) and not inside and (stack := _stack(path, module)):
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
    several = f" Several can be named, with commas between them, and {EVERY!r} are all of them." if stacks[1:] else ""
    raise StackError(f"This model ({type(base).__name__}) has no stack {name!r}. It has: {known}.{several}")


def choose_stacks(base: Any, names: str = LARGEST) -> tuple[Stack, ...]:
    """The stacks of some names, separated by commas, or all of them: in the order in which the base has them.

    Raises:
        StackError: see `choose_stack`.
    """
    asked = [name.strip() for name in names.split(",") if name.strip()] or [LARGEST]
    if EVERY in asked:
        asked = [stack.path for stack in find_stacks(base)] or [LARGEST]
    chosen = {choose_stack(base, name).path for name in asked}
    return tuple(stack for stack in find_stacks(base) if stack.path in chosen)


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


def _whole(module: nn.Module, name: str) -> int | None:
    value = getattr(module, name, None)
    return value if isinstance(value, int) else None


def _has_a_weight(module: nn.Module) -> bool:
    """A weight may be None until it is loaded, or be called otherwise where it is packed."""
    return any(hasattr(module, name) for name in ("weight", "qweight", "comfy_cast_weights"))


def _works_on_single_pixels(module: nn.Module) -> bool:
    kernel, stride = (getattr(module, name, None) for name in ("kernel_size", "stride"))
    if not isinstance(kernel, tuple) or {*kernel, *stride} != {1}:
        return False
    padded = not isinstance(module.padding, str) and any(module.padding)
    return module.groups == 1 and not module.transposed and not padded


def _stack(path: str, blocks: nn.ModuleList) -> Stack | None:
    if len(blocks) < 2 or len({type(uncompiled(block)) for block in blocks}) > 1:
        return None
    first, *others = (_linears(block) for block in blocks)
    shared = {name: shape for name, shape in first.items() if all(other.get(name) == shape for other in others)}
    # not embeddings alone, as in UNets
    worth_it = any(_in_preset(name, ATTENTION_AND_FEED_FORWARD) for name in shared)
    return Stack(path, len(blocks), shared) if worth_it else None


def _linears(block: nn.Module) -> dict[str, tuple[int, int]]:
    found = layers(block).items()
    return {
        path: (layer.in_features, layer.out_features)
        for path, layer in found
        if path and layer.experts is None and not layer.channels_first
    }


def _in_preset(name: str, preset: str) -> bool:
    if preset == ALL:
        return True
    if _MODULATION.search(name):
        return False
    return preset == ATTENTION_AND_FEED_FORWARD or bool(_ATTENTION.search(name))


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
