"""The autoencoder: the host's own encoder and decoder in the sizes that the base's config.json names, as a stock VAE."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from comfy.ldm.models.autoencoder import AutoencodingEngine
from torch import Tensor

from .config import VaeConfig

BYTES_PER_PIXEL = 6000  # of decoding, times the bytes of a number; twice what the host assumes for this autoencoder
ENGINE = "comfy.ldm.hunyuan_video.vae_refiner"
REGULARIZER = "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"


class Latent(comfy.latent_formats.LatentFormat):
    """The base's latents: one frame, the autoencoder's times a factor."""

    latent_dimensions = 3

    def __init__(self, config: VaeConfig):
        self.latent_channels = config.latent_channels
        self.spacial_downscale_ratio = config.ffactor_spatial
        self.scale_factor = config.scaling_factor


class LatentVAE(comfy.sd.VAE):
    """Pictures (B, H, W, 3) in [0, 1] <-> latents (B, C, 1, H / 16, W / 16)."""

    def __init__(self, state: Mapping[str, Tensor], config: VaeConfig, dtype: torch.dtype | None = None):
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)  # the host's defaults
        spatial, temporal = config.ffactor_spatial, config.ffactor_temporal
        self.latent_channels, self.latent_dim, self.not_video = config.latent_channels, 3, True
        self.upscale_ratio = (lambda frames: max(0, frames * temporal - temporal + 1), spatial, spatial)
        self.upscale_index_formula = (temporal, spatial, spatial)
        self.downscale_ratio = (lambda frames: math.floor((frames + temporal - 1) / temporal), spatial, spatial)
        self.downscale_index_formula = (temporal, spatial, spatial)
        self.disable_offload, self.working_dtypes = False, [torch.float16, torch.bfloat16, torch.float32]
        self.memory_used_encode = lambda shape, dtype: BYTES_PER_PIXEL * _area(shape, 1) * _size(dtype)
        self.memory_used_decode = lambda shape, dtype: BYTES_PER_PIXEL * _area(shape, spatial) * _size(dtype)
        self._load(_engine(config), state, dtype)

    def sample_posterior(self, picture: Tensor, source: torch.Generator) -> Tensor:
        """A latent drawn from the posterior, not its mode, as the reference does: picture (1, H, W, 3) -> (1, C, 1, h, w)."""
        pixels = self.process_input(self.vae_encode_crop_pixels(picture)).movedim(-1, 1).unsqueeze(2)
        room = self.memory_used_encode(pixels.shape, self.vae_dtype)
        comfy.model_management.load_models_gpu([self.patcher], memory_required=room)
        moments = self.first_stage_model.encoder(pixels.to(self.device, self.vae_dtype))
        mean, logvar = moments.to(self.output_device, torch.float32).chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=source).to(mean)
        return mean + (0.5 * logvar.clamp(-30.0, 20.0)).exp() * noise

    def _load(self, engine: AutoencodingEngine, state: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
        management = comfy.model_management
        self.vae_dtype = dtype or management.vae_dtype(self.device, self.working_dtypes)
        self.first_stage_model = engine.eval().requires_grad_(False).to(self.vae_dtype)
        self.patcher = comfy.model_patcher.CoreModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=management.vae_offload_device()
        )
        self.first_stage_model.load_state_dict(dict(state), strict=False, assign=self.patcher.is_dynamic())
        management.archive_model_dtypes(self.first_stage_model)
        self.size = None
        self.model_size()


def expected_shapes(config: VaeConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the weights that a file must have."""
    with torch.device("meta"):
        engine = _engine(config)
    return {name: tuple(t.shape) for name, t in engine.state_dict().items() if ".temb_proj." not in name}


def _engine(config: VaeConfig) -> AutoencodingEngine:
    sizes = asdict(config) | {
        "in_channels": 3,
        "out_channels": 3,
        "z_channels": config.latent_channels,
        "num_res_blocks": config.layers_per_block,
        "refiner_vae": False,
    }
    return AutoencodingEngine(
        regularizer_config={"target": REGULARIZER},
        encoder_config={"target": f"{ENGINE}.Encoder", "params": sizes},
        decoder_config={"target": f"{ENGINE}.Decoder", "params": sizes},
    )


def _area(shape, factor: int) -> int:
    return shape[0] * shape[-2] * shape[-1] * factor * factor


def _size(dtype: torch.dtype) -> int:
    return comfy.model_management.dtype_size(dtype)
