"""Whether the base is told what a LoRA's generator was trained beside, noticed while it samples.

A blind generator was trained beside a base that reads an empty prompt; used with the instruction at the base, both do the
edit. One that was trained with a told base is weak beside an empty prompt. What the base is told is known to its sampler
alone, so a wrapper compares that, once for each sampling, with the instruction that the LoRA was generated from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .. import knowledge
from ..condition import CONDITIONING, Condition, assemble, expected_parts, text_of
from ..config import GeneratorConfig
from ..lora import InstanceLora
from ..messages import Message
from .cards import NOTICE, Card

KEY = "hywu_told"  # of the wrapper
READ, REGIME = "condition_digest", "regime"  # entries of a LoRA's metadata
NUMBERS = 16  # of a condition's description that a LoRA carries
NEAR = 1e-2  # relative distance of equal texts, one of which went through the base's dtype
POSITIVE = 0  # of the host's cond_or_uncond

WORDS_AT_A_BLIND_ONE = Message(
    "The base is told the instruction, but this generator was trained beside a base that reads an empty prompt. Give the "
    "sampler an encoded empty prompt as positive, with the source picture on it."
)
NONE_AT_A_TOLD_ONE = Message(
    "The base is not told the instruction that the LoRA was generated from, but this generator was trained beside a base "
    "that reads it as well. Give the sampler the same CONDITIONING."
)


def marked(lora: InstanceLora, condition: Condition, config: GeneratorConfig) -> InstanceLora:
    """The LoRA with what it was generated from, if that is one text, and what the base read in training, if that is known."""
    regime, text = knowledge.reads(config.hywu), text_of(assemble(condition, config), config)
    encoded = CONDITIONING in dict(expected_parts(config))
    if regime is None or not encoded or text is None or len(text) > 1:
        return lora
    return lora.with_metadata(**{READ: _digest(text)[0].tolist(), REGIME: regime})


def watch(
    model: comfy.model_patcher.ModelPatcher, lora: InstanceLora, show: Callable[[Card], None] | None, card: Card
) -> None:
    """Have a MODEL of our own say it when its sampler tells the base something else than in training.

    Args:
        show: draws a card on the node; card: what is drawn there.
    """
    read, regime = lora.metadata.get(READ), lora.metadata.get(REGIME)
    if not isinstance(read, list) or regime not in (knowledge.BLIND, knowledge.TOLD):
        return
    model.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, Watch(torch.tensor(read), regime, show, card))


class Watch:
    """Looks at the first call with the positive of every sampling."""

    def __init__(self, read: Tensor, regime: str, show: Callable[[Card], None] | None, card: Card):
        self.read, self.regime, self.show, self.card = read, regime, show, card
        self._seen: Tensor | None = None
        self._noticed = False

    def __call__(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
    ):
        """See the host's BaseModel.apply_model."""
        options = transformer_options or {}
        sampling, kinds = options.get("sample_sigmas"), options.get("cond_or_uncond", ())
        if sampling is not None and sampling is not self._seen and c_crossattn is not None and POSITIVE in kinds:
            self._seen = sampling
            self._look(c_crossattn, kinds)
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def _look(self, context: Tensor, kinds: list[int]) -> None:
        # another wrapper may have divided the batch otherwise
        if context.ndim != 3 or len(context) % len(kinds):
            return
        rows = context.unflatten(0, (len(kinds), -1))[list(kinds).index(POSITIVE)]
        apart = (_digest(rows) - self.read).norm(dim=-1) / self.read.norm().clamp(min=1e-6)
        told, before = bool((apart < NEAR).any()), self._noticed
        self._noticed = told != (self.regime == knowledge.TOLD)
        card = self.card
        if self._noticed:
            message = WORDS_AT_A_BLIND_ONE if told else NONE_AT_A_TOLD_ONE
            logging.warning("HY-WU: %s", message)
            card = card._replace(level=NOTICE, notes=(*card.notes, message))
        if self.show and (self._noticed or before):
            self.show(card)


def _digest(text: Tensor) -> Tensor:
    """(B, L, D) -> (B, NUMBERS): parts of the description, as few as a file's metadata may hold."""
    described = knowledge.describe(text)
    return described[:, :: max(1, described.shape[1] // NUMBERS)][:, :NUMBERS]
