"""What a run does, counted while it runs: kernels, copies between devices, angles, bytes alive. Works on the meta device."""

import weakref
from collections import Counter

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Fused(TorchFunctionMode):
    """Attention and norms as the one kernel that they are on a GPU; the meta device would take them apart."""

    def __init__(self):
        super().__init__()
        self.kernels = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.scaled_dot_product_attention, F.rms_norm, torch.rms_norm):
            self.kernels += 1
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


class Kernels(TorchDispatchMode):
    """Kernels launched on a device, angles taken, and copies of more than one number from the CPU to the device."""

    def __init__(self, device: str = "meta"):
        super().__init__()
        self.device, self.launched, self.angles, self.copied = device, Counter(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs, outputs = tensors((args, kwargs)), tensors(result)
        if func is torch.ops.aten.cos.default:
            self.angles += outputs[0].numel()
        if any(tensor.device.type == self.device for tensor in outputs):
            self.copied += any(tensor.device.type == "cpu" and tensor.numel() > 1 for tensor in inputs)
            returns = [value.alias_info for value in func._schema.returns]
            view = any(alias is not None and not alias.is_write for alias in returns)
            if not view and "empty" not in func.name() and func is not torch.ops.aten.detach.default:
                self.launched[func.name()] += 1
        return result


class Alive(TorchDispatchMode):
    """Bytes of all storages that were made while it was on and are still alive; `peak` is the most at any time."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs))}
        for tensor in tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known and storage._cdata not in given:
                self._count(storage)
        return result

    def _count(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone() -> None:
            self.known.pop(key)
            self.now -= size

        self.known[key] = weakref.finalize(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
