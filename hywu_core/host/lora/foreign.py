"""LoRAs of other tools, read by the host's own loader: plain low-rank pairs become ours, everything else is kept as it came
and becomes the host's patches once a MODEL is known.

The host's loader asks for names that a MODEL has. Without one, it is asked for every name that a file's keys could stand for.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import comfy.lora
import comfy.lora_convert
import comfy.weight_adapter
from torch import Tensor

from ...errors import LoraError
from ...files.lora_files import METADATA_KEY, own_metadata
from ...files.lora_state import as_factor, assemble, check_state, of_text_encoder, one_each, own_name, scale_of
from ...lora import InstanceLora, LoraFactor, Part
from ...messages import Message

WEIGHT, BIAS = ".weight", ".bias"
# Of the values that a LoRAAdapter holds behind up, down and alpha: any of these makes it more than a product of two factors.
_MORE = {3: Message("LoCon with a middle factor"), 4: "DoRA", 5: Message("reshaped weights")}
_CHANGES = {"diff": Message("difference"), "set": Message("replacement")}
_KINDS = {"loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT", "boft": "BOFT", "lora": "LoRA"}


class Patch(NamedTuple):
    """A change that the host writes into a weight of a MODEL."""

    key: Any  # of the host's add_patches: a name, or (name, offset) or (name, offset, function)
    value: Any  # its adapter, or a tuple such as ("diff", (tensor,))
    kind: str  # in words
    strength: float = 1.0


def read(state: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> InstanceLora:
    """Read a LoRA in any dialect that the host reads, without a MODEL.

    Args:
        header: of the file.
    Raises:
        LoraError: if nothing in it is a LoRA that the host knows, or it is damaged.
    """
    check_state(state)
    ours = METADATA_KEY in (header or {})
    state = _converted(state)
    found = _by_name(state)
    pairs: dict[str, list[tuple[LoraFactor, float]]] = {}
    foreign, used = set(), set()
    keys_of: dict[int, list[str]] = {}
    for key, tensor in state.items():
        keys_of.setdefault(id(tensor), []).append(key)
    for stem, value in _low_rank(found):
        up, down = value.weights[:2]
        pair = as_factor(stem, down, up)
        name, spelled = own_name(stem, peft=ours)
        foreign |= {name} if spelled else set()
        pairs.setdefault(name, []).append((pair, scale_of(stem, state.get(f"{stem}.alpha"), pair.rank)))
        used |= {key for key in (f"{stem}.alpha", *keys_of[id(up)], *keys_of[id(down)]) if key.startswith(stem)}
    rest = {key: tensor for key, tensor in state.items() if key not in used}
    rest = _known(rest, found)
    if not pairs and not rest:
        raise LoraError(
            "There are no LoRA weights here that ComfyUI knows. "
            + (f"The first key is {next(iter(state))}. " if state else "The file is empty. ")
            + "Choose a LoRA; a checkpoint belongs into the loader of its kind."
        )
    return assemble(one_each(pairs), own_metadata(header or {}), foreign, _parts(rest, found))


def patches_of(part: Part, table: Mapping[str, Any]) -> dict[str, list[Patch]]:
    """{name in the file: what the host makes of it for a MODEL with this key table}, nothing for names that it does not have.

    Raises:
        LoraError: if the host cannot read it.
    """
    state = dict(zip(part.keys, part.tensors, strict=True))
    patches = {}
    for stem in _by_name(state):
        target = table.get(stem)
        found = {} if target is None else _host_read(state, {stem: target})
        patches[stem] = [Patch(key, value, kind_of(key, value), part.strength) for key, value in found.items()]
    return patches


def respelled(part: Part, table: Mapping[str, Any]) -> Part:
    """A part in the names that a MODEL with this key table has for whole weights, without what it does not have."""
    state = dict(zip(part.keys, part.tensors, strict=True))
    stems = set(_by_name(state))
    keys = {}
    for key, tensor in state.items():
        stem = _stem(key, stems)
        target = table.get(stem)
        if target is None and not of_text_encoder(stem):
            continue
        whole = isinstance(target, str) and target.endswith(WEIGHT)
        keys[target.removesuffix(WEIGHT) + key.removeprefix(stem) if whole else key] = tensor
    return part._replace(keys=tuple(keys), tensors=tuple(keys.values()))


def kind_of(key: Any, value: Any) -> str:
    """What a host's patch is, in words that an artist may have seen."""
    if isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        more = [word for place, word in _MORE.items() if value.name == "lora" and value.weights[place] is not None]
        return more[0] if more else _KINDS.get(value.name, value.name)
    what = _CHANGES.get(value[0], value[0])
    if isinstance(key, str) and key.endswith(BIAS):
        return Message("bias {change}", change=what)
    return Message("weight {change}", change=what)


def _converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        return comfy.lora_convert.convert_lora(dict(state))
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise LoraError(f"ComfyUI cannot read this LoRA ({error}); it is incomplete or damaged.") from error


def _by_name(state: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """{name in the file: {".weight" or ".bias": what the host reads there}}."""
    found: dict[str, dict[str, Any]] = {}
    read_ = _host_read(state, {name: name + WEIGHT for name in _possible_names(state)})
    for key, value in read_.items():
        end = next(end for end in (WEIGHT, BIAS) if key.endswith(end))
        found.setdefault(key.removesuffix(end), {})[end] = value
    return found


def _parts(state: Mapping[str, Tensor], stems: Mapping[str, Any]) -> list[Part]:
    """What is no low-rank pair, a part for each name in the file, so that each can have a strength of its own."""
    keys_of: dict[str, list[str]] = {}
    for key in state:
        keys_of.setdefault(_stem(key, stems), []).append(key)
    return [Part(tuple(keys), tuple(state[key] for key in keys)) for keys in keys_of.values()]


def _stem(key: str, stems: Container[str]) -> str:
    """The name that a key belongs to."""
    return next(name for name in _possible_names([key]) if name in stems)


def _host_read(state: Mapping[str, Tensor], table: Mapping[str, Any]) -> dict[Any, Any]:
    try:
        return comfy.lora.load_lora(state, table, log_missing=False)
    except KeyError as error:
        raise LoraError(f"The LoRA lacks {error.args[0]}; it is incomplete.") from error
    except (IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise LoraError(f"ComfyUI cannot read this LoRA ({error}); it is damaged, or not a LoRA.") from error


def _possible_names(keys: Iterable[str]) -> Iterator[str]:
    """Every beginning of a key that could be a target's name, each once, in the order of the keys."""
    seen = set()
    for key in keys:
        words = key.split(".")
        for count in range(len(words) - 1, 0, -1):
            beginning = ".".join(words[:count])
            # an old spelling has "<name>_lora.up.weight"
            for name in (beginning, beginning.removesuffix("_lora")):
                if name and name not in seen:
                    seen.add(name)
                    yield name


def _low_rank(found: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    for stem, values in found.items():
        value = values.get(WEIGHT)
        if isinstance(value, comfy.weight_adapter.LoRAAdapter) and all(value.weights[place] is None for place in _MORE):
            yield stem, value


def _known(rest: dict[str, Tensor], found: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the host has read of the rest. Its loader says of each other key that it is not loaded; one line is enough.

    Raises:
        LoraError: for half of a pair, which is no other tool's invention but a damaged file.
    """
    stems = set(found)
    known = {key: tensor for key, tensor in rest.items() if not stems.isdisjoint(_possible_names([key]))}
    unknown = sorted(rest.keys() - known.keys())
    for key in unknown:
        if ".lora_A" in key or ".lora_down" in key or ".lora.down" in key:
            raise LoraError(f"{key} has no partner; the LoRA is incomplete.")
    if unknown and known.keys() | found.keys():
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        logging.warning(
            "HY-WU: ComfyUI knows no meaning of these keys of the LoRA, they do nothing: %s%s.", unknown[0], more
        )
    return known
