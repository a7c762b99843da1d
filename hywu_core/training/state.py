"""The state of a run in one safetensors file: parameters, AdamW moments, averages, and how far it got."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HywuError
from ..files.safetensors import open_safetensors, write_safetensors
from ..files.text import parse_json
from .options import TrainConfig

KEY = "hywu_run"
MOMENTS = ("exp_avg", "exp_avg_sq")


class StateError(HywuError):
    """A run's state cannot be read, or belongs to another run."""


def save_state(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
    averaged: Mapping[str, Tensor],
    done: int,
    config: TrainConfig,
) -> None:
    """Write everything that a run needs to go on.

    Raises:
        SaveError: if it cannot be written; what stood there stays.
    """
    tensors = {f"parameter.{name}": parameter.detach() for name, parameter in parameters.items()}
    tensors |= {f"average.{name}": average for name, average in averaged.items()}
    for name, parameter in parameters.items():
        tensors |= {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in MOMENTS if optimizer.state}
    write_safetensors(path, tensors, {KEY: json.dumps({"done": done, "config": asdict(config)})})


def load_state(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
    averaged: Mapping[str, Tensor],
    config: TrainConfig,
) -> int:
    """Read a run's state into what was built for it.

    Returns:
        the optimizer steps done so far.
    Raises:
        StateError: if the file is damaged, of other parameters, or of other hyper-parameters.
    """
    remedy = "Use a new run name, or delete the file to begin again."
    with open_safetensors(path, StateError, remedy) as handle:
        text = (handle.metadata() or {}).get(KEY)
        if text is None:
            raise StateError(f"{path} is not the state of a training run. {remedy}")
        stored = parse_json(text, f"{path} ({KEY})", StateError, remedy)
        _check_config(path, stored.get("config"), config)
        done = _steps_done(path, stored, remedy)
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}
    _check_tensors(path, tensors, parameters, averaged)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            if f"{MOMENTS[0]}.{name}" in tensors:
                # copies: what stays memory-mapped cannot be replaced on Windows, and the next save replaces this file
                moments = {moment: tensors[f"{moment}.{name}"].to(parameter.device, copy=True) for moment in MOMENTS}
                optimizer.state[parameter] = moments | {"step": torch.tensor(float(done))}
        for name, average in averaged.items():
            average.copy_(tensors[f"average.{name}"])
    return done


def _steps_done(path: Path, stored: Mapping[str, Any], remedy: str) -> int:
    done, steps = stored.get("done"), stored["config"].get("steps")
    if not isinstance(done, int) or isinstance(done, bool) or not isinstance(steps, int) or not 0 <= done <= steps:
        raise StateError(f"{path} is damaged: it says {done!r:.40} of {steps!r:.40} steps are done. {remedy}")
    return done


def _check_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    averaged: Mapping[str, Tensor],
) -> None:
    """Before anything is changed: that all is there that will be taken, in its shape."""
    expected = {f"parameter.{name}": parameter.shape for name, parameter in parameters.items()}
    expected |= {f"average.{name}": average.shape for name, average in averaged.items()}
    if any(name.startswith(tuple(f"{moment}." for moment in MOMENTS)) for name in tensors):
        expected |= {f"{moment}.{name}": p.shape for name, p in parameters.items() for moment in MOMENTS}
    for name, shape in expected.items():
        found = tensors.get(name)
        if found is None or found.shape != shape or not found.is_floating_point():
            kind = "is missing" if found is None else f"is {list(found.shape)} of {found.dtype}, expected {list(shape)}"
            raise StateError(f"{path} is of another model, or damaged: {name} {kind}. Use a new run name.")


def _check_config(path: Path, stored: Any, config: TrainConfig) -> None:
    if not isinstance(stored, dict):
        raise StateError(f"{path} does not say what it was trained with. Use a new run name.")
    now = config.identity()
    changed = [name for name in now if stored.get(name) != now[name]]
    if changed:
        name = changed[0]
        raise StateError(
            f"{path} was trained with {name} {stored.get(name)!r:.80}, now it is {now[name]}. A run is resumed with what it "
            "was started with; use a new run name for other settings."
        )
