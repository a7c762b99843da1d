"""The host's quantised formats that a base's large weights may be stored in: what a file holds for one weight, and how it is
made from floating-point numbers.

A matrix is a Linear's weight (out, in); a bank is all experts' matrices of one projection (E, out, in), and each of them has
scales of its own. Only weights are quantised: every mark asks the host for full-precision products, because its fast ones
would round the activations as well, and cut them off at the largest number of fp8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from torch import Tensor

from ...errors import CheckpointError

MARK, SCALE, SCALE_2 = "comfy_quant", "weight_scale", "weight_scale_2"  # names beside "weight", as the host reads them
FORMATS = {"fp8": "float8_e4m3fn", "nvfp4": "nvfp4"}  # ours: the host's
LONGEST_MARK = 4096  # bytes
STORED_AS = {"F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}
_LARGEST = {"fp8": 448.0, "nvfp4": 448.0 * 6.0}  # what the scale brings a matrix's largest number to
_QUANTISED = re.compile(
    r"^model\.layers\.\d+\.(self_attn\.(qkv|o)_proj|mlp\.(shared_mlp|experts)\.(gate_and_up|down)_proj)\.weight$"
)


class Stored(NamedTuple):
    shape: tuple[int, ...]
    dtype: str | None  # as safetensors names it; None: any floating-point type

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel() * STORED_AS[self.dtype].itemsize


def can_be_quantised(name: str) -> bool:
    """Whether the weight of this name is one of the large ones that the formats are for."""
    return _QUANTISED.match(name) is not None


def stored(kind: str, shape: tuple[int, ...]) -> dict[str, Stored]:
    """What a file holds, beside the mark, for a matrix or a bank of this shape: {name beside the module's: tensor}."""
    *experts, rows, columns = shape
    if kind == "fp8":
        return {"weight": Stored(tuple(shape), "F8_E4M3"), SCALE: Stored(tuple(experts), "F32")}
    rows, columns = _whole(rows, 16), _whole(columns, 16)  # two numbers in a byte, a scale for 16 of a row
    blocks = _whole(rows, 128), _whole(columns // 16, 4)  # in the tiles that tensor cores read
    return {
        "weight": Stored((*experts, rows, columns // 2), "U8"),
        SCALE: Stored((*experts, *blocks), "F8_E4M3"),
        SCALE_2: Stored(tuple(experts), "F32"),
    }


def quantise(
    kind: str, name: str, matrices: Iterable[Tensor], shape: tuple[int, ...], device: torch.device
) -> dict[str, Tensor]:
    """Quantise the weight `name` of this shape, matrix by matrix; one of them is in floating point at a time.

    Args:
        matrices: a bank's (out, in) in the order of the experts, or the only one.
        device: where the arithmetic is done. What is returned is on the CPU.
    Returns:
        what `stored` describes, and the mark.
    Raises:
        CheckpointError: if a number is not finite.
    """
    made = {own: torch.empty(kept.shape, dtype=STORED_AS[kept.dtype]) for own, kept in stored(kind, shape).items()}
    rows = made if len(shape) == 3 else {own: tensor.unsqueeze(0) for own, tensor in made.items()}
    for index, matrix in enumerate(matrices):
        for own, tensor in _quantise_matrix(kind, name, matrix.to(device, torch.float32)).items():
            rows[own][index].copy_(tensor)
    return made | {MARK: mark(kind, shape)}


def mark(kind: str, shape: tuple[int, ...]) -> Tensor:
    """What tells the host how a weight is stored: JSON as bytes."""
    told = {"format": FORMATS[kind], "full_precision_matrix_mult": True}
    told |= {"num_experts": shape[0]} if len(shape) == 3 else {}
    return torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)


def read_mark(name: str, told: Tensor) -> str:
    """Our name of the format in a mark `name`.

    Raises:
        CheckpointError: if it cannot be read, or names another format.
    """
    try:
        if told.dtype != torch.uint8 or told.ndim != 1 or told.numel() > LONGEST_MARK:
            raise ValueError(f"{list(told.shape)} of {told.dtype}")
        found = json.loads(bytes(told.tolist()))["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{name} is damaged ({error!r}). Convert or download the folder again.") from None
    for kind, hosts in FORMATS.items():
        if found == hosts and found in QUANT_ALGOS:
            return kind
    raise CheckpointError(
        f"{name} names the format {found!r}, but only {' and '.join(FORMATS.values())} are read. Convert the official "
        "folder with scripts/convert_hunyuan_image3.py."
    )


def _quantise_matrix(kind: str, name: str, matrix: Tensor) -> dict[str, Tensor]:
    layout = QUANT_ALGOS[FORMATS[kind]]["comfy_tensor_layout"]
    largest = matrix.abs().amax()
    if not torch.isfinite(largest):
        raise CheckpointError(f"{name} holds numbers that are not finite, so it is damaged. Download the file again.")
    scale = (largest / _LARGEST[kind]).clamp(min=torch.finfo(torch.float32).tiny)  # a matrix of zeros has a scale, too
    return QuantizedTensor.from_float(matrix, layout, scale=scale).state_dict("weight")


def _whole(length: int, step: int) -> int:
    return -(-length // step) * step
