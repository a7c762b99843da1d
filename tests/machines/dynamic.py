"""Dynamic VRAM as the host's main.py turns it on for a default NVIDIA install, with comfy-aimdo played.

comfy-aimdo needs an NVIDIA driver. What the host uses of it is small: mapped files, growing host buffers, address space on
the device (a VBAR) whose pages come when they are asked for and may be taken away. All of it is here, in ordinary memory.
"""

import mmap
import os
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch


class MappedFile:
    """comfy_aimdo.model_mmap.ModelMMAP: a file's bytes."""

    def __init__(self, path):
        self._file = open(path, "rb")
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)

    def get(self):
        return np.frombuffer(self._map, dtype=np.uint8).ctypes.data

    def get_file_handle(self):
        return self._file.fileno()

    def bounce(self):
        return False


class HostBuffer:
    """comfy_aimdo.host_buffer.HostBuffer: pinned memory. None is ever pinned here, so it stays empty."""

    def __init__(self, size, prewarm=0, max_grow_size=0, mark_cold=True):
        self.size = int(size)

    def truncate(self, size, do_unregister=True):
        self.size = int(size)


class Vbar:
    """comfy_aimdo.model_vbar.ModelVBAR: a piece is there when it was faulted and room was left; its signature says for how
    long.
    """

    all: list["Vbar"] = []
    from_files = 0  # weights that were read to the device without passing through a tensor here
    room = 1 << 40  # bytes of all pieces that fit onto the device

    def __init__(self, size, device):
        self.max_size, self.device, self.offset = size, device, 0
        self._pieces: dict[int, tuple[int, int]] = {}  # {offset: (size, signature)} of those that are there
        self._next = 0
        Vbar.all.append(self)

    def prioritize(self, malloc_async_clamp=None):
        pass

    def alloc(self, size):
        place, self.offset = self.offset, self.offset + size
        return self, place, size

    def fault(self, place, size):
        if place not in self._pieces:
            if sum(vbar.loaded_size() for vbar in Vbar.all) + size > Vbar.room:
                return None
            self._next += 1
            self._pieces[place] = size, self._next
        return bytearray(self._pieces[place][1].to_bytes(8, "little"))

    def loaded_size(self):
        return sum(size for size, _ in self._pieces.values())

    def free_memory(self, size):
        freed = 0
        while self._pieces and freed < size:
            freed += self._pieces.popitem()[1][0]
        return freed


class VramBuffer:
    """comfy_aimdo.vram_buffer.VRAMBuffer: a device buffer that every cast of a stream starts at the head of."""

    def __init__(self, size, device):
        self.max_size, self._allocated = size, 0

    def size(self):
        return self._allocated

    def get(self, size, offset=0):
        self._allocated = max(self._allocated, offset + size)
        return self, offset, size


_memory: dict[tuple, torch.Tensor] = {}


def bytes_of(piece, device):
    """comfy_aimdo.torch.aimdo_to_tensor: a piece as a tensor of bytes. The same piece is the same memory."""
    owner, place, size = piece
    key = id(owner), place, size
    if key not in _memory:
        _memory[key] = torch.empty(size, dtype=torch.uint8, device=device)
    return _memory[key]


def read_slice(tensor, destination, stream=None, destination2=None):
    """comfy.memory_management.read_tensor_file_slice_into for what it does without pinned memory: a weight goes from its file
    to the device.
    """
    if hasattr(tensor, "_qdata"):
        return False  # its scales travel with it
    info = getattr(tensor.untyped_storage(), "_comfy_tensor_file_slice", None)
    target = destination if destination2 is None else destination2
    if info is None or tensor.nbytes != info.size or not tensor.is_contiguous():
        return False
    read = bytearray(os.pread(info.file_ref, info.size, info.offset))
    target.copy_(torch.frombuffer(read, dtype=tensor.dtype).view(tensor.shape))
    Vbar.from_files += 1
    return True


@contextmanager
def dynamic_vram():
    """For the time of the block: layers make no weights before they are loaded, patchers are of the dynamic kind (which on a
    CPU stand back for the plain one), and files are read the way the host then reads them.
    """
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_mmap
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch
    import comfy_aimdo.vram_buffer

    played = [
        (comfy.memory_management, "aimdo_enabled", True),
        (comfy.memory_management, "read_tensor_file_slice_into", read_slice),
        (comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic),
        (comfy.model_management.args, "disable_pinned_memory", True),
        (comfy_aimdo.model_mmap, "ModelMMAP", MappedFile),
        (comfy_aimdo.host_buffer, "HostBuffer", HostBuffer),
        (comfy_aimdo.model_vbar, "ModelVBAR", Vbar),
        (comfy_aimdo.model_vbar, "vbar_fault", lambda piece: piece[0].fault(*piece[1:])),
        (comfy_aimdo.model_vbar, "vbar_unpin", lambda piece: None),
        (comfy_aimdo.torch, "aimdo_to_tensor", bytes_of),
        (comfy_aimdo.vram_buffer, "VRAMBuffer", VramBuffer),
    ]
    with ExitStack() as stack:
        for owner, name, value in played:
            stack.enter_context(mock.patch.object(owner, name, value))
        try:
            yield
        finally:
            comfy.model_management.current_loaded_models.clear()
            Vbar.all.clear()
            _memory.clear()
