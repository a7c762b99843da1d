"""Two GPUs, played by two names of the CPU: the host's own MultiGPU clones, thread pool and work split."""

import threading

import comfy.model_management
import comfy.multigpu
import comfy_extras.nodes_multigpu
import families
import pytest
import torch

from hywu_core.host.lora.apply import applied_loras, apply_lora
from hywu_core.host.lora.bank import Adapter

FIRST, SECOND = torch.device("cpu"), torch.device("cpu:0")


@pytest.fixture(autouse=True)
def _two_devices(monkeypatch):
    monkeypatch.setattr(
        comfy.model_management,
        "get_all_torch_devices",
        lambda exclude_current=False: [SECOND] if exclude_current else [FIRST, SECOND],
    )
    with torch.inference_mode():
        yield
    comfy.model_management.current_loaded_models.clear()


@pytest.fixture
def flux():
    """With a loader, as MODELs of the host's loaders have one."""

    def load(disable_dynamic=False):
        return families.flux().model

    with torch.inference_mode():
        family = families.flux()
        family.model.cached_patcher_init = (load, ())
        return family


def close(found, expected):
    unit = expected.std()
    torch.testing.assert_close(found / unit, expected / unit, atol=1e-5, rtol=0)


@pytest.fixture
def used(monkeypatch):
    """{name of a thread: the adapters that ran in it}."""
    found, add_to = {}, Adapter.add_to

    def recorded(adapter, *args):
        found.setdefault(threading.current_thread().name, set()).add(adapter)
        return add_to(adapter, *args)

    monkeypatch.setattr(Adapter, "add_to", recorded)
    return found


@pytest.mark.parametrize("order", ["apply first", "split first"])
@pytest.mark.parametrize("mode", ["bypass", "merge"])
def test_both_devices_have_the_loras(flux, mode, order, used):
    one, two = families.random_lora(flux, seed=5), families.random_lora(flux, seed=6)
    base = families.sample(flux, flux.model)
    expected = families.sample(flux, apply_lora(apply_lora(flux.model, one, 0.7, "merge")[0], two, 0.4, "merge")[0])
    model = flux.model
    if order == "split first":
        model = comfy.multigpu.create_multigpu_deepclones(model, 2)
    for lora, strength in ((one, 0.7), (two, 0.4)):
        model, _ = apply_lora(model, lora, strength, mode)
    if order == "apply first":
        model = comfy.multigpu.create_multigpu_deepclones(model, 2)
    assert len(applied_loras(model)) == (2 if mode == "bypass" else 0)
    for _ in range(2):
        used.clear()
        close(families.sample(flux, model), expected)
    assert torch.equal(families.sample(flux, flux.model), base)
    if mode == "bypass":
        first, second = used.values()
        assert len(first) == len(second) == 16 and not first & second, "each device has banks of its own"


def test_another_device_can_be_chosen(flux):
    lora = families.random_lora(flux, seed=5)
    expected = families.sample(flux, apply_lora(flux.model, lora, 0.7, "merge")[0])
    patched, _ = apply_lora(flux.model, lora, 0.7, "bypass")
    moved = comfy_extras.nodes_multigpu._retarget_patcher(patched, SECOND, FIRST)
    assert moved.model is not flux.model.model
    assert [bank.load_device for bank in moved.get_additional_models()] == [SECOND]
    close(families.sample(flux, moved), expected)
