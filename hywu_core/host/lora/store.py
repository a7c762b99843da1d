"""LoRA files where the host keeps them: read from its `loras` folders, written below its output folder."""

from __future__ import annotations

import logging
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_execution.graph_utils import ExecutionBlocker

from ...errors import LoraError, SaveError
from ...files.atomic import no_empty_folders
from ...files.lora_files import Dialect, grouped_targets, read_file, save_lora, to_state_dict
from ...files.names import below
from ...lora import InstanceLora, blend, truncate
from ...messages import Message
from .. import progress
from . import foreign
from .matching import canonical

FOLDER = "loras"
# also full-width ones; a comma between two characters is left in the word
_SEPARATORS = re.compile(r",?[\s;\uff1b\uff0c\u3001]+")
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+%?$")
SAVE_DTYPES = {
    "as generated": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Bases, by the host's classes, whose modules are called as in diffusers.
DIFFUSERS_NAMES = {"QwenImage"}


_shipped: dict[str, Path] = {}  # LoRA files that came with the pack, for bases that did


def ship(name: str, path: Path) -> None:
    """Offer a file of the pack's own, behind those of the host's folders."""
    _shipped[name] = path


def names() -> list[str]:
    found = folder_paths.get_filename_list(FOLDER)
    return [*found, *(name for name in _shipped if name not in found)]


def modified(name: str) -> float:
    """When a LoRA file changed, so that a replaced one is loaded again."""
    return os.path.getmtime(_path(name))


def load(name: str, model: Any = None) -> InstanceLora:
    """Load a LoRA file by its name.

    Args:
        model: a MODEL that has it; then its targets get the base's own names.
    Raises:
        LoraError: if it is damaged, or no LoRA that the host knows.
        MatchError: if the model has none of its targets.
    """
    path = _path(name)
    try:
        lora = foreign.read(*read_file(path))
    except LoraError as error:
        text = str(error)
        raise LoraError(text if str(path) in text else f"{path}: {text}") from error
    return lora if model is None else canonical(lora, model.model)


def _path(name: str) -> Path:
    found = folder_paths.get_full_path(FOLDER, name)
    if found is None and name in _shipped:
        return _shipped[name]
    return Path(folder_paths.get_full_path_or_raise(FOLDER, name))


def save_to_output(lora: InstanceLora, prefix: str, dialect: Dialect, dtype: torch.dtype | None) -> Path:
    """Save every instance of a LoRA as a file (peft: a folder) of its own, numbered on from what is there.

    Returns:
        the path of the last one.
    Raises:
        LoraError: if the dialect cannot hold it.
        SaveError: if the folder cannot be written to.
    """
    diffusers = lora.metadata.get("base") in DIFFUSERS_NAMES
    for index in range(lora.batch):
        path = save_lora(lora.select(index), output_path(prefix), dialect, dtype, diffusers)
    return path


def remarks(lora: InstanceLora, dialect: Dialect) -> Message | None:
    """What a saved LoRA does not do where one would expect it; None if there is nothing to say."""
    experts = grouped_targets(lora)
    if dialect == "stock" and experts:
        return Message(
            "{experts} of {count} targets are banks of experts, for which ComfyUI's own LoRA loader has no key: it loads the "
            "others only. Load Instance LoRA reads them all.",
            experts=experts,
            count=len(lora.names),
        )
    base = lora.metadata.get("base")
    if dialect == "peft" and not lora.foreign and base not in DIFFUSERS_NAMES:
        return Message(
            "For PEFT around a model with the module names that ComfyUI has for {base}. Where those of diffusers differ, as "
            "for Flux, its pipelines do nothing with this folder: give them a file of the format stock.",
            base=base or Message("this base"),
        )
    return None


def for_the_host(lora: InstanceLora) -> dict[str, torch.Tensor]:
    """A LORA_MODEL of the first instance. Warns of what the host's own nodes ignore in it."""
    if said := remarks(lora, "stock"):
        logging.warning("HY-WU: of the output lora_model, %s", said)
    return to_state_dict(lora.select(0))


def output_for_the_host(lora: InstanceLora) -> dict[str, torch.Tensor] | ExecutionBlocker:
    """The same as a node's output: what no file can hold can still be applied, so it ends only what takes the LORA_MODEL."""
    try:
        return for_the_host(lora)
    except LoraError as error:
        return ExecutionBlocker(str(error))


def beside_the_pairs(loras: Sequence[InstanceLora]) -> str:
    """A line on what of LoRAs is no pair of factors, which norms and cosines do not count; nothing if there is nothing."""
    others = sum(len(part.keys) for lora in loras for part in lora.parts)
    return f"\nnot counted: {others} tensors that are no pairs of low-rank factors" if others else ""


def output_path(prefix: str) -> Path:
    """The next free file name below the host's output folder for a prefix such as "loras/hywu".

    Raises:
        SaveError: if the folder cannot be made or lies outside the output folder, or a name in it cannot be one.
    """
    root, relative = folder_paths.get_output_directory(), prefix.replace("\\", "/")
    if not os.path.isabs(relative) and ".." not in relative.split("/"):
        below(root, relative, "LoRA files")
    try:
        with no_empty_folders(Path(root, relative).parent):  # what writes the file makes them, if it can
            folder, name, counter, *_ = folder_paths.get_save_image_path(relative, root)
    except Exception as error:  # the host raises a bare Exception for a path outside its output folder
        raise SaveError(
            f"Cannot save to {prefix!r}: {error}. Choose a name below ComfyUI's output folder, in a folder that can be "
            "written to."
        ) from error
    return Path(folder, f"{name}_{counter:05}_.safetensors")


def as_instance_lora(lora: InstanceLora | Mapping[str, torch.Tensor]) -> InstanceLora:
    """An InstanceLora as it is; a LORA_MODEL (the host's plain state dict) read into one.

    Raises:
        LoraError: if it is no LoRA that the host knows.
    """
    return lora if isinstance(lora, InstanceLora) else foreign.read(lora)


def blend_of(
    loras: Sequence[InstanceLora], weights: str = "", sliders: Sequence[float] = (), max_rank: int = 0
) -> InstanceLora:
    """Blend with weights as an artist writes them: "0.7, 0.3", "70% 30%", "0,7; 0,3", or nothing for equal shares; or with
    the numbers of sliders.

    Raises:
        LoraError: if the weights are no numbers, could be read in two ways, are given twice, or are not one for each LoRA.
    """
    if sliders and weights.strip():
        raise LoraError(
            "The weights are given twice, as text and by sliders. Empty the text, or switch the sliders off."
        )
    numbers = list(sliders) or _weights(weights, len(loras)) or [1 / len(loras)] * len(loras)
    blended = blend(loras, numbers).with_metadata(**_said(loras, numbers))
    return truncate(blended, max_rank, progress.bar()) if max_rank else blended


def _said(loras: Sequence[InstanceLora], weights: Sequence[float]) -> dict[str, str]:
    """The instruction of a blend: those of its parts."""
    texts = [str(lora.metadata.get("instruction") or "") for lora in loras]
    said = [f"{weight:g} {text}" for text, weight in zip(texts, weights, strict=False) if text]
    return {"instruction": " + ".join(said)} if said else {}


def _weights(text: str, count: int) -> list[float]:
    words = [word.strip(",") for word in _SEPARATORS.split(text) if word.strip(",")]
    joined = [word for word in words if "," in word]
    if joined and "." not in text and all(_DECIMAL_COMMA.match(word) for word in joined):
        if len(words) != count:
            first = joined[0].split(",")
            raise LoraError(
                f"{joined[0]!r} in the weights can mean {first[0]} and {first[1]}, or one number. Write decimals with a "
                f'point and a space after each comma, such as "0.7, 0.3".'
            )
        words = [word.replace(",", ".") for word in words]
    try:
        numbers = [_number(part) for word in words for part in word.split(",")]
    except ValueError:
        raise LoraError(f"The weights {text!r} are not numbers separated by commas, such as 0.7, 0.3.") from None
    return numbers


def _number(word: str) -> float:
    plain = unicodedata.normalize("NFKC", word)
    value = float(plain.removesuffix("%")) / (100 if plain.endswith("%") else 1)
    if not math.isfinite(value):
        raise ValueError(word)
    return value
