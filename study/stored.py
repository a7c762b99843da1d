"""Parameters of a study's runs as files, so that what was trained is not trained again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hywu_core.errors import HywuError
from hywu_core.files.safetensors import open_safetensors, write_safetensors
from hywu_core.training import Trainable


def trained_once(path: Path, trainable: Trainable, train: Callable[[], None]) -> None:
    """Give a trainable the parameters of a file; if there is none, train it and write one."""
    if path.exists():
        restore(path, trainable.named_parameters())
        return
    train()
    write_safetensors(path, {name: p.detach() for name, p in trainable.named_parameters().items()}, {"run": path.stem})


def restore(path: Path, parameters: Mapping[str, Tensor]) -> None:
    """Replace parameters by those of a file, which must hold all of them.

    Raises:
        HywuError: if the file cannot be read.
    """
    with open_safetensors(path, HywuError) as handle, torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(handle.get_tensor(name))
