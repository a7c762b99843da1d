"""The pocket editor's diffusion model: ComfyUI's own Flux, small, in pixel space, with Kontext-style reference latents.

Nothing of the architecture is defined here. The host's model detection reads what a state dict shows, `EditorConfig` adds
what it cannot show (patch size, heads, rotary axes), and the host's `Flux` and `model_base.Flux` do the rest.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.ldm.flux.model
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch
from torch import Tensor

from ...errors import CheckpointError
from ...files.safetensors import open_safetensors, write_safetensors
from ...files.text import parse_json

CONFIG_KEY = "pocket_editor_config"  # of the file's metadata
FLUX_WIDTH, FLUX_PATCH = 3072, 2  # what the host's memory estimate for Flux was measured on, patch in latent pixels


@dataclass(frozen=True)
class EditorConfig:
    """Sizes of the pocket editor. The defaults are what ships: 2.5 M parameters."""

    width: int = 128  # of the token stream
    heads: int = 4
    depth: int = 4  # double blocks; there are no single blocks
    patch_size: int = 4  # pixels; pictures are cropped to a multiple of it
    context_dim: int = 64  # width of the text encoder's tokens and of its pooled vector
    axes_dim: tuple[int, int, int] = (8, 12, 12)  # rotary numbers per head for (picture index, row, column)

    def detected(self, state: dict[str, Tensor]) -> dict[str, Any]:
        """The host's unet_config for these weights, with what no weight's shape shows taken from here."""
        found = comfy.model_detection.detect_unet_config(state, "")
        if found is None or found.get("image_model") != "flux":
            raise CheckpointError(
                "These are not the weights of a pocket editor: the host does not detect a Flux model."
            )
        return found | {
            "in_channels": 3,
            "out_channels": 3,
            "patch_size": self.patch_size,
            "num_heads": self.heads,
            "axes_dim": list(self.axes_dim),
        }


class PixelFlux(comfy.supported_models.FluxSchnell):
    """The host's guidance-free flow-matching Flux over RGB in [-1, 1] instead of a VAE's latent."""

    latent_format = comfy.latent_formats.ChromaRadiance  # 3 channels, unscaled, one latent pixel per pixel

    def __init__(self, unet_config: dict[str, Any]):
        super().__init__(unet_config)
        tokens = (FLUX_PATCH / unet_config["patch_size"]) ** 2
        self.memory_usage_factor *= tokens * unet_config["hidden_size"] / FLUX_WIDTH


def build_editor(config: EditorConfig | None = None, seed: int = 0):
    """A freshly initialised editor as a MODEL, for training. The same seed gives the same weights."""
    config = config or EditorConfig()
    return editor_from_state(initial_state(config, seed), config)


def load_editor(path: str | Path, disable_dynamic: bool = False):
    """Load an editor's file as a MODEL that the host can load again by itself.

    Raises:
        CheckpointError: if the file is missing, damaged, or not a pocket editor.
    """
    with open_safetensors(Path(path), CheckpointError) as handle:
        text = (handle.metadata() or {}).get(CONFIG_KEY)
        if text is None:
            raise CheckpointError(
                f"{path} is not a pocket editor: its metadata has no {CONFIG_KEY!r}. Reinstall the pack."
            )
        state = {name: handle.get_tensor(name) for name in handle.keys()}
    values = parse_json(text, f"{path} ({CONFIG_KEY})", CheckpointError)
    try:
        config = EditorConfig(**values | {"axes_dim": tuple(values["axes_dim"])})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a pocket editor: its {CONFIG_KEY} is damaged ({error!r}).") from None
    patcher = editor_from_state(state, config, disable_dynamic)
    patcher.cached_patcher_init = (load_editor, (str(path),))
    return patcher


def save_editor(
    state: dict[str, Tensor],
    config: EditorConfig,
    path: str | Path,
    metadata: dict[str, str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write an editor's file atomically: `state` is the diffusion model's state dict, metadata its provenance."""
    stored = {name: tensor.to(dtype) for name, tensor in state.items()}
    write_safetensors(Path(path), stored, {"format": "pt", **(metadata or {}), CONFIG_KEY: json.dumps(asdict(config))})
    return Path(path)


def editor_from_state(state: dict[str, Tensor], config: EditorConfig, disable_dynamic: bool = False):
    """Wrap weights as a MODEL under the host's memory management, in the dtype that the host chooses.

    Raises:
        CheckpointError: naming every weight that is missing, unexpected or mis-shaped.
    """
    _check_names(state, config)
    management = comfy.model_management
    device = management.get_torch_device()
    model_config = PixelFlux(config.detected(state))
    supported = list(model_config.supported_inference_dtypes)
    parameters = sum(tensor.numel() for tensor in state.values())
    dtype = management.unet_dtype(device, parameters, supported, next(iter(state.values())).dtype)
    model_config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, supported), device=device)
    model = model_config.get_model(state, "")
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=device, offload_device=management.unet_offload_device())
    # in that dtype already: under dynamic VRAM the host's layers keep what they are given
    given = {name: tensor.to(dtype) for name, tensor in state.items()}
    model.load_model_weights(given, "", assign=patcher.is_dynamic())
    return patcher


def initial_state(config: EditorConfig, seed: int) -> dict[str, Tensor]:
    """Seeded float32 weights: matrices N(0, 1/fan_in), norms one, biases zero; modulation and output N(0, 0.02^2).

    Small modulation starts every block near the identity, as DiT's zero initialisation does, yet lets an adapter on any
    of its weights show from the first step.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in _shapes(config).items():
        if len(shape) == 1:
            state[name] = torch.ones(shape) if name.endswith("_norm.weight") else torch.zeros(shape)
        else:
            std = 0.02 if "_mod." in name or name.startswith("final_layer.") else 1 / math.sqrt(shape[1])
            state[name] = torch.randn(shape, generator=generator) * std
    return state


def _shapes(config: EditorConfig) -> dict[str, tuple[int, ...]]:
    """Of torch's own layers: under dynamic VRAM the host's have no weights before they are loaded."""
    flux = comfy.ldm.flux.model.Flux(
        in_channels=3,
        out_channels=3,
        patch_size=config.patch_size,
        hidden_size=config.width,
        num_heads=config.heads,
        depth=config.depth,
        depth_single_blocks=0,
        axes_dim=list(config.axes_dim),
        context_in_dim=config.context_dim,
        vec_in_dim=config.context_dim,
        mlp_ratio=4.0,
        theta=10000,
        qkv_bias=True,
        guidance_embed=False,
        txt_ids_dims=[],
        dtype=torch.float32,
        device="meta",
        operations=torch.nn,
    )
    return {name: tuple(tensor.shape) for name, tensor in flux.state_dict().items()}


def _check_names(state: dict[str, Tensor], config: EditorConfig) -> None:
    expected = _shapes(config)
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in state]
    for name, tensor in state.items():
        if name not in expected:
            problems.append(f"unexpected {name} {list(tensor.shape)}")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(f"{name} has the shape {list(tensor.shape)}, expected {list(expected[name])}")
    if problems:
        raise CheckpointError(f"These are not the weights of this pocket editor: {'; '.join(problems[:8])}.")
