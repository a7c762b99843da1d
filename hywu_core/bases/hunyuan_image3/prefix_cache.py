"""The cache of keys and values of a sequence's prefix: everything before the generated image, which never sees that image and
so is the same at every step of a sampling run.

A cache belongs to one sampling run. It is found in transformer_options, made before the first step and emptied when the run
ends, fails or is cancelled, so nothing of it outlives the LoRAs and weights that it was computed with.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEY = "hunyuan_image3_prefix"  # in transformer_options
MOST = 2  # entries: the conditional and the unconditional row, where they do not fit into one batch

KeysValues = tuple[Tensor, Tensor]  # (B, key/value heads, tokens, head_dim) each


class GrowingKeysValues:
    """Keys and values of one layer while tokens are added, in memory for all of them.

    Args:
        most: tokens that it can hold.
    """

    def __init__(self, most: int):
        self.most, self.length = most, 0
        self._all: KeysValues | None = None

    def add(self, own: KeysValues) -> KeysValues:
        """Those of more tokens; gives everybody's, without a copy."""
        if self._all is None:
            self._all = tuple(part.new_empty(*part.shape[:2], self.most, part.shape[3]) for part in own)
        start, self.length = self.length, self.length + own[0].shape[2]
        for whole, part in zip(self._all, own, strict=True):
            whole[:, :, start : self.length] = part
        return tuple(whole[:, :, : self.length] for whole in self._all)


class PrefixKey(NamedTuple):
    """Everything that the prefix is computed from, except the weights, which stay as they are during a run."""

    layout: Any
    adapters: Any  # which LoRAs act beside the weights, and how strongly
    tensors: tuple[Tensor, ...]  # ids, and what the source pictures give

    def same(self, other: PrefixKey) -> bool:
        """Whether the same prefix follows from both."""
        if self.layout != other.layout or self.adapters != other.adapters or len(self.tensors) != len(other.tensors):
            return False
        pairs = list(zip(self.tensors, other.tensors, strict=True))
        if not all(_alike(mine, others) for mine, others in pairs):
            return False
        # asked once for all of them: every question waits for the device
        return bool(torch.stack([(mine == others).all() for mine, others in pairs]).all()) if pairs else True


class PrefixCache:
    """Prefixes that were computed in this run."""

    def __init__(self):
        self._entries: list[tuple[PrefixKey, list[KeysValues]]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: PrefixKey) -> list[KeysValues] | None:
        """Keys and values of every layer, or None if this prefix was not computed yet."""
        return next((kept for known, kept in self._entries if known.same(key)), None)

    def keep(self, key: PrefixKey, layers: list[KeysValues]) -> None:
        """Remember a prefix, and forget the oldest one where there are too many."""
        self._entries = [*self._entries, (key, layers)][-MOST:]

    def clear(self) -> None:
        self._entries = []


def usable(transformer_options: dict[str, Any]) -> PrefixCache | None:
    """The run's cache, unless something in this call could make the prefix depend on the step."""
    patched = any(transformer_options.get(name) for name in ("patches", "patches_replace"))
    wrapped = any(_flatten(transformer_options.get("wrappers", {}).get("diffusion_model", {})))
    return None if patched or wrapped else transformer_options.get(KEY)


def with_prefix_cache(executor, *args, **kwargs):
    """Wraps the host's outer sampling: gives the run a cache, and takes it away whatever happens."""
    if any(row.get("hooks") for rows in executor.class_obj.conds.values() for row in rows):
        return executor(*args, **kwargs)  # the host's hooks change weights between steps and between conditionings
    cache = PrefixCache()
    options = executor.class_obj.model_options.setdefault("transformer_options", {})
    options[KEY] = cache
    try:
        return executor(*args, **kwargs)
    finally:
        options.pop(KEY, None)
        cache.clear()


def _alike(mine: Tensor, others: Tensor) -> bool:
    return mine.shape == others.shape and mine.dtype == others.dtype and mine.device == others.device


def _flatten(wrappers: dict[Any, list]) -> Iterable[Any]:
    return (wrapper for group in wrappers.values() for wrapper in group)
