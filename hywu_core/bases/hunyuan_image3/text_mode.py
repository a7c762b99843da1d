"""The base in text mode: one prefill gives a generator's condition and the ratio that the model would choose. No LoRA acts
here, whatever the MODEL carries. Source: reference fact 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor

from ...condition import HIDDEN_STATES, Condition, ConditionPart
from ...errors import ConditionError
from ...host.conditions import bare
from .base_model import HostModel, working_memory
from .edit import Edit
from .foreign import borrow_decoder
from .sequence import Sequence
from .sizes import Size, buckets
from .transformer import HunyuanImage3, Sources


class Reading(NamedTuple):
    """What one prefill tells about an edit."""

    condition: Condition
    ratio_logits: Tensor | None  # (vocabulary,), of the token that would name the ratio; None: the MODEL has no head
    size: Size  # the one asked for, else the bucket that the model would choose, else the first picture's


class Prepared(NamedTuple):
    """A base that is loaded without any LoRA, and an edit's inputs beside it."""

    decoder: HunyuanImage3
    ids: Tensor  # (1, L)
    sources: Sources
    dtype: torch.dtype
    # what the host's sampler tells a model that it runs
    options: dict[str, Any]


def read_edit(model: comfy.model_patcher.ModelPatcher, edit: Edit) -> Reading:
    """Run the base once on an edit, as text: no noise, no LoRA, the conditional row.

    Returns:
        the condition, (1, L, H) of every token before the final norm, and the ratio.
    Raises:
        ConditionError: if the MODEL is another base.
    """
    sequence = edit.ratio_sequence()
    ready = prepare(model, edit, sequence)
    hidden, _ = ready.decoder.prefill(ready.ids, sequence.layout, ready.sources, ready.dtype, options=ready.options)
    logits = None if ready.decoder.lm_head is None else ready.decoder.logits(hidden[:, -1:])[0, 0].cpu()
    kept = hidden.to(comfy.model_management.intermediate_device(), torch.float32)
    condition = Condition((ConditionPart(HIDDEN_STATES, kept),), edit.request.prompt)
    return Reading(condition, logits, edit.size or _chosen(edit, logits))


def prepare(model: comfy.model_patcher.ModelPatcher, edit: Edit, sequence: Sequence, more_tokens: int = 0) -> Prepared:
    """Load the base bare, with room for a sequence and what it may grow by.

    Raises:
        ConditionError: if the MODEL is another base.
    """
    base = model.model
    decoder = base.diffusion_model if isinstance(base, HostModel) else borrow_decoder(base.diffusion_model, edit.config)
    if decoder is None or (decoder.lm_head is None and more_tokens):
        raise ConditionError(
            f"This needs the MODEL of Load HunyuanImage-3, but a {type(base).__name__} is wired in"
            f"{' whose modules do not fit' if decoder is None else ' that has no head for text (lm_head)'}. What the "
            "generator reads is what that base itself sees."
        )
    dtype, alone = base.get_dtype_inference(), bare(model)
    room = working_memory(decoder, dtype, 1, sequence.layout.length + more_tokens)
    comfy.model_management.load_models_gpu([alone], memory_required=room)
    device, options = alone.load_device, {"prefetch_dynamic_vbars": alone.is_dynamic()}
    scale = edit.config.vae.scaling_factor
    latents = tuple((latent * scale)[:, :, 0].to(device, dtype) for latent in edit.latents)
    vision = tuple(tokens.to(device, dtype) for tokens in edit.vision)
    return Prepared(decoder, torch.tensor([sequence.ids], device=device), Sources(latents, vision), dtype, options)


def _chosen(edit: Edit, logits: Tensor | None) -> Size:
    if logits is None:
        return edit.default_size
    ratios = torch.tensor(edit.builder.tokenizer.special.ratios)
    return buckets(edit.config.image_base_size)[int(logits[ratios].argmax())]
