"""Finding the modules of a base that a LoRA's targets name."""

from __future__ import annotations

from typing import Any, NamedTuple

import comfy.lora

from ...errors import MatchError
from ...layout import Placement, place
from ...lora import InstanceLora, LoraFactor
from ..model import Layer, clean, layers
from .experts import other_place

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
        """The weight's key in the base."""
        return f"{ROOT}.{self.module}.weight"


class Matches(NamedTuple):
    """What of a LoRA fits a base."""

    matched: tuple[Match, ...]
    missing: tuple[str, ...]

    @property
    def total(self) -> int:
        """Targets of the LoRA."""
        return len(self.matched) + len(self.missing)

    def __str__(self) -> str:
        text = f"matched {len(self.matched)}/{self.total} targets"
        if self.missing:
            text += f"; not in this model: {', '.join(self.missing[:SHOWN])}"
            text += f" and {len(self.missing) - SHOWN} more" if len(self.missing) > SHOWN else ""
        return text


def match(lora: InstanceLora, base: Any) -> Matches:
    """Match every target of a LoRA to a linear layer or a bank of experts of a base.

    A target's name is a module path below diffusion_model; names of other tools ("transformer.<name>", fused q/k/v) are
    resolved by the host's own table.

    Args:
        base: the host's BaseModel, `patcher.model`.
    Raises:
        MatchError: if nothing matches, or a matching layer has another shape.
    """
    carriers = layers(getattr(base, ROOT))
    foreign: dict[str, Any] | None = None
    matched, missing = [], []
    for name, pair in lora.factors.items():
        where = place(name, pair.up.shape[-2], pair.grouped)
        if where.module not in carriers and other_place(where.module) in carriers:
            where = where._replace(module=other_place(where.module))
        if where.module not in carriers:
            foreign = comfy.lora.model_lora_keys_unet(base, {}) if foreign is None else foreign
            where = _resolve(name, foreign)
        layer = carriers.get(where.module) if where else None
        if layer is None:
            missing.append(name)
            continue
        _check_shape(name, pair, where, layer)
        matched.append(Match(name, pair, where.module, where.start, where.length, layer.channels_first))
    matches = Matches(tuple(matched), tuple(missing))
    if not matched:
        raise MatchError(_nothing_matches(lora, base, matches))
    return matches


def _resolve(name: str, table: dict[str, Any]) -> Placement | None:
    for candidate in (name, f"{ROOT}.{name}", f"transformer.{name}"):
        found = table.get(candidate)
        if found is None:
            continue
        key, offset = (found, None) if isinstance(found, str) else (found[0], found[1])
        module = clean(key.removeprefix(f"{ROOT}.").removesuffix(".weight"))
        if offset is None:
            return Placement(module)
        if offset[0] == 0:  # a slice of output rows; a slice of inputs is not expressible beside the forward
            return Placement(module, offset[1], offset[2])
    return None


def _check_shape(name: str, pair: LoraFactor, where: Placement, layer: Layer) -> None:
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
            "The LoRA was generated for another base; load the base that its generator was trained for."
        )


def _nothing_matches(lora: InstanceLora, base: Any, matches: Matches) -> str:
    made_for = lora.metadata.get("base")
    origin = f"It was generated for {made_for}. " if made_for else ""
    return (
        f"None of the LoRA's {matches.total} targets is in this model ({type(base).__name__}); the first is "
        f"{matches.missing[0] if matches.missing else 'missing'}. {origin}"
        "Load the base that its generator was trained for."
    )
