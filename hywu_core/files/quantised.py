"""The matrices of a generator's blocks with one byte a number, in the host's own file format.

    <layer>.weight        int8 or float8 (out, in)
    <layer>.weight_scale  float32: (out, 1) for int8, one number for float8; what a number is multiplied with
    <layer>.comfy_quant   the text {"format": ...} as bytes
Norms, biases, positions, the condition's projection and the output heads keep their type: they are few, and errors there
weigh most.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError
from .shards import DTYPES, Header
from .text import parse_json

INT8, FP8 = "int8_tensorwise", "float8_e4m3fn"
STORED = {INT8: torch.int8, FP8: torch.float8_e4m3fn}
HEADERS = {INT8: "I8", FP8: "F8_E4M3"}  # as safetensors names them
# activations are not rounded: float8 without a scale of their own would cut them
MARKS = {INT8: {"format": INT8}, FP8: {"format": FP8, "full_precision_matrix_mult": True}}
SCALE, MARK = ".weight_scale", ".comfy_quant"
LONGEST_MARK = 4096  # bytes; other tools write a few words more than we do
SMALLEST = 1e-12  # a scale, so that a row of zeros divides
KEPT_AS = torch.bfloat16  # what is not quantised, unless it is smaller already


def is_block_matrix(name: str, dims: int) -> bool:
    """Whether a weight is one of those that are quantised."""
    return name.startswith("model.blocks.") and name.endswith(".weight") and dims == 2


def quantise(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """A matrix (out, in) -> its numbers and their scale, as the format stores them."""
    wide = weight.float()
    if kind == INT8:
        scale = (wide.abs().amax(dim=1, keepdim=True) / 127).clamp_min(SMALLEST)
        return (wide / scale).round_().clamp_(-127, 127).to(torch.int8), scale
    scale = (wide.abs().amax() / torch.finfo(STORED[kind]).max).clamp_min(SMALLEST)
    return (wide / scale).to(STORED[kind]), scale


def quantised(tensors: Mapping[str, Tensor] | Iterator[tuple[str, Tensor]], kind: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a plain generator, the matrices of its blocks quantised, one at a time."""
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if not is_block_matrix(name, tensor.ndim):
            yield name, tensor.to(KEPT_AS) if tensor.dtype.itemsize > KEPT_AS.itemsize else tensor
            continue
        layer = name.removesuffix(".weight")
        numbers, scale = quantise(tensor, kind)
        yield name, numbers
        yield layer + SCALE, scale
        yield layer + MARK, torch.tensor(list(json.dumps(MARKS[kind]).encode()), dtype=torch.uint8)


def plain(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a generator in floating point: in `dtype`, or each in its own, a quantised one in its bias's."""
    state = {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if name.endswith((SCALE, MARK)):
            continue
        if layer + SCALE in tensors:
            tensor = (tensor.float() * tensors[layer + SCALE]).to(dtype or tensors[f"{layer}.bias"].dtype)
        state[name] = tensor.to(dtype or tensor.dtype)
    return state


def kind_of(tensors: Mapping[str, Tensor]) -> str | None:
    """How the matrices of the blocks are quantised; None for a plain generator."""
    marks = (tensor for name, tensor in tensors.items() if name.endswith(MARK))
    mark = next(marks, None)
    return None if mark is None else json.loads(mark.cpu().numpy().tobytes())["format"]


def check_mark(mark: Tensor, kind: str, where: str) -> None:
    """Raises:
    CheckpointError: if a mark does not say, in the host's words, what the type of its layer's numbers says.
    """
    damaged = (
        f"{where} does not say how this layer is quantised (expected {json.dumps(MARKS[kind])}). Download it again."
    )
    if mark.dtype != torch.uint8 or mark.numel() > LONGEST_MARK:
        raise CheckpointError(damaged)
    try:
        text = mark.numpy().tobytes().decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(damaged) from None
    said = parse_json(text, where, CheckpointError, "Download it again.")
    if said.get("format") != kind or not isinstance(said.get("full_precision_matrix_mult", False), bool):
        raise CheckpointError(damaged)


def quantised_layers(found: Mapping[str, Header]) -> tuple[dict[str, str], list[str]]:
    """{layer: how it is quantised} by the types in a file's headers, and what is wrong with them."""
    kinds = {header: kind for kind, header in HEADERS.items()}
    layers, problems = {}, []
    for name in (name for name in found if name.endswith(MARK)):
        layer = name.removesuffix(MARK)
        weight, scale = found.get(f"{layer}.weight"), found.get(layer + SCALE)
        if weight is None or scale is None or not is_block_matrix(f"{layer}.weight", len(weight.shape)):
            problems.append(f"{layer} is marked as quantised, but is no matrix of a block with a weight and a scale")
        elif weight.dtype not in kinds:
            known = " or ".join(HEADERS.values())
            problems.append(f"{layer} is quantised as {weight.dtype}, expected {known}")
        elif scale.dtype not in DTYPES or scale.shape not in ((), (1,), (weight.shape[0], 1)):
            problems.append(
                f"{layer}{SCALE} is {scale.dtype} {list(scale.shape)}, expected one number or one for each row"
            )
        else:
            layers[layer] = kinds[weight.dtype]
    if len(set(layers.values())) > 1:
        problems.append("its blocks are quantised in more than one way")
    return layers, problems
