"""Weights that lie in one or several safetensors files of a folder: which files, and what each tensor's header says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import CheckpointError
from .names import LONGEST
from .safetensors import PICKLE_SUFFIXES, open_safetensors
from .text import read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHOWN = 8  # names listed in one error
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Header(NamedTuple):
    """What a file says of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it
    shard: Path


def folder_shards(folder: Path) -> list[Path]:
    """The safetensors files that hold a folder's weights.

    Raises:
        CheckpointError: if there are none, the index is damaged, or a shard that it names is not there.
    """
    index = folder / INDEX_FILE
    if os.path.isfile(index):
        names = indexed(index)
        absent = [name for name in names if not os.path.isfile(folder / name)]
        if absent:
            raise CheckpointError(f"{folder} lacks the shards {some(absent)} that {INDEX_FILE} names. Download them.")
        return [folder / name for name in names]
    if os.path.isfile(folder / WEIGHTS_FILE):
        return [folder / WEIGHTS_FILE]
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be looked into ({error}).") from None
    others = [file for file in files if file.suffix == ".safetensors" and not file.name.startswith(".")]
    if len(others) == 1:
        return others
    pickles = [file.name for file in files if file.suffix.lower() in PICKLE_SUFFIXES]
    refused = f" ({some(pickles)} would be pickles, which are refused)" if pickles else ""
    raise CheckpointError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}{refused}. Download the weights there.")


def indexed(index: Path) -> list[str]:
    """The names of the shards that an index lists, sorted. They lie beside it.

    Raises:
        CheckpointError: if it is no such index.
    """
    weights = read_json(index, CheckpointError).get("weight_map")
    names = list(weights.values()) if isinstance(weights, dict) else []
    if not names or not all(
        isinstance(name, str) and 0 < len(name.encode("utf-8", "replace")) <= LONGEST for name in names
    ):
        raise CheckpointError(
            f"{index} is not a shard index: it needs a weight_map from tensors to files. Download it again."
        )
    foreign = sorted(name for name in set(names) if name != Path(name).name or "\\" in name or "\0" in name)
    if foreign:
        raise CheckpointError(f"{index} names {foreign[0]!r}, which is no file beside it. Download it again.")
    return sorted(set(names))


def read_headers(shards: list[Path]) -> dict[str, Header]:
    """{name: header} of every tensor.

    Raises:
        CheckpointError: if a file is damaged, or two hold the same name.
    """
    found: dict[str, Header] = {}
    for shard in shards:
        with open_safetensors(shard, CheckpointError) as handle:
            for name in handle.keys():
                if name in found:
                    raise CheckpointError(f"{name} is in both {found[name].shard.name} and {shard.name}.")
                part = handle.get_slice(name)
                found[name] = Header(tuple(part.get_shape()), part.get_dtype(), shard)
    return found


def main_dtype(found: Mapping[str, Header]) -> torch.dtype:
    """What most of the floating-point numbers are stored as."""
    sizes: dict[str, int] = {}
    for header in found.values():
        if header.dtype in DTYPES:
            sizes[header.dtype] = sizes.get(header.dtype, 0) + torch.Size(header.shape).numel()
    return DTYPES[max(sizes, key=sizes.get)]


def some(names: list[str], separator: str = ", ") -> str:
    """The first few of a list, for an error."""
    rest = len(names) - SHOWN
    return separator.join(names[:SHOWN]) + (f"{separator}and {rest} more" if rest > 0 else "")
