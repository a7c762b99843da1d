"""Weights that the host streams to a device come through one buffer for each of its streams, and every cast of a stream
starts at the head of its buffer: what an adapter brings may not land on a bank of experts that is still in use.
"""

import comfy.model_management
import comfy_aimdo.torch
import pytest
import torch
import toy_mixture
from dynamic import Vbar, VramBuffer, bytes_of, dynamic_vram
from safetensors.torch import load_file
from second_device import DEVICE, Machine, host_on
from torch.nn.functional import pad

from hywu_core import InstanceLora, LoraFactor
from hywu_core.host.lora.apply import apply_lora


class Stream:
    """Copies of a played device are done at once, so there is nothing to wait for."""

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass

    def as_context(self, stream):
        return torch.inference_mode()


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def with_streams(monkeypatch, count):
    """The host's own buffers, one for each of this many streams."""
    management = comfy.model_management
    monkeypatch.setattr(management, "NUM_STREAMS", count)
    monkeypatch.setattr(management, "STREAMS", {DEVICE: [Stream() for _ in range(count)]})
    for name in ("stream_counters", "STREAM_CAST_BUFFERS", "STREAM_AIMDO_CAST_BUFFERS"):
        monkeypatch.setattr(management, name, {})


@pytest.fixture
def golden(fixtures_dir):
    return load_file(fixtures_dir / "lora_apply.safetensors")


def run(golden, lora, case):
    base = toy_mixture.base_of(golden)
    model = base if lora is None else apply_lora(base, lora, 1.0, "bypass")[0]
    return base.model.run(model, golden[f"{case}.in"].to(DEVICE)).cpu()


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("case", ["x1", "x2"])
def test_adapters_leave_the_experts_alone(golden, case, streams, monkeypatch):
    """Under --novram."""
    with_streams(monkeypatch, streams)
    with host_on(Machine()):
        monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
        for lora, expected in ((None, "out_base"), (toy_mixture.lora_of(golden), "out_lora")):
            torch.testing.assert_close(run(golden, lora, case), golden[f"{case}.{expected}"], atol=1e-4, rtol=0)
            assert comfy.model_management.STREAM_CAST_BUFFERS, "or nothing was streamed"


def one_memory(piece, device):
    """Of a stream's buffer every piece is a part of one memory."""
    buffer, start, size = piece
    if not isinstance(buffer, VramBuffer):
        return bytes_of(piece, device)
    if not hasattr(buffer, "memory"):
        buffer.memory = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    return buffer.memory[start : start + size]


def padded(lora, rank):
    """The same with zeros up to a rank: the host streams nothing that is small."""
    factors = {
        name: LoraFactor(pad(down, (0, 0, 0, rank - down.shape[-2])), pad(up, (0, rank - up.shape[-1])))
        for name, (down, up) in lora.factors.items()
    }
    return InstanceLora(factors, lora.scale)


@pytest.mark.parametrize("room", [0, 1 << 40], ids=["evicted", "resident"])
def test_adapters_under_dynamic_memory(golden, room, monkeypatch):
    monkeypatch.setattr(Vbar, "room", room)
    with_streams(monkeypatch, 2)
    with host_on(Machine()), dynamic_vram():
        monkeypatch.setattr(comfy_aimdo.torch, "aimdo_to_tensor", one_memory)
        found = run(golden, padded(toy_mixture.lora_of(golden), 48), "x2")
        assert bool(comfy.model_management.STREAM_AIMDO_CAST_BUFFERS) == (room == 0)
    torch.testing.assert_close(found, golden["x2.out_lora"], atol=1e-4, rtol=0)
