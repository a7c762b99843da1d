"""What else a MODEL carries, and how that acts while a generator is trained or measured on it.

weight patches (merged LoRAs)      in the weights, as in sampling
LoRAs in bypass mode, ours         beside the layers, for as long as the backward pass needs them
LoRAs in bypass mode, the host's   as in sampling; bound anew where the base is a copy
patches and wrappers of the model call   as in sampling, one sample a pass: they may look at the noise level
torch.compile                      left out: it changes no number
functions of the guidance          not: there is no guidance in training. A message says so
anything around the whole sampling refused by name
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import torch
from comfy.patcher_extension import WrappersMP
from comfy.weight_adapter import BypassInjectionManager
from torch import Tensor

from ...errors import MatchError
from ...lora import LoraFactor
from ..lora.apply import COMPILE_KEY, KEY, Applied, applied_loras
from ..lora.bank import Adapter, Bank
from ..lora.matching import Match
from ..told import KEY as WATCH_KEY

ACTING = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
GUIDANCE = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function")
IN_SAMPLING_ONLY = ("sampler_calc_cond_batch_function", "context_handler", "denoise_mask_function")
CALL = "model_function_wrapper"


class Carried:
    """What a MODEL carries, ready for training.

    Args:
        given: the MODEL as it was wired.
        patcher: the clone, or the copy, of it that is trained on.
    Raises:
        MatchError: naming what cannot act in training.
    """

    def __init__(self, given: comfy.model_patcher.ModelPatcher, patcher: comfy.model_patcher.ModelPatcher):
        self.options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
        comfy.sampler_helpers.prepare_model_patcher(patcher, {}, self.options)
        _refuse(self.options)
        self.loras = tuple(_ours(lora) for lora in applied_loras(given))
        calls = self.options["transformer_options"]["wrappers"].get(WrappersMP.APPLY_MODEL, {})
        # ours act through `loras`, and what only watches a sampling has nothing to say of a training
        for key in (KEY, COMPILE_KEY, WATCH_KEY):
            calls.pop(key, None)
        if patcher.model is not given.model:
            _bind_anew(given, patcher)
        self.wrapped = tuple(_wrappers(self.options))
        self.foreign = (*self.wrapped, *_patches(self.options))
        self.scheduled = any(not lora.schedule.whole for lora in self.loras)

    @property
    def one_by_one(self) -> bool:
        """Whether a pass may hold one noise level only."""
        return bool(self.foreign) or self.scheduled

    def banks(self, patcher: comfy.model_patcher.ModelPatcher) -> list[comfy.model_patcher.ModelPatcher]:
        """The factors of our LoRAs, for the host to load beside the base."""
        return [
            comfy.model_patcher.ModelPatcher(
                lora.bank, load_device=patcher.load_device, offload_device=comfy.model_management.unet_offload_device()
            )
            for lora in self.loras
        ]

    def adapters(self, model_sampling: Any, sigma: Tensor) -> dict[str, list[tuple[Adapter, float]]]:
        """{path of a layer: what acts beside it at this noise level, at which strength}."""
        found: dict[str, list[tuple[Adapter, float]]] = {}
        for lora in self.loras:
            strength = lora.at(model_sampling, sigma).strength
            if strength:
                for adapter in lora.bank.adapters:
                    found.setdefault(adapter.path, []).append((adapter, strength))
        return found

    def transformer_options(self, sigma: Tensor) -> dict[str, Any]:
        """What the host's sampler would hand to the model at this noise level."""
        options = comfy.model_patcher.create_model_options_clone(self.options)["transformer_options"]
        return options | {
            "cond_or_uncond": [0] * len(sigma),
            "uuids": [0] * len(sigma),
            "sigmas": sigma,
            "sample_sigmas": torch.stack((sigma.max(), torch.zeros_like(sigma.max()))),
        }

    def call(self, base: Any, x: Tensor, sigma: Tensor, conds: dict[str, Any]) -> Tensor:
        """The model call of the host's sampler."""
        given = {**conds, "transformer_options": self.transformer_options(sigma)}
        wrapper = self.options.get(CALL)
        if wrapper is None:
            return base.apply_model(x, sigma, **given)
        kept = given["transformer_options"]["cond_or_uncond"]
        return wrapper(base.apply_model, {"input": x, "timestep": sigma, "c": given, "cond_or_uncond": kept})


def _refuse(options: dict[str, Any]) -> None:
    wrappers = options["transformer_options"]["wrappers"]
    found = [
        f"a {kind} wrapper of {key or _name(some)}"
        for kind, by_key in wrappers.items()
        for key, some in by_key.items()
        if some and kind not in ACTING
    ]
    found += [name for name in IN_SAMPLING_ONLY if options.get(name)]
    if found:
        raise MatchError(
            f"The MODEL carries {', '.join(found)}, which acts on the sampling as a whole and cannot act in training. Wire "
            "the MODEL from before the node that added it."
        )
    guidance = [name for name in GUIDANCE if options.get(name)]
    if guidance:
        logging.warning(
            "HY-WU: the MODEL carries %s, which changes the guidance. There is none in training, so the loss does not see "
            "it; sampled previews do.",
            ", ".join(guidance),
        )


def _wrappers(options: dict[str, Any]) -> Iterator[str]:
    """Names of what other nodes put around the model call."""
    for kind in ACTING:
        for key, some in options["transformer_options"]["wrappers"].get(kind, {}).items():
            if some:
                yield f"a {kind} wrapper of {key or _name(some)}"
    if options.get(CALL) is not None:
        yield f"the {CALL} {_name([options[CALL]])}"


def _patches(options: dict[str, Any]) -> Iterator[str]:
    """Names of what other nodes put into the model call."""
    for kind in ("patches", "patches_replace"):
        yield from (f"{kind} of {name}" for name, some in options["transformer_options"].get(kind, {}).items() if some)


def _ours(lora: Applied) -> Applied:
    """The LoRA with factors that may take part in a backward pass: those of nodes were made in inference mode."""
    matches = []
    with torch.inference_mode(False):
        for adapter in lora.bank.adapters:
            pair = LoraFactor(*(factor.weight.detach().cpu().clone() for factor in (adapter.down, adapter.up)))
            where = adapter.path, adapter.start, adapter.length, adapter.channels_first
            matches.append(Match(adapter.path, pair, *where))
        return lora._replace(bank=Bank(tuple(matches), lora.bank.adapters[0].scale if matches else 1.0))


def _bind_anew(given: comfy.model_patcher.ModelPatcher, patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Injections hold modules of the base that they were made for. The host's own bypass LoRAs are made again for a copy.

    Raises:
        MatchError: for injections of others, and for objects put in place of parts of the model.
    """
    for key, injections in given.injections.items():
        made = []
        for injection in injections:
            manager = inspect.getclosurevars(injection.inject).nonlocals.get("self")
            if not isinstance(manager, BypassInjectionManager):
                raise MatchError(
                    f"The MODEL carries an injection of {key!r}, which is bound to the loaded model, and training needs a "
                    "copy of that. Wire the MODEL from before the node that added it."
                )
            made += _copied(manager).create_injections(patcher.model)
        patcher.set_injections(key, made)
    parts = [path for path, part in given.object_patches.items() if path.startswith("diffusion_model")]
    if parts:
        raise MatchError(
            f"The MODEL carries another {parts[0]} in place of its own, and training needs a copy of the model, which would "
            "not have it. Wire the MODEL from before the node that put it there."
        )


def _copied(manager: BypassInjectionManager) -> BypassInjectionManager:
    copy = BypassInjectionManager()
    for key, (adapter, strength) in manager.adapters.items():
        copy.add_adapter(key, type(adapter)(set(adapter.loaded_keys), _own(adapter.weights)), strength)
    return copy


def _own(value: Any) -> Any:
    if isinstance(value, Tensor):
        with torch.inference_mode(False):
            return value.detach().clone()
    return type(value)(_own(part) for part in value) if isinstance(value, (tuple, list)) else value


def _name(some: Any) -> str:
    first = next(iter(some), None)
    return getattr(first, "__qualname__", type(first).__name__)
