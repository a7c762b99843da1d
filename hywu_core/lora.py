"""InstanceLora: the LoRA of one edit as a value, and what can be done to it without forming out x in products.

Letters: B batch · E experts · r rank. A factor pair changes its weight by scale * up @ down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import LoraError

INSTRUCTIONS = "instructions"  # of a batch's metadata: one for each instance; a single one's is its "instruction"
EQUAL = 1e-12  # share of a square that is rounding


class LoraFactor(NamedTuple):
    """The factor pair of one target."""

    down: Tensor  # A: (B, r, in) or, for grouped experts, (B, E, r, in)
    up: Tensor  # B: (B, out, r) or (B, E, out, r)

    @property
    def rank(self) -> int:
        """Rows of A, columns of B."""
        return self.down.shape[-2]

    @property
    def grouped(self) -> bool:
        """Whether this pair belongs to a bank of experts."""
        return self.down.ndim == 4


class Part(NamedTuple):
    """What of another tool's file is no pair of factors (DoRA, LoHa, bias differences ...), as it came. What it means is the
    host's to say, once a MODEL is known.
    """

    keys: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    strength: float = 1.0


class _Fields(NamedTuple):
    names: tuple[str, ...]
    pairs: tuple[LoraFactor, ...]
    scale: float
    metadata: Mapping[str, Any]
    foreign: tuple[str, ...]
    parts: tuple[Part, ...]


class InstanceLora(_Fields):
    """A generated (or loaded) LoRA: factor pairs by target name, one scale, and where it came from.

    It is a tuple of tuples of tensors on purpose: hosts that count the memory of cached values look into tuples, not into
    dictionaries or objects. It is a value: every operation gives a new one.

    Args:
        factors: {target name: LoraFactor}; a batch of 1 or one common batch.
        scale: multiplies every B.A.
        metadata: JSON-like provenance: base family, generator, instruction, ...
        foreign: those of the names that are not module paths but another tool's, kept as its file spells them.
        parts: what of another tool's file is no pair of factors.
    Raises:
        LoraError: if a pair's shapes do not fit together, or batches differ.
    """

    __slots__ = ()

    def __new__(
        cls,
        factors: Mapping[str, LoraFactor],
        scale: float = 1.0,
        metadata: Mapping[str, Any] | None = None,
        foreign: Sequence[str] = (),
        parts: Sequence[Part] = (),
    ) -> InstanceLora:
        pairs = tuple(LoraFactor(*pair) for pair in factors.values())
        for name, pair in zip(factors, pairs, strict=True):
            _check_pair(name, pair)
        if len({pair.down.shape[0] for pair in pairs}) > 1:
            raise LoraError(f"The factors have different batch sizes: {sorted({p.down.shape[0] for p in pairs})}.")
        kept = tuple(name for name in factors if name in set(foreign))
        provenance = MappingProxyType(dict(metadata or {}))
        return super().__new__(cls, tuple(factors), pairs, float(scale), provenance, kept, tuple(parts))

    def __reduce__(self):
        return type(self), (dict(self.factors), self.scale, dict(self.metadata), self.foreign, self.parts)

    @property
    def factors(self) -> Mapping[str, LoraFactor]:
        """{target name: LoraFactor}, in token order."""
        return MappingProxyType(dict(zip(self.names, self.pairs, strict=True)))

    @property
    def batch(self) -> int:
        return self.pairs[0].down.shape[0] if self.pairs else len(self.parts[:1])

    @property
    def rank(self) -> int:
        return max((pair.rank for pair in self.pairs), default=0)

    @property
    def elements(self) -> int:
        """Elements of all factors, the whole batch, and of the other parts."""
        others = sum(tensor.numel() for part in self.parts for tensor in part.tensors)
        return sum(pair.down.numel() + pair.up.numel() for pair in self.pairs) + others

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> InstanceLora:
        """The same LoRA elsewhere; shares storage where nothing changes. Parts of other tools keep their types."""
        parts = [part._replace(tensors=tuple(t.to(device=device) for t in part.tensors)) for part in self.parts]
        moved = self.map(lambda pair: LoraFactor(*(t.to(device=device, dtype=dtype) for t in pair)))
        return moved.changed(parts=parts)

    def select(self, index: int) -> InstanceLora:
        """Instance `index` of the batch, as a batch of 1."""
        if not -self.batch <= index < self.batch:
            raise LoraError(f"There is no instance {index}: this LoRA holds {self.batch}.")
        index %= self.batch
        chosen = self.map(lambda pair: LoraFactor(pair.down[index : index + 1], pair.up[index : index + 1]))
        told = self.metadata.get(INSTRUCTIONS, ())
        if len(told) != self.batch:
            return chosen
        rest = {name: value for name, value in self.metadata.items() if name != INSTRUCTIONS}
        return chosen.changed(metadata={**rest, "instruction": told[index]})

    def scaled(self, strength: float) -> InstanceLora:
        """The same LoRA, `strength` times as strong."""
        parts = [part._replace(strength=part.strength * strength) for part in self.parts]
        return self.changed(scale=self.scale * strength, parts=parts)

    def with_metadata(self, **entries: Any) -> InstanceLora:
        """The same LoRA with entries added to its metadata."""
        return self.changed(metadata={**self.metadata, **entries})

    def map(self, change: Callable[[LoraFactor], LoraFactor]) -> InstanceLora:
        """The same LoRA with every factor pair changed by a function."""
        return self.changed(factors={n: change(p) for n, p in self.factors.items()})

    def changed(self, **fields: Any) -> InstanceLora:
        """The same LoRA with some of its fields, called as they are when it is made, replaced."""
        own = {name: getattr(self, name) for name in ("factors", "scale", "metadata", "foreign", "parts")}
        return InstanceLora(**own | fields)


def blend(loras: Sequence[InstanceLora], weights: Sequence[float]) -> InstanceLora:
    """The LoRA whose every dW is the weighted sum of the given ones' dW, exactly, by concatenating ranks.

    A target that only some of them have keeps what those contribute. Scales and weights are folded into the up factors, so
    the result has scale 1. What is no pair of factors keeps its own weight.
    """
    if not loras or len(loras) != len(weights):
        raise LoraError(f"Blending needs one weight for each LoRA, got {len(loras)} LoRAs and {len(weights)} weights.")
    if not all(map(math.isfinite, weights)):
        raise LoraError(f"The weights of a blend must be finite numbers, got {', '.join(map(str, weights))}.")
    batches = {lora.batch for lora in loras}
    if len(batches - {1}) > 1:
        raise LoraError(f"LoRAs of different batch sizes cannot be blended: {sorted(batches)}.")
    weighted = [lora.scaled(weight) for lora, weight in zip(loras, weights, strict=True)]
    pairs: dict[str, list[LoraFactor]] = {}
    for lora in weighted:
        for name, pair in lora.factors.items():
            pairs.setdefault(name, []).append(LoraFactor(wide(pair.down), times(pair.up, lora.scale)))
    factors = {name: concatenate(name, those, max(batches)) for name, those in pairs.items()}
    foreign = {name for lora in loras for name in lora.foreign}
    paths = {name for lora in loras for name in lora.names if name not in lora.foreign}
    parts = [part for lora in weighted for part in lora.parts if part.strength]
    return InstanceLora(factors, 1.0, {"blend": [dict(lora.metadata) for lora in loras]}, [*foreign - paths], parts)


def wide(factor: Tensor) -> Tensor:
    """Factors of eight bits as bfloat16, which holds each of their values: nothing can be computed with them as they are."""
    return factor.bfloat16() if factor.dtype.itemsize == 1 else factor


def finite(numbers: Tensor) -> bool:
    """Whether no number is NaN or infinite, in one pass and with one wait for the device; nothing at all is finite."""
    return not numbers.numel() or bool(torch.isfinite(torch.stack(wide(numbers).aminmax())).all())


def times(up: Tensor, scale: float) -> Tensor:
    """An up factor times a scale, in float32 where fewer bits would round the product."""
    up = wide(up)
    exact = abs(math.frexp(scale)[0]) in (0.0, 0.5)
    return (up if exact or up.dtype.itemsize >= 4 else up.float()) * scale


def truncate(lora: InstanceLora, rank: int, progress: Callable[[int, int], None] | None = None) -> InstanceLora:
    """The best LoRA of at most `rank` (Eckart-Young), from the factors alone.

    With QR of both factors, up @ down = Q_u (R_u R_d^T) Q_d^T, so only an r x r matrix meets the SVD.

    Args:
        progress: called with (done, total) after every target; what it raises ends the work.
    Raises:
        LoraError: for a rank below 1, or factors that are not finite.
    """
    if rank < 1:
        raise LoraError(f"The rank must be at least 1, got {rank}.")
    factors = {}
    for done, (name, pair) in enumerate(lora.factors.items(), 1):
        factors[name] = pair if pair.rank <= rank else _truncate(name, pair, rank)
        if progress:
            progress(done, len(lora.names))
    return lora.changed(factors=factors)


def inner(a: LoraFactor, b: LoraFactor) -> Tensor:
    """<B_a A_a, B_b A_b> over the last two axes, without forming a product: sum((B_a^T B_b) * (A_a A_b^T)).

    Returns:
        (B,) or, for grouped experts, (B, E), in float64 on the CPU.
    """
    ups = _exact(a.up).mT @ _exact(b.up)
    downs = _exact(a.down) @ _exact(b.down).mT
    return (ups * downs).sum((-2, -1))


def norms(lora: InstanceLora) -> dict[str, Tensor]:
    """The Frobenius norm of every dW (scale included): {name: (B,)}, experts of a bank taken together.

    Raises:
        LoraError: if the LoRA has no factor pairs.
    """
    _check_any_pairs(lora)
    return {
        name: lora.scale * _over_experts(inner(pair, pair)).clamp(min=0).sqrt() for name, pair in lora.factors.items()
    }


def cosine(a: InstanceLora, b: InstanceLora) -> Tensor:
    """Cosine between the dW of two LoRAs, all targets as one vector: (B,), 0 where one of them is zero.

    It is gauge-invariant: it compares the products B.A, which many factor pairs share, never A and B themselves.
    """
    return cosines([a, b])[0, 1]


def cosines(
    loras: Sequence[InstanceLora], progress: Callable[[int, int], None] | None = None, centred: bool = False
) -> Tensor:
    """`cosine` between every two of N LoRAs: (N, N, B). Holds the factors of one target in float64 at a time.

    Args:
        centred: compare what is left of each dW without the mean of all N, which LoRAs of one generator share; exact, from
            the inner products. Unrelated LoRAs then have -1 / (N - 1) on average, and two always -1.
        progress: called with (done, total) after every target; what it raises ends the work.
    Raises:
        LoraError: if one has no pairs, or they have not the same targets of the same shapes, or batches that differ and are
            not 1.
    """
    _check_alike(loras)
    count, names = len(loras), loras[0].names
    factors = [dict(zip(lora.names, lora.pairs, strict=True)) for lora in loras]
    products = torch.zeros(count, count, max(lora.batch for lora in loras), dtype=torch.float64)
    for done, name in enumerate(names, 1):
        pairs = [LoraFactor(*map(_exact, found[name])) for found in factors]
        for i in range(count):
            for j in range(i, count):
                both = loras[i].scale * loras[j].scale * _over_experts(inner(pairs[i], pairs[j]))
                products[i, j] += both
                if j > i:
                    products[j, i] += both
        if progress:
            progress(done, len(names))
    if centred:
        whole = products.diagonal().T
        products = products - products.mean(0, keepdim=True) - products.mean(1, keepdim=True) + products.mean((0, 1))
        # what only rounding leaves of equal ones is nothing
        nothing = products.diagonal().T <= EQUAL * whole
        products = products.masked_fill(nothing.unsqueeze(0) | nothing.unsqueeze(1), 0.0)
    squares = products.diagonal().T.clamp(min=0)  # (N, B)
    lengths = (squares.unsqueeze(0) * squares.unsqueeze(1)).sqrt()
    return torch.where(lengths > 0, products / lengths.clamp(min=torch.finfo(lengths.dtype).tiny), 0.0)


def _exact(factor: Tensor) -> Tensor:
    """In float64, which not every device has."""
    return factor.cpu().double()


def _check_alike(loras: Sequence[InstanceLora]) -> None:
    first = loras[0]
    for lora in loras:
        _check_any_pairs(lora)
    for number, lora in enumerate(loras[1:], 2):
        if set(lora.names) != set(first.names):
            apart = sorted(set(lora.names) ^ set(first.names))
            remedy = " Wire the base into Load Instance LoRA, so that all have its names."
            raise LoraError(
                f"Only LoRAs of the same targets can be compared: of the first and number {number}, only one has {apart[0]} "
                f"({len(apart)} such targets).{remedy if first.foreign or lora.foreign else ''}"
            )
        mine = dict(zip(first.names, first.pairs, strict=True))
        for name, pair in zip(lora.names, lora.pairs, strict=True):
            if _place_of(pair) != _place_of(mine[name]):
                raise LoraError(f"{name} has different shapes in the LoRAs to compare; they belong to different bases.")
    batches = sorted({lora.batch for lora in loras} - {1})
    if len(batches) > 1:
        raise LoraError(
            f"LoRAs of {batches[0]} and of {batches[1]} instances cannot be compared; take equal numbers, or one."
        )


def _check_any_pairs(lora: InstanceLora) -> None:
    if not lora.pairs:
        held = f"only {lora.parts[0].keys[0]} and the like" if lora.parts else "nothing"
        raise LoraError(f"This LoRA holds {held}: no pairs of low-rank factors, which are what can be measured.")


def _over_experts(values: Tensor) -> Tensor:
    return values.sum(-1) if values.ndim == 2 else values


def _place_of(pair: LoraFactor) -> tuple[int, ...]:
    """(experts, if it is a bank of them, inputs, outputs) of the weight that a pair belongs to."""
    return (*pair.down.shape[1:-2], pair.down.shape[-1], pair.up.shape[-2])


def concatenate(name: str, pairs: Sequence[LoraFactor], batch: int = 1) -> LoraFactor:
    """Pairs of one target as one, whose change is the sum of theirs: their ranks side by side.

    Raises:
        LoraError: if they are of differing shapes.
    """
    if len({_place_of(pair) for pair in pairs}) > 1:
        raise LoraError(
            f"{name} has different shapes in LoRAs that are to be added up; they belong to different bases."
        )
    pairs = [LoraFactor(*(t.expand(batch, *t.shape[1:]) for t in p)) for p in pairs]
    return LoraFactor(torch.cat([p.down for p in pairs], dim=-2), torch.cat([p.up for p in pairs], dim=-1))


def _truncate(name: str, pair: LoraFactor, rank: int) -> LoraFactor:
    if not all(map(finite, pair)):
        raise LoraError(f"{name}: the factors hold NaN or infinite values, so there is no nearest LoRA of rank {rank}.")
    q_up, r_up = torch.linalg.qr(_exact(pair.up))
    q_down, r_down = torch.linalg.qr(_exact(pair.down).mT)
    left, values, right = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    root = values[..., :rank].sqrt()
    up = (q_up @ left[..., :rank]) * root.unsqueeze(-2)
    down = root.unsqueeze(-1) * (right[..., :rank, :] @ q_down.mT)
    return LoraFactor(down.to(pair.down), up.to(pair.up))


def _check_pair(name: str, pair: LoraFactor) -> None:
    down, up = pair
    fits = (
        down.ndim in (3, 4)
        and 0 not in (*down.shape, *up.shape)
        and up.ndim == down.ndim
        and up.shape[-1] == down.shape[-2]
        and up.shape[:-2] == down.shape[:-2]
    )
    if not fits:
        raise LoraError(
            f"{name}: the factors {tuple(down.shape)} and {tuple(up.shape)} do not fit together, "
            "expected (B, r, in) with (B, out, r), or (B, E, r, in) with (B, E, out, r), none of them 0."
        )
