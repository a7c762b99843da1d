"""Weights that lie in one or several safetensors files of a folder: which files, and what each tensor's header says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import CheckpointError
from .safetensors import PICKLE_SUFFIXES, open_safetensors

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
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            shards = [folder / name for name in sorted(set(names))]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is not a shard index ({error!r}). Download it again.") from None
        absent = [shard.name for shard in shards if not shard.is_file()]
        if absent:
            raise CheckpointError(f"{folder} lacks the shards {some(absent)} that {INDEX_FILE} names. Download them.")
        return shards
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in PICKLE_SUFFIXES)
    refused = f" ({some(pickles)} would be pickles, which are refused)" if pickles else ""
    raise CheckpointError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}{refused}. Download the weights there.")


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
