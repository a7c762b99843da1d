"""HunyuanImage-3 as a model of the host: how a CONDITIONING becomes a step's inputs, what it takes, how it is sampled."""

from __future__ import annotations

from functools import partial
from typing import Any

import comfy.conds
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...errors import ConditionError
from .config import BaseConfig
from .edit import KEY, Edit, opened
from .moe import ROWS_AT_ONCE
from .prefix_cache import with_prefix_cache
from .transformer import HunyuanImage3
from .vae import Latent

WRAPPER = "hunyuan_image3"


class HostModel(comfy.model_base.BaseModel):
    """The host's view of the base."""

    untrainable = "HunyuanImage-3 is there for sampling only"

    def __init__(self, model_config: HostConfig, device: torch.device | None = None):
        super().__init__(model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=HunyuanImage3)

    @property
    def config(self) -> BaseConfig:
        return self.diffusion_model.config

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """What `HunyuanImage3._forward` takes, for one CONDITIONING; the sequence follows from the size of the latent.

        Raises:
            ConditionError: if the CONDITIONING was not made for this model, or the sequence is too long.
        """
        edit: Edit | None = kwargs.get(KEY)
        if edit is None:
            raise ConditionError(
                "HunyuanImage-3 reads a CONDITIONING that only the node HunyuanImage-3 Edit makes, but this one comes from "
                "elsewhere. Wire that node's positive and negative outputs into the sampler."
            )
        edit = opened(kwargs["cross_attn"], edit)
        sequence = edit.sequence(tuple(kwargs["noise"].shape[-2:]))
        conds = {
            "ids": comfy.conds.CONDRegular(torch.tensor([sequence.ids])),
            "layout": comfy.conds.CONDConstant(sequence.layout),
            "latents": comfy.conds.CONDList([self.process_latent_in(latent)[:, :, 0] for latent in edit.latents]),
            "vision": comfy.conds.CONDList(list(edit.vision)),
        }
        if self.config.distilled:
            scale = kwargs.get("guidance") or self.config.sampling.diff_guidance_scale
            conds["guidance"] = comfy.conds.CONDRegular(torch.tensor([float(scale)]))
        return conds

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, list[int]]:
        """The prefix, for the estimate before sampling."""
        edit: Edit | None = kwargs.get(KEY)
        return {} if edit is None else {"prefix": [1, edit.prefix_length()]}

    def memory_required(self, input_shape: list[int], cond_shapes: dict[str, list] | None = None) -> int:
        """Bytes of a step beside the weights; see `working_memory`."""
        shapes = cond_shapes or {}
        tokens = max((shape[1] for name in ("ids", "prefix") for shape in shapes.get(name, ())), default=0)
        if "ids" not in shapes:
            tokens += input_shape[-1] * input_shape[-2]
        return working_memory(self.diffusion_model, self.get_dtype_inference(), input_shape[0], tokens)


class HostConfig(comfy.supported_models_base.BASE):
    """What the host asks of a kind of model."""

    unet_extra_config = {}
    supported_inference_dtypes = [torch.bfloat16, torch.float32]

    def __init__(self, config: BaseConfig):
        self.latent_format = partial(Latent, config.vae)
        self.sampling_settings = {"shift": config.sampling.flow_shift, "multiplier": 1000}
        super().__init__({"image_model": "hunyuan_image3", "config": config})

    def get_model(
        self, state_dict: dict[str, Tensor], prefix: str = "", device: torch.device | None = None
    ) -> HostModel:
        return HostModel(self, device=device)


def working_memory(decoder: HunyuanImage3, dtype: torch.dtype, rows: int, tokens: int) -> int:
    """Bytes that one forward takes beside the model's own weights: keys and values of the prefix, the tokens' activations,
    the rows that a chunk of them makes in the experts, and the banks of two layers, one in use and one on its way, as they
    are stored. Derived, not measured.
    """
    config = decoder.config
    number = comfy.model_management.dtype_size(dtype)
    head_numbers = config.num_key_value_heads * config.attention_head_dim
    cache = 2 * head_numbers * config.num_hidden_layers * number
    activations = 8 * config.hidden_size * number + config.qkv_features * (3 * 4 + number)
    chunk = min(tokens * rows * config.moe_topk, ROWS_AT_ONCE)
    expert_rows = chunk * 2 * (config.hidden_size + config.moe_intermediate_size) * number
    banks = 2 * decoder.model.layers[0].mlp.experts.stored_bytes()
    return rows * tokens * (cache + activations) + expert_rows + banks


def manage(model: HostModel, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Put the model under the host's memory management; every sampling run gets a prefix cache of its own."""
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER, with_prefix_cache)
    return patcher
