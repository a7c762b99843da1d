"""A second device that is not the CPU, played with real numbers.

Its tensors keep their numbers in ordinary memory, but they say that they are elsewhere, and torch treats them so: an
operation on tensors of both devices fails as on a GPU, copies and synchronisations are counted, and dtypes that a kind of
device lacks are refused.
"""

from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "privateuseone"  # what DirectML calls its devices, too


class Backend(_DummyBackendModule):
    """What torch asks a kind of device for."""

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


_setup_privateuseone_for_python_backend(NAME, Backend())  # named, so that torch takes it for the accelerator
DEVICE = torch.device(NAME, 0)

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# the CPU has to know a number of the device before it can go on
WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default,
    aten.bincount.default, aten._unique2.default, aten.unique_dim.default, aten.is_nonzero.default,
}  # fmt: skip


class Elsewhere(torch.Tensor):
    """A tensor of the second device; `here` holds its numbers."""

    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )

    def __init__(self, here):
        self.here = here

    def __repr__(self, **_):
        return f"Elsewhere({self.here})"

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}) if OURS.issuperset(types) else NotImplemented


OURS = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, Elsewhere}


class Machine(TorchDispatchMode):
    """While it is entered, tensors can be made on the second device.

    Args:
        lacks: dtypes that the device cannot hold.
    """

    active: "Machine | None" = None

    def __init__(self, lacks=()):
        super().__init__()
        self.lacks, self.counts = frozenset(lacks), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not OURS.issuperset(types):
            return NotImplemented  # a wrapper of its own, such as the host's quantised tensors, takes itself apart
        if torch.is_inference_mode_enabled() and _is_composite(func):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {})

    @property
    def waits(self) -> int:
        """How often the CPU had to wait for the device."""
        return self.counts["waits"]


def _numbers_first(make):
    """torch.tensor and its like make their numbers on the CPU, and then copy them."""

    def made(*args, device=None, **options):
        if device is None or torch.device(device).type != NAME:
            return make(*args, device=device, **options)
        return make(*args, **options).to(device)

    return made


def to_host(tensor):
    """The numbers of a tensor of either device."""
    return tensor.here if isinstance(tensor, Elsewhere) else tensor


def _run(func, args, kwargs):
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    elsewhere = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    asked = kwargs.get("device")
    asked = torch.device(asked) if isinstance(asked, str) else asked
    if not elsewhere and (asked is None or asked.type != NAME):
        return func(*args, **kwargs)
    if func is aten._has_compatible_shallow_copy_type.default:
        return False
    _check(func, args, tensors, elsewhere)
    _count(func, args, asked)
    args_here, kwargs_here = tree_map(to_host, (args, kwargs))
    if asked is not None:
        kwargs_here["device"] = torch.device("cpu")
    if asked is not None and asked.type != NAME:
        out = func(*args_here, **kwargs_here)
        return out.clone() if func is aten._to_copy.default else out
    if func is aten.copy_.default and not isinstance(args[0], Elsewhere):
        return func(*args_here, **kwargs_here)
    out = tree_map(_there, func(*args_here, **kwargs_here))
    return return_and_correct_aliasing(func, args, kwargs, out)


def _is_composite(func):
    """Whether it is made of others; under inference_mode torch does not take it apart before it asks."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _there(value):
    if not isinstance(value, torch.Tensor) or isinstance(value, Elsewhere):
        return value
    machine = Machine.active
    if machine is not None and value.dtype in machine.lacks:
        raise TypeError(f"This device has no {value.dtype}.")
    return Elsewhere(value.resolve_conj().resolve_neg())  # the wrapper cannot say that its numbers are yet to be turned


def _check(func, args, tensors, elsewhere):
    if func in COPIES or not elsewhere:
        return
    if func in INDEXING:
        tensors = [args[0], *(args[2:3])]
        if not isinstance(args[0], Elsewhere):
            raise RuntimeError(f"{func}: indices should be on the same device as the indexed tensor (cpu).")
    strangers = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.ndim]
    if strangers:
        shapes = [list(tensor.shape) for tensor in strangers]
        raise RuntimeError(f"{func}: expected all tensors on the same device, but found {DEVICE} and cpu {shapes}.")


def _count(func, args, asked):
    machine = Machine.active
    if machine is None:
        return
    if func in COPIES:
        target = asked.type == NAME if asked is not None else isinstance(args[0], Elsewhere)
        source = isinstance(args[1] if func is aten.copy_.default else args[0], Elsewhere)
        machine.counts["to_device"] += target and not source
        machine.counts["to_host"] += source and not target
        machine.counts["waits"] += source and not target
    elif func in INDEXING:
        flat = tree_leaves(args[1])
        machine.counts["to_device"] += sum(isinstance(i, torch.Tensor) and not isinstance(i, Elsewhere) for i in flat)
        machine.counts["waits"] += any(isinstance(i, torch.Tensor) and i.dtype is torch.bool for i in flat)
    elif func in WAITS:
        machine.counts["waits"] += 1
    machine.counts["launches"] += not func.is_view


@contextmanager
def host_on(machine: Machine, fp16_first: bool = False, room: int = 1 << 34):
    """For the time of the block the host works on the second device as on a GPU with `room` bytes free.

    Args:
        fp16_first: whether it would rather compute in float16 than in bfloat16, as it does on NVIDIA cards.
    """
    import comfy.model_management as management

    played = [
        ("cpu_state", management.CPUState.GPU),
        ("vram_state", management.VRAMState.NORMAL_VRAM),
        ("get_torch_device", lambda: DEVICE),
        ("get_all_torch_devices", lambda exclude_current=False: [] if exclude_current else [DEVICE]),
        ("get_torch_device_name", lambda device: NAME),
        ("get_free_memory", lambda dev=None, torch_free_too=False: (room, room) if torch_free_too else room),
        ("get_total_memory", lambda dev=None, torch_total_too=False: (room, room) if torch_total_too else room),
        ("should_use_fp16", lambda *args, **options: fp16_first),
        ("should_use_bf16", lambda *args, **options: torch.bfloat16 not in machine.lacks),
        ("supports_fp8_compute", lambda device=None: False),
        ("is_directml_enabled", lambda: torch.float64 in machine.lacks),
        ("is_nvidia", lambda: False),
        ("is_amd", lambda: False),
        ("extra_reserved_memory", lambda: 0),
        ("synchronize", lambda: None),
        ("soft_empty_cache", lambda force=False: None),
    ]
    generator = torch.Generator
    with ExitStack() as stack:
        for name, value in played:
            stack.enter_context(mock.patch.object(management, name, value))
        for name in ("tensor", "as_tensor"):
            stack.enter_context(mock.patch.object(torch, name, _numbers_first(getattr(torch, name))))
        stack.enter_context(mock.patch.object(torch, "Generator", lambda device=None: generator()))
        stack.enter_context(mock.patch.object(Machine, "active", machine))
        stack.enter_context(machine)
        try:
            yield machine
        finally:
            management.current_loaded_models.clear()
