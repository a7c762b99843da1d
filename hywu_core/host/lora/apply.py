"""Applying a LoRA to a MODEL: beside the forward (bypass) or in the weights (merge). The MODEL given is never changed.

Bypass: one wrapper under one key holds all HY-WU LoRAs of a MODEL. For the time of each model call, and not longer, the
forwards of the matched layers are wrapped; they are unwrapped when the call returns, raises or is interrupted, so no trace
stays on a base that other MODELs share. The factors are a bank in the MODEL's additional models, under the host's memory
management.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.patcher_extension import WrappersMP
from comfy.quant_ops import QuantizedTensor

from ...bases.hunyuan_image3.foreign import borrow_mixture
from ...bases.hunyuan_image3.moe import MixtureOfExperts
from ...errors import MatchError
from ...layout import FOREIGN_BANKS
from ...lora import InstanceLora
from .bank import Adapter, Bank
from .experts import ExpertLoraAdapter
from .foreign import Patch
from .matching import Match, Matches, as_adapter, match

KEY = "hywu"
COMPILE_KEY = "torch.compile"  # the host's own, of its TorchCompileModel node
Mode = Literal["auto", "bypass", "merge"]


class Applied(NamedTuple):
    """One LoRA on a MODEL in bypass mode."""

    bank: Bank
    strength: float
    start: float  # fractions of the sampling schedule between which it acts
    end: float
    identity: uuid.UUID

    def acts(self, model_sampling: Any, sigma: torch.Tensor) -> bool:
        """Whether it acts at this noise level."""
        if self.start <= 0 and self.end >= 1:
            return True
        now = float(sigma.max())
        return model_sampling.percent_to_sigma(self.end) <= now <= model_sampling.percent_to_sigma(self.start)


def apply_lora(
    model: comfy.model_patcher.ModelPatcher,
    lora: InstanceLora,
    strength: float = 1.0,
    mode: Mode = "auto",
    start: float = 0.0,
    end: float = 1.0,
) -> tuple[comfy.model_patcher.ModelPatcher, Matches]:
    """A clone of `model` with the LoRA on it: W' = W + strength * scale * B . A on every matched weight.

    Args:
        strength: any sign; 0 gives an unchanged clone.
        mode: "merge" rewrites weights through the host's patches; "bypass" adds beside the forward and suits quantised,
            offloaded and mixture-of-experts bases, batches and schedules; "auto" is bypass, and merge where that cannot do
            it: on compiled models, and for what of a LoRA cannot stand beside a layer.
        start, end: fractions of the sampling schedule between which the LoRA acts.
    Returns:
        the clone, and what matched.
    Raises:
        MatchError: if the LoRA and the model do not fit, or the mode cannot do what is asked.
    """
    if start > end:
        raise MatchError(
            f"The LoRA would start at {start:g} of the sampling and end at {end:g}, so it would never act. "
            "Make the start smaller than the end."
        )
    matches = match(lora, model.model)
    clone = model.clone()
    if strength == 0:
        return clone, matches
    inside = mode == "merge" or (mode == "auto" and _compiled(model))
    if inside:
        _check_mergeable(lora, start, end)
        _check_banks(matches.matched, model.model)
        _merge(clone, [_as_patch(found, lora.scale) for found in matches.matched], strength)
    else:
        _check_beside(matches, mode, start, end)
        if matches.matched:
            _bypass(clone, Applied(Bank(matches.matched, lora.scale), strength, start, end, uuid.uuid4()))
    if matches.patches:
        _check_mergeable(lora, start, end)
        _merge(clone, [patch for _, patches in matches.patches for patch in patches], strength)
    matches = matches._replace(how=_how(matches, inside))
    logging.log(logging.WARNING if matches.missing else logging.INFO, "HY-WU: %s (%s).", matches, matches.how)
    return clone, matches


def applied_loras(model: comfy.model_patcher.ModelPatcher) -> tuple[Applied, ...]:
    """The LoRAs that a MODEL carries in bypass mode, in the order they were applied."""
    wrappers = model.get_wrappers(WrappersMP.APPLY_MODEL, KEY)
    return wrappers[0].loras if wrappers else ()


class BypassWrapper:
    """Runs a model call with every LoRA of one MODEL beside the layers it changes."""

    def __init__(self, loras: tuple[Applied, ...]):
        self.loras = loras

    def __call__(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
    ):
        """See the host's BaseModel.apply_model. The base learns from transformer_options["hywu"] what acts on it."""
        base = executor.class_obj
        acting = tuple(lora for lora in self.loras if lora.acts(base.model_sampling, t))
        options = {**(transformer_options or {}), KEY: tuple((lora.identity, lora.strength) for lora in acting)}
        with beside(base.diffusion_model, acting):
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


@contextmanager
def beside(diffusion_model: torch.nn.Module, loras: tuple[Applied, ...]) -> Iterator[None]:
    """For the time of the block, the forward of every layer that a LoRA changes adds the LoRA's part."""
    adapters: dict[str, list[tuple[Adapter, float]]] = {}
    for lora in loras:
        for adapter in lora.bank.adapters:
            adapters.setdefault(adapter.path, []).append((adapter, lora.strength))
    with wrapped_forwards(diffusion_model, adapters):
        yield


@contextmanager
def wrapped_forwards(
    diffusion_model: torch.nn.Module, adapters: dict[str, list[tuple[Adapter, float]]]
) -> Iterator[None]:
    """For the time of the block, the modules at these paths add their adapters, each at its strength."""
    wrapped = []
    try:
        for module, forward in _forwards(diffusion_model, adapters):
            wrapped.append((module, vars(module).get("forward")))
            module.forward = forward
        yield
    finally:
        for module, previous in reversed(wrapped):
            vars(module).pop("forward", None)
            if previous is not None:  # somebody else's, such as the host's own bypass
                module.forward = previous


def _forwards(
    diffusion_model: torch.nn.Module, adapters: dict[str, list[tuple[Adapter, float]]]
) -> Iterator[tuple[torch.nn.Module, Callable]]:
    """The modules that are to run otherwise, and how. Another pack never calls its banks: our mixture runs in their place."""
    mixtures: dict[str, MixtureOfExperts] = {}
    ours = {theirs: bank for bank, theirs in FOREIGN_BANKS.items()}
    for path, parts in adapters.items():
        parent, _, name = path.rpartition(".")
        if name in ours:
            if parent not in mixtures:
                mlp = diffusion_model.get_submodule(parent)
                mixtures[parent] = borrow_mixture(mlp)
                yield mlp, mixtures[parent].forward
            bank = mixtures[parent].experts.get_submodule(ours[name])
            bank.forward = _with_adapters(bank.forward, parts)  # of our own object, which goes when this is over
        else:
            module = diffusion_model.get_submodule(path)
            yield module, _with_adapters(module.forward, parts)


def _with_adapters(forward: Callable, parts: list[tuple[Adapter, float]]) -> Callable:
    def forward_with_adapters(x, *args, **kwargs):
        y = forward(x, *args, **kwargs)
        for adapter, strength in parts:
            y = adapter.add_to(y, x, strength, *args[:1])
        return y

    return forward_with_adapters


def _bypass(clone: comfy.model_patcher.ModelPatcher, applied: Applied) -> None:
    patcher = comfy.model_patcher.CoreModelPatcher(
        applied.bank, load_device=clone.load_device, offload_device=comfy.model_management.unet_offload_device()
    )
    loras = (*applied_loras(clone), applied)
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, BypassWrapper(loras))
    clone.set_additional_models(KEY, [*clone.get_additional_models_with_key(KEY), patcher])


def _how(matches: Matches, inside: bool) -> str:
    if inside:
        return "merge"
    return f"bypass; merged: {matches.kinds}" if matches.patches else "bypass"


def _as_patch(found: Match, scale: float) -> Patch:
    adapter = as_adapter(found.pair, scale)
    if found.pair.grouped:
        adapter = ExpertLoraAdapter(set(), adapter.weights)
    rows_axis = 1 if found.pair.grouped else 0
    key = found.key if found.length is None else (found.key, (rows_axis, found.start, found.length))
    return Patch(key, adapter, "LoRA")


def _merge(clone: comfy.model_patcher.ModelPatcher, patches: Sequence[Patch], strength: float) -> None:
    """Hand patches to the host, which takes one for each key at a time: two names may stand for one weight."""
    rounds: list[dict[Any, Patch]] = []
    for patch in patches:
        free = next((r for r in rounds if patch.key not in r and _strength_of(r) == patch.strength), None)
        if free is None:
            rounds.append(free := {})
        free[patch.key] = patch
    for keys in rounds:
        accepted = clone.add_patches({key: patch.value for key, patch in keys.items()}, strength * _strength_of(keys))
        if len(accepted) != len(keys):
            refused = sorted(str(key) for key in keys.keys() - set(accepted))
            raise MatchError(
                f"This model keeps no weight that can be merged into at {refused[0]}. Use the mode bypass."
            )


def _strength_of(patches: dict[Any, Patch]) -> float:
    return next(iter(patches.values())).strength


def _check_beside(matches: Matches, mode: Mode, start: float, end: float) -> None:
    """What acts on a weight as a whole cannot stand beside its layer, and cannot be taken out for a part of the sampling."""
    if not matches.patches:
        return
    remedy = "Use the mode merge or auto, or ComfyUI's own LoRA loader."
    if start > 0 or end < 1:
        raise MatchError(
            f"This LoRA has {matches.kinds}, which is in the weights for the whole schedule. Let it act from 0 to 1. {remedy}"
        )
    if mode == "bypass":
        raise MatchError(f"This LoRA has {matches.kinds}, which cannot stand beside a layer. {remedy}")


def _check_mergeable(lora: InstanceLora, start: float, end: float) -> None:
    if lora.batch > 1:
        raise MatchError(
            f"Merging writes one LoRA into the weights, but this one holds {lora.batch} instances. Use the mode bypass."
        )
    if start > 0 or end < 1:
        raise MatchError(
            "A merged LoRA is in the weights for the whole schedule. Use the mode bypass for start and end."
        )


def _check_banks(matched: tuple[Match, ...], base: torch.nn.Module) -> None:
    """A quantised bank of experts takes no patch in the host, and another pack's bank may not look at it."""
    for found in matched:
        if not found.pair.grouped:
            continue
        theirs = found.module.rpartition(".")[2] in FOREIGN_BANKS.values()
        weight = base.diffusion_model.get_submodule(found.module).weight
        if theirs or isinstance(weight, QuantizedTensor):
            raise MatchError(
                f"{found.module} of this model is a {'foreign' if theirs else 'quantised'} bank of experts, which no LoRA "
                "can be merged into. Use the mode bypass: it acts beside the weights, whatever they are stored as."
            )


def _compiled(model: comfy.model_patcher.ModelPatcher) -> bool:
    return bool(model.get_wrappers(WrappersMP.APPLY_MODEL, COMPILE_KEY))
