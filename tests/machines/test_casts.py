"""Weights that the host streams to a device come through one buffer for each of its streams, and every cast of a stream
starts at the head of its buffer: what an adapter brings may not land on a bank of experts that is still in use.
"""

import comfy.model_management
import pytest
import torch
import toy_mixture
from dynamic import Vbar, dynamic_vram
from safetensors.torch import load_file
from second_device import DEVICE, Machine, host_on

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


@pytest.fixture(params=[1, 2], ids=["one stream", "two streams"])
def streaming(request, monkeypatch):
    """A device under --novram, with the host's own stream buffers."""
    management = comfy.model_management
    monkeypatch.setattr(management, "NUM_STREAMS", request.param)
    monkeypatch.setattr(management, "STREAMS", {DEVICE: [Stream() for _ in range(request.param)]})
    monkeypatch.setattr(management, "stream_counters", {})
    monkeypatch.setattr(management, "STREAM_CAST_BUFFERS", {})
    with host_on(Machine()):
        monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
        yield


@pytest.fixture
def golden(fixtures_dir):
    return load_file(fixtures_dir / "lora_apply.safetensors")


def run(golden, lora, case):
    base = toy_mixture.base_of(golden)
    model = base if lora is None else apply_lora(base, lora, 1.0, "bypass")[0]
    return base.model.run(model, golden[f"{case}.in"].to(DEVICE)).cpu()


@pytest.mark.parametrize("case", ["x1", "x2"])
def test_adapters_leave_the_experts_alone(streaming, golden, case):
    for lora, expected in ((None, "out_base"), (toy_mixture.lora_of(golden), "out_lora")):
        torch.testing.assert_close(run(golden, lora, case), golden[f"{case}.{expected}"], atol=1e-4, rtol=0)
        assert comfy.model_management.STREAM_CAST_BUFFERS, "or nothing was streamed"


@pytest.mark.parametrize("room", [0, 1 << 40], ids=["evicted", "resident"])
def test_adapters_under_dynamic_memory(golden, room, monkeypatch):
    monkeypatch.setattr(Vbar, "room", room)
    with host_on(Machine()), dynamic_vram():
        found = run(golden, toy_mixture.lora_of(golden), "x2")
    torch.testing.assert_close(found, golden["x2.out_lora"], atol=1e-4, rtol=0)
