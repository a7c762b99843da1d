"""One edit, from picture and words to what a sampler takes: condition, LoRA, and the MODEL with it."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import comfy.model_patcher
import node_helpers
from torch import Tensor

from .. import knowledge
from ..condition import HIDDEN_STATES, Condition, assemble, expected_parts
from ..errors import ConditionError
from ..files.lora_cache import key_of
from ..lora import InstanceLora
from .cards import GOOD, NOTICE, Card
from .conditions import from_host
from .generator_cards import strange
from .lora.apply import Mode, apply_lora
from .lora.lora_cards import applied
from .memory import GeneratorHandle, generate

REFERENCES = "reference_latents"

# the last LoRA of every loaded generator, so that another strength does not generate it again
_last: WeakKeyDictionary[comfy.model_patcher.ModelPatcher, tuple[str, InstanceLora]] = WeakKeyDictionary()


class Words(NamedTuple):
    """What is asked for: by the text encoder's output, or as text with the text encoder itself."""

    conditioning: list | None = None
    clip: Any = None
    instruction: str = ""
    empty: list | None = None  # the encoded empty prompt


class Picture(NamedTuple):
    """The source picture, as a LATENT or as pixels with a VAE; or neither, if it is on the CONDITIONING."""

    latent: dict | None = None
    image: Any = None
    vae: Any = None


class How(NamedTuple):
    """See `apply_lora`, and `memory.generate`."""

    strength: float = 1.0
    mode: Mode = "auto"
    start: float = 0.0
    end: float = 1.0
    keep_gb: float = 0.0


class Edit(NamedTuple):
    """Everything for a sampler, and the LoRA."""

    model: comfy.model_patcher.ModelPatcher
    positive: list
    negative: list
    latent: dict
    lora: InstanceLora
    card: Card


def edit(
    model: comfy.model_patcher.ModelPatcher,
    handle: GeneratorHandle,
    words: Words,
    picture: Picture,
    how: How,
    clip_vision_output: Any | None = None,
) -> Edit:
    """Write the LoRA of one picture and one instruction and put it on a MODEL.

    The positive is what the base was told while the generator was trained: the instruction, or with a blind one the empty
    prompt. The negative is the empty prompt. Both have the source picture on them.

    Raises:
        ConditionError: if picture, words or the empty prompt are missing, or one is given twice.
        MatchError, GenerationError: see `apply_lora` and `memory.generate`.
    """
    latent = _latent(picture)
    read = _seen(_asked(words), latent)
    source = latent or {"samples": _reference(read)}
    silent = _silent(words, source)
    base = model if HIDDEN_STATES in dict(expected_parts(handle.config)) else None
    condition = from_host(read, clip_vision_output, words.instruction, base)
    lora = _written(handle, condition, how.keep_gb)
    patched, matches = apply_lora(model, lora, how.strength, how.mode, how.start, how.end)
    card = applied(lora, matches, how.strength, how.mode)
    notices = tuple(strange(handle, condition))
    if notices:
        card = card._replace(notes=(*notices, *card.notes), level=NOTICE if card.level == GOOD else card.level)
    blind = knowledge.reads(handle.config.hywu) == knowledge.BLIND
    return Edit(patched, silent if blind else read, silent, source, lora, card)


def _written(handle: GeneratorHandle, condition: Condition, keep_gb: float) -> InstanceLora:
    key = key_of(assemble(condition, handle.config), handle.fingerprint)
    kept = _last.get(handle.patcher)
    if kept is None or kept[0] != key:
        # the old one's memory first
        _last.pop(handle.patcher, None)
        kept = _last[handle.patcher] = key, generate(handle, condition, keep_gb)
    return kept[1].with_metadata(instruction=condition.instruction)


def _latent(picture: Picture) -> dict | None:
    if picture.latent is not None and picture.image is not None:
        raise ConditionError("The source picture is given twice, as latent and as image. Take one of them away.")
    if picture.image is None:
        return picture.latent
    if picture.vae is None:
        raise ConditionError(
            "An image needs the base's VAE to be seen by the base. Wire vae, or wire a latent instead."
        )
    return {"samples": picture.vae.encode(picture.image)}


def _asked(words: Words) -> list:
    if words.conditioning is not None:
        return words.conditioning
    if words.clip is None:
        raise ConditionError(
            "Nothing says what to do with the picture. Wire the encoded instruction into conditioning, or clip, and write "
            "the instruction."
        )
    if not words.instruction.strip():
        raise ConditionError("The instruction is empty. Write what to do with the picture, or wire conditioning.")
    return _encoded(words.clip, words.instruction)


def _silent(words: Words, source: dict) -> list:
    """The empty prompt with the source picture on it, if it has none of its own."""
    if words.empty is None and words.clip is None:
        raise ConditionError(
            "There is no empty prompt, which is the negative, and what the base is told where only the generator reads the "
            "instruction. Wire clip, or the encoded empty prompt into empty."
        )
    empty = _encoded(words.clip, "") if words.empty is None else words.empty
    return empty if _reference(empty) is not None else _seen(empty, source)


def _encoded(clip: Any, text: str) -> list:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def _seen(conditioning: list, latent: dict | None) -> list:
    """With the source picture on it."""
    there = _reference(conditioning) is not None
    if latent is None:
        if not there:
            raise ConditionError(
                "There is no source picture. Wire image and vae, or latent; or put it on the CONDITIONING with Set Reference "
                "Latent."
            )
        return conditioning
    if there:
        raise ConditionError(
            "The CONDITIONING holds a source picture already, and another one is wired in. Take one of them away."
        )
    return node_helpers.conditioning_set_values(conditioning, {REFERENCES: [latent["samples"]]})


def _reference(conditioning: list) -> Tensor | None:
    return next((options[REFERENCES][0] for _, options in conditioning if options.get(REFERENCES)), None)
