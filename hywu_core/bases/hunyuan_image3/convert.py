"""Converting the official folder of a HunyuanImage-3 into one with its large weights quantised, which the loader reads.

A file for each decoder layer and for each other part; every file is checked and skipped when the same conversion runs
again, so it goes on where it stopped. In memory is one quantised layer at most, and one expert's matrix in floating point;
the source is memory-mapped.

What marks a conversion: conversion.json is there first, model.safetensors.index.json last, checksums.sha256 grows by a line
for every finished file (`sha256sum -c` reads it).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...errors import CheckpointError, SaveError
from ...files.atomic import atomic_write
from ...files.shards import DTYPES, INDEX_FILE, some
from ...files.text import read_json
from . import quantised
from .config import CONFIG_FILE, GENERATION_FILE
from .files import CONVERSION_FILE, PROMPT_FILE, PROMPT_TEXT_FILE, BaseFiles, Shards, decoder_shapes, inspect_base
from .quantised import MARK
from .tokenizer import TOKENIZER_FILE

TOOL = "HY-WU convert_hunyuan_image3, version 1"  # files of different versions are not mixed
SUMS_FILE = "checksums.sha256"
COPIED = (CONFIG_FILE, GENERATION_FILE, TOKENIZER_FILE, "tokenizer_config.json", PROMPT_FILE, PROMPT_TEXT_FILE)
LAYERS = "model.layers."
METADATA_KEY = "hywu_conversion"  # the only key: the order of several in a file's header would be left to chance
SAMPLE = 64  # numbers of a tensor that tell sources apart
_LEFT_OVER = re.compile(r"^\..+\.\d+\.tmp$")  # of a run that was killed while it wrote

Say = Callable[[str], None]


class _Job(NamedTuple):
    files: BaseFiles
    target: Path
    kind: str
    device: torch.device
    shapes: dict[str, tuple[int, ...]]  # of the decoder's weights, experts in banks

    def plan(self) -> dict[str, list[str]]:
        """{file to write: names of the weights in it, experts in banks}."""
        digits = len(str(self.files.config.num_hidden_layers - 1))
        plan: dict[str, list[str]] = {}
        for name in self.shapes:
            if name.startswith(LAYERS):
                layer = int(name.removeprefix(LAYERS).partition(".")[0])
                plan.setdefault(f"layer-{layer:0{digits}}.safetensors", []).append(name)
        for name in self.files.headers:
            if not name.startswith(LAYERS):  # none of the parts is as large as a layer
                plan.setdefault(f"{name.partition('.')[0]}.safetensors", []).append(name)
        return plan

    def sizes(self, names: list[str]) -> dict[str, int]:
        """{tensor: bytes} of what these weights become."""
        sizes = {}
        for name in names:
            if not quantised.can_be_quantised(name):
                header = self.files.headers[name]
                sizes[name] = torch.Size(header.shape).numel() * DTYPES[header.dtype].itemsize
                continue
            module, shape = name.removesuffix("weight"), self.shapes[name]
            sizes |= {module + own: kept.size for own, kept in quantised.stored(self.kind, shape).items()}
            sizes[module + MARK] = quantised.mark(self.kind, shape).numel()
        return sizes

    def tensors(self, names: list[str]) -> dict[str, Tensor]:
        """What these weights become; those that stay as they are, memory-mapped."""
        made = {}
        with Shards() as shards:
            for name in names:
                if not quantised.can_be_quantised(name):
                    made[name] = shards.tensor(name, self.files.headers[name])
                    continue
                matrices, module = self.files.matrices(name, shards), name.removesuffix("weight")
                found = quantised.quantise(self.kind, name, matrices, self.shapes[name], self.device)
                made |= {module + own: tensor for own, tensor in found.items()}
        return made

    def record(self) -> dict[str, str]:
        """What this is made from, and how."""
        return {"source": self.files.folder.resolve().name, "format": self.kind, "tool": TOOL}


def convert(source: str | Path, target: str | Path, kind: str, device: torch.device, say: Say = print) -> Path:
    """Convert an official folder, or do the rest of it.

    Args:
        kind: a name of quantised.FORMATS.
        device: where weights are quantised.
        say: is told the progress, line by line.
    Returns:
        the target.
    Raises:
        CheckpointError: if the source is no unquantised HunyuanImage-3.
        SaveError: if the target holds something else or cannot be written, or the disk is too small.
    """
    files, target = inspect_base(source), Path(target)
    if files.quantised:
        raise CheckpointError(
            f"{files.folder} is quantised already ({', '.join(sorted(set(files.kinds.values())))}), and would lose by being "
            "quantised again. Convert from the official folder of HunyuanImage-3.0-Instruct."
        )
    job = _Job(files, target, kind, device, decoder_shapes(files.config))
    _claim(job)
    plan, sums = job.plan(), read_sums(target)
    finished = _finished(target, list(plan), sums, say)
    _check_room(job, [name for file, names in plan.items() if file not in finished for name in names])
    for number, (file, names) in enumerate(plan.items(), start=1):
        if file not in finished:
            start = time.monotonic()
            _write_shard(job, file, job.tensors(names), sums)
            size, seconds = (target / file).stat().st_size, time.monotonic() - start
            say(f"[{number}/{len(plan)}] {file}: {size / 1e9:.3f} GB in {seconds:.1f} s")
    for name in COPIED:
        if (files.folder / name).is_file():
            _write_bytes(target, name, (files.folder / name).read_bytes(), sums)
    _write_bytes(target, INDEX_FILE, _index(job, plan), sums)
    inspect_base(target)
    say(f"{target} is complete: {len(plan)} files of weights")
    return target


def verify(target: str | Path, say: Say = print) -> None:
    """Read every file of a converted folder and compare it with the checksum from when it was written.

    Raises:
        CheckpointError: naming the files that are damaged or missing, or if this is no finished conversion.
    """
    folder, sums = Path(target), read_sums(Path(target))
    damaged = []
    for name, expected in sums.items():  # before anything is understood: damage may lie where that would stumble
        intact = _intact(folder / name, expected)
        say(f"{name}: {'intact' if intact else 'DAMAGED'}")
        damaged += [] if intact else [name]
    if damaged:
        raise CheckpointError(
            f"{folder}: {some(damaged)} differ from what the conversion wrote. Run the conversion into this folder again: it "
            "makes only these files anew."
        )
    written = {header.shard.name for header in inspect_base(folder).headers.values()} | {CONFIG_FILE, INDEX_FILE}
    if unlisted := sorted(written - set(sums)):
        raise CheckpointError(
            f"{SUMS_FILE} of {folder} lists no checksum of {some(unlisted)}, so this is not a folder that "
            "scripts/convert_hunyuan_image3.py has finished. Convert the official folder."
        )


def read_sums(target: Path) -> dict[str, str]:
    """{file: sha256} of the finished files of a conversion.

    Raises:
        CheckpointError: if the list is damaged.
    """
    path = target / SUMS_FILE
    if not path.is_file():
        return {}
    lines = [line.split("  ", 1) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    if any(len(line) != 2 or not re.fullmatch("[0-9a-f]{64}", line[0]) for line in lines):
        raise CheckpointError(
            f"{path} is not a list of checksums. Delete it and run the conversion again: it makes every file anew."
        )
    return {name: found for found, name in lines}


def _claim(job: _Job) -> None:
    """Make the target this conversion's, or see that it is already."""
    target, path = job.target, job.target / CONVERSION_FILE
    record = job.record() | {"source_sample": _sample(job.files)}
    if path.is_file():
        try:
            before = read_json(path, CheckpointError)
        except CheckpointError:
            before = {}
        changed = [key for key in record if before.get(key) != record[key]]
        if changed:
            raise SaveError(
                f"{target} holds another conversion: its {path.name} differs in {', '.join(changed)}. Choose an empty "
                "folder, or start the conversion that was begun there."
            )
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SaveError(f"{target} holds something else already. Choose an empty folder, or one that does not exist.")
    else:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for file in target.iterdir():
        if _LEFT_OVER.match(file.name):
            file.unlink()


def _sample(files: BaseFiles) -> str:
    """Tells sources apart: every tensor's name, shape and type, and the first numbers of those that are no expert's."""
    digest = hashlib.sha256()
    with Shards() as shards:
        for name, header in sorted(files.headers.items()):
            digest.update(f"{name} {header.shape} {header.dtype}\n".encode())
            if ".experts." not in name:
                numbers = shards.tensor(name, header).flatten()[:SAMPLE]
                digest.update(numbers.clone().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _finished(target: Path, names: list[str], sums: dict[str, str], say: Say) -> set[str]:
    """Files that need not be written again."""
    finished = set()
    for name in names:
        if name in sums and (target / name).is_file():
            intact = _intact(target / name, sums[name])
            say(f"{name}: {'there and intact' if intact else 'damaged, is converted again'}")
            finished |= {name} if intact else set()
    return finished


def _check_room(job: _Job, names: list[str]) -> None:
    needed, free = sum(job.sizes(names).values()), shutil.disk_usage(job.target).free
    if needed > free:
        raise SaveError(
            f"{job.target} needs {needed / 1e9:.1f} GB more, but its disk has {free / 1e9:.1f} GB free. Nothing was written. "
            "Make room, or choose a folder on another disk."
        )


def _write_shard(job: _Job, name: str, tensors: dict[str, Tensor], sums: dict[str, str]) -> None:
    with atomic_write(job.target / name) as temporary:
        save_file(tensors, str(temporary), metadata={METADATA_KEY: json.dumps(job.record())})
        found = _sha256(temporary)
    _note(job.target, name, found, sums)


def _write_bytes(target: Path, name: str, content: bytes, sums: dict[str, str]) -> None:
    """The checksum first: the index, which says that all is there, must be the last that is written."""
    _note(target, name, hashlib.sha256(content).hexdigest(), sums)
    with atomic_write(target / name) as temporary:
        temporary.write_bytes(content)


def _note(target: Path, name: str, found: str, sums: dict[str, str]) -> None:
    sums[name] = found
    with atomic_write(target / SUMS_FILE) as temporary:
        temporary.write_text("".join(f"{sums[known]}  {known}\n" for known in sorted(sums)), encoding="utf-8")


def _index(job: _Job, plan: dict[str, list[str]]) -> bytes:
    sizes = {file: job.sizes(names) for file, names in plan.items()}
    weights = {name: file for file, tensors in sizes.items() for name in tensors}
    total = sum(size for tensors in sizes.values() for size in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def _intact(path: Path, expected: str) -> bool:
    return path.is_file() and _sha256(path) == expected


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
