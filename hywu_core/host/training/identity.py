"""What a run is about, and whether a folder's run is about the same: digests of what is in memory, not of names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import comfy.model_patcher
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...errors import SaveError
from ...files.atomic import atomic_write
from ...files.text import read_json
from ...training import SessionOptions, TrainingError
from ...training.log import LOG, STATE, VALIDATION
from ...training.options import REFUSE, RESTART
from ..lora.apply import applied_loras

FILE = "run.json"  # in a run's folder, beside its state and logs
BEGUN = "begun"  # an entry of it
SAMPLED = 64  # numbers of every weight that count: each may be a page of a file that is read for it


def claim(folder: Path, now: Mapping[str, Any], options: SessionOptions) -> bool:
    """Take a folder for a run, and say whether the run that it holds goes on.

    Args:
        now: what the run is about: digests and settings, as JSON holds them.
    Raises:
        TrainingError: if it holds another run, one that must not be touched, or one that does not say what it is about.
        SaveError: if the folder cannot be written to.
    """
    goes_on = (folder / STATE).exists() and options.if_exists != RESTART
    if goes_on and options.if_exists == REFUSE:
        raise TrainingError(
            f"{folder} holds a run already, and if_exists is {REFUSE!r}. Choose another way, or a new run name or folder."
        )
    if goes_on:
        _check_same(folder, now)
    else:
        for file in (*(folder / name for name in (STATE, LOG, VALIDATION)), *folder.glob("step-*.png")):
            _remove(file)
    kept = {BEGUN: begun(folder) if goes_on else date.today().isoformat()}
    with atomic_write(folder / FILE) as temporary:
        temporary.write_text(json.dumps({**now, **kept}, indent=1), encoding="utf-8")
    return goes_on


def begun(folder: Path) -> str:
    """The day on which the run of a folder was begun, as its file says; "" if that does not say."""
    day = json.loads((folder / FILE).read_text(encoding="utf-8")).get(BEGUN, "")
    return day if isinstance(day, str) and len(day) <= len("2000-01-01") else ""


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise SaveError(f"{file} of the run before cannot be removed ({error}). Close what has it open.") from error


def digest(values: Iterable[Any]) -> str:
    """Of tensors and plain values, and of lists, tuples and dicts of them, in their order."""
    found = hashlib.sha256()
    for value in values:
        _add(found, value)
    return found.hexdigest()[:16]


def digest_of_base(model: comfy.model_patcher.ModelPatcher) -> str:
    """Of a MODEL: its class, a sample of every weight, and what is patched into it or stands beside it."""
    found = hashlib.sha256(type(model.model).__name__.encode())
    for name, tensor in sorted(model.model.state_dict().items()):
        kept = model.backup.get(name)  # a loaded MODEL holds patched weights; these are what they were
        _add(found, name)
        _add(found, _sample(tensor if kept is None else kept.weight))
    for name, patches in sorted(model.patches.items(), key=lambda item: str(item[0])):
        _add(found, str(name))
        for strength, value, strength_model, offset, _ in patches:
            _add(found, [strength, strength_model, offset, _of_adapter(value)])
    for lora in applied_loras(model):
        curve = lora.schedule.curve
        _add(found, [lora.strength, lora.schedule.start, lora.schedule.end])
        if curve is not None:
            _add(found, [type(curve).__name__, [list(point) for point in curve.points]])
        for adapter in lora.bank.adapters:
            parts = [_sample(factor.weight) for factor in (adapter.down, adapter.up)]
            _add(found, [adapter.path, adapter.scale, adapter.start, adapter.length, parts])
    return found.hexdigest()[:16]


def _check_same(folder: Path, now: Mapping[str, Any]) -> None:
    ways = (
        "Go on with what it was started with, choose restart as if_exists to begin it anew (its state is deleted then), or "
        "use a new run name or folder."
    )
    try:
        before = read_json(folder / FILE, TrainingError, remedy="")
    except TrainingError as error:
        raise TrainingError(
            f"{folder} holds a run's state, but {FILE} beside it does not say of which ({error}). {ways}"
        ) from None
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        said = ", ".join(f"{name} ({before.get(name, 'not written down')}, now {now[name]})" for name in changed)
        raise TrainingError(f"The run in {folder} was started with other {said}. {ways}")


def _of_adapter(value: Any) -> Any:
    """A patch's numbers: those of the host's adapters, or the tensors themselves."""
    weights = getattr(value, "weights", value)
    if isinstance(weights, (tuple, list)):
        return [_of_adapter(part) for part in weights]
    return _sample(weights) if isinstance(weights, Tensor) else weights


def _sample(tensor: Tensor) -> Any:
    """A weight's shape and some of its numbers, spread over all of it; the whole is not moved."""
    stored = tensor._qdata if isinstance(tensor, QuantizedTensor) else tensor
    if stored.is_meta:
        return list(stored.shape)
    flat = stored.detach().reshape(-1)
    return [list(stored.shape), flat[:: max(1, flat.numel() // SAMPLED)].cpu()]


def _add(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        found.update(f"{tuple(value.shape)} {value.dtype}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    elif isinstance(value, Mapping):
        for name in sorted(value, key=str):
            _add(found, str(name))
            _add(found, value[name])
    elif isinstance(value, (list, tuple)):
        found.update(f"[{len(value)}".encode())
        for part in value:
            _add(found, part)
    else:
        plain = isinstance(value, (str, bytes, bool, int, float, type(None)))
        found.update(f"{type(value).__name__} {value if plain else ''!r};".encode())
