"""Generator files in and out: safetensors, sharded or not, checked by name and by shape before anything is loaded.

Three forms are read:
    a folder    config.json + model.safetensors
    a folder    config.json + model.safetensors.index.json + its shards (the released form)
    one file    *.safetensors with the configuration in its metadata, or with a config.json beside it
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import GeneratorConfig
from ..errors import CheckpointError, SaveError
from ..generator import Generator
from .atomic import atomic_write
from .names import check_path
from .quantised import MARK, SCALE, check_mark, kind_of, plain, quantised, quantised_layers
from .safetensors import open_safetensors, write_safetensors
from .shards import DTYPES, INDEX_FILE, WEIGHTS_FILE, Header, folder_shards, indexed, main_dtype, read_headers, some
from .text import read_text

CONFIG_FILE = "config.json"
CONFIG_KEY = "hywu_config"  # of a single file's metadata
# of the weights of a folder: their configuration, and the hash of the config.json that stood there while they were written
OWN_CONFIG_KEY, REPLACED_KEY = "hywu_folder_config", "hywu_replaced_config"
SAMPLE = 4096  # bytes of a tensor's first rows that tell generators apart


class GeneratorFiles(NamedTuple):
    """A generator on disk whose headers were read and fit together."""

    path: Path
    config: GeneratorConfig
    shards: dict[Path, tuple[str, ...]]  # file -> the tensors to take from it
    dtype: torch.dtype  # of most of its weights that are not quantised
    quantised: str | None  # how the matrices of its blocks are stored; None: like the rest

    @property
    def fingerprint(self) -> str:
        """See `fingerprint`. Reads a sample of every tensor."""
        return fingerprint(self.config, dict(self.tensors()))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by name, memory-mapped: its bytes are read when they are used."""
        for shard, names in self.shards.items():
            with open_safetensors(shard, CheckpointError) as handle:
                for name in names:
                    yield name, handle.get_tensor(name)


def inspect_generator(path: str | Path) -> GeneratorFiles:
    """Read the configuration and all headers of a generator and check them against each other. Loads no weights.

    Raises:
        CheckpointError, ConfigError: naming the file, and every tensor that is missing, unexpected or mis-shaped.
    """
    path = Path(path)
    if os.path.isdir(path):
        config, shards = _folder_config(path)
    elif os.path.exists(path) or path.suffix:
        config, shards = _file_config(path), [path]
    else:
        raise CheckpointError(f"{path} does not exist. Expected a generator's folder or .safetensors file.")
    found = read_headers(shards)
    layers = _check_tensors(path, config, found)
    _check_marks(layers, found)
    by_shard = {shard: tuple(name for name, header in found.items() if header.shard == shard) for shard in shards}
    rest = {name: header for name, header in found.items() if name.removesuffix(".weight") not in layers}
    kind = next(iter(layers.values()), None)
    return GeneratorFiles(path, config, by_shard, main_dtype(rest), kind)


def load_generator(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> Generator:
    """Load a generator from a folder, a sharded folder, or a single file.

    Args:
        path: see the top of this file.
        device, dtype: of its parameters; dtype None keeps what is stored, what is quantised as float32.
    Raises:
        CheckpointError, ConfigError: see `inspect_generator`.
    """
    files = inspect_generator(path)
    generator = Generator(files.config, device="meta")
    state = plain(dict(files.tensors()), dtype)
    generator.load_state_dict({name: tensor.to(device) for name, tensor in state.items()}, assign=True)
    return generator


def save_generator(generator: Generator, path: str | Path, dtype: torch.dtype | str | None = None) -> Path:
    """Write a generator: one file if `path` ends in .safetensors, else a folder in the released form.

    What stood there is replaced at one moment. A folder is read as before until then and as the new generator from then on,
    whenever the process is killed; shards that an index named before are removed.

    Args:
        dtype: to store; None keeps the parameters' own; one of `quantised.STORED` quantises the matrices of the blocks.
    Returns:
        the path that `load_generator` reads.
    Raises:
        SaveError: if it cannot be written; nothing is left half-written.
    """
    path, config = Path(path), generator.config.to_json()
    state, cast = _stored(generator.state_dict(), dtype), None if isinstance(dtype, str) else dtype
    if path.suffix == ".safetensors":
        write_safetensors(path, state, {"format": "pt", CONFIG_KEY: config}, cast)
        return path
    check_path(Path(os.path.abspath(path)))
    weights, own = path / WEIGHTS_FILE, {OWN_CONFIG_KEY: config, REPLACED_KEY: _hash_of(path / CONFIG_FILE)}
    replaced = _indexed_before(path)
    with atomic_write(path / CONFIG_FILE) as temporary:
        temporary.write_text(config, encoding="utf-8")
        write_safetensors(weights, state, {"format": "pt", **own}, cast)
        if replaced:
            _remove(path / INDEX_FILE)
    for name in set(replaced) - {WEIGHTS_FILE}:
        with suppress(OSError):  # nothing reads it any more; on Windows it stays as long as it is mapped
            (path / name).unlink()
    return path


def _stored(state: dict[str, Tensor], dtype: torch.dtype | str | None) -> dict[str, Tensor]:
    """The tensors of a generator, quantised or not, as a file is to hold them; what is plain is cast while it is written."""
    if isinstance(dtype, str):
        return state if dtype == kind_of(state) else dict(quantised(plain(state), dtype))
    return state if dtype is None or kind_of(state) is None else plain(state, dtype)


def fingerprint(config: GeneratorConfig, state: Mapping[str, Tensor]) -> str:
    """Tells generators apart: the configuration, and every tensor's name, shape, type and first rows. A whole hash of 16 GB
    would take a minute at every start.
    """
    digest = hashlib.sha256(config.to_json().encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        first = tensor.detach().reshape(-1)[: max(1, SAMPLE // tensor.element_size())].to("cpu")
        digest.update(first.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _folder_config(folder: Path) -> tuple[GeneratorConfig, list[Path]]:
    """The configuration and the files of a folder. Weights that were saved here name the config.json that they replace: as
    long as that one still stands there, the save was cut short after the weights, and their own configuration counts.
    """
    file = folder / CONFIG_FILE
    if not os.path.isfile(file) and not os.path.isfile(folder / WEIGHTS_FILE):
        raise CheckpointError(
            f"{folder} has no {CONFIG_FILE}, so it is not a generator's folder. "
            "Put the checkpoint's config.json and its .safetensors files there."
        )
    shards = folder_shards(folder)
    with open_safetensors(shards[0], CheckpointError) as handle:
        written = handle.metadata() or {}
    if len(shards) == 1 and written.get(REPLACED_KEY) == _hash_of(file) and OWN_CONFIG_KEY in written:
        return GeneratorConfig.from_json(written[OWN_CONFIG_KEY], f"{shards[0]} (metadata)"), shards
    if not os.path.isfile(file):
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}. Put the one that belongs to its weights there.")
    return GeneratorConfig.from_json(read_text(file, CheckpointError), str(file)), shards


def _check_marks(layers: Mapping[str, str], found: Mapping[str, Header]) -> None:
    """What a file says of its quantised layers is text that whoever loads it parses."""
    for shard in {found[layer + MARK].shard for layer in layers}:
        with open_safetensors(shard, CheckpointError) as handle:
            for layer, kind in layers.items():
                if found[layer + MARK].shard == shard:
                    check_mark(handle.get_tensor(layer + MARK), kind, f"{shard}, {layer + MARK}")


def _hash_of(file: Path) -> str:
    """Of a file's content; of a file that is not there, nothing."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest() if os.path.isfile(file) else ""
    except OSError:
        return "unreadable"


def _indexed_before(folder: Path) -> list[str]:
    index = folder / INDEX_FILE
    try:
        return indexed(index) if os.path.isfile(index) else []
    except CheckpointError:
        return [INDEX_FILE]  # a damaged index must go as well


def _remove(file: Path) -> None:
    try:
        file.unlink()
    except OSError as error:
        raise SaveError(
            f"Cannot remove {file} ({error}), which says that the folder's weights are other files. The folder is read as "
            "before; close what holds that file, and save again."
        ) from error


def _file_config(file: Path) -> GeneratorConfig:
    with open_safetensors(file, CheckpointError) as handle:
        text = (handle.metadata() or {}).get(CONFIG_KEY)
    if text is not None:
        return GeneratorConfig.from_json(text, f"{file} (metadata)")
    if file.name == WEIGHTS_FILE and not os.path.isfile(file.parent / INDEX_FILE):
        return _folder_config(file.parent)[0]
    beside = file.parent / CONFIG_FILE
    if os.path.isfile(beside):
        return GeneratorConfig.from_json(read_text(beside, CheckpointError), str(beside))
    raise CheckpointError(
        f"{file} has no generator configuration: neither {CONFIG_KEY!r} in its metadata nor a {CONFIG_FILE} beside it."
    )


def _check_tensors(path: Path, config: GeneratorConfig, found: dict[str, Header]) -> dict[str, str]:
    """What of it is quantised, by layer."""
    layers, problems = quantised_layers(found)
    beside = {layer + suffix for layer in layers for suffix in (SCALE, MARK)}
    expected = {name: tuple(tensor.shape) for name, tensor in Generator(config, device="meta").state_dict().items()}
    problems += [f"missing {name} {list(expected[name])}" for name in expected if name not in found]
    problems += [
        f"unexpected {name} {list(header.shape)}"
        for name, header in found.items()
        if name not in expected.keys() | beside
    ]
    for name, header in found.items():
        if name in expected and header.shape != expected[name]:
            problems.append(f"{name} has the shape {list(header.shape)}, expected {list(expected[name])}")
        elif name in expected and header.dtype not in DTYPES and name.removesuffix(".weight") not in layers:
            problems.append(f"{name} is stored as {header.dtype}, expected a floating-point type")
    if problems:
        raise CheckpointError(
            f"{path} does not hold the weights that its configuration describes: {some(problems, '; ')}. "
            "Download it again, or use the config.json that belongs to it."
        )
    return layers
