"""Write a generator once more with the matrices of its blocks quantised, or in another type: a block at a time, so that
memory holds one, and resumable, so that a stopped conversion goes on where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, SaveError
from .atomic import atomic_write
from .checkpoint import CONFIG_FILE, GeneratorFiles, inspect_generator
from .quantised import MARK, SCALE, plain, quantised
from .safetensors import open_safetensors, write_safetensors
from .shards import INDEX_FILE

MADE_FROM = "hywu_converted"  # in a shard's metadata: of which generator, and into what


def convert_generator(
    source: str | Path, target: str | Path, dtype: torch.dtype | str, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Write the generator `source` as the folder `target`.

    Args:
        dtype: a floating-point type, or one of `quantised.STORED`.
        say: told of each file.
    Raises:
        CheckpointError, ConfigError: see `inspect_generator`.
        SaveError: if `target` holds anything but this conversion, or cannot be written.
    """
    files, target = inspect_generator(source), Path(target)
    made = f"{files.fingerprint} {dtype}"
    groups = _groups(files)
    shards = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    _check_target(target, {*shards, CONFIG_FILE, INDEX_FILE})
    index: dict[str, str] = {}
    for shard, names in zip(shards, groups, strict=True):
        written = _names_in(target / shard, made)
        if written is None:
            tensors = dict(_converted(files, names, dtype))
            write_safetensors(target / shard, tensors, {"format": "pt", MADE_FROM: made})
            written = list(tensors)
            say(f"{shard}: {len(written)} tensors")
        else:
            say(f"{shard}: there already")
        index |= dict.fromkeys(written, shard)
    _write_text(target / INDEX_FILE, json.dumps({"metadata": {}, "weight_map": index}, indent=1))
    # last, since a folder without it is no generator
    _write_text(target / CONFIG_FILE, files.config.to_json())
    return target


def _groups(files: GeneratorFiles) -> list[list[str]]:
    """The names of the plain tensors, by block; what is of no block first."""
    groups: dict[int, list[str]] = {}
    for name in (name for names in files.shards.values() for name in names):
        if not name.endswith((SCALE, MARK)):
            block = int(name.split(".")[2]) if name.startswith("model.blocks.") else -1
            groups.setdefault(block, []).append(name)
    return [sorted(groups[block]) for block in sorted(groups)]


def _converted(files: GeneratorFiles, names: list[str], dtype: torch.dtype | str) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a generator, plain or quantised, as `dtype`."""
    wanted = set(names) | {name.removesuffix(".weight") + suffix for name in names for suffix in (SCALE, MARK)}
    read = {}
    for shard, stored in files.shards.items():
        with open_safetensors(shard, CheckpointError) as handle:
            read |= {name: handle.get_tensor(name) for name in stored if name in wanted}
    if isinstance(dtype, str):
        return quantised(plain(read), dtype)
    return iter(plain(read, dtype).items())


def _names_in(shard: Path, made: str) -> list[str] | None:
    """The tensors of a shard that this conversion wrote before; None if there is none."""
    if not os.path.exists(shard):
        return None
    with open_safetensors(shard, CheckpointError) as handle:
        found, names = (handle.metadata() or {}).get(MADE_FROM), list(handle.keys())
    if found != made:
        raise SaveError(
            f"{shard} is of another conversion ({found or 'not one of these'}). Nothing was changed. Choose an empty folder."
        )
    return names


def _check_target(target: Path, own: set[str]) -> None:
    if target.suffix == ".safetensors" or os.path.isfile(target):
        raise SaveError(f"{target} is a file. A conversion writes a folder: name one that is empty or not there.")
    others = sorted(set(os.listdir(target)) - own) if os.path.isdir(target) else []
    if others:
        raise SaveError(f"{target} holds other files ({others[0]}). Nothing was changed. Choose an empty folder.")


def _write_text(file: Path, text: str) -> None:
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
