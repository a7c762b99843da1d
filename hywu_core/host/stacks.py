"""What of a MODEL can receive generated LoRAs: its stacks of like blocks, the linear layers in them, and a generator's shape.

A stack is a list of blocks of one class. Its targets are the linear layers that all of its blocks have, in equal shapes: the
last block of some models lacks a few.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch

from ..condition import CLIP_VISION, CONDITIONING, HIDDEN_STATES, REFERENCE_LATENT, Condition, part_entry
from ..config import GeneratorConfig
from ..errors import HywuError, MatchError
from ..layout import full_name
from ..layout import targets as targets_of
from ..lora import InstanceLora, LoraFactor
from .matching import match

LARGEST = "largest"  # the default stack
SHOWN = 6

ATTENTION, ATTENTION_AND_FEED_FORWARD, ALL = "attention", "attention and feed-forward", "all linear layers"
PRESETS = (ATTENTION_AND_FEED_FORWARD, ATTENTION, ALL)
_MODULATION = re.compile(r"(^|[._])(\w*mod|\w*modulation|ada_?ln\w*|\w*norm\w*|\w*emb\w*)([._]|$)", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention|(^|[._])(qkv|to_[qkv]|to_out)([._]|$)", re.IGNORECASE)

SIZES = {  # name -> (d_model, head_dim, blocks, rows of a token at one position)
    "small": (128, 32, 2, 2),
    "medium": (512, 64, 6, 4),
    "large": (1024, 64, 12, 4),
}
OF_THE_BASE = "hidden states of the base"  # the source for which the base is run
SOURCES = {  # what a generator reads -> the parts of a condition, in their order; None: all there are
    "instruction and source picture": (CONDITIONING, REFERENCE_LATENT),
    "instruction": (CONDITIONING,),
    "instruction and CLIP Vision": (CONDITIONING, CLIP_VISION),
    OF_THE_BASE: (HIDDEN_STATES,),
    "everything wired in": None,
}


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


def generator_config(
    base: Any,
    example: Condition,
    size: str = "small",
    targets: str = ATTENTION_AND_FEED_FORWARD,
    target_names: str = "",
    stack: str = LARGEST,
    rank: int = 16,
    alpha: float = 32.0,
    source: str = "instruction and source picture",
    encoder_layers: int = 1,
) -> GeneratorConfig:
    """The configuration of a generator for a base.

    Args:
        base: the host's BaseModel.
        example: a condition as training will give them; parts and widths are read off it.
        size: one of SIZES; targets, target_names: see `choose_targets`; stack: see `choose_stack`; source: one of SOURCES.
    Raises:
        StackError, ConfigError: see there.
    """
    chosen = choose_stack(base, stack)
    layers = choose_targets(chosen, targets, target_names)
    d_model, head_dim, blocks, most = SIZES[size]
    accumulation = next(rows for rows in (most, 2, 1) if rank % rows == 0)
    token_dim = _token_dim(layers, d_model // accumulation)
    parts = _parts(base, example, source)
    return GeneratorConfig(
        d_model=d_model,
        head_dim=head_dim,
        num_pg_layers=blocks,
        input_dim=sum(part["width"] for part in parts),
        output_dim=token_dim,
        num_base_model_layers=chosen.blocks,
        rank=rank,
        alpha=alpha,
        token_dim=token_dim,
        dim_accumulation=accumulation,
        pg_mapping={name: {"lora_A_dim": columns, "lora_B_dim": rows} for name, (columns, rows) in layers.items()},
        prefix=f"{chosen.path}.",
        hywu={"base": type(base).__name__, "condition": parts, "encoder_layers": encoder_layers},
    )


def check_fits(base: Any, config: GeneratorConfig) -> None:
    """Make sure that a base has every target of a generator, before any work is done.

    Raises:
        MatchError: naming what is missing or has another shape.
    """
    factors = {}
    for layer in range(config.num_base_model_layers):
        for target in targets_of(config):
            shapes = target.down_shape(config.rank), target.up_shape(config.rank)
            empty = (torch.zeros(()).expand(1, *shape) for shape in shapes)  # of any size, and takes no memory
            factors[full_name(config, layer, target.name)] = LoraFactor(*empty)
    found = match(InstanceLora(factors, metadata={"base": config.hywu.get("base")}), base)
    if found.missing:
        raise MatchError(
            f"The generator was made for another model ({found}). Use the one that it was made for, or make a new one."
        )


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


def _token_dim(layers: dict[str, tuple[int, int]], largest: int) -> int:
    """The width of a token that leaves least of the tokens empty; of equals, the largest. A factor fills in/token_dim or
    out/token_dim tokens.
    """
    sides = [side for shape in layers.values() for side in shape]

    def wasted(width: int) -> float:
        return sum(-side % width for side in sides) / sum(sides)

    widths = range(max(4, min(largest // 4, *sides)), largest + 1)
    return min(widths, key=lambda width: (round(wasted(width), 2), -width))


def _parts(base: Any, example: Condition, source: str) -> list[dict]:
    given = {part.kind: part.tokens for part in example.parts}
    kinds = SOURCES[source] or tuple(given)
    parts = []
    for kind in kinds:
        if kind not in given:
            raise StackError(
                f"The generator is to read {source!r}, but the example condition has no {kind}: it has "
                f"{', '.join(given) or 'nothing'}. {_REMEDIES[kind]}"
            )
        if kind == REFERENCE_LATENT:
            side = patch_size(base)
            parts.append(part_entry(kind, given[kind].shape[1] * side * side, side))
        else:
            parts.append(part_entry(kind, given[kind].shape[-1]))
    return parts


_REMEDIES = {
    CONDITIONING: "Wire the text encoder's CONDITIONING.",
    REFERENCE_LATENT: "Put the source picture on the CONDITIONING with Set Reference Latent, or choose another source.",
    CLIP_VISION: "Wire a CLIP_VISION_OUTPUT into HY-WU Condition.",
    HIDDEN_STATES: "Wire the MODEL into HY-WU Condition.",
}


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
