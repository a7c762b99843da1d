"""What the host brings to a generate: its prefetch of a block's weights, its rotation kernel, its word on free memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.ldm.flux.math
import comfy.model_management
import comfy.model_patcher
import comfy.model_prefetch
import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor, TensorWiseINT8Layout
from torch import Tensor, nn

from ..chunked import Engine
from ..config import GeneratorConfig
from ..errors import GenerationError
from ..plan import plan
from ..transformer import REAL, Block, Rotation


@contextmanager
def engine(patcher: comfy.model_patcher.ModelPatcher, config: GeneratorConfig, dtype: torch.dtype) -> Iterator[Engine]:
    """For one run, in `dtype`, of a generator that the host has loaded."""
    device, dynamic = patcher.load_device, patcher.is_dynamic()
    # the host's plain version of its kernel is slower on a CPU than one complex product a pair
    rotation = None if comfy.model_management.is_device_cpu(device) else Rotation(REAL.table, _turn)
    run = Engine(rotation=rotation, is_out_of_memory=comfy.model_management.is_oom)
    blocks = list(patcher.model.model.blocks)
    queue = comfy.model_prefetch.make_prefetch_queue(blocks, device, {"prefetch_dynamic_vbars": dynamic})
    # with streams but no prefetch, dynamic weights that do not stay resident share one buffer and cannot be held together
    if queue is not None or not dynamic or comfy.model_management.NUM_STREAMS == 0:
        run = run._replace(hold=_Holder(config, queue, dynamic, device, dtype).hold)
    try:
        yield run
        comfy.model_prefetch.prefetch_queue_pop(queue, device, None)
    finally:
        if queue is not None:
            comfy.model_prefetch.cleanup_prefetch_queues()


def room_for(config: GeneratorConfig, batch: int, length: int, dtype: torch.dtype) -> int:
    """Bytes to ask of the host before a run: for the work, and for a block that is held while it works."""
    planned = plan(config, batch, length, dtype)
    return planned.peak + planned.block


def chunk_bytes(device: torch.device, config: GeneratorConfig, batch: int, length: int, dtype: torch.dtype) -> int:
    """How much a run may work on at once in the memory that is free now, the weights being loaded."""
    planned = plan(config, batch, length, dtype)
    if comfy.model_management.is_device_cpu(device):
        return planned.chunk
    free = comfy.model_management.get_free_memory(device) - planned.block
    # never less than was asked for: dynamic weights fill what is free, and give way
    return max(planned.chunk, plan(config, batch, length, dtype, budget=planned.weights + free).chunk)


def refuse_beyond(device: torch.device, needed: int, what: str, remedy: str) -> None:
    """
    Raises:
        GenerationError: if all memory of a device is less than is needed, before the work begins that would end so.
    """
    total = comfy.model_management.get_total_memory(device)
    if needed > total:
        raise GenerationError(
            f"{what} needs about {needed / 1e9:,.0f} GB, but {device} has {total / 1e9:,.0f} GB in all. {remedy}"
        )


class _Holder:
    """Lends each block as plain layers whose weights were brought to the device once."""

    def __init__(
        self, config: GeneratorConfig, queue: list | None, dynamic: bool, device: torch.device, dtype: torch.dtype
    ):
        self.config, self.queue, self.dynamic, self.device, self.dtype = config, queue, dynamic, device, dtype

    @contextmanager
    def hold(self, block: Block) -> Iterator[Block]:
        """The same block in plain layers, until the context ends."""
        comfy.model_prefetch.prefetch_queue_pop(self.queue, self.device, block)
        plain, fetched = Block(self.config, nn, device="meta"), []
        try:
            for name, layer in block.named_modules():
                if layer._parameters:
                    fetched.append((layer, *self._fetch(layer)))
                    _lend(plain.get_submodule(name), *fetched[-1][1:3])
            yield plain
        finally:
            # whoever still knows the plain block must not keep these weights alive beside the next block's
            for layer in plain.modules():
                layer._parameters.clear()
            for layer, weight, bias, stream in fetched:
                comfy.ops.uncast_bias_weight(layer, weight, bias, stream)

    def _fetch(self, layer: nn.Module) -> tuple[Tensor, Tensor | None, tuple | None]:
        """A layer's weight and bias on the device, as tensors that no other layer's will overwrite."""
        if not hasattr(layer, "comfy_cast_weights"):
            # a plain layer, of a generator that was trained here
            bias = getattr(layer, "bias", None)
            bias = None if bias is None else bias.to(self.device, self.dtype)
            return layer.weight.to(self.device, self.dtype), bias, None
        types = {"dtype": self.dtype, "device": self.device, "bias_dtype": self.dtype}
        if self.dynamic:
            return comfy.ops.cast_bias_weight(layer, **types, offloadable=True)
        # not offloadable: those share one buffer a stream
        return *comfy.ops.cast_bias_weight(layer, **types), None


def _lend(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    if isinstance(weight, QuantizedTensor) and not _multiplies(weight):
        weight = weight.dequantize()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)


def _multiplies(weight: QuantizedTensor) -> bool:
    """Whether the device multiplies with it as it is, and what it is multiplied with keeps its own scale for each row."""
    return issubclass(weight.layout_cls, TensorWiseINT8Layout) and weight.layout_cls.supports_fast_matmul()


def _turn(heads: Tensor, table: Tensor) -> Tensor:
    """The host's kernel, which takes one leading axis."""
    turned = comfy.ldm.flux.math.apply_rope1(heads.flatten(0, -4), table[None, None])
    return turned.unflatten(0, heads.shape[:-3])
