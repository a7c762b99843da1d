"""The tensors of a LoRA's state dict as factor pairs: what every reader of one needs, whatever its dialect."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraError
from ..lora import InstanceLora, LoraFactor, Part, concatenate, finite, times, wide

STOCK_PREFIX = "diffusion_model."
PEFT_PREFIX = "base_model.model."
# Of a file's names that no MODEL knows: a text encoder's, in the spellings of the host's key table.
TEXT_ENCODER_PREFIXES = ("lora_te", "text_encoder", "lora_prior_te")

_EXPERT = re.compile(r"^(?P<bank>.*\.experts)\.(?P<index>\d+)\.(?P<part>.+)$")


def check_state(state: Mapping[str, Tensor]) -> None:
    """Refuse what is no state dict of a LoRA before anything reads it.

    Raises:
        LoraError: for names that are no text, values that are no plain tensors with values, NaN and infinite values.
    """
    for key, tensor in state.items():
        if not isinstance(key, str):
            raise LoraError(f"The LoRA has a key {key!r} that is no text.")
        if not isinstance(tensor, Tensor):
            raise LoraError(f"{key} of the LoRA is a {type(tensor).__name__}, expected a tensor.")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex():
            kind = "has no values" if tensor.is_meta else f"is a {tensor.layout}, {tensor.dtype} tensor"
            raise LoraError(f"{key} of the LoRA {kind}, expected plain real numbers.")
        if tensor.is_floating_point() and not finite(tensor):
            raise LoraError(
                f"{key} of the LoRA holds NaN or infinite values; its training has failed, or it is damaged."
            )


def own_name(stem: str, peft: bool = True) -> tuple[str, bool]:
    """A target's name, and whether it is another tool's, kept as it came, rather than a module path of the host.

    Args:
        peft: whether the PEFT prefix is ours; other tools have names below it that are no module paths.
    """
    for prefix in (STOCK_PREFIX, PEFT_PREFIX) if peft else (STOCK_PREFIX,):
        if stem.startswith(prefix):
            return stem.removeprefix(prefix), False
    return stem, True


def scale_of(stem: str, alpha: Tensor | None, rank: int) -> float:
    """alpha / rank, 1 where a file says no alpha.

    Raises:
        LoraError: if alpha is not one finite number.
    """
    if alpha is None:
        return 1.0
    if alpha.numel() != 1 or not math.isfinite(value := float(alpha)):
        raise LoraError(f"{stem}.alpha of the LoRA has the shape {tuple(alpha.shape)}, expected one finite number.")
    return value / rank


def as_factor(stem: str, down: Tensor, up: Tensor) -> LoraFactor:
    """Two tensors of a file as one instance's pair. A convolution's become matrices over its flattened kernel, as its weight.

    Raises:
        LoraError: if they do not fit together.
    """
    grouped = down.ndim == 3 and up.ndim == 3 and (down.shape[0], down.shape[1]) == (up.shape[0], up.shape[2])
    if min(down.ndim, up.ndim) < 2:
        raise LoraError(
            f"{stem}: the factors have the shapes {tuple(down.shape)} and {tuple(up.shape)}, expected (r, in) and (out, r)."
        )
    pair = (down, up) if grouped else (down.flatten(1), up.flatten(1))
    if not all(factor.is_floating_point() for factor in pair):
        raise LoraError(f"{stem}: the factors are {down.dtype} and {up.dtype}, expected floating point numbers.")
    pair = LoraFactor(*(wide(factor).unsqueeze(0) for factor in pair))
    InstanceLora({stem: pair})
    return pair


def one_each(pairs: Mapping[str, Sequence[tuple[LoraFactor, float]]]) -> dict[str, tuple[LoraFactor, float]]:
    """Pairs and their scales by target, those of one target put together so that none is lost."""
    whole = {}
    for name, those in pairs.items():
        folded = [LoraFactor(pair.down, times(pair.up, scale)) for pair, scale in those]
        whole[name] = those[0] if len(those) == 1 else (concatenate(name, folded), 1.0)
    return whole


def assemble(
    pairs: Mapping[str, tuple[LoraFactor, float]],
    metadata: Mapping[str, Any] | None,
    foreign: Iterable[str] = (),
    parts: Sequence[Part] = (),
) -> InstanceLora:
    """Pairs with scales of their own as a LoRA with one: the commonest, the others folded into their up factors."""
    common = Counter(scale for _, scale in pairs.values()).most_common(1)
    scale = common[0][0] if common and common[0][0] else 1.0
    factors = {
        name: pair if own == scale else LoraFactor(pair.down, times(pair.up, own / scale))
        for name, (pair, own) in pairs.items()
    }
    return InstanceLora(factors, scale, metadata, tuple(foreign), parts)


def regroup(pairs: Mapping[str, tuple[LoraFactor, float]]) -> dict[str, tuple[LoraFactor, float]]:
    """Pairs of single experts, if all of a bank are there, as one pair with an expert axis.

    Raises:
        LoraError: if experts are missing or differ in shape.
    """
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
        if len({(pair.down.shape, pair.up.shape) for pair, _ in ordered}) > 1:
            raise LoraError(f"{name}: the factors of its experts differ in shape, so they are no experts of one bank.")
        down = torch.stack([pair.down[0] for pair, _ in ordered])
        up = torch.stack([times(pair.up[0], scale) for pair, scale in ordered])
        kept[name] = (LoraFactor(down.unsqueeze(0), up.unsqueeze(0)), 1.0)
    return kept


def of_text_encoder(name: str) -> bool:
    """Whether a target's name is a text encoder's, which a MODEL does not have."""
    return name.startswith(TEXT_ENCODER_PREFIXES)
