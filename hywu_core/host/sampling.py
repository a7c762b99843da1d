"""Pictures from a MODEL through the host's own sampler, for evaluation and validation."""

from __future__ import annotations

import comfy.model_patcher
import comfy.sample
import torch
from torch import Tensor


def sample(
    model: comfy.model_patcher.ModelPatcher,
    conditioning: list,
    like: Tensor,
    steps: int = 8,
    seed: int = 0,
    sampler: str = "euler",
    scheduler: str = "simple",
) -> Tensor:
    """Sample from noise, without guidance.

    Args:
        conditioning: one CONDITIONING; its tensors may hold one row for each sample.
        like: latents (B, C, ..., H, W) whose shape is wanted; their values are not used.
        seed: sample i of the batch gets the same noise whatever the size of the batch.
    Returns:
        latents of that shape, on the host's intermediate device.
    """
    empty = torch.zeros_like(like, device="cpu")
    source = torch.Generator().manual_seed(seed)
    noise = torch.stack([torch.randn(like.shape[1:], generator=source) for _ in range(len(like))])
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            noise,
            steps,
            1.0,
            sampler,
            scheduler,
            conditioning,
            conditioning,
            empty,
            disable_pbar=True,
            seed=seed,
        ).clone()
