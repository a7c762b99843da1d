"""Reading and writing safetensors files so that nothing is half-written and every failure has a name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import HywuError, SaveError
from .atomic import atomic_write
from .text import what_it_is

PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
NAMES = {  # of the types that a file may hold
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
LARGEST_HEADER = 100_000_000  # bytes that the format allows


def _always() -> bool:
    return True


# Whether tensors may stay memory-mapped after their file is closed. A host whose user turned that off says so here.
keep_mapped: Callable[[], bool] = _always


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write one safetensors file atomically. Beside the tensors given, only one at a time is in memory as it is stored.

    Args:
        dtype: to store floating-point tensors in; None keeps their own.
    Raises:
        SaveError: if it cannot be written; what stood there stays.
    """
    stored = {name: _stored_dtype(name, tensor, dtype) for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (-stored[name].itemsize, name))  # aligned, largest numbers first
    header: dict[str, Any] = {"__metadata__": {key: _plain(text) for key, text in (metadata or {}).items()}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * stored[name].itemsize
        header[name] = {
            "dtype": NAMES[stored[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    if len(content) > LARGEST_HEADER:
        raise SaveError(
            f"Cannot write {path}: its names and metadata take {len(content):,} bytes. Nothing was changed."
        )
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(len(content).to_bytes(8, "little"))
        file.write(content)
        for name in order:
            _write_tensor(file, tensors[name], stored[name])


@contextmanager
def open_safetensors(path: Path, error: type[HywuError], remedy: str = "Download it again.") -> Iterator[Any]:
    """Open a safetensors file for reading, memory-mapped.

    Args:
        remedy: what to do about a damaged file.
    Returns:
        the library's handle: keys(), metadata(), get_slice(name), get_tensor(name).
    Raises:
        error: of the caller's kind, if the file is missing, is a pickle, or is damaged.
    """
    path = Path(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise error(
            f"{path} is a pickle file, which could run any code when opened, so it is refused. "
            "Convert it to .safetensors where it came from."
        )
    if not os.path.isfile(path):
        raise error(f"{path} does not exist.")
    try:
        handle = safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as reason:
        raise error(f"{path} is not a readable safetensors file: {_damage(path, reason, remedy)}") from reason
    with handle:
        try:
            yield handle if keep_mapped() else _Copies(handle)
        except SafetensorError as reason:
            raise error(f"{path} is not a readable safetensors file: {reason}. {remedy}") from reason


class _Copies:
    """A handle whose tensors have memory of their own, so that nothing holds the file after it is closed."""

    def __init__(self, handle: Any):
        self.keys, self.metadata, self.get_slice = handle.keys, handle.metadata, handle.get_slice
        self._mapped = handle.get_tensor

    def get_tensor(self, name: str) -> Tensor:
        return self._mapped(name).clone()


def _stored_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    found = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if tensor.is_meta or tensor.layout is not torch.strided or found not in NAMES:
        kind = "no numbers yet" if tensor.is_meta else f"numbers of the kind {found} ({tensor.layout})"
        raise SaveError(f"{name} holds {kind}, which a safetensors file cannot hold. Nothing was changed.")
    return found


def _write_tensor(file: BinaryIO, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.numel():
        stored = tensor.detach().to("cpu", dtype).contiguous()
        file.write(memoryview(stored.reshape(-1).view(torch.uint8).numpy()))


def _plain(text: str) -> str:
    """Halves of characters, as browsers can send them, exist in no file format."""
    return text.encode("utf-8", "replace").decode()


def _damage(path: Path, reason: Exception, remedy: str) -> str:
    """What a file that cannot be opened is, as far as it can be told, and what to do."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(512)
            if found := what_it_is(start, size):
                return f"it {found}"
            if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
                return (
                    "it is a pickle or a zip archive (.pt, .bin, .ckpt) under another name, which could run any code when "
                    "opened, so it is refused. Convert it to .safetensors where it came from."
                )
            if start.startswith(b"GGUF"):
                return "it is a GGUF file under another name. Download the .safetensors file."
            expected = _expected_size(start, file)
    except OSError:
        return f"{reason}. {remedy}"
    if expected is not None and size < expected:
        return (
            f"it is probably truncated: it has {size:,} of {expected:,} bytes, as after a download or a copy that was not "
            f"finished. {remedy}"
        )
    if expected is not None and size > expected:
        return f"it has {size:,} bytes where its header describes {expected:,}, so it is damaged. {remedy}"
    return f"{reason}. It is damaged or probably truncated: it has {size:,} bytes. {remedy}"


def _expected_size(start: bytes, file: BinaryIO) -> int | None:
    """Bytes that the header says the file has; None if that cannot be read."""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > LARGEST_HEADER:
        return None
    file.seek(8)
    try:
        header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return None
