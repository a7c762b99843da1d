"""The host's `pixel_space` VAE, in float32, which crops to the editor's patches as any VAE crops to its own."""

from __future__ import annotations

import comfy.sd
import torch
from torch import Tensor


class PixelVAE(comfy.sd.VAE):
    """Pictures (B, H, W, 3) in [0, 1] <-> latents (B, 3, H, W) in [-1, 1], lossless but for the crop.

    The editor reads whole patches, so a side that is no multiple of `patch_size` loses at most `patch_size` - 1 pixels.
    """

    def __init__(self, patch_size: int):
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
        self.patch_size = patch_size

    def vae_encode_crop_pixels(self, pixels: Tensor) -> Tensor:
        """Crop around the centre, then drop an alpha channel as the host does."""
        for axis in (1, 2):
            size = pixels.shape[axis]
            kept = size - size % self.patch_size
            pixels = pixels.narrow(axis, (size - kept) // 2, kept)
        return super().vae_encode_crop_pixels(pixels)


def load_vae(patch_size: int) -> PixelVAE:
    """The VAE, made anew. It has no file: nothing of it is learned."""
    vae = PixelVAE(patch_size)
    vae.patcher.cached_patcher_init = (_load_patcher, (patch_size,))
    return vae


def _load_patcher(patch_size: int, disable_dynamic: bool = False):
    return PixelVAE(patch_size).patcher  # the host never makes this patcher a dynamic one
