"""Generated LoRAs kept on the disk, so that an edit that was generated once is only read again. Bounded in size; several
processes may share one folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LoraError, SaveError
from ..lora import InstanceLora, LoraFactor
from .safetensors import open_safetensors, write_safetensors

SUFFIX = ".lora.safetensors"
ABANDONED = 86400.0  # seconds after which a file that was being written is nobody's
VERSION = "1"  # of what is written; a change makes old entries unknown


def key_of(tokens: Tensor, *settings: object) -> str:
    """A name for what is generated: the assembled condition, bit for bit, and everything else that decides the result."""
    digest = hashlib.sha256(f"{VERSION} {tokens.dtype} {tuple(tokens.shape)} {settings}".encode())
    digest.update(tokens.detach().contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()[:40]


class LoraCache:
    """A folder of generated LoRAs, the least recently used ones leaving first.

    Args:
        limit: bytes that all entries may take. One that is larger by itself is not kept.
    """

    def __init__(self, folder: str | Path, limit: int):
        self.folder, self.limit = Path(folder), limit

    def get(self, key: str, make: Callable[[], InstanceLora]) -> InstanceLora:
        """The LoRA of a key, read or made. What cannot be read is made, what cannot be written is not kept."""
        return self.get_all([key], lambda missing: [make()])[0]

    def get_all(self, keys: Sequence[str], make: Callable[[list[int]], Sequence[InstanceLora]]) -> list[InstanceLora]:
        """The LoRAs of several keys. What is not there is made at once: `make` is given the places of those keys."""
        found = [self._read(key) for key in keys]
        missing = [place for place, lora in enumerate(found) if lora is None]
        made = make(missing) if missing else ()
        for place, lora in zip(missing, made, strict=True):
            found[place] = lora
            self._keep(keys[place], lora)
        return found

    def _keep(self, key: str, lora: InstanceLora) -> None:
        if lora.elements * lora.pairs[0].down.element_size() <= self.limit:
            with suppress(SaveError):
                self._write(key, lora)
                self._evict(key)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _read(self, key: str) -> InstanceLora | None:
        path = self._path(key)
        try:
            with open_safetensors(path, LoraError) as handle:
                told = json.loads((handle.metadata() or {})["hywu_lora"])
                # in memory of its own: another process may remove the file at any time
                pairs = {
                    name: LoraFactor(*(handle.get_tensor(f"{number}.{part}").clone() for part in ("down", "up")))
                    for number, name in enumerate(told["names"])
                }
            lora = InstanceLora(pairs, told["scale"], told["metadata"])
        except (LoraError, OSError, ValueError, KeyError, TypeError, RuntimeError):
            return None
        with suppress(OSError):
            os.utime(path)
        return lora

    def _write(self, key: str, lora: InstanceLora) -> None:
        tensors = {}
        for number, pair in enumerate(lora.pairs):
            tensors |= {f"{number}.down": pair.down, f"{number}.up": pair.up}
        told = {"names": lora.names, "scale": lora.scale, "metadata": dict(lora.metadata)}
        write_safetensors(self._path(key), tensors, {"format": "pt", "hywu_lora": json.dumps(told)})

    def _evict(self, newest: str) -> None:
        """Remove the least recently used entries until the rest fits; others may do the same at the same time."""
        entries = []
        for path in self.folder.glob(".*.tmp"):
            with suppress(OSError):
                # of a process that was killed: nobody writes for so long
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(OSError):
                about = path.stat()
                entries.append((path.name == self._path(newest).name, about.st_mtime, about.st_size, path))
        total = sum(size for *_, size, _ in entries)
        for _, _, size, path in sorted(entries):
            if total <= self.limit:
                return
            with suppress(OSError):
                path.unlink()
            total -= size
