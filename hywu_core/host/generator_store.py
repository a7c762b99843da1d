"""Generators written to the model folder `hywu`, where Load HY-WU Generator finds them."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
import torch

from ..checkpoint import save_generator
from ..errors import SaveError
from .folders import FOLDER, SUFFIX
from .generators import GeneratorHandle

SAVE_DTYPES = {
    "as trained": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def save(handle: GeneratorHandle, name: str, dtype: torch.dtype | None = None) -> Path:
    """Write a generator as one file. One of the same name stays; the new one is numbered.

    Raises:
        SaveError: if the name leads out of the folder, or the file cannot be written; nothing is left half-written then.
    """
    return save_generator(handle.generator, _free_path(name), dtype)


def _free_path(name: str) -> Path:
    root = Path(os.path.normpath(folder_paths.get_folder_paths(FOLDER)[0]))
    stem = name.strip().removesuffix(SUFFIX)
    path = Path(os.path.normpath(root / stem))
    if not stem or path == root or not path.is_relative_to(root):
        raise SaveError(
            f"{name!r} is no name for a generator. Use a plain name such as my-edits; it is saved in {root}."
        )
    candidate, number = path.with_name(path.name + SUFFIX), 1
    while os.path.exists(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}{SUFFIX}")
    return candidate
