"""Conditions from what the host's nodes already computed, and from the frozen base itself."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_patcher
import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ..condition import CLIP_VISION, CONDITIONING, HIDDEN_STATES, REFERENCE_LATENT, Condition, ConditionPart
from ..errors import ConditionError
from .model import StackError, find_stacks, submodule

# what a CONDITIONING can carry for the sampler that says nothing about picture or instruction
_FOR_THE_SAMPLER = (
    "control", "control_apply_to_uncond", "hooks", "gligen", "area", "set_area_to_bounds", "mask", "mask_strength",
    "strength", "start_percent", "end_percent", "default", "additional_models",
)  # fmt: skip

# {option of a CONDITIONING: (whose it is, the node that reads it)}; a base that has a reader of its own adds itself
OWN_READERS: dict[str, tuple[str, str]] = {}


def from_host(
    conditioning: list,
    clip_vision_output: Any | None = None,
    instruction: str = "",
    model: comfy.model_patcher.ModelPatcher | None = None,
) -> Condition:
    """The condition that a CONDITIONING, and optionally a CLIP_VISION_OUTPUT, stand for. The CONDITIONING's first reference
    latent, if it has one, comes along for generators that read the source picture from it. What of it is not read is logged.

    Args:
        model: run this base on picture and instruction; its hidden states then stand in place of the CONDITIONING.
    Raises:
        ConditionError: if the CONDITIONING holds more than one entry, or is one that another node reads, or the vision
            output has no patch features; see also `hidden_states`.
    """
    tokens, options = _single(conditioning)
    for base, node in (told for option, told in OWN_READERS.items() if option in options):
        raise ConditionError(
            f"This CONDITIONING is one of {base}, whose generator reads what the base itself sees. Wire it, with the MODEL, "
            f"into {node}, and that node's condition in here."
        )
    _log_what_is_not_read(options, model is not None)
    if model is None:
        parts = [ConditionPart(CONDITIONING, tokens)]
    else:
        parts = [ConditionPart(HIDDEN_STATES, hidden_states(model, conditioning))]
    if options.get("reference_latents"):
        parts.append(ConditionPart(REFERENCE_LATENT, options["reference_latents"][0]))
    if clip_vision_output is not None:
        parts.append(ConditionPart(CLIP_VISION, _patches(clip_vision_output)))
    return Condition(tuple(parts), instruction)


def as_condition(given: Condition | list) -> Condition:
    """A condition, or the one that a CONDITIONING stands for.

    Raises:
        ConditionError: see `from_host`.
    """
    return given if isinstance(given, Condition) else from_host(given)


def hidden_states(model: comfy.model_patcher.ModelPatcher, conditioning: list) -> Tensor:
    """What the base's last block gives when it looks at the source picture at the sampler's last noise level, with its
    instruction: (B, L, width). Runs the base once, without anything that other nodes put on the MODEL or the CONDITIONING.

    Raises:
        ConditionError: if there is no source picture, or the last block gives no tokens.
        StackError: if the base has no stack of blocks.
    """
    tokens, options = _single(conditioning)
    if not options.get("reference_latents"):
        raise ConditionError(
            "The base can only look at a source picture that it is given, but the CONDITIONING has no reference latent. "
            "Put the encoded picture on it with Set Reference Latent, or take the MODEL away."
        )
    base = bare(model)
    own = [[tokens, {name: value for name, value in options.items() if name not in _FOR_THE_SAMPLER}]]
    latent = comfy.sample.fix_empty_latent_channels(base, options["reference_latents"][0])
    sigma = float(base.get_model_object("model_sampling").sigma_min)
    with last_block_output(base.model) as seen:
        comfy.sample.sample_custom(
            base,
            torch.zeros_like(latent),
            1.0,
            comfy.samplers.sampler_object("euler"),
            torch.tensor([sigma, 0.0]),
            own,
            own,
            latent,
            disable_pbar=True,
        )
    return _as_tokens(seen[-1] if seen else None).to(latent.device)


def bare(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A clone on which nothing acts: no LoRA, merged or beside, and no option, wrapper or model of another node. Objects that
    another node put in the place of the base's own, such as a compute dtype, stay: without them it may not run.
    """
    clone = model.clone()
    changed = clone.patches or clone.injections or clone.hook_patches or clone.weight_wrapper_patches
    for name in ("patches", "injections", "hook_patches", "weight_wrapper_patches", "wrappers", "callbacks"):
        setattr(clone, name, {})
    clone.additional_models, clone.model_options = {}, {"transformer_options": {}}
    if changed:
        # other weights than those of the MODEL that it was cloned from
        clone.patches_uuid = uuid.uuid4()
    return clone


@contextmanager
def last_block_output(base: Any) -> Iterator[list[Any]]:
    """For the time of the block, collect what the last block of every stack gives; the base's own last one comes last.

    Raises:
        StackError: if the base has no stack.
    """
    stacks, seen, handles = find_stacks(base), [], []
    if not stacks:
        raise StackError(
            f"This model ({type(base).__name__}) has no stack of blocks whose output could be read. Use its CONDITIONING."
        )
    try:
        for stack in stacks:
            block = submodule(base.diffusion_model, stack.path)[-1]
            handles.append(block.register_forward_hook(lambda _module, _inputs, output: seen.append(output)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _as_tokens(output: Any) -> Tensor:
    """A block's output as one sequence; streams of equal width (text and picture) follow each other."""
    streams = output if isinstance(output, (tuple, list)) else (output,)
    streams = [stream for stream in streams if isinstance(stream, Tensor) and stream.ndim == 3]
    if not streams or len({stream.shape[-1] for stream in streams}) > 1:
        raise ConditionError(
            "The base's last block gives no tokens of one width, so its hidden states cannot be a condition. "
            "Use the CONDITIONING or CLIP Vision features."
        )
    return torch.cat(streams, dim=1).float()


def _log_what_is_not_read(options: dict[str, Any], by_the_base: bool) -> None:
    ignored = [name for name in _FOR_THE_SAMPLER if options.get(name) is not None]
    if ignored:
        logging.warning("HY-WU: a condition leaves out what only the sampler reads: %s.", ", ".join(ignored))
    pictures = len(options.get("reference_latents") or ())
    if pictures > 1 and not by_the_base:
        logging.warning(
            "HY-WU: the CONDITIONING holds %d reference latents; a generator reads the first one only.", pictures
        )


def _single(conditioning: list) -> tuple[Tensor, dict[str, Any]]:
    if len(conditioning) != 1:
        raise ConditionError(
            f"The CONDITIONING holds {len(conditioning)} entries (combined or area prompts), but a generator reads one "
            "instruction. Wire the text encoder's output directly."
        )
    return conditioning[0][0], conditioning[0][1]


def _patches(output: Any) -> Tensor:
    hidden = output["last_hidden_state"]
    if hidden is None:
        raise ConditionError(
            "The CLIP_VISION_OUTPUT has no patch features (last_hidden_state). Encode the picture again."
        )
    return hidden
