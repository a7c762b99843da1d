"""A generator under the host's memory management: loaded lazily, offloaded and counted like any other model."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch

from ..checkpoint import inspect_generator
from ..chunked import memory_required
from ..condition import Condition, assemble
from ..config import GeneratorConfig
from ..errors import ConditionError
from ..generator import Generator
from ..lora import InstanceLora

WEIGHT_DTYPES = {
    "default": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}


class GeneratorHandle(NamedTuple):
    """What travels between nodes: a patcher that owns the weights, and what the generator is."""

    patcher: comfy.model_patcher.ModelPatcher
    config: GeneratorConfig
    compute_dtype: torch.dtype
    name: str
    fingerprint: str

    @property
    def generator(self) -> Generator:
        """The module; its weights are wherever the host put them."""
        return self.patcher.model


def load(path: Path, weight_dtype: torch.dtype | None = None) -> GeneratorHandle:
    """Check a generator's files and hand its memory-mapped weights to a patcher. The device is touched only on use.

    Args:
        weight_dtype: to keep the weights in; None keeps what is stored.
    Raises:
        CheckpointError, ConfigError: see `inspect_generator`.
    """
    files = inspect_generator(path)
    dtype = weight_dtype or files.dtype
    patcher = _patcher(path, dtype)
    return GeneratorHandle(patcher, files.config, _compute_dtype(dtype), files.path.name, files.fingerprint)


def wrap(generator: Generator, name: str, fingerprint: str) -> GeneratorHandle:
    """Put a generator that was built or trained in memory under the host's memory management."""
    dtype = next(generator.parameters()).dtype
    return GeneratorHandle(_manage(generator), generator.config, _compute_dtype(dtype), name, fingerprint)


def generate(handle: GeneratorHandle, condition: Condition) -> InstanceLora:
    """Write the LoRA of a condition. Shows progress; the host's cancel button works between chunks.

    Returns:
        factors on the host's intermediate device, each layer moved there as soon as it is ready.
    Raises:
        ConditionError, GenerationError: see `Generator.generate`.
    """
    tokens = assemble(condition, handle.config)
    if not torch.isfinite(tokens).all():
        raise ConditionError("The condition holds NaN or infinity. The text or image encoder that made it overflowed.")
    batch, length = tokens.shape[:2]
    room = memory_required(handle.generator, batch, length, handle.compute_dtype)
    comfy.model_management.load_models_gpu([handle.patcher], memory_required=room)

    bar = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar = bar or comfy.utils.ProgressBar(total)
        bar.update_absolute(done, total)

    lora = handle.generator.generate(
        tokens.to(handle.patcher.load_device),
        dtype=handle.compute_dtype,
        result_device=comfy.model_management.intermediate_device(),
        progress=progress,
    )
    return lora.with_metadata(
        generator=handle.name, generator_hash=handle.fingerprint, instruction=condition.instruction
    )


def _patcher(path: str | Path, dtype: torch.dtype, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    files = inspect_generator(path)
    generator = Generator(files.config, operations=comfy.ops.manual_cast, device="meta", dtype=dtype)
    state = {name: tensor.to(dtype) for name, tensor in files.tensors()}
    generator.load_state_dict(state, assign=True)
    patcher = _manage(generator, disable_dynamic)
    patcher.cached_patcher_init = (_patcher, (path, dtype))
    return patcher


def _manage(generator: Generator, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    generator.requires_grad_(False)
    patcher = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    return patcher(
        generator,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def _compute_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    device = comfy.model_management.get_torch_device()
    return comfy.model_management.unet_manual_cast(weight_dtype, device) or weight_dtype
