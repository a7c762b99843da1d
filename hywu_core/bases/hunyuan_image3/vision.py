"""The vision tower: the host's SigLIP2, with the padding slots that the base was trained with, and the aligner behind it.

The base reads a fixed number of slots for each picture. What the tower gives for an unused slot is not nothing: it is a patch
of zeros that sees the whole picture, and all of them are equal. So one of them is computed and repeated.
Source: reference fact 5.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import comfy.clip_model
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import BaseConfig
from .image_ends import Aligner
from .sequence import Grid

MEAN = STD = 0.5


class VisionTower(nn.Module):
    """Pictures to tokens of the base."""

    def __init__(self, config: BaseConfig, operations: Any, device=None, dtype=None):
        super().__init__()
        vision = asdict(config.vision) | {"model_type": "siglip2_vision_model", "image_size": -1}
        self.vision_model = comfy.clip_model.CLIPVision(vision, dtype, device, operations)
        self.vision_aligner = Aligner(
            config.vision.hidden_size, config.hidden_size, operations, device=device, dtype=dtype
        )
        self.slots, self.patch_size = config.max_num_patches, config.vision.patch_size
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = config.vision.layer_norm_eps  # the host's is for other towers

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (1, 3, height, width), normalised, whole patches -> (1, slots, H)."""
        return self.vision_aligner(self.features(pixels))

    def features(self, pixels: Tensor) -> Tensor:
        """pixels (1, 3, height, width) -> (1, slots, features)."""
        tower = self.vision_model
        x, mask = tower.embeddings(pixels), None
        used = x.shape[1]
        if used < self.slots:
            x = torch.cat((x, self._empty_slot(pixels)), dim=1)
            mask = x.new_zeros(used + 1, used + 1)
            mask[:, used] = torch.finfo(x.dtype).min  # seen by nobody
        x = tower.post_layernorm(tower.encoder(x, mask=mask)[0])
        empty = x[:, used:].expand(-1, self.slots - used, -1) if used < self.slots else x[:, used:]
        return torch.cat((x[:, :used], empty), dim=1)

    def _empty_slot(self, pixels: Tensor) -> Tensor:
        """A patch of zeros at the first place of the picture's grid."""
        first = self.vision_model.embeddings(torch.zeros_like(pixels))
        return first[:, :1]


def preprocess(picture: Tensor, config: BaseConfig) -> tuple[Tensor, Grid]:
    """A picture (1, height, width, 3) in [0, 1] of any size -> pixels (1, 3, height', width') and the grid of its patches.

    The size is the host's rule. Pixels are scaled as 8-bit numbers, as in the reference: fractions of 255 round differently.
    """
    side = config.vision.patch_size
    size = comfy.clip_model.siglip2_flex_calc_resolution(*picture.shape[1:3], side, config.max_num_patches)
    levels = (picture.movedim(-1, 1) * 255).round()
    levels = F.interpolate(levels, size=size, mode="bilinear", antialias=True).clamp(0, 255).round()
    return (levels / 255 - MEAN) / STD, (size[0] // side, size[1] // side)


def look(patcher: comfy.model_patcher.ModelPatcher, pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Run the tower under the host's memory management: pixels (1, 3, height, width) -> (1, slots, H), on the host's
    intermediate device.
    """
    tower: VisionTower = patcher.model
    width = tower.vision_model.post_layernorm.normalized_shape[0]
    room = 32 * tower.slots * width * comfy.model_management.dtype_size(dtype)
    comfy.model_management.load_models_gpu([patcher], memory_required=room)
    return tower(pixels.to(patcher.load_device, dtype)).to(comfy.model_management.intermediate_device())


def manage(tower: VisionTower) -> comfy.model_patcher.ModelPatcher:
    """Put a tower under the host's memory management."""
    return comfy.model_patcher.CoreModelPatcher(
        tower.requires_grad_(False).eval(),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.text_encoder_offload_device(),
    )


def build(config: BaseConfig, dtype: torch.dtype) -> VisionTower:
    """A tower without weights, to load a state dict into with assign=True."""
    return VisionTower(config, comfy.ops.manual_cast, device="meta", dtype=dtype)
