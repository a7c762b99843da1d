"""LoRA files where the host keeps them: read from its `loras` folders, written below its output folder."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import folder_paths
import torch

from ...errors import LoraError, SaveError
from ...files.lora_files import Dialect, from_state_dict, load_lora, save_lora
from ...lora import InstanceLora, blend, truncate
from .. import progress

FOLDER = "loras"
_SEPARATORS = re.compile(
    r",?[\s;\uff1b\uff0c\u3001]+"
)  # also full-width ones; a comma with nothing after it is left in the word
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+%?$")
SAVE_DTYPES = {
    "as generated": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def names() -> list[str]:
    """The LoRA files that can be chosen."""
    return folder_paths.get_filename_list(FOLDER)


def modified(name: str) -> float:
    """When a LoRA file changed, so that a replaced one is loaded again."""
    return os.path.getmtime(folder_paths.get_full_path_or_raise(FOLDER, name))


def load(name: str) -> InstanceLora:
    """Load a LoRA file by its name.

    Raises:
        LoraError: see `load_lora`.
    """
    return load_lora(folder_paths.get_full_path_or_raise(FOLDER, name))


def save_to_output(lora: InstanceLora, prefix: str, dialect: Dialect, dtype: torch.dtype | None) -> Path:
    """Save every instance of a LoRA as a file of its own, numbered on from what is there.

    Returns:
        the path of the last file.
    Raises:
        SaveError: if the folder cannot be written to.
    """
    for index in range(lora.batch):
        path = save_lora(lora.select(index), output_path(prefix), dialect, dtype)
    return path


def output_path(prefix: str) -> Path:
    """The next free file name below the host's output folder for a prefix such as "loras/hywu".

    Raises:
        SaveError: if the folder cannot be made, or lies outside the output folder.
    """
    try:
        folder, name, counter, *_ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    except Exception as error:  # the host raises a bare Exception for a path outside its output folder
        raise SaveError(
            f"Cannot save to {prefix!r}: {error}. Choose a name below ComfyUI's output folder, in a folder that can be "
            "written to."
        ) from error
    return Path(folder, f"{name}_{counter:05}_.safetensors")


def as_instance_lora(lora: InstanceLora | Mapping[str, torch.Tensor]) -> InstanceLora:
    """An InstanceLora as it is; a LORA_MODEL (the host's plain state dict) read into one.

    Raises:
        LoraError: if it is no plain low-rank LoRA.
    """
    return lora if isinstance(lora, InstanceLora) else from_state_dict(lora)


def blend_from_text(loras: Sequence[InstanceLora], weights: str, max_rank: int = 0) -> InstanceLora:
    """Blend with weights as an artist writes them: "0.7, 0.3", "70% 30%", "0,7; 0,3", or nothing for equal shares.

    Raises:
        LoraError: if the weights are no numbers, could be read in two ways, or are not one for each LoRA.
    """
    blended = blend(loras, _weights(weights, len(loras)) or [1 / len(loras)] * len(loras))
    return truncate(blended, max_rank, progress.bar()) if max_rank else blended


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
