"""LoRA files in and out, in the two dialects that this package writes.

    stock   diffusion_model.<module>.lora_down.weight / .lora_up.weight / .alpha    ComfyUI's own loader
    peft    base_model.model.<module>.lora_A.weight / .lora_B.weight                PEFT; scale folded into B

Row slices of one fused weight become one pair over the whole weight, exactly (ranks concatenated, zero rows elsewhere).
Grouped experts keep their leading axis in the stock dialect, which only this package reads, and become one pair for each
expert's fused module in the PEFT dialect. Files hold one instance: a batch of 1. Files of other tools are read by the host
(`hywu_core.host.lora.foreign`); what it read keeps its own names, and is written back under them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import LoraError, SaveError
from ..layout import place
from ..lora import InstanceLora, LoraFactor, times
from .lora_state import (
    PEFT_PREFIX,
    STOCK_PREFIX,
    as_factor,
    assemble,
    check_state,
    of_text_encoder,
    one_each,
    own_name,
    regroup,
    scale_of,
)
from .safetensors import atomic_write, open_safetensors, write_safetensors

Dialect = Literal["stock", "peft"]
METADATA_KEY = "hywu"
DIFFUSERS_PREFIX = "transformer."

_SUFFIXES = {".lora_down.weight": ".lora_up.weight", ".lora_A.weight": ".lora_B.weight"}
_SPELLING = re.compile(
    r"^(diffusion_model\.|base_model\.model\.|transformer\.|unet\.|lora_unet_|lora_transformer_|lycoris_)"
)
# What adds to a weight, and so can itself be added up. Everything else of a file acts on the weight as a whole.
_DIFFERENCES = (".diff", ".diff_b", ".w_norm", ".b_norm")


def to_state_dict(lora: InstanceLora) -> dict[str, Tensor]:
    """The stock dialect of one instance, sharing storage with it wherever no slices must be fused. Names of other tools,
    and what is no pair of factors, stay as they came.

    Raises:
        LoraError: if the LoRA holds more than one instance, or what one file cannot hold.
    """
    state, foreign = {}, set(lora.foreign)
    _check_spellings(lora)
    for module, pair in _fused(lora).items():
        rank = pair.down.shape[-2]
        stem = module if module in foreign else STOCK_PREFIX + module
        state[f"{stem}.lora_down.weight"] = pair.down
        state[f"{stem}.lora_up.weight"] = pair.up
        state[f"{stem}.alpha"] = torch.tensor(lora.scale * rank)
    return state | _parts_state(lora, state)


def to_peft_state_dict(lora: InstanceLora) -> dict[str, Tensor]:
    """The PEFT dialect of one instance. PEFT keeps alpha outside the weights, so the scale is folded into B.

    Raises:
        LoraError: if the LoRA holds more than one instance, or what PEFT does not read.
    """
    return {f"{PEFT_PREFIX}{name}": factor for name, factor in _peft_factors(lora).items()}


def from_state_dict(state: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> InstanceLora:
    """Read plain low-rank pairs in the two dialects. Names that are spelled otherwise are kept as they came.

    Raises:
        LoraError: for a key that is no plain low-rank pair (DoRA, LoKr, LoCon mid weights), naming it, and for tensors that
            are none, hold NaN, or do not fit together.
    """
    check_state(state)
    pairs: dict[str, list[tuple[LoraFactor, float]]] = {}
    foreign, used = set(), set()
    for key, down in state.items():
        suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
        if suffix is None:
            continue
        stem = key.removesuffix(suffix)
        up = state.get(stem + _SUFFIXES[suffix])
        if up is None:
            raise LoraError(f"{key} has no partner {stem + _SUFFIXES[suffix]}; the LoRA is incomplete.")
        used |= {key, stem + _SUFFIXES[suffix], f"{stem}.alpha"}
        name, spelled = own_name(stem)
        foreign |= {name} if spelled else set()
        pair = as_factor(stem, down, up)
        pairs.setdefault(name, []).append((pair, scale_of(stem, state.get(f"{stem}.alpha"), pair.rank)))
    others = sorted(state.keys() - used)
    if others:
        raise LoraError(
            f"{others[0]} (and {len(others) - 1} more keys) is not part of a plain low-rank pair. "
            "Load Instance LoRA in ComfyUI reads such files, as its own LoRA loader does."
        )
    if not pairs:
        raise LoraError("There are no LoRA weights here: no key ends in lora_down.weight or lora_A.weight.")
    return assemble(regroup(one_each(pairs)), metadata, foreign)


def save_lora(
    lora: InstanceLora,
    path: str | Path,
    dialect: Dialect = "stock",
    dtype: torch.dtype | None = None,
    diffusers: bool = False,
) -> Path:
    """Write one instance as a LoRA file, or for PEFT as a folder, atomically, with its metadata.

    Args:
        path: in the peft dialect, a folder; a suffix .safetensors is taken off.
        dialect: "stock" for ComfyUI's own loader. "peft" for PEFT: adapter_model.safetensors beside adapter_config.json.
        dtype: to store; None keeps the factors' own.
        diffusers: whether the modules are called as in diffusers, so that a file for its pipelines belongs into the folder.
    Returns:
        the file or the folder.
    Raises:
        LoraError: if the LoRA holds more than one instance, or what the dialect cannot hold.
        SaveError: if it cannot be written; nothing is left half-written.
    """
    path, lora = Path(path), lora.to(dtype=dtype)
    if dialect == "stock":
        write_safetensors(path, to_state_dict(lora), _file_metadata(lora))
        return path
    folder = path.with_suffix("") if path.suffix == ".safetensors" else path
    factors = _peft_factors(lora)
    # The configuration goes first and comes last: no reader finds the weights of one LoRA beside that of another.
    try:
        (folder / "adapter_config.json").unlink(missing_ok=True)
    except OSError as error:
        raise SaveError(f"Cannot write {folder}: {error}. Choose a folder that can be written to.") from error
    header = _file_metadata(lora)
    write_safetensors(
        folder / "adapter_model.safetensors", {PEFT_PREFIX + key: factor for key, factor in factors.items()}, header
    )
    if diffusers or _spelled_as_diffusers(lora):
        state = {DIFFUSERS_PREFIX + key: factor for key, factor in factors.items()}
        write_safetensors(folder / "pytorch_lora_weights.safetensors", state, header)
    with atomic_write(folder / "adapter_config.json") as temporary:
        temporary.write_text(json.dumps(_peft_config(factors), indent=2) + "\n", encoding="utf-8")
    return folder


def load_lora(path: str | Path) -> InstanceLora:
    """Read a LoRA file in one of the two dialects, memory-mapped.

    Raises:
        LoraError: if it is missing, damaged, a pickle, or no plain LoRA.
    """
    path = Path(path)
    state, header = read_file(path)
    try:
        return from_state_dict(state, own_metadata(header))
    except LoraError as error:
        raise LoraError(f"{path}: {error}") from None


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a LoRA file, memory-mapped, and its header.

    Raises:
        LoraError: if it is missing, damaged, or a pickle.
    """
    with open_safetensors(path, LoraError) as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}, dict(handle.metadata() or {})


def own_metadata(header: Mapping[str, str]) -> dict[str, Any]:
    """What we wrote into a file's header. Another tool's entry under our name is no reason to refuse its weights."""
    try:
        written = json.loads(header.get(METADATA_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return written if isinstance(written, dict) else {}


def grouped_targets(lora: InstanceLora) -> int:
    """How many targets are banks of experts, for which ComfyUI's own LoRA loader has no key."""
    return sum(pair.grouped for pair in lora.pairs)


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


def _check_spellings(lora: InstanceLora) -> None:
    """Two spellings of one layer in one file would be read as one, so a file is written in one spelling only."""
    stems = [name if name in set(lora.foreign) else STOCK_PREFIX + name for name in lora.names]
    stems += [key for part in lora.parts for key in part.keys]
    spellings = {}
    for stem in stems:
        if not of_text_encoder(stem):
            found = _SPELLING.match(stem)
            spellings.setdefault(found[1] if found else "", stem)
    if len(spellings) > 1:
        examples = " and ".join(sorted(spellings.values())[:2])
        raise LoraError(
            f"This LoRA mixes the spellings of several tools, such as {examples}; one layer may be there under two names. "
            "Wire the base into the model input of each Load Instance LoRA before blending, which gives one spelling; "
            "or save the LoRAs one by one."
        )


def _parts_state(lora: InstanceLora, pairs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts as keys of one file: differences are added up, anything else must be alone and as strong as it came."""
    state: dict[str, Tensor] = {}
    paired = {key.removesuffix(".lora_up.weight") for key in pairs if key.endswith(".lora_up.weight")}
    for part in lora.parts:
        for key, tensor in zip(part.keys, part.tensors, strict=True):
            stem, _, kind = key.rpartition(".")
            adds = key.endswith(_DIFFERENCES)
            clash = (stem in paired and kind != "diff_b") or (not adds and key in state)
            if clash or (not adds and part.strength != 1):
                where = "beside another change of the same weight" if clash else "at another strength"
                raise LoraError(
                    f"{key} is no pair of low-rank factors, and one file cannot hold it {where}. "
                    "Save the LoRAs one by one, and apply them one after another."
                )
            if adds:
                tensor = times(tensor, part.strength)
                tensor = state[key] + tensor if key in state else tensor
            state[key] = tensor
    return state


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


def _peft_factors(lora: InstanceLora) -> dict[str, Tensor]:
    """{"<module>.lora_A.weight": ..., "<module>.lora_B.weight": ...} with the scale in B."""
    if lora.parts:
        raise LoraError(
            f"{lora.parts[0].keys[0]} is no pair of low-rank factors, and the peft format holds nothing else. Save as stock."
        )
    if lora.foreign and not _spelled_as_diffusers(lora):
        raise LoraError(
            f"{lora.foreign[0]} is another tool's name, and the peft format needs the paths of modules. "
            "Wire the base into the model input of Load Instance LoRA: then all names are the base's own."
        )
    factors = {}
    for module, pair in _per_expert(_fused(lora)).items():
        module = module.removeprefix(DIFFUSERS_PREFIX) if lora.foreign else module
        factors[f"{module}.lora_A.weight"] = pair.down
        factors[f"{module}.lora_B.weight"] = times(pair.up, lora.scale)
    return factors


def _spelled_as_diffusers(lora: InstanceLora) -> bool:
    spelled = all(name.startswith(DIFFUSERS_PREFIX) for name in lora.names)
    return bool(lora.foreign) and len(lora.foreign) == len(lora.names) and spelled


def _peft_config(factors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What PEFT needs to build the adapters: each module's rank, and an alpha that equals it."""
    ranks = {
        key.removesuffix(".lora_A.weight"): factor.shape[0]
        for key, factor in factors.items()
        if key.endswith(".lora_A.weight")
    }
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    others = {f"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
    }
