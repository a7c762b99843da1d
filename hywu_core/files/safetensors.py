"""Reading and writing safetensors files so that nothing is half-written and every failure has a name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import HywuError, SaveError

PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; what was written there replaces `path` at once, or is removed on failure.

    Raises:
        SaveError: if the folder cannot be written to or the disk is full. What stood at `path` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = (
            temporary.stat().st_mode
        )  # what the user's umask gives; the writer may leave a file only its owner can read
        yield temporary
        temporary.chmod(mode)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise SaveError(
            f"Cannot write {path}: {error}. Nothing was changed. Choose a folder that can be written to and has room."
        ) from error
    finally:
        if os.path.exists(temporary):  # not Path.exists: that raises where the folder may not even be looked into
            temporary.unlink()


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file atomically. Tensors are stored contiguous, each on its own."""
    with atomic_write(path) as temporary:
        own = {name: tensor.detach().to("cpu").clone().contiguous() for name, tensor in tensors.items()}
        save_file(own, str(temporary), metadata=dict(metadata or {}))


@contextmanager
def open_safetensors(path: Path, error: type[HywuError]) -> Iterator[safe_open]:
    """Open a safetensors file for reading, memory-mapped.

    Raises:
        error: of the caller's kind, if the file is missing, is a pickle, or is damaged.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise error(
            f"{path} is a pickle file, which could run any code when opened, so it is refused. "
            "Convert it to .safetensors where it came from."
        )
    if not path.is_file():
        raise error(f"{path} does not exist.")
    try:
        handle = safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as reason:
        raise error(
            f"{path} is not a readable safetensors file ({reason}). It is probably truncated: "
            f"it has {path.stat().st_size:,} bytes. Download it again."
        ) from reason
    with handle:
        yield handle
