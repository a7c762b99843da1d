"""Generator files in and out: safetensors, sharded or not, checked by name and by shape before anything is loaded.

Three forms are read:
    a folder    config.json + model.safetensors
    a folder    config.json + model.safetensors.index.json + its shards (the released form)
    one file    *.safetensors with the configuration in its metadata, or with a config.json beside it
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import GeneratorConfig
from ..errors import CheckpointError
from ..generator import Generator
from .quantised import MARK, SCALE, kind_of, plain, quantised, quantised_layers
from .safetensors import atomic_write, open_safetensors, write_safetensors
from .shards import DTYPES, WEIGHTS_FILE, Header, folder_shards, main_dtype, read_headers, some

CONFIG_FILE = "config.json"
CONFIG_KEY = "hywu_config"  # of a single file's metadata


class GeneratorFiles(NamedTuple):
    """A generator on disk whose headers were read and fit together."""

    path: Path
    config: GeneratorConfig
    shards: dict[Path, tuple[str, ...]]  # file -> the tensors to take from it
    dtype: torch.dtype  # of most of its weights that are not quantised
    quantised: str | None  # how the matrices of its blocks are stored; None: like the rest
    fingerprint: str  # of the configuration, every tensor's name and shape, and a sample of its bytes

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
    if path.is_dir():
        config, shards = _read_folder_config(path), folder_shards(path)
    elif path.exists() or path.suffix:
        config, shards = _file_config(path), [path]
    else:
        raise CheckpointError(f"{path} does not exist. Expected a generator's folder or .safetensors file.")
    found = read_headers(shards)
    layers = _check_tensors(path, config, found)
    by_shard = {shard: tuple(name for name, header in found.items() if header.shard == shard) for shard in shards}
    rest = {name: header for name, header in found.items() if name.removesuffix(".weight") not in layers}
    kind = next(iter(layers.values()), None)
    return GeneratorFiles(path, config, by_shard, main_dtype(rest), kind, _fingerprint(config, by_shard))


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
    """Write a generator atomically: one file if `path` ends in .safetensors, else a folder in the released form.

    Args:
        dtype: to store; None keeps the parameters' own; one of `quantised.STORED` quantises the matrices of the blocks.
    Returns:
        the path that `load_generator` reads.
    Raises:
        SaveError: if it cannot be written; nothing is left half-written.
    """
    path = Path(path)
    state = _stored(generator.state_dict(), dtype)
    if path.suffix == ".safetensors":
        write_safetensors(path, state, {"format": "pt", CONFIG_KEY: generator.config.to_json()})
        return path
    with atomic_write(path / CONFIG_FILE) as temporary:  # takes its place only once the weights are in theirs
        temporary.write_text(generator.config.to_json(), encoding="utf-8")
        write_safetensors(path / WEIGHTS_FILE, state, {"format": "pt"})
    return path


def _stored(state: dict[str, Tensor], dtype: torch.dtype | str | None) -> dict[str, Tensor]:
    """The tensors of a generator, quantised or not, as a file is to hold them."""
    if dtype is None or dtype == kind_of(state):
        return state
    return dict(quantised(plain(state), dtype)) if isinstance(dtype, str) else plain(state, dtype)


def _read_folder_config(folder: Path) -> GeneratorConfig:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {CONFIG_FILE}, so it is not a generator's folder. "
            "Put the checkpoint's config.json and its .safetensors files there."
        )
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors put a mark in front
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8 text ({error}). Download it again.") from None
    return GeneratorConfig.from_json(text, str(file))


def _file_config(file: Path) -> GeneratorConfig:
    with open_safetensors(file, CheckpointError) as handle:
        text = (handle.metadata() or {}).get(CONFIG_KEY)
    if text is not None:
        return GeneratorConfig.from_json(text, f"{file} (metadata)")
    if (file.parent / CONFIG_FILE).is_file():
        return _read_folder_config(file.parent)
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


def _fingerprint(config: GeneratorConfig, shards: dict[Path, tuple[str, ...]]) -> str:
    """A whole hash of 16 GB would take a minute at every start; a sample of every tensor tells generators apart."""
    digest = hashlib.sha256(config.to_json().encode())
    for shard, names in shards.items():
        with open_safetensors(shard, CheckpointError) as handle:
            for name in sorted(names):
                part = handle.get_slice(name)
                digest.update(f"{name} {part.get_shape()} {part.get_dtype()}".encode())
                first = part[:2] if part.get_shape() else handle.get_tensor(name)
                digest.update(first.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()[:4096])
    return digest.hexdigest()[:16]
