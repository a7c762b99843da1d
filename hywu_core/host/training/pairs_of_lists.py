"""Training pairs from what the host's dataset nodes give: lists of LATENT and lists of CONDITIONING."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor

from ...condition import HIDDEN_STATES, REFERENCE_LATENT, Condition, ConditionPart, assemble, expected_parts
from ...config import GeneratorConfig
from ...knowledge import BLIND, TOLD
from ...lora import finite
from ...training.data import Sample
from ..conditions import from_host
from ..model import patch_size
from .identity import digest
from .pair_lists import PairError

REFERENCES = "reference_latents"
# what training cannot honour, with the values that ask for nothing
IGNORED = {name: None for name in ("control", "mask", "area", "hooks", "gligen")}
IGNORED |= {"start_percent": 0.0, "end_percent": 1.0, "strength": 1.0}


class KeptPair(NamedTuple):
    """A pair as it is kept: equal tensors of several pairs, such as those of an instruction, are one."""

    latent: Tensor
    entry: Any  # of the CONDITIONING that the base reads
    condition: Condition  # in its parts; as one sequence it would be mostly zeros
    instruction: str  # equal where the same instruction was given
    key: str


class HostPairs(Sequence):
    """Pairs whose conditions were computed once. See `hywu_core.training.SampleSource`.

    Args:
        config: of the generator that reads the conditions.
    """

    def __init__(self, kept: Sequence[KeptPair], config: GeneratorConfig):
        self.kept, self.config = tuple(kept), config

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Sample:
        pair = self.kept[index]
        condition = assemble(pair.condition, self.config)[0].float()
        return Sample(pair.latent, pair.entry, condition, pair.key)

    def sizes(self) -> list[tuple[int, ...]]:
        """See `hywu_core.training.data.Sized`: of the latents."""
        return [tuple(pair.latent.shape) for pair in self.kept]

    @property
    def samples(self) -> Sequence[Sample]:
        """The pairs, each put together when it is asked for."""
        return self

    @property
    def instructions(self) -> tuple[str, ...]:
        """Pairs with an equal entry were given the same instruction."""
        return tuple(pair.instruction for pair in self.kept)

    @property
    def regime(self) -> str | None:
        """Whether the base reads the instructions (TOLD) or one and the same text for all (BLIND); None where all pairs were
        given the same instruction, so that it could be either.
        """
        if len(set(self.instructions)) < 2:
            return None
        return BLIND if len({digest([pair.entry[0]]) for pair in self.kept}) == 1 else TOLD

    def sample(self, index: int, source: torch.Generator) -> Sample:
        """The pair at an index; nothing of it is random."""
        return self[index]

    def chosen(self, indices: Sequence[int]) -> HostPairs:
        return HostPairs([self.kept[i] for i in indices], self.config)

    def split(self, held_out: int) -> tuple[HostPairs, HostPairs]:
        """Pairs to train on and `held_out` others, taken evenly from the list so that every kind of edit is among them.

        Raises:
            PairError: if fewer than two would be left to train on.
        """
        count = len(self)
        if count - held_out < 2:
            raise PairError(f"Of {count} pairs, {held_out} cannot be held out: at least 2 must be left to train on.")
        apart = {int((place + 0.5) * count / held_out) for place in range(held_out)}
        return self.chosen([i for i in range(count) if i not in apart]), self.chosen(sorted(apart))

    def sources(self, count: int) -> list[Tensor]:
        """At most so many of the pairs' source pictures, as latents, each once."""
        found: dict[str, Tensor] = {}
        for sample in self.samples:
            for latent in sample.conditioning[1].get(REFERENCES, ())[:1]:
                found.setdefault(digest([latent]), latent)
        return list(found.values())[:count]

    def identity(self) -> dict[str, str]:
        """Digests by which a run knows its data again."""
        entries = [pair.entry for pair in self.kept]
        words = [[tokens, {n: v for n, v in options.items() if n != REFERENCES}] for tokens, options, *_ in entries]
        return {
            "pictures": digest([[pair.latent, pair.entry[1].get(REFERENCES, ())] for pair in self.kept]),
            "instructions": digest([words, self.instructions]),
            "conditions": digest([pair.condition.parts for pair in self.kept]),
        }


class _Pair(NamedTuple):
    latent: Tensor  # (C, ..., H, W)
    entry: Any  # of the CONDITIONING that the base reads
    reads: Any  # what the generator reads: a CONDITIONING of one entry, or a Condition


def host_pairs(
    model: comfy.model_patcher.ModelPatcher,
    config: GeneratorConfig,
    latents: Sequence[dict],
    positive: Sequence[list],
    generator_positive: Sequence[Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> HostPairs:
    """Put lists of the host together as pairs for a generator.

    Args:
        latents: of the edited pictures, each a LATENT; a bucket of several with as many entries in its CONDITIONING is fine.
        positive: what the base reads, each a CONDITIONING, with its reference latents. One for all is fine if the
            generator reads others.
        generator_positive: what the generator reads, each a CONDITIONING or a Condition; by default what the base reads.
        progress: called with (done, total) after every condition; what it raises ends the work.
    Raises:
        PairError: naming the pair that does not fit.
        ConditionError: if a condition is not what the generator reads.
    """
    pairs = _paired(latents, positive, generator_positive)
    if len(pairs) < 2:
        raise PairError(
            f"There {'is one training pair' if pairs else 'are no training pairs'}, and with fewer than two there is "
            "nothing for a generator to tell apart. Give more pairs; for a single one, train an ordinary LoRA."
        )
    kept, known = [], {}
    with torch.inference_mode(False), torch.no_grad():
        for index, pair in enumerate(pairs):
            key = f"pair {index + 1}"
            _check(model, key, pair)
            condition = _condition(model, config, pair.reads)
            if condition.batch > 1:
                raise PairError(
                    f"What the generator reads of {key} is a batch of {condition.batch}; give one for each pair."
                )
            # here, where an error still has its pair
            assemble(condition, config)
            latent = _own(_as_the_base_has_it(model, pair.latent), known)
            instruction = digest([condition.parts[0].tokens])
            kept.append(KeptPair(latent, _own(pair.entry, known), _parts(condition, known), instruction, key))
            comfy.model_management.throw_exception_if_processing_interrupted()
            if progress:
                progress(index + 1, len(pairs))
    return HostPairs(kept, config)


def _paired(latents: Sequence[dict], positive: Sequence[list], reads: Sequence[Any] | None) -> list[_Pair]:
    pictures = [latent for value in latents for latent in value["samples"]]
    entries = _entries("positive", latents, positive, len(pictures), one_for_all=reads is not None)
    if reads is None:
        return [_Pair(*both, [both[1]]) for both in zip(pictures, entries, strict=True)]
    if any(isinstance(value, Condition) for value in reads):
        read = list(reads)
        _check_count("generator_positive", len(read), len(pictures))
    else:
        read = [[entry] for entry in _entries("generator_positive", latents, reads, len(pictures))]
    return [_Pair(*three) for three in zip(pictures, entries, read, strict=True)]


def _entries(
    name: str, latents: Sequence[dict], values: Sequence[list], count: int, one_for_all: bool = False
) -> list[Any]:
    """The entry of each picture."""
    if one_for_all and len(values) == 1 and len(values[0]) == 1:
        return [values[0][0]] * count
    _check_count(name, len(values), len(latents))
    entries = []
    for index, (latent, conditioning) in enumerate(zip(latents, values, strict=True)):
        batch = len(latent["samples"])
        if len(conditioning) != batch:
            raise PairError(
                f"Entry {index + 1} of the latents holds {batch} pictures, but {name} {index + 1} holds "
                f"{len(conditioning)} entries. Give every picture an entry of its own, or use lists instead of batches."
            )
        entries += [entry[0] if isinstance(entry[0], (list, tuple)) else entry for entry in conditioning]
    return entries


def _check_count(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise PairError(
            f"There are {expected} latents but {found} of {name}. Every edited picture needs exactly one; make both lists "
            "in the same order and of the same length."
        )


def _check(model: comfy.model_patcher.ModelPatcher, key: str, pair: _Pair) -> None:
    tokens, options = pair.entry[0], pair.entry[1]
    if tokens.shape[0] != 1:
        raise PairError(f"The CONDITIONING of {key} is a batch of {tokens.shape[0]}; give lists, one for each picture.")
    ignored = [name for name, nothing in IGNORED.items() if _asks_for_something(options.get(name), nothing)]
    if ignored:
        raise PairError(
            f"The CONDITIONING of {key} carries {', '.join(ignored)}, which cannot act in training. Wire it from before the "
            "node that added that."
        )
    channels = model.get_model_object("latent_format").latent_channels
    if pair.latent.ndim not in (3, 4) or pair.latent.shape[0] != channels:
        raise PairError(
            f"The latent of {key} has the shape {tuple(pair.latent.shape)}, but this model works on {channels} channels. "
            "Encode the edited pictures with the VAE that belongs to the model."
        )
    if not pair.latent.numel():
        raise PairError(f"The latent of {key} is empty: its picture is too small for the VAE. Use a larger picture.")
    if not finite(pair.latent):
        raise PairError(f"The latent of {key} holds NaN or infinity. Encode that picture again, in float32.")
    side, size = patch_size(model.model), tuple(pair.latent.shape[-2:])
    if size[0] % side or size[1] % side:
        raise PairError(
            f"The latent of {key} has {size[0]} x {size[1]} rows and columns, which are no multiples of the model's "
            f"patches of {side}. Crop or scale the picture."
        )
    for reference in options.get(REFERENCES, ())[:1]:
        if reference.shape[0] != 1 or tuple(reference.shape[-2:]) != size:
            raise PairError(
                f"The edited picture of {key} has a latent of {size[0]} x {size[1]}, but its source picture (reference "
                f"latent) is {reference.shape[0]} of {reference.shape[-2]} x {reference.shape[-1]}. Scale both pictures "
                "of a pair to the same size."
            )


def _asks_for_something(value: Any, nothing: float | None) -> bool:
    return value is not None and not (isinstance(value, (int, float)) and value == nothing)


def _condition(model: comfy.model_patcher.ModelPatcher, config: GeneratorConfig, reads: Any) -> Condition:
    if isinstance(reads, Condition):
        return reads
    looks = any(kind == HIDDEN_STATES for kind, _ in expected_parts(config))
    return from_host(reads, model=model if looks else None)


def _as_the_base_has_it(model: comfy.model_patcher.ModelPatcher, latent: Tensor) -> Tensor:
    """Models of videos work on (C, T, H, W), also for single pictures."""
    wants_time = model.get_model_object("latent_format").latent_dimensions == 3
    return latent.unsqueeze(1) if wants_time and latent.ndim == 3 else latent


def _parts(condition: Condition, known: dict[str, Tensor]) -> Condition:
    """The parts in half their size, but for the latent that the base reads as well and that is there anyhow."""
    parts = []
    for kind, tokens in condition.parts:
        narrow = tokens if kind == REFERENCE_LATENT else tokens.to(torch.bfloat16)
        parts.append(ConditionPart(kind, _own(narrow.cpu(), known)))
    return condition._replace(parts=tuple(parts))


def _own(value: Any, known: dict[str, Tensor]) -> Any:
    """The same with tensors that may take part in a backward pass: nodes get and make such that may not. One of each.

    Args:
        known: {digest: tensor} of those that there are.
    """
    if isinstance(value, Tensor):
        name = digest([value])
        if name not in known:
            known[name] = value.detach().clone()
        return known[name]
    if isinstance(value, dict):
        return {name: _own(part, known) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_own(part, known) for part in value)
    return value
