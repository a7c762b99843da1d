"""A generator under the host's memory management: loaded lazily, offloaded and counted like any other model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ..condition import OF_THE_BASE, Condition, assemble
from ..config import GeneratorConfig
from ..errors import ConditionError
from ..files import safetensors
from ..files.checkpoint import GeneratorFiles, fingerprint, inspect_generator, save_generator
from ..files.lora_cache import LoraCache, key_of
from ..files.names import below
from ..files.quantised import FP8, INT8, KEPT_AS, plain, quantised
from ..generator import Generator
from ..layout import lora_elements
from ..lora import INSTRUCTIONS, InstanceLora, finite
from ..plan import plan, summary
from ..training.memory import graph_bytes
from ..training.trainable import concatenate, instances
from . import engine
from .conditions import from_host
from .folders import FOLDER, SUFFIX
from .mapped import mapped_by_host
from .new_generator import generator_config

WEIGHT_DTYPES = {
    "default": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3fn": FP8,
    "int8": INT8,
}

# what weights that are stored otherwise are computed in: a generator is trained in bfloat16 and overflows in float16
COMPUTE_DTYPES = [torch.bfloat16, torch.float32]

SAVE_DTYPES = {
    "as trained": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": INT8,
    "fp8_e4m3fn": FP8,
}

EXAMPLE_LENGTH = 4096  # of a condition, to say what a generator needs


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


class Fresh:
    """Whether a LoRA was generated, or read from the disk."""

    def __init__(self):
        self.made = False


def describe(handle: GeneratorHandle) -> str:
    """One line for an artist: how large a generator is, what it writes, and what it needs to."""
    needed = plan(handle.config, 1, EXAMPLE_LENGTH, handle.compute_dtype)
    return (
        f"{summary(handle.config, handle.patcher.model_size())}, {needed.peak / 1e9:.1f} GB to generate from a condition of "
        f"{EXAMPLE_LENGTH:,} tokens"
    )


def describe_new(handle: GeneratorHandle) -> str:
    """One line for an artist: how large a generator is, what it writes, and what a pair takes while it is trained."""
    graph = graph_bytes(handle.config, EXAMPLE_LENGTH, torch.float32, recomputed=True)
    return (
        f"{summary(handle.config, handle.patcher.model_size())}, {graph / 1e9:.1f} GB for each pair that it is trained on at "
        f"a time, with gradient_checkpointing and a condition of {EXAMPLE_LENGTH:,} tokens"
    )


def load(path: Path, weight_dtype: torch.dtype | str | None = None) -> GeneratorHandle:
    """Check a generator's files and hand its memory-mapped weights to a patcher. The device is touched only on use.

    Args:
        weight_dtype: to keep the weights in; None keeps what is stored; one of `quantised.STORED` quantises the matrices of
            the blocks.
    Raises:
        CheckpointError, ConfigError: see `inspect_generator`.
    """
    files = inspect_generator(path)
    generator = _built(files, weight_dtype)
    known = fingerprint(files.config, generator.state_dict())
    compute_dtype = _compute_dtype(_kept_dtype(files, weight_dtype))
    patcher = _reloadable(generator, path, weight_dtype)
    return GeneratorHandle(patcher, files.config, compute_dtype, files.path.name, known)


def wrap(generator: Generator, name: str) -> GeneratorHandle:
    """Put a generator that was built or trained in memory under the host's memory management."""
    dtype, known = next(generator.parameters()).dtype, fingerprint(generator.config, generator.state_dict())
    return GeneratorHandle(_manage(generator), generator.config, _compute_dtype(dtype), name, known)


def new_for(
    model: comfy.model_patcher.ModelPatcher,
    example: Condition | list,
    condition_source: str,
    seed: int,
    **settings: Any,
) -> GeneratorHandle:
    """A fresh generator for a MODEL.

    Args:
        example: a CONDITIONING, or a Condition, as training will give them.
        condition_source: one of `condition.SOURCES`; settings: see `new_generator.generator_config`.
    Raises:
        StackError, ConfigError: see there. ConditionError: if the example is no single condition.
    """
    if not isinstance(example, Condition):
        example = from_host(example, model=model if condition_source == OF_THE_BASE else None)
    config = generator_config(model.model, example, source=condition_source, **settings)
    with torch.inference_mode(False):
        return new(config, seed)


def new(config: GeneratorConfig, seed: int) -> GeneratorHandle:
    """A fresh generator, before its first training step: it writes LoRAs that change nothing yet."""
    return from_state(config, Generator(config, dtype=torch.float32).initialize(seed).state_dict(), "new generator")


def from_state(config: GeneratorConfig, state: Mapping[str, Tensor], name: str) -> GeneratorHandle:
    """A generator of these weights. They are copied."""
    generator = Generator(config, operations=comfy.ops.manual_cast, device="meta")
    generator.load_state_dict({key: tensor.detach().to("cpu", copy=True) for key, tensor in state.items()}, assign=True)
    return wrap(generator, name)


def trainable_copy(handle: GeneratorHandle) -> Generator:
    """The same generator in float32 on the CPU, with weights of its own that can be trained."""
    with torch.inference_mode(False):
        copy = Generator(handle.config, device="meta")
        state = plain(handle.generator.state_dict(), torch.float32)
        own = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
        copy.load_state_dict(own, assign=True)
        return copy.requires_grad_(True)


def manage_training(generator: Generator) -> comfy.model_patcher.ModelPatcher:
    """A generator that is being trained, under the host's memory management, its weights always whole."""
    patcher = _manage(generator, disable_dynamic=True)
    generator.requires_grad_(True)
    return patcher


def generate(
    handle: GeneratorHandle,
    condition: Condition,
    keep_gb: float = 0.0,
    more: Sequence[Condition] = (),
    fresh: Fresh | None = None,
) -> InstanceLora:
    """Write the LoRA of a condition. Shows progress; the host's cancel button works between chunks.

    Args:
        keep_gb: GB of the disk that generated LoRAs may take, to be read when they are asked for again; 0: none.
        more: further conditions, of any lengths. Their instances follow in the same batch, and the generator's weights are
            brought to the device once for all of them.
        fresh: is told whether anything was generated now.
    Returns:
        factors on the host's intermediate device, each layer moved there as soon as it is ready.
    Raises:
        ConditionError, GenerationError: see `Generator.generate`.
    """
    conditions = [condition, *more]
    tokens = [assemble(one, handle.config) for one in conditions]
    if not all(map(finite, tokens)):
        raise ConditionError("The condition holds NaN or infinity. The text or image encoder that made it overflowed.")
    bar = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        bar = bar or comfy.utils.ProgressBar(total)
        bar.update_absolute(done, total)

    def make(asked: Sequence[Tensor]) -> InstanceLora:
        if fresh is not None:
            fresh.made = True
        return write(handle, asked, progress)

    if keep_gb:
        lora = _kept(handle, tokens, int(keep_gb * 1e9), make)
    else:
        lora = make(tokens)
    instructions = [one.instruction for one, laid in zip(conditions, tokens, strict=True) for _ in laid]
    told = {INSTRUCTIONS: instructions} if more else {"instruction": condition.instruction}
    return lora.with_metadata(**told, generator=handle.name)


def _kept(
    handle: GeneratorHandle, tokens: Sequence[Tensor], limit: int, make: Callable[[Sequence[Tensor]], InstanceLora]
) -> InstanceLora:
    """What is made for assembled conditions, each read from the disk if it is there and kept there if it is not."""

    def missing(places: Sequence[int]) -> list[InstanceLora]:
        asked = [tokens[place] for place in places]
        ends = list(accumulate(one.shape[0] for one in asked))
        written = make(asked)
        return [instances(written, slice(end - one.shape[0], end)) for one, end in zip(asked, ends, strict=True)]

    keys = [key_of(one, handle.fingerprint, str(handle.compute_dtype)) for one in tokens]
    loras = LoraCache(folder_paths.get_system_user_directory(FOLDER), limit).get_all(keys, missing)
    if len(loras) == 1:
        return loras[0]
    return concatenate([lora.to(comfy.model_management.intermediate_device()) for lora in loras])


def write(
    handle: GeneratorHandle, tokens: Tensor | Sequence[Tensor], progress: Callable[[int, int], None] | None = None
) -> InstanceLora:
    """Write the LoRA of an assembled condition (B, L, input_dim), or of several as one batch; the host's cancel button works
    between chunks.
    """
    given = [tokens] if isinstance(tokens, Tensor) else tokens
    lengths = [one.shape[1] for one in given for _ in range(one.shape[0])]
    asked = handle.config, len(lengths), lengths, handle.compute_dtype
    device, room = handle.patcher.load_device, engine.room_for(*asked)
    what, remedy = f"Generating {len(lengths)} LoRAs at once", "Generate fewer at a time, or from smaller pictures."
    engine.refuse_beyond(device, room, what, remedy)
    result = len(lengths) * lora_elements(handle.config) * handle.compute_dtype.itemsize
    engine.refuse_beyond(comfy.model_management.intermediate_device(), result, what, remedy)
    comfy.model_management.load_models_gpu([handle.patcher], memory_required=room)

    def interruptible(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if progress:
            progress(done, total)

    with engine.engine(handle.patcher, handle.config, handle.compute_dtype) as run:
        lora = handle.generator.generate(
            [one.to(device, handle.compute_dtype) for one in given],
            dtype=handle.compute_dtype,
            result_device=comfy.model_management.intermediate_device(),
            chunk_bytes=engine.chunk_bytes(device, *asked),
            progress=interruptible,
            engine=run,
        )
    return lora.with_metadata(generator=handle.name, generator_hash=handle.fingerprint)


def save(handle: GeneratorHandle, name: str, dtype: torch.dtype | str | None = None) -> Path:
    """Write a generator as one file. One of the same name stays; the new one is numbered.

    Raises:
        SaveError: if the name cannot be one, or the file cannot be written; nothing is left half-written then.
    """
    return save_generator(handle.generator, _free_path(name), dtype)


def _patcher(
    path: str | Path, weight_dtype: torch.dtype | str | None, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    return _reloadable(_built(inspect_generator(path), weight_dtype), path, weight_dtype, disable_dynamic)


def _reloadable(
    generator: Generator, path: str | Path, weight_dtype: torch.dtype | str | None, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    patcher = _manage(generator, disable_dynamic)
    patcher.cached_patcher_init = (_patcher, (path, weight_dtype))
    return patcher


def _built(files: GeneratorFiles, weight_dtype: torch.dtype | str | None) -> Generator:
    """The module over the file's tensors, in the host's layers: its quantised ones where the blocks' matrices are."""
    state, kept = _state(files), _kept_dtype(files, weight_dtype)
    kind = files.quantised if weight_dtype is None else weight_dtype if isinstance(weight_dtype, str) else None
    if kind is None:
        generator = Generator(files.config, operations=comfy.ops.manual_cast, device="meta", dtype=kept)
        generator.load_state_dict(plain(state, kept), assign=True)
        return generator
    if kind != files.quantised:
        state = dict(quantised(plain(state), kind))
    operations = comfy.ops.mixed_precision_ops(compute_dtype=_compute_dtype(kept), disabled={FP8})
    generator = Generator(files.config, operations=operations, device="cpu", dtype=kept)
    generator.load_state_dict(state, assign=True)
    return generator


def _state(files: GeneratorFiles) -> dict[str, Tensor]:
    """Every tensor by name, memory-mapped, by the host where that is of use to it."""
    if not safetensors.keep_mapped():
        return dict(files.tensors())
    state: dict[str, Tensor] = {}
    for shard, names in files.shards.items():
        mapped = mapped_by_host(shard)
        if mapped is None:
            return dict(files.tensors())
        state |= {name: mapped[name] for name in names}
    return state


def _kept_dtype(files: GeneratorFiles, weight_dtype: torch.dtype | str | None) -> torch.dtype:
    """What is not quantised is kept in."""
    if isinstance(weight_dtype, str) and files.quantised is None:
        return min(files.dtype, KEPT_AS, key=lambda dtype: dtype.itemsize)
    return weight_dtype if isinstance(weight_dtype, torch.dtype) else files.dtype


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
    return comfy.model_management.unet_manual_cast(weight_dtype, device, COMPUTE_DTYPES) or weight_dtype


def _free_path(name: str) -> Path:
    path = below(folder_paths.get_folder_paths(FOLDER)[0], name.strip().removesuffix(SUFFIX), "a generator")
    candidate, number = path.with_name(path.name + SUFFIX), 1
    while os.path.exists(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}{SUFFIX}")
    return candidate
