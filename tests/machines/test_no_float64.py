"""A device without float64, fp8 and complex numbers, as MPS and DirectML are."""

import comfy.sample
import families
import pytest
import torch
from safetensors.torch import load_file
from second_device import DEVICE, Machine, host_on

from hywu_core.condition import CONDITIONING, Condition, ConditionPart
from hywu_core.host import memory
from hywu_core.host.lora.apply import apply_lora
from hywu_core.lora import blend, cosine, truncate

LACKS = (
    torch.float64, torch.complex32, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def machine():
    with torch.inference_mode(), host_on(Machine(LACKS)) as machine:
        yield machine


def test_the_device_refuses_what_it_lacks():
    for dtype in LACKS:
        with pytest.raises(TypeError, match="This device has no"):
            torch.zeros(2, dtype=dtype, device=DEVICE)


def test_a_generator_writes_the_references_numbers(fixtures_dir):
    golden = load_file(fixtures_dir / "gen_2" / "io.safetensors")
    handle = memory.load(fixtures_dir / "gen_2")
    lora = memory.generate(handle, Condition((ConditionPart(CONDITIONING, golden["case1.condition"]),)))
    for name, pair in lora.factors.items():
        torch.testing.assert_close(pair.up, golden[f"case1.out.{name}.lora_B"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("mode", ["bypass", "merge"])
def test_a_lora_is_applied(mode):
    family = families.FAMILIES["flux_double"]()
    model, _ = apply_lora(family.model, families.random_lora(family, seed=5), mode=mode)
    noise = torch.randn(family.latent.shape, generator=torch.Generator().manual_seed(0))
    cond = family.conditioning
    assert (
        comfy.sample.sample(model, noise, 2, 1.0, "euler", "simple", cond, cond, family.latent, seed=0).isfinite().all()
    )


def test_loras_are_compared_and_blended():
    """Analysis is done in float64: on the CPU, wherever the factors are."""
    family = families.FAMILIES["flux_double"]()
    loras = [families.random_lora(family, seed=seed) for seed in (1, 2)]
    there = [lora.to(DEVICE) for lora in loras]
    torch.testing.assert_close(cosine(*there), cosine(*loras))
    found, expected = (truncate(blend(pair, [0.5, 0.5]), 2) for pair in (there, loras))
    for name in expected.names:
        mine, theirs = found.factors[name], expected.factors[name]
        torch.testing.assert_close((mine.up @ mine.down).cpu(), theirs.up @ theirs.down)
