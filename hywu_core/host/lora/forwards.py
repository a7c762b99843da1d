"""Modules of a base that run otherwise for the time of a block, and as before whatever ends it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.cli_args
import torch
from torch import Tensor, nn

from .bank import Adapter, add_parts

Part = tuple[Adapter, float]  # an adapter and its strength


@contextmanager
def replaced_forwards(replacements: Iterable[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Each module runs the callable beside it for the time of the block. A forward that somebody else has put on a module,
    such as the host's own bypass, comes back. `replacements` may be a generator that fails half-way.
    """
    replaced = []
    try:
        for module, forward in replacements:
            replaced.append((module, vars(module).get("forward")))
            module.forward = forward
        yield
    finally:
        for module, previous in reversed(replaced):
            vars(module).pop("forward", None)
            if previous is not None:
                module.forward = previous


class Beside:
    """A module's forward with what adapters add. One object stays with a module from call to call, so that a compiled graph
    meets the same one again.
    """

    def __init__(self):
        self.forward: Callable | None = None
        self.parts: list[Part] = []
        # in any call so far: packs that cache skip whole blocks at some steps
        self.ran = False

    def start(self, forward: Callable, parts: list[Part]) -> None:
        """Stand in for `forward`."""
        self.forward, self.parts = forward, parts

    def stop(self) -> None:
        """Let go of the module and of the adapters."""
        self.forward, self.parts = None, []

    # A graph cannot hold how the host brings factors to the device; and one that held them would be made anew for another
    # rank, another number of LoRAs, or a step at which one of them rests.
    @torch.compiler.disable
    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.ran = True
        y = self.forward(x, *args, **kwargs)
        return add_parts(y, x, self.parts, *args[:1])


_lock, _blocks, _before = threading.Lock(), 0, None


@contextmanager
def blocks_not_replayed() -> Iterator[None]:
    """Hosts newer than the verified one replay blocks that they captured as CUDA graphs, and call no layer then; for the
    time of the block they are asked not to. Calls may overlap: the host runs one for each GPU.
    """
    global _blocks, _before
    switches = comfy.cli_args.args
    if not hasattr(switches, "disable_cuda_graphs"):
        yield
        return
    with _lock:
        _before = _before if _blocks else switches.disable_cuda_graphs
        _blocks += 1
        switches.disable_cuda_graphs = True
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks:
                switches.disable_cuda_graphs = _before
