"""The frozen base in a backward pass: nothing of a weight is remembered, and it is fetched again when its turn comes.

So a base may be quantised, offloaded, or streamed through buffers that the host uses again; all of its formats give the
gradient of the weight that they stand for. Activations are not rounded, whatever the device could do with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
import torch.nn.functional as F
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import MatchError
from ..model import layer_of

SMOOTHING = "pre_quant_scale"  # of some quantised layers: what their input is multiplied by


@contextmanager
def frozen(patcher: comfy.model_patcher.ModelPatcher) -> Iterator[None]:
    """For the time of the block, the layers of a base remember no weights."""
    wrapped = []
    try:
        for module in patcher.model.diffusion_model.modules():
            # somebody else's forward knows what it does with the layer's own
            if "forward" in vars(module):
                continue
            forward = _forward(module, patcher)
            if forward is not None:
                wrapped.append(module)
                module.forward = forward
        yield
    finally:
        for module in reversed(wrapped):
            vars(module).pop("forward", None)


def refuse_untrainable(base: Any) -> None:
    """Raises:
    MatchError: for a base whose class says so (`untrainable`, a reason), and naming a part that is quantised in a way that no
        gradient passes through.
    """
    reason = getattr(base, "untrainable", "")
    if reason:
        raise MatchError(f"Generators cannot be trained on this base: {reason}. Train on another base.")
    for path, module in base.diffusion_model.named_modules():
        if is_linear(module):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            narrow = not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2
            if isinstance(parameter.data, QuantizedTensor) or (narrow and not _is_cast(module)):
                raise MatchError(
                    f"{path}.{name} is quantised ({parameter.dtype}) but no linear layer of the host, so no gradient passes "
                    "through it. Train on another version of this base; the generator can then be used with this one."
                )


def is_linear(module: nn.Module) -> bool:
    """Whether it multiplies its input by one matrix, whatever that is stored as."""
    layer = layer_of(module)
    return layer is not None and layer.experts is None and not layer.channels_first


@contextmanager
def fetched(module: nn.Module, like: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """A layer's weight and bias in the type and on the device of a tensor, as the host gives them."""
    if not _is_cast(module):
        yield module.weight.to(like), None if module.bias is None else module.bias.to(like)
        return
    weight, bias, stream = comfy.ops.cast_bias_weight(module, like, offloadable=True, compute_dtype=like.dtype)
    try:
        yield (weight.dequantize().to(like.dtype) if isinstance(weight, QuantizedTensor) else weight), bias
    finally:
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)


class FrozenLinear(torch.autograd.Function):
    """x . W^T + b for a frozen W and rows x (n, in): remembers nothing but the layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        # where the host asks whether it was interrupted
        comfy.ops.run_every_op()
        ctx.module = module
        with fetched(module, x) as (weight, bias):
            return F.linear(_smoothed(module, x), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with fetched(ctx.module, gradient) as (weight, _):
            return _smoothed(ctx.module, gradient @ weight), None


class ForeignLinear(torch.autograd.Function):
    """The same for a layer that only its own forward can read: being linear, its gradient is the same at every input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = forward, x.shape, x.dtype
        y = forward(x.detach())
        # blocks add to what a layer gave them in place, which torch allows only where it is nobody's view
        return y.clone() if y._is_view() else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            anywhere = torch.zeros(ctx.shape, dtype=ctx.dtype, device=gradient.device, requires_grad=True)
            return torch.autograd.grad(ctx.layer(anywhere), anywhere, gradient)[0], None


def _forward(module: nn.Module, patcher: comfy.model_patcher.ModelPatcher) -> Callable | None:
    """How a module runs while the base is frozen; None: as ever."""
    if is_linear(module):
        if type(module).forward.__module__ in (comfy.ops.__name__, nn.Linear.forward.__module__):
            return lambda x, *args, **kwargs: _linear(x, module)
        own = module.forward
        return lambda x, *args, **kwargs: ForeignLinear.apply(x, own)
    if _is_cast(module) and _streams(module, patcher):
        own = module.forward
        return lambda *args, **kwargs: checkpoint(own, *args, use_reentrant=False, **kwargs)
    return None


def _linear(x: Tensor, module: nn.Module) -> Tensor:
    """The view is made out here: blocks add to what a layer gave them in place."""
    return FrozenLinear.apply(x.reshape(-1, x.shape[-1]), module).unflatten(0, x.shape[:-1])


def _is_cast(module: nn.Module) -> bool:
    return isinstance(module, comfy.ops.CastWeightBiasOp)


def _streams(module: nn.Module, patcher: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether its weights come and go: then its forward is run again right before its gradient is needed."""
    weights = list(module.parameters(recurse=False))
    return bool(weights) and (patcher.is_dynamic() or any(w.device != patcher.load_device for w in weights))


def _smoothed(module: nn.Module, x: Tensor) -> Tensor:
    scale = getattr(module, SMOOTHING, None)
    return x if scale is None else x * comfy.model_management.cast_to_device(scale, x.device, x.dtype)
