"""The state of a run in one safetensors file: parameters, AdamW moments, averages, and how far it got."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import HywuError
from ..files.safetensors import open_safetensors, write_safetensors
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
    with open_safetensors(path, StateError) as handle:
        text = (handle.metadata() or {}).get(KEY)
        if text is None:
            raise StateError(f"{path} is not the state of a training run.")
        stored = json.loads(text)
        _check_config(path, stored["config"], config)
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}
    expected = {f"parameter.{name}": parameter.shape for name, parameter in parameters.items()}
    wrong = [name for name, shape in expected.items() if name not in tensors or tensors[name].shape != shape]
    if wrong:
        raise StateError(f"{path} is of another model: {wrong[0]} is missing or has another shape. Use a new run name.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            if f"exp_avg.{name}" in tensors:
                optimizer.state[parameter] = {m: tensors[f"{m}.{name}"].to(parameter.device) for m in MOMENTS}
                optimizer.state[parameter]["step"] = torch.tensor(float(stored["done"]))
        for name, average in averaged.items():
            average.copy_(tensors[f"average.{name}"])
    return stored["done"]


def _check_config(path: Path, stored: dict, config: TrainConfig) -> None:
    now = config.identity()
    changed = [name for name in now if stored.get(name) != now[name]]
    if changed:
        name = changed[0]
        raise StateError(
            f"{path} was trained with {name} {stored.get(name)}, now it is {now[name]}. A run is resumed with what it was "
            "started with; use a new run name for other settings."
        )
