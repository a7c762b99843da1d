"""LoRA files as lessons: a folder of them with their instructions, brought onto the weights that a generator writes.

An instruction stands in a list of the folder (loras.jsonl or loras.csv with the columns file and instruction; a file may
stand there several times, in other words), in a text file beside the LoRA, or in its metadata under "instruction".
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...config import GeneratorConfig
from ...errors import HywuError, LoraError
from ...files.lora_files import own_metadata, read_file
from ...files.safetensors import open_safetensors
from ...files.text import read_text
from ...layout import Target, all_targets, place
from ...lora import InstanceLora, LoraFactor, finite, norms
from ...training import Sample, TrainConfig
from ...training.weight_space import Lesson
from ..lora import foreign
from ..lora.matching import Match, match
from .identity import digest
from .lessons import LORAS, Asked, HostLesson, LessonError

LISTS = ("loras.jsonl", "loras.csv")
SUFFIX, WORDS = ".safetensors", (".txt", ".caption")
EXAMPLE = '{"file": "warm.safetensors", "instruction": "make it warmer"}'
LONGEST = 2000  # characters of an instruction
SHOWN = 10  # problems that one error names


class Collected(NamedTuple):
    """A LoRA file, on the weights that a generator writes for."""

    path: Path
    instructions: tuple[str, ...]
    lora: InstanceLora  # one instance


class Collection:
    """LoRAs by the names of their files; see `hywu_core.training.weight_space.Teacher`. All are held in memory."""

    def __init__(self, loras: Sequence[Collected]):
        self.loras = {collected.path.name: collected.lora for collected in loras}

    def lora(self, samples: Sequence[Sample]) -> InstanceLora:
        """One instance for each sample, whose key names the file."""
        return stacked([self.loras[sample.key] for sample in samples])


def collect(folder: Path, base: Any, config: GeneratorConfig) -> list[Collected]:
    """All LoRAs of a folder, with their instructions.

    Args:
        base: the host's BaseModel, whose names the files' targets get.
    Raises:
        LessonError: naming every file that cannot be used, and why; or if there are none.
    """
    found, problems = [], []
    for path, texts in _named(folder).items():
        try:
            found.append(Collected(path, texts, aligned(foreign.read(*read_file(path)), base, config, path.name)))
        except HywuError as error:
            text = str(error)
            problems.append(text if path.name in text else f"{path.name}: {text}")
    if problems:
        more = f"\n... and {len(problems) - SHOWN} more." if len(problems) > SHOWN else ""
        raise LessonError(
            f"{len(problems)} of {len(found) + len(problems)} LoRAs in {folder} cannot be learned from:\n"
            + "\n".join(problems[:SHOWN])
            + more
        )
    return found


def learning(loras: Sequence[Collected], asked: Asked, config: TrainConfig) -> HostLesson:
    """The lesson to write what the files hold, for their instructions on any pictures. The keys of what is asked name the
    files.
    """
    lesson = Lesson(LORAS, asked, Collection(loras), config.loras, config.loras_batch, config.loras_schedule)
    files = digest([[c.path.name, c.lora.scale, *c.lora.pairs] for c in loras])
    return HostLesson(lesson, (), {"loras_learned": files, "loras_instructions": asked.digest()})


def aligned(lora: InstanceLora, base: Any, config: GeneratorConfig, name: str) -> InstanceLora:
    """A LoRA of any rank on exactly the weights that a generator writes for: rows of fused weights cut or joined, nothing
    where the LoRA leaves a weight alone. What it changes beside those cannot be learned; the log says how much that is.

    Raises:
        MatchError: if the base does not have what it changes.
        LoraError: if it changes nothing of what the generator writes for, or is not finite.
    """
    if lora.batch != 1:
        raise LoraError(f"{name} holds {lora.batch} instances; a file holds one.")
    if not all(finite(factor) for pair in lora.pairs for factor in pair):
        raise LoraError(f"{name} holds NaN or infinity.")
    found = match(lora, base)
    if found.patches:
        raise LoraError(
            f"{name} holds what is no pair of factors beside a layer, and cannot be written so: {found.kinds}."
        )
    by_module: dict[str, list[Match]] = {}
    for part in found.matched:
        by_module.setdefault(part.module, []).append(part)
    factors, used = {}, set()
    for full, target in all_targets(config):
        where = place(full, target.out_features, target.experts is not None)
        parts = [part for part in by_module.get(where.module, ()) if _rows(part, where.start, target.out_features)]
        factors[full] = _joined(parts, where.start, target)
        used |= {part.name for part in parts}
    result = InstanceLora(factors, lora.scale, lora.metadata)
    if not sum(float(value) for value in norms(result).values()):
        raise LoraError(
            f"{name} changes nothing of what this generator writes LoRAs for ({len(lora.names)} targets, such as "
            f"{lora.names[0]}). Make a generator with those targets (target_names), or use LoRAs of its own."
        )
    left = len({part.name for part in found.matched} - used) + len(found.missing)
    if left:
        logging.warning("HY-WU: %d of %d targets of %s are not written by this generator.", left, found.total, name)
    return result


def stacked(loras: Sequence[InstanceLora]) -> InstanceLora:
    """Single instances of the same targets as one batch of scale 1; smaller ranks are filled up with zeros."""
    factors = {}
    for name in loras[0].names:
        pairs = [(lora.factors[name], lora.scale) for lora in loras]
        rank = max(pair.rank for pair, _ in pairs)
        downs = [_widened(pair.down, rank, -2) for pair, _ in pairs]
        ups = [_widened(pair.up * scale, rank, -1) for pair, scale in pairs]
        factors[name] = LoraFactor(torch.cat(downs), torch.cat(ups))
    return InstanceLora(factors)


def _widened(factor: torch.Tensor, rank: int, axis: int) -> torch.Tensor:
    missing = rank - factor.shape[axis]
    shape = list(factor.shape)
    shape[axis] = missing
    return torch.cat((factor, factor.new_zeros(shape)), axis) if missing else factor


def _rows(part: Match, start: int, rows: int) -> tuple[int, int] | None:
    """The rows of a weight that a part of a LoRA and a target have in common."""
    first, last = max(part.start, start), min(part.start + part.pair.up.shape[-2], start + rows)
    return (first, last) if first < last else None


def _joined(parts: Sequence[Match], start: int, target: Target) -> LoraFactor:
    """Everything that changes a target's rows as one pair, in float32; of rank 1 and zero if there is nothing."""
    if not parts:
        shapes = target.down_shape(1), target.up_shape(1)
        return LoraFactor(*(torch.zeros(1, *shape) for shape in shapes))
    downs, ups = [], []
    for part in parts:
        first, last = _rows(part, start, target.out_features)
        given = part.pair.up.float()
        up = given.new_zeros(*given.shape[:-2], target.out_features, given.shape[-1])
        up[..., first - start : last - start, :] = given[..., first - part.start : last - part.start, :]
        downs.append(part.pair.down.float())
        ups.append(up)
    return LoraFactor(torch.cat(downs, -2), torch.cat(ups, -1))


def _named(folder: Path) -> dict[Path, tuple[str, ...]]:
    """{file: its instructions}."""
    if not folder.is_dir():
        raise LessonError(f"{folder} is not a folder. Put LoRA files there, each with its instruction.")
    files = {path.name: path for path in sorted(folder.glob(f"*{SUFFIX}")) if not path.name.startswith(".")}
    if not files:
        raise LessonError(f"There are no LoRA files (*{SUFFIX}) in {folder}.")
    lists = [folder / name for name in LISTS if (folder / name).is_file()]
    if len(lists) > 1:
        raise LessonError(f"{folder} holds {' and '.join(path.name for path in lists)}. Keep the one that is meant.")
    problems: list[str] = []
    listed = _listed(lists[0], files, problems) if lists else {}
    named = {}
    for name, path in files.items():
        texts = listed.get(name) or _beside(path)
        if any(len(text) > LONGEST for text in texts):
            problems.append(f"{name}: an instruction has more than {LONGEST} characters.")
        elif texts:
            named[path] = texts
        else:
            problems.append(f"{name}: it has no instruction.")
    if problems:
        raise LessonError(
            f"{len(problems)} problems in {folder}:\n"
            + "\n".join(problems[:SHOWN])
            + "\nWrite the instruction into a text file "
            f"of the LoRA's name beside it, or a line such as {EXAMPLE} into {LISTS[0]}."
        )
    return named


def _listed(file: Path, files: Mapping[str, Path], problems: list[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for values, where in _rows_of(file, problems):
        name, text = (values.get(column) if isinstance(values, dict) else None for column in ("file", "instruction"))
        if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
            problems.append(f"{where}: expected file and instruction, as in {EXAMPLE}.")
        elif name not in files and f"{name}{SUFFIX}" not in files:
            problems.append(f"{where}: there is no {name} beside it.")
        else:
            found.setdefault(name if name in files else f"{name}{SUFFIX}", []).append(text.strip())
    return {name: tuple(dict.fromkeys(texts)) for name, texts in found.items()}


def _rows_of(file: Path, problems: list[str]) -> Iterator[tuple[Any, str]]:
    text = _text(file)
    if file.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        try:
            for row in reader:
                yield row, f"{file.name}, line {reader.line_num}"
        except csv.Error as error:
            problems.append(f"{file.name}, line {reader.line_num}: {error}")
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line), f"{file.name}, line {number}"
            except (ValueError, RecursionError):
                problems.append(f"{file.name}, line {number}: not valid JSON.")


def _beside(path: Path) -> tuple[str, ...]:
    """What a text file beside a LoRA says, each line another wording; else what its metadata says."""
    for ending in WORDS:
        if path.with_suffix(ending).is_file():
            lines = (line.strip() for line in _text(path.with_suffix(ending)).splitlines())
            return tuple(dict.fromkeys(line for line in lines if line))
    with open_safetensors(path, LoraError) as handle:
        header = handle.metadata() or {}
    text = own_metadata(header).get("instruction") or header.get("instruction", "")
    return (text.strip(),) if isinstance(text, str) and text.strip() else ()


def _text(file: Path) -> str:
    return read_text(file, LessonError, "Save it as UTF-8.")
