"""Finding the weights of a base that a LoRA's targets name."""

from __future__ import annotations

import logging
import math
from functools import cached_property
from typing import Any, NamedTuple

import comfy.lora
import comfy.utils
import comfy.weight_adapter
import torch

from ...errors import LoraError, MatchError
from ...files.lora_state import of_text_encoder, own_name, regroup
from ...layout import Placement, place
from ...lora import InstanceLora, LoraFactor, concatenate
from ...messages import Message, listed
from ..model import COMPILED, Layer, clean, is_compiled, layer_of, named_modules
from .experts import other_place
from .foreign import WEIGHT, Patch, patches_of, respelled

ROOT = "diffusion_model"
SHOWN = 4


class Match(NamedTuple):
    """A target and the rows of the weight that it changes."""

    name: str  # of the target in the LoRA
    pair: LoraFactor
    module: str  # path below the base's diffusion_model
    start: int  # first output row
    length: int | None  # number of output rows; None: all of them
    # features lie in the second axis of what the module gives (a 1x1 convolution), not in the last
    channels_first: bool = False

    @property
    def key(self) -> str:
        return f"{ROOT}.{self.module}.weight"


class Matches(NamedTuple):
    """What of a LoRA fits a base."""

    matched: tuple[Match, ...]
    missing: tuple[str, ...]
    patches: tuple[tuple[str, tuple[Patch, ...]], ...] = ()  # by name in the LoRA: what cannot stand beside a layer
    text_encoder: tuple[str, ...] = ()  # names that are no MODEL's business
    how: Message | None = None  # bypass, merge, or what of both
    caution: Message | None = None  # what an artist should know of that

    @property
    def found(self) -> int:
        """Targets of the LoRA that the base has."""
        return len({found.name for found in self.matched} | {name for name, _ in self.patches})

    @property
    def total(self) -> int:
        return self.found + len(self.missing)

    @property
    def kinds(self) -> str:
        """The kinds of what cannot stand beside a layer, each with how many there are and the first name."""
        kinds: dict[str, list[str]] = {}
        for name, patches in self.patches:
            for patch in patches:
                kinds.setdefault(patch.kind, []).append(name)
        return listed(
            [
                Message("{count} x {kind} ({name})", count=len(names), kind=kind, name=names[0])
                for kind, names in kinds.items()
            ]
        )

    @property
    def counted(self) -> Message:
        """How much of the LoRA fits."""
        return Message("matched {found}/{total} targets", found=self.found, total=self.total)

    @property
    def said(self) -> Message:
        """How much fits, and what does not."""
        text = self.counted
        if self.missing:
            text = Message("{matched}; not in this model: {names}", matched=text, names=self._names_of_missing())
        if self.text_encoder:
            text = Message(
                "{matched}; {count} of a text encoder, which is not part of a MODEL, left out",
                matched=text,
                count=len(self.text_encoder),
            )
        return text

    def __str__(self) -> str:
        return self.said

    def _names_of_missing(self) -> str:
        names, more = ", ".join(self.missing[:SHOWN]), len(self.missing) - SHOWN
        return Message("{names} and {count} more", names=names, count=more) if more > 0 else names


def match(lora: InstanceLora, base: Any) -> Matches:
    """Match every target of a LoRA to a weight of a base.

    A target's name is a module path below diffusion_model; names of other tools ("transformer.<name>", fused q/k/v) are
    resolved by the host's own table.

    Args:
        base: the host's BaseModel, `patcher.model`.
    Raises:
        MatchError: if nothing matches, or a matching layer has another shape.
        LoraError: if the host cannot read a part of another tool's LoRA.
    """
    layers = _Layers(base, lora)
    matched, patches, missing = [], [], []
    for name, pair in _with_banks(lora, layers).items():
        found = layers.find(name, pair, lora.scale)
        if found is None:
            missing.append(name)
        elif isinstance(found, Match):
            matched.append(found)
        else:
            patches.append((name, (found,)))
    for part in lora.parts:
        for stem, those in patches_of(part, layers.table).items():
            name = own_name(stem, peft=False)[0]
            kept = tuple(patch for patch in those if layers.has(patch.key))
            if kept:
                patches.append((name, kept))
            missing += [f"{name} ({patch.kind})" for patch in those if patch not in kept] if those else [name]
    matches = Matches(
        tuple(matched),
        tuple(name for name in missing if not of_text_encoder(name)),
        tuple(patches),
        tuple(name for name in missing if of_text_encoder(name)),
    )
    if not matches.found:
        raise MatchError(_nothing_matches(lora, base, matches))
    return matches


def canonical(lora: InstanceLora, base: Any) -> InstanceLora:
    """The LoRA with the base's own names; two names of one target become one. What the base does not have is left out, and
    the log says so; a text encoder's part is kept as it came.

    Raises:
        MatchError: if nothing matches, or a matching layer has another shape.
    """
    layers = _Layers(base, lora)
    matches = match(lora, base)
    pairs: dict[str, list[LoraFactor]] = {}
    foreign = set()
    for name, pair in _with_banks(lora, layers).items():
        found = layers.find(name, pair, lora.scale)
        if found is None and not of_text_encoder(name):
            continue
        own = layers.own_name(found)
        foreign |= {name} if own is None and name in lora.foreign else set()
        pairs.setdefault(own or name, []).append(found.pair if isinstance(found, Match) else pair)
    factors = {name: those[0] if len(those) == 1 else concatenate(name, those) for name, those in pairs.items()}
    parts = [respelled(part, layers.table) for part in lora.parts]
    if matches.missing:
        logging.warning("HY-WU: what the base does not have is left out of a loaded LoRA: %s.", matches)
    metadata = {"base": type(base).__name__, **lora.metadata}
    return InstanceLora(factors, lora.scale, metadata, tuple(foreign), [part for part in parts if part.keys])


class _Layers:
    """The weights of a base by the names that LoRAs have for them."""

    def __init__(self, base: Any, lora: InstanceLora):
        self.base = base
        self.made_for = f" ({lora.metadata['base']})" if lora.metadata.get("base") else ""
        self.modules = dict(named_modules(getattr(base, ROOT)))

    @cached_property
    def table(self) -> dict[str, Any]:
        """The host's own: {a tool's name: key, or (key, offset), or (key, offset, function)}."""
        table = comfy.lora.model_lora_keys_unet(self.base, {})
        return _checkpoints(table) if is_compiled(getattr(self.base, ROOT)) else table

    @cached_property
    def keys(self) -> set[str]:
        """Of the base's weights."""
        return {clean(key) for key in self.base.state_dict()}

    def has(self, key: Any) -> bool:
        """Whether the base has the weight of a patch."""
        return (key if isinstance(key, str) else key[0]) in self.keys

    def find(self, name: str, pair: LoraFactor, scale: float) -> Match | Patch | None:
        """Where a target is: beside a layer, or only in a weight, or nowhere.

        Raises:
            MatchError: if its shape is another.
        """
        where = place(name, pair.up.shape[-2], pair.grouped)
        if where.module not in self.modules and other_place(where.module) in self.modules:
            where = where._replace(module=other_place(where.module))
        if where.module in self.modules:
            offset = None if where.length is None else (0, where.start, where.length)
            return self._at(name, pair, scale, (f"{ROOT}.{where.module}{WEIGHT}", offset, None), where.total)
        entry = self._entry(name)
        return None if entry is None else self._at(name, pair, scale, entry)

    def own_name(self, found: Match | Patch | None) -> str | None:
        """The name that the base itself has for what was found, in the words of `layout.place`."""
        if isinstance(found, Match):
            if found.pair.grouped or found.length is None:
                return found.name if found.pair.grouped else found.module
            stop, total = found.start + found.length, layer_of(self.modules[found.module]).out_features
            return f"{found.module}[{found.start}:{stop}/{total}]"
        if found is not None and isinstance(found.key, str) and found.key.endswith(WEIGHT):
            return found.key.removeprefix(f"{ROOT}.").removesuffix(WEIGHT)
        return None

    def _entry(self, name: str) -> tuple[str, Any, Any] | None:
        for candidate in (name, f"{ROOT}.{name}", f"transformer.{name}", f"base_model.model.{name}"):
            found = self.table.get(candidate)
            if found is not None:
                return (found, None, None) if isinstance(found, str) else (*found, None, None)[:3]
        return None

    def _at(
        self, name: str, pair: LoraFactor, scale: float, entry: tuple[str, Any, Any], total: int | None = None
    ) -> Match | Patch | None:
        key, offset, function = entry
        module = self.modules.get(key.removeprefix(f"{ROOT}.").removesuffix(WEIGHT)) if key.endswith(WEIGHT) else None
        rows = None if function is None else _rows(function, pair.up.shape[-2])
        layer = None if module is None else layer_of(module)
        beside = layer is not None and (offset is None or offset[0] == 0) and (function is None or rows is not None)
        if beside:
            if rows is not None:
                pair = LoraFactor(pair.down, pair.up[..., rows, :])
            start, length = (0, None) if offset is None else offset[1:]
            where = Placement(key.removeprefix(f"{ROOT}.").removesuffix(WEIGHT), start, length, total)
            _check_shape(name, pair, where, layer, self.made_for)
            return Match(name, pair, where.module, start, length, layer.channels_first)
        if key not in self.keys or pair.grouped:
            return None
        if pair.down.shape[0] > 1:
            raise MatchError(
                f"{name} is no linear layer in this model, so its weight itself is changed and takes one LoRA, but this one "
                f"holds {pair.down.shape[0]} instances. Choose one instance."
            )
        _check_size(name, pair, offset, comfy.utils.get_attr(self.base, key))
        whole = key if offset is None and function is None else (key, offset, function) if function else (key, offset)
        return Patch(whole, as_adapter(pair, scale), _kind(module, offset))


def _checkpoints(table: dict[str, Any]) -> dict[str, Any]:
    """The host's table, which it makes of the names in the live tree, with those of a checkpoint."""
    names = {}
    for name, entry in table.items():
        entry = clean(entry) if isinstance(entry, str) else (clean(entry[0]), *entry[1:])
        names[clean(name).replace(f"_{COMPILED}", "")] = entry
    return names


def as_adapter(pair: LoraFactor, scale: float) -> comfy.weight_adapter.LoRAAdapter:
    """The host's patch of one instance's pair."""
    # rounded as in a LoRA file, so that both give the same bits
    alpha = float(torch.tensor(scale * pair.rank))
    return comfy.weight_adapter.LoRAAdapter(set(), (pair.up[0], pair.down[0], alpha, None, None, None))


def _kind(module: Any, offset: Any) -> Message:
    if offset is not None and offset[0] != 0:
        return Message("LoRA on a part of a layer's inputs")
    if hasattr(module, "kernel_size"):
        return Message("LoRA on a convolution")
    return Message("LoRA on a weight that is no linear layer")


def _with_banks(lora: InstanceLora, layers: _Layers) -> dict[str, LoraFactor]:
    """The LoRA's pairs, those of single experts put together where the base has banks of them."""
    alone = {
        name: pair
        for name, pair in lora.factors.items()
        if ".experts." in name and layers.find(name, pair, 1.0) is None
    }
    if not alone:
        return dict(lora.factors)
    kept = {name: pair for name, pair in lora.factors.items() if name not in alone}
    try:
        banks = regroup({name: (pair, 1.0) for name, pair in alone.items()})
    except LoraError:
        return dict(lora.factors)
    return kept | {name: pair for name, (pair, _) in banks.items()}


def _rows(function: Any, rows: int) -> torch.Tensor | None:
    """The order in which a function of the host's table takes the rows of a change; None if it does something else to it."""
    numbers = torch.arange(rows, dtype=torch.float64).unsqueeze(1)
    try:
        order = function(numbers.clone()).flatten()
    except (RuntimeError, ValueError, TypeError):
        return None
    return order.long() if torch.equal(order.sort().values, numbers.flatten()) else None


def _check_shape(name: str, pair: LoraFactor, where: Placement, layer: Layer, made_for: str) -> None:
    lead = () if layer.experts is None else (layer.experts,)
    rows = layer.out_features if where.length is None else where.length
    expected = (*lead, rows, layer.in_features)
    found = (*pair.up.shape[1:-1], pair.down.shape[-1])
    fits = found == expected and where.start + rows <= layer.out_features
    if where.total is not None:
        fits = fits and where.total == layer.out_features
    if not fits:
        raise MatchError(
            f"{name}: the LoRA changes a weight of shape {found}, but {where.module} of this model has rows "
            f"{where.start} to {where.start + rows} of ({layer.out_features}, {layer.in_features})"
            f"{'' if layer.experts is None else f' in each of {layer.experts} experts'}. "
            f"The LoRA was generated for another base{made_for}; load the base that its generator was trained for."
        )


def _check_size(name: str, pair: LoraFactor, offset: Any, weight: torch.Tensor | None) -> None:
    """The host takes a product of the weight's size, whatever its shape, and only logs one that is not."""
    if weight is None:
        return
    shape = list(weight.shape)
    if offset is not None:
        shape[offset[0]] = offset[2]
    found = (pair.up.shape[-2], pair.down.shape[-1])
    if math.prod(found) != math.prod(shape):
        raise MatchError(
            f"{name}: the LoRA changes a weight of shape {found}, but this model's has the shape {tuple(shape)}. "
            "The LoRA was made for another base; load the base that it was made for."
        )


def _nothing_matches(lora: InstanceLora, base: Any, matches: Matches) -> str:
    made_for = lora.metadata.get("base")
    origin = f"It was generated for {made_for}. " if made_for else ""
    if matches.text_encoder and not matches.missing:
        return (
            f"This LoRA holds {len(matches.text_encoder)} targets of a text encoder and none of a model. "
            "Use ComfyUI's own LoRA loader, with the CLIP."
        )
    return (
        f"None of the LoRA's {matches.total} targets is in this model ({type(base).__name__}); the first is "
        f"{matches.missing[0] if matches.missing else 'missing'}. {origin}"
        "Load the base that its generator was trained for."
    )
