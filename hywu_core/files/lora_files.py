"""LoRA files in and out, in the key dialects that other tools read.

    stock   diffusion_model.<module>.lora_down.weight / .lora_up.weight / .alpha    ComfyUI's own loader
    peft    base_model.model.<module>.lora_A.weight / .lora_B.weight                PEFT and diffusers; scale folded into B

Row slices of one fused weight become one pair over the whole weight, exactly (ranks concatenated, zero rows elsewhere).
Grouped experts keep their leading axis in the stock dialect, which only this package reads, and become one pair for each
expert's fused module in the PEFT dialect. Files hold one instance: a batch of 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import LoraError
from ..layout import place
from ..lora import InstanceLora, LoraFactor
from .safetensors import open_safetensors, write_safetensors

Dialect = Literal["stock", "peft"]
METADATA_KEY = "hywu"
STOCK_PREFIX = "diffusion_model."
PEFT_PREFIX = "base_model.model."

_SUFFIXES = {  # of a pair's two keys, down and up, in every dialect that is read
    ".lora_down.weight": ".lora_up.weight",
    ".lora_A.weight": ".lora_B.weight",
    ".lora_A.default.weight": ".lora_B.default.weight",
    ".lora_A": ".lora_B",
    ".lora.down.weight": ".lora.up.weight",
    "_lora.down.weight": "_lora.up.weight",
    ".lora_linear_layer.down.weight": ".lora_linear_layer.up.weight",
}
_EXPERT = re.compile(r"^(?P<bank>.*\.experts)\.(?P<index>\d+)\.(?P<part>.+)$")


def to_state_dict(lora: InstanceLora) -> dict[str, Tensor]:
    """The stock dialect of one instance, sharing storage with it wherever no slices must be fused.

    Raises:
        LoraError: if the LoRA holds more than one instance.
    """
    state = {}
    for module, pair in _fused(lora).items():
        rank = pair.down.shape[-2]
        state[f"{STOCK_PREFIX}{module}.lora_down.weight"] = pair.down
        state[f"{STOCK_PREFIX}{module}.lora_up.weight"] = pair.up
        state[f"{STOCK_PREFIX}{module}.alpha"] = torch.tensor(lora.scale * rank)
    return state


def to_peft_state_dict(lora: InstanceLora) -> dict[str, Tensor]:
    """The PEFT dialect of one instance. PEFT keeps alpha outside the weights, so the scale is folded into B.

    Raises:
        LoraError: if the LoRA holds more than one instance.
    """
    state = {}
    for module, pair in _per_expert(_fused(lora)).items():
        state[f"{PEFT_PREFIX}{module}.lora_A.weight"] = pair.down
        state[f"{PEFT_PREFIX}{module}.lora_B.weight"] = pair.up * lora.scale
    return state


def from_state_dict(state: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> InstanceLora:
    """Read any of the dialects, ours or foreign. Names keep what the host must resolve, such as "transformer.<name>".

    Raises:
        LoraError: for a key that is no plain low-rank pair (DoRA, LoKr, LoCon mid weights), naming it.
    """
    pairs, used = {}, set()
    for key, down in state.items():
        suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
        if suffix is None:
            continue
        name = key.removesuffix(suffix)
        up = state.get(name + _SUFFIXES[suffix])
        if up is None:
            raise LoraError(f"{key} has no partner {name + _SUFFIXES[suffix]}; the LoRA is incomplete.")
        alpha = state.get(f"{name}.alpha")
        used |= {key, name + _SUFFIXES[suffix], f"{name}.alpha"}
        scale = 1.0 if alpha is None else float(alpha) / down.shape[-2]
        pairs[_own_name(name)] = (LoraFactor(_matrix(key, down), _matrix(key, up)), scale)
    foreign = sorted(state.keys() - used)
    if foreign:
        raise LoraError(
            f"{foreign[0]} (and {len(foreign) - 1} more keys) is not part of a plain low-rank pair. "
            "Use ComfyUI's own LoRA loader for DoRA, LoKr, LoCon and similar files."
        )
    if not pairs:
        raise LoraError("There are no LoRA weights here: no key ends in lora_down.weight, lora_A.weight or the like.")
    return _assemble(_regroup(pairs), metadata)


def save_lora(
    lora: InstanceLora, path: str | Path, dialect: Dialect = "stock", dtype: torch.dtype | None = None
) -> Path:
    """Write one instance as a LoRA file, atomically, with its metadata.

    Args:
        dialect: "stock" for ComfyUI's own loader, "peft" for PEFT and diffusers.
        dtype: to store; None keeps the factors' own.
    Raises:
        LoraError: if the LoRA holds more than one instance.
        SaveError: if it cannot be written; nothing is left half-written.
    """
    path, lora = Path(path), lora.to(dtype=dtype)
    state = to_state_dict(lora) if dialect == "stock" else to_peft_state_dict(lora)
    write_safetensors(path, state, _file_metadata(lora))
    return path


def load_lora(path: str | Path) -> InstanceLora:
    """Read a LoRA file in any of the dialects, memory-mapped.

    Raises:
        LoraError: if it is missing, damaged, a pickle, or no plain LoRA.
    """
    path = Path(path)
    with open_safetensors(path, LoraError) as handle:
        metadata = _own_metadata(handle.metadata() or {})
        state = {key: handle.get_tensor(key) for key in handle.keys()}
    try:
        return from_state_dict(state, metadata)
    except LoraError as error:
        raise LoraError(f"{path}: {error}") from None


def _own_metadata(header: Mapping[str, str]) -> dict[str, Any]:
    """What we wrote into a file's header. Another tool's entry under our name is no reason to refuse its weights."""
    try:
        written = json.loads(header.get(METADATA_KEY, "{}"))
    except ValueError:
        return {}
    return written if isinstance(written, dict) else {}


def _file_metadata(lora: InstanceLora) -> dict[str, str]:
    alpha = lora.scale * lora.rank
    return {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(lora.rank),
        "ss_network_alpha": str(alpha),
        METADATA_KEY: json.dumps(
            {**lora.metadata, "rank": lora.rank, "alpha": alpha, "scale": lora.scale}, default=str
        ),
    }


def _own_name(name: str) -> str:
    for prefix in (STOCK_PREFIX, PEFT_PREFIX):
        name = name.removeprefix(prefix)
    return name


def _matrix(key: str, factor: Tensor) -> Tensor:
    """(r, in) or (E, r, in), with the batch axis of one instance."""
    if factor.ndim == 4 and factor.shape[2:] == (1, 1):
        factor = factor.flatten(1)  # a 1x1 convolution is a matrix
    if factor.ndim not in (2, 3):
        raise LoraError(f"{key} has the shape {tuple(factor.shape)}; only factors of linear layers are supported.")
    return factor.unsqueeze(0)


def _assemble(pairs: Mapping[str, tuple[LoraFactor, float]], metadata: Mapping[str, Any] | None) -> InstanceLora:
    scales = {scale for _, scale in pairs.values()}
    if len(scales) == 1:
        return InstanceLora({name: pair for name, (pair, _) in pairs.items()}, scales.pop(), metadata)
    folded = {name: LoraFactor(pair.down, pair.up * scale) for name, (pair, scale) in pairs.items()}
    return InstanceLora(folded, 1.0, metadata)


def _fused(lora: InstanceLora) -> dict[str, LoraFactor]:
    """{module path: (r, in) and (out, r)}: the slices of one fused weight as one pair over the whole weight."""
    if lora.batch != 1:
        raise LoraError(f"A LoRA file holds one instance, this LoRA holds {lora.batch}. Save them one by one.")
    modules: dict[str, list[tuple[int, LoraFactor]]] = {}
    totals: dict[str, int] = {}
    for name, pair in lora.factors.items():
        pair = LoraFactor(pair.down[0], pair.up[0])
        where = place(name, pair.up.shape[-2])
        modules.setdefault(where.module, []).append((where.start, pair))
        totals[where.module] = where.total or pair.up.shape[-2]
    return {module: _fuse(parts, totals[module]) for module, parts in modules.items()}


def _fuse(parts: list[tuple[int, LoraFactor]], total: int) -> LoraFactor:
    if len(parts) == 1 and parts[0][1].up.shape[-2] == total:
        return parts[0][1]
    up = parts[0][1].up
    whole = up.new_zeros(*up.shape[:-2], total, sum(pair.rank for _, pair in parts))
    column = 0
    for start, pair in parts:
        whole[..., start : start + pair.up.shape[-2], column : column + pair.rank] = pair.up
        column += pair.rank
    return LoraFactor(torch.cat([pair.down for _, pair in parts], dim=-2), whole)


def _per_expert(fused: Mapping[str, LoraFactor]) -> dict[str, LoraFactor]:
    """Split grouped pairs (E, r, in), (E, out, r) into the fused modules of single experts, where other tools have them."""
    banks: dict[str, list[tuple[int, int, LoraFactor]]] = {}
    split = {}
    for name, pair in fused.items():
        if pair.down.ndim == 2:
            split[name] = pair
            continue
        where = place(name, pair.up.shape[-2], grouped=True)
        banks.setdefault(where.module, []).append((where.start, where.total or pair.up.shape[-2], pair))
    for module, parts in banks.items():
        whole = _fuse([(start, pair) for start, _, pair in parts], parts[0][1])
        bank, _, part = module.rpartition(".")
        for expert in range(whole.down.shape[0]):
            split[f"{bank}.{expert}.{part}"] = LoraFactor(whole.down[expert], whole.up[expert])
    return split


def _regroup(pairs: Mapping[str, tuple[LoraFactor, float]]) -> dict[str, tuple[LoraFactor, float]]:
    """The inverse of `_per_expert`: pairs of single experts, if all of a bank are there, as one pair with an expert axis."""
    kept, banks = {}, {}
    for name, (pair, scale) in pairs.items():
        match = _EXPERT.match(name)
        if match is None:
            kept[name] = (pair, scale)
        else:
            banks.setdefault(f"{match['bank']}.{match['part']}", {})[int(match["index"])] = (pair, scale)
    for name, experts in banks.items():
        if sorted(experts) != list(range(len(experts))):
            raise LoraError(f"{name}: the LoRA has the experts {sorted(experts)}, expected all from 0 on.")
        ordered = [experts[index] for index in range(len(experts))]
        down = torch.stack([pair.down[0] for pair, _ in ordered])
        up = torch.stack([pair.up[0] * scale for pair, scale in ordered])
        kept[name] = (LoraFactor(down.unsqueeze(0), up.unsqueeze(0)), 1.0)
    return kept
