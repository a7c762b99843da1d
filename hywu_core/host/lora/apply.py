"""Applying a LoRA to a MODEL: beside the forward (bypass) or in the weights (merge). The MODEL given is never changed.

Bypass: one wrapper under one key holds all HY-WU LoRAs of a MODEL. For the time of each model call, and not longer, the
forwards of the matched layers are wrapped; they are unwrapped when the call returns, raises or is interrupted, so no trace
stays on a base that other MODELs share. The factors are a bank in the MODEL's additional models, under the host's memory
management.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import torch
from comfy.patcher_extension import WrappersMP
from comfy.quant_ops import QuantizedTensor
from torch import nn

from ...errors import MatchError
from ...lora import InstanceLora
from ...messages import Message
from ..model import clean, is_compiled, submodule
from .bank import Bank, bank_patcher
from .experts import ExpertLoraAdapter, foreign_bank
from .foreign import Patch
from .forwards import Beside, Part, blocks_not_replayed, replaced_forwards
from .matching import Match, Matches, as_adapter, match
from .schedule import Curve, Schedule

KEY = "hywu"
COMPILE_KEY = "torch.compile"  # the host's own, of its TorchCompileModel node
Mode = Literal["auto", "bypass", "merge"]
Parts = dict[str, list[Part]]  # path of a module -> what is added to it


class Applied(NamedTuple):
    """One LoRA on a MODEL in bypass mode."""

    bank: Bank
    strength: float
    schedule: Schedule
    identity: uuid.UUID

    def at(self, model_sampling: Any, sigma: torch.Tensor) -> Applied:
        """The same with the strength that it has at this noise level; 0: it does not act."""
        return self._replace(strength=self.strength * self.schedule.share(model_sampling, sigma))


class Acting:
    """Which LoRAs act in a model call, and how strongly: what a base that keeps results from call to call has to compare. No
    tuple, because a compiled graph would be made anew for another one.
    """

    def __init__(self, loras: tuple[Applied, ...]):
        self._loras = tuple((lora.identity, lora.strength) for lora in loras)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Acting) and self._loras == other._loras

    def __hash__(self) -> int:
        return hash(self._loras)


def apply_lora(
    model: comfy.model_patcher.ModelPatcher,
    lora: InstanceLora,
    strength: float = 1.0,
    mode: Mode = "auto",
    start: float = 0.0,
    end: float = 1.0,
    curve: Curve | None = None,
) -> tuple[comfy.model_patcher.ModelPatcher, Matches]:
    """A clone of `model` with the LoRA on it: W' = W + strength * scale * B . A on every matched weight.

    Args:
        strength: any sign; 0 gives an unchanged clone.
        mode: "merge" rewrites weights through the host's patches; "bypass" adds beside the forward and suits quantised,
            offloaded and mixture-of-experts bases, batches and schedules; "auto" is bypass, and merge where that cannot do
            it: on compiled models if merging can, and for what of a LoRA cannot stand beside a layer.
        start, end: fractions of the sampling schedule between which the LoRA acts.
        curve: what the strength is multiplied by, over the fraction of the sampling that is done.
    Returns:
        the clone, and what matched.
    Raises:
        MatchError: if the LoRA and the model do not fit, or the mode cannot do what is asked.
    """
    schedule = Schedule(start, end, curve).check()
    matches = match(lora, model.model)
    clone = model.clone()
    if strength == 0:
        return clone, matches
    inside = mode == "merge" or (mode == "auto" and _compiled(model) and _merging_can(lora, matches, model, schedule))
    if inside:
        _check_merge(lora, matches, model, schedule)
        _merge(clone, [_as_patch(found, lora.scale) for found in matches.matched], strength)
    else:
        _check_beside(matches, mode, schedule)
        if matches.matched:
            bank = bank_patcher(matches.matched, lora.scale, clone.load_device)
            _bypass(clone, bank, Applied(bank.model, strength, schedule, bank.clone_base_uuid))
    if matches.patches:
        _check_object_patches(_keys(matches.patches), model)
        _merge(clone, [patch for _, patches in matches.patches for patch in patches], strength)
    matches = matches._replace(how=_how(matches, inside), caution=_caution(matches, inside, model))
    logging.log(logging.WARNING if matches.missing else logging.INFO, "HY-WU: %s (%s).", matches, matches.how)
    if matches.caution:
        logging.warning("HY-WU: %s", matches.caution)
    return clone, matches


def applied_loras(model: comfy.model_patcher.ModelPatcher) -> tuple[Applied, ...]:
    """The LoRAs that a MODEL carries in bypass mode, in the order they were applied."""
    wrappers = model.get_wrappers(WrappersMP.APPLY_MODEL, KEY)
    return wrappers[0].loras if wrappers else ()


class BypassWrapper:
    """Runs a model call with every LoRA of one MODEL beside the layers it changes."""

    def __init__(self, loras: tuple[Applied, ...]):
        self.loras = loras
        self._besides: WeakKeyDictionary[nn.Module, Beside] = WeakKeyDictionary()
        self._said: set[str] = set()

    def __call__(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
    ):
        """See the host's BaseModel.apply_model. The base learns from transformer_options["hywu"] what acts on it."""
        base = executor.class_obj
        now = (lora.at(base.model_sampling, t) for lora in self.loras)
        acting = tuple(lora for lora in now if lora.strength)
        options = {**(transformer_options or {}), KEY: Acting(acting)}
        parts = _parts(acting, getattr(base, "current_patcher", None))
        with blocks_not_replayed(), _running(base.diffusion_model, parts, self._besides) as besides:
            result = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
            self._warn(base.diffusion_model, options, [path for path, beside in besides.items() if not beside.ran])
        return result

    def _warn(self, diffusion_model: nn.Module, options: dict[str, Any], silent: list[str]) -> None:
        """Once for each thing that an artist should know."""
        if silent:
            more = f" and {len(silent) - 1} more layers" if silent[1:] else ""
            self._say(f"The LoRA does not act on {silent[0]}{more}: this model did not call them. Use the mode merge.")
        compiled = comfy.patcher_extension.get_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY, options)
        if self.loras and (compiled or is_compiled(diffusion_model)):
            self._say(
                "This model is compiled, and a LoRA in the mode bypass breaks its graph at every layer it changes. The mode "
                "merge does not; auto chooses it where the model is compiled before the LoRA is applied."
            )

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logging.warning("HY-WU: %s", message)


@contextmanager
def beside(diffusion_model: nn.Module, loras: tuple[Applied, ...]) -> Iterator[None]:
    """For the time of the block, the forward of every layer that a LoRA changes adds the LoRA's part."""
    with wrapped_forwards(diffusion_model, _parts(loras)):
        yield


@contextmanager
def wrapped_forwards(diffusion_model: nn.Module, parts: Parts) -> Iterator[None]:
    """For the time of the block, the modules at these paths add their adapters, each at its strength."""
    with _running(diffusion_model, parts, {}):
        yield


@contextmanager
def _running(
    diffusion_model: nn.Module, parts: Parts, kept: MutableMapping[nn.Module, Beside]
) -> Iterator[dict[str, Beside]]:
    """The same; gives what stands at which path. `kept` holds it from call to call."""
    besides: dict[str, Beside] = {}
    try:
        with replaced_forwards(_forwards(diffusion_model, parts, kept, besides)):
            yield besides
    finally:
        for stood in besides.values():
            stood.stop()


def _forwards(
    diffusion_model: nn.Module, parts: Parts, kept: MutableMapping[nn.Module, Beside], besides: dict[str, Beside]
) -> Iterator[tuple[nn.Module, Callable]]:
    """The modules that are to run otherwise, and how. Another pack never calls its banks: our mixture runs in their place."""
    mixtures: dict[str, nn.Module] = {}
    for path, added in parts.items():
        parent, foreign = path.rpartition(".")[0], foreign_bank(path)
        if foreign is None:
            module = submodule(diffusion_model, path)
            besides[path] = kept.setdefault(module, Beside())
            besides[path].start(module.forward, added)
            yield module, besides[path]
            continue
        kind, name = foreign
        if parent not in mixtures:
            mlp = submodule(diffusion_model, parent)
            mixtures[parent] = kind.borrow(mlp)
            yield mlp, mixtures[parent].forward
        bank = mixtures[parent].experts.get_submodule(name)
        besides[path] = Beside()
        besides[path].start(bank.forward, added)
        # of our own object, which goes when this is over
        bank.forward = besides[path]


def _parts(loras: tuple[Applied, ...], patcher: comfy.model_patcher.ModelPatcher | None = None) -> Parts:
    """What each LoRA adds where. A patcher for another device has copies of the banks on that device."""
    attached = [] if patcher is None else patcher.get_additional_models_with_key(KEY)
    banks = {bank.clone_base_uuid: bank.model for bank in attached}
    parts: Parts = {}
    for lora in loras:
        for adapter in banks.get(lora.identity, lora.bank).adapters:
            parts.setdefault(adapter.path, []).append((adapter, lora.strength))
    return parts


def _bypass(clone: comfy.model_patcher.ModelPatcher, bank: comfy.model_patcher.ModelPatcher, applied: Applied) -> None:
    loras = (*applied_loras(clone), applied)
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, BypassWrapper(loras))
    clone.set_additional_models(KEY, [*clone.get_additional_models_with_key(KEY), bank])


def _how(matches: Matches, inside: bool) -> Message:
    if inside:
        return Message("merge")
    return Message("bypass; merged: {kinds}", kinds=matches.kinds) if matches.patches else Message("bypass")


def _caution(matches: Matches, inside: bool, model: comfy.model_patcher.ModelPatcher) -> Message | None:
    """What does not stay on the device is merged anew whenever it is fetched, a whole bank of experts at a time."""
    banks = inside and any(found.pair.grouped for found in matches.matched)
    if not banks or model.model_size() <= comfy.model_management.maximum_vram_for_weights(model.load_device):
        return None
    return Message(
        "This model is larger than the memory of its device, and a merged LoRA is written into its banks of experts again "
        "each time one is fetched, in every step. The mode bypass gives the same picture without that."
    )


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
    live = _live_keys(clone)
    for patch in (patch._replace(key=_live(patch.key, live)) for patch in patches):
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


def _check_beside(matches: Matches, mode: Mode, schedule: Schedule) -> None:
    """What acts on a weight as a whole cannot stand beside its layer, and cannot be taken out for a part of the sampling."""
    if not matches.patches:
        return
    remedy = "Use the mode merge or auto, or ComfyUI's own LoRA loader."
    if not schedule.whole:
        raise MatchError(
            f"This LoRA has {matches.kinds}, which is in the weights for the whole schedule. Let it act from 0 to 1, without "
            f"a curve. {remedy}"
        )
    if mode == "bypass":
        raise MatchError(f"This LoRA has {matches.kinds}, which cannot stand beside a layer. {remedy}")


def _check_mergeable(lora: InstanceLora, schedule: Schedule) -> None:
    if lora.batch > 1:
        raise MatchError(
            f"Merging writes one LoRA into the weights, but this one holds {lora.batch} instances. Use the mode bypass."
        )
    if not schedule.whole:
        raise MatchError(
            "A merged LoRA is in the weights for the whole schedule. Use the mode bypass for start, end and curve."
        )


def _check_banks(matched: tuple[Match, ...], base: Any) -> None:
    """A quantised bank of experts takes no patch in the host, and another pack's bank may not look at it."""
    for found in matched:
        if not found.pair.grouped:
            continue
        theirs = foreign_bank(found.module) is not None
        if theirs or isinstance(submodule(base.diffusion_model, found.module).weight, QuantizedTensor):
            raise MatchError(
                f"{found.module} of this model is a {'foreign' if theirs else 'quantised'} bank of experts, which no LoRA "
                "can be merged into. Use the mode bypass: it acts beside the weights, whatever they are stored as."
            )


def _check_object_patches(keys: Iterable[str], model: comfy.model_patcher.ModelPatcher) -> None:
    """The host puts an object in the place of a block before it loads weights, and then finds no patch of the names below."""
    patched = model.object_patches.items()
    compiled = [name for name, put in patched if isinstance(put, nn.Module) and is_compiled(put)]
    for key in keys if compiled else ():
        for name in compiled:
            if key.startswith(f"{name}."):
                raise MatchError(
                    f"Another node has put a compiled block in the place of {name}, and the host merges nothing into such a "
                    "one. Use the mode bypass, or a compile node that compiles while sampling."
                )


def _keys(patches: Iterable[tuple[str, Sequence[Patch]]]) -> Iterator[str]:
    for _, those in patches:
        yield from (patch.key if isinstance(patch.key, str) else patch.key[0] for patch in those)


def _check_merge(
    lora: InstanceLora, matches: Matches, model: comfy.model_patcher.ModelPatcher, schedule: Schedule
) -> None:
    _check_mergeable(lora, schedule)
    _check_banks(matches.matched, model.model)
    _check_object_patches((found.key for found in matches.matched), model)


def _merging_can(*asked: Any) -> bool:
    try:
        _check_merge(*asked)
    except MatchError:
        return False
    return True


def _live_keys(clone: comfy.model_patcher.ModelPatcher) -> dict[str, str]:
    """{key of a weight in a checkpoint: its key now}, where they differ because blocks of the shared base are compiled."""
    if not is_compiled(clone.model.diffusion_model):
        return {}
    # another clone's object patches go with its weights
    comfy.model_management.unload_model_and_clones(clone, unload_additional_models=False)
    return {clean(key): key for key in clone.model.state_dict()}


def _live(key: Any, live: dict[str, str]) -> Any:
    """A key of the host's add_patches, with the weight's name as it is now."""
    return live.get(key, key) if isinstance(key, str) else (live.get(key[0], key[0]), *key[1:])


def _compiled(model: comfy.model_patcher.ModelPatcher) -> bool:
    patched = (put for put in model.object_patches.values() if isinstance(put, nn.Module))
    return bool(model.get_wrappers(WrappersMP.APPLY_MODEL, COMPILE_KEY)) or any(is_compiled(put) for put in patched)
