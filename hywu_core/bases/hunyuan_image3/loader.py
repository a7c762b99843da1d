"""Loading a HunyuanImage-3 folder: MODEL, VAE and encoder, each under the host's memory management."""

from __future__ import annotations

import logging
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...files.shards import main_dtype
from . import vision
from .base_model import HostConfig, HostModel, manage
from .edit import Encoder
from .files import TOWER, VAE, BaseFiles, decoder_shapes, inspect_base, read_system_prompt
from .sequence import SequenceBuilder
from .tokenizer import Tokenizer
from .vae import LatentVAE


def load(folder: str | Path, weight_dtype: torch.dtype | None = None):
    """Load a base from its folder.

    Args:
        weight_dtype: to keep unquantised weights in; None keeps what is stored where the device can use it.
    Returns:
        (MODEL, VAE, Encoder).
    Raises:
        CheckpointError: see `inspect_base`, `read_system_prompt` and `Tokenizer.read`.
    """
    files = inspect_base(folder)
    tokenizer, prompt = Tokenizer.read(files.folder, files.config), read_system_prompt(files.folder)
    if files.config.distilled:
        logging.warning(
            "HY-WU: %s is Instruct-Distil. The released generator was trained for Instruct; with Distil it is experimental.",
            files.folder.name,
        )
    model = _model_of(files, weight_dtype)
    vae = LatentVAE(files.part(VAE, strip=VAE), files.config.vae)
    builder = SequenceBuilder(
        tokenizer, files.config.max_num_patches, files.config.distilled, files.config.sampling.drop_think
    )
    tower, dtype = load_tower(files, weight_dtype)
    return model, vae, Encoder(builder, files.config, tower, dtype, vae, prompt)


def load_model(folder: str | Path, weight_dtype: torch.dtype | None = None, disable_dynamic: bool = False):
    """The diffusion model alone, as a MODEL that the host can load again by itself."""
    return _model_of(inspect_base(folder), weight_dtype, disable_dynamic)


def _model_of(files: BaseFiles, weight_dtype: torch.dtype | None, disable_dynamic: bool = False):
    device, management = comfy.model_management.get_torch_device(), comfy.model_management
    host = HostConfig(files.config)
    supported = host.supported_inference_dtypes
    parameters = sum(torch.Size(header.shape).numel() for header in files.headers.values())
    if files.quantised:
        host.quant_config = {"mixed_ops": True}
        dtype = weight_dtype or management.unet_dtype(device, parameters, supported)
        # the host's layers of this kind need to be told what to compute in, even where it is no other dtype
        cast = management.unet_manual_cast(weight_dtype, device, supported) or dtype
    else:
        stored = main_dtype({name: header for name, header in files.headers.items() if name.startswith("model.")})
        dtype = weight_dtype or management.unet_dtype(device, parameters, supported, stored)
        cast = management.unet_manual_cast(dtype, device, supported)
    _check_memory(files, dtype)
    host.set_inference_dtype(dtype, cast, device=device)
    # quantised layers make their weights when they are loaded; others are replaced, so none need be made before
    model = host.get_model({}, device=None if files.quantised else torch.device("meta"))
    _fill(model, files, dtype)
    patcher = manage(model, disable_dynamic)
    patcher.cached_patcher_init = (load_model, (str(files.folder), weight_dtype))
    return patcher


def _check_memory(files: BaseFiles, dtype: torch.dtype) -> None:
    """Refuse what the operating system would end the process for, without a word."""
    needed = files.memory_of_its_own(dtype)
    available = comfy.model_management.get_free_memory(torch.device("cpu"))
    if needed > available:
        raise CheckpointError(
            f"{files.folder} needs {needed / 1e9:.1f} GB of memory for its experts, which are stacked when it is loaded, but "
            f"{available / 1e9:.1f} GB are available. Convert it once, and choose the new folder: its weights stay on the "
            f"disk until they are used. Run: python scripts/convert_hunyuan_image3.py {files.folder} "
            f"{files.folder}-fp8 --format fp8"
        )


def load_tower(
    files: BaseFiles, weight_dtype: torch.dtype | None
) -> tuple[comfy.model_patcher.ModelPatcher, torch.dtype]:
    """The vision tower and the dtype that it computes in."""
    state = files.part(*TOWER)
    stored = weight_dtype or next(iter(state.values())).dtype
    tower = vision.build(files.config, stored)
    tower.load_state_dict({name: tensor.to(stored) for name, tensor in state.items()}, assign=True)
    patcher = vision.manage(tower)
    supported = HostConfig.supported_inference_dtypes
    return patcher, comfy.model_management.unet_manual_cast(stored, patcher.load_device, supported) or stored


def _fill(model: HostModel, files: BaseFiles, dtype: torch.dtype) -> None:
    """Hand the weights over module by module, with progress; the host's cancel button works between them."""
    decoder = model.diffusion_model
    bar = comfy.utils.ProgressBar(len(decoder_shapes(files.config)))
    for path, tensors in files.decoder_modules(dtype):
        comfy.model_management.throw_exception_if_processing_interrupted()
        _give(decoder.get_submodule(path), path, tensors)
        bar.update(len(tensors))


def _give(module: nn.Module, path: str, tensors: dict[str, Tensor]) -> None:
    """All weights of a module at once: a quantised kind takes what is not given for gone."""
    state = {name.removeprefix(f"{path}."): tensor for name, tensor in tensors.items()}
    missing, unexpected = module.load_state_dict(state, strict=False, assign=True)
    assert not missing and not unexpected, (path, missing, unexpected)  # the census was checked before
    module.requires_grad_(False)
