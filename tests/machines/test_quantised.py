"""Bases in the formats that the host stores quantised weights in, on its own layers, and in layers of another pack: they have
stacks, give conditions, take generators, and carry LoRAs as the numbers that they stand for would.
"""

from typing import NamedTuple

import comfy.model_management
import comfy.model_patcher
import families
import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

from hywu_core.condition import OF_THE_BASE, REFERENCE_LATENT
from hywu_core.host import model as structure
from hywu_core.host import new_generator
from hywu_core.host.conditions import from_host, hidden_states
from hywu_core.host.lora.apply import apply_lora

SCALED = [name for name in ("float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8", "int8_tensorwise") if name in QUANT_ALGOS]
CAST = "float8_e4m3fn, not scaled"
PACKED = "packed by another pack"
FORMATS = [*SCALED, CAST, PACKED]
# of the picture's spread; formats whose products round the activations, too, on this machine
TOLERANCE = {"int8_tensorwise": 0.05}
# so much of what a LoRA changes may rounding the changed weights again take away
LOST = {"nvfp4": 0.6, "float8_e5m2": 0.35}


class Base(NamedTuple):
    quantised: families.Family
    # the same numbers, stored as they are
    dense: families.Family


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", params=FORMATS)
def base(request):
    with torch.inference_mode():
        dense = families.flux(channels=16)
        layers = {
            path: module
            for path, module in dense.model.model.diffusion_model.named_modules()
            if path.startswith(("double_blocks", "single_blocks")) and isinstance(module, torch.nn.Linear)
        }
        if request.param == PACKED:
            quantised = replaced(dense, layers)
        else:
            quantised = stored(dense, layers, request.param)
        yield request.param, Base(dense._replace(model=quantised), dense)


def stored(dense, layers, kind):
    """The base as the host loads a file of a format. `dense` gets the numbers that are left."""
    config = type(dense.model.model.model_config)(dense.model.model.model_config.unet_config)
    config.quant_config = {} if kind == CAST else {"mixed_ops": True}
    config.set_inference_dtype(torch.float8_e4m3fn if kind == CAST else torch.float32, torch.float32)
    config.custom_operations = None
    state = dict(dense.model.model.diffusion_model.state_dict())
    model = config.get_model({}, "", device=None)
    for path, layer in () if kind == CAST else layers.items():
        layout = QUANT_ALGOS[kind]["comfy_tensor_layout"]
        narrow = QuantizedTensor.from_float(layer.weight.detach(), layout, scale="recalculate")
        del state[f"{path}.weight"]
        state |= narrow.state_dict(f"{path}.weight")
        state[f"{path}.comfy_quant"] = torch.tensor(list(f'{{"format": "{kind}"}}'.encode()), dtype=torch.uint8)
        continue_with(layer, narrow.dequantize())
    missing, unexpected = model.diffusion_model.load_state_dict(state, strict=False)
    assert not missing and not unexpected
    for path in layers:
        weight = model.diffusion_model.get_submodule(path).weight
        assert isinstance(weight, QuantizedTensor) or weight.dtype is torch.float8_e4m3fn
    # cast to 8 bits is everything, not only what is large
    narrow = model.diffusion_model.named_parameters() if kind == CAST else ()
    for name, parameter in narrow:
        dense.model.model.diffusion_model.get_parameter(name).copy_(parameter)
    return as_model(model)


def continue_with(layer, numbers):
    layer.weight = torch.nn.Parameter(numbers.to(layer.weight.dtype), requires_grad=False)


def as_model(model):
    return comfy.model_patcher.CoreModelPatcher(
        model.eval().requires_grad_(False),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


class PackedLinear(torch.nn.Module):
    """As other packs keep 4-bit weights: no Linear, and nothing that is called weight."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        largest = layer.weight.abs().amax(dim=1, keepdim=True)
        self.qweight = torch.nn.Parameter((layer.weight / largest * 7).round().to(torch.int8), requires_grad=False)
        self.scale = torch.nn.Parameter(largest / 7, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.qweight * self.scale, self.bias)


def replaced(dense, layers):
    model = families.flux(channels=16).model.model
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        packed = PackedLinear(layer)
        setattr(model.diffusion_model.get_submodule(parent), name, packed)
        continue_with(layer, packed.qweight * packed.scale)
    return as_model(model)


def looking(family):
    ((tokens, options),) = family.conditioning
    picture = torch.randn(family.latent.shape, generator=torch.Generator().manual_seed(7))
    return [[tokens, options | {"reference_latents": [picture]}]]


def bits(model):
    return {
        name: tensor.contiguous().flatten().view(torch.uint8).clone()
        for name, tensor in model.model.state_dict().items()
    }


def off(found, expected):
    """How far a picture is off, in parts of the expected one's spread."""
    return float((found - expected).norm() / (expected - expected.mean()).norm())


def test_it_has_its_stacks_and_takes_a_generator(base):
    _, (quantised, dense) = base
    assert structure.find_stacks(quantised.model.model) == structure.find_stacks(dense.model.model)
    example = from_host(looking(dense))
    assert REFERENCE_LATENT in {part.kind for part in example.parts}
    made = [
        new_generator.generator_config(family.model.model, example, rank=4, alpha=8.0) for family in (quantised, dense)
    ]
    assert made[0] == made[1]
    new_generator.check_fits(quantised.model.model, made[0])


def test_it_gives_hidden_states(base):
    kind, (quantised, dense) = base
    found, expected = (hidden_states(family.model, looking(family)) for family in (quantised, dense))
    assert off(found, expected) < TOLERANCE.get(kind, 1e-4)
    condition = from_host(looking(quantised), model=quantised.model)
    config = new_generator.generator_config(quantised.model.model, condition, rank=4, alpha=8.0, source=OF_THE_BASE)
    assert [part["kind"] for part in config.hywu["condition"]] == ["hidden_states"]


@pytest.mark.parametrize("stack", ["double", "single"])
def test_a_lora_beside_it_is_exact(base, stack):
    kind, (quantised, dense) = base
    lora = families.random_lora(families.flux(stack, channels=16), seed=5)
    before, plain = bits(quantised.model), families.sample(quantised, quantised.model)
    expected = families.sample(dense, apply_lora(dense.model, lora, 0.7, "merge")[0])
    patched, report = apply_lora(quantised.model, lora, 0.7)
    assert len(report.matched) == report.total
    found = families.sample(quantised, patched)
    assert off(found, expected) < TOLERANCE.get(kind, 1e-4)
    assert off(plain, expected) > 0.1, "the LoRA must change the picture, or nothing was tested"
    assert torch.equal(families.sample(quantised, quantised.model), plain)
    assert all(torch.equal(now, before[name]) for name, now in bits(quantised.model).items())


def test_merging_into_it(base):
    """The host rounds the changed weights again. Layers of another pack hold nothing that it can merge into."""
    kind, (quantised, dense) = base
    lora = families.random_lora(dense, seed=5)
    if kind == PACKED:
        with pytest.raises(Exception, match="no weight that can be merged into at .*Use the mode bypass"):
            apply_lora(quantised.model, lora, 0.7, "merge")
        return
    before, plain = bits(quantised.model), families.sample(quantised, quantised.model)
    expected = families.sample(dense, apply_lora(dense.model, lora, 0.7, "merge")[0])
    found = families.sample(quantised, apply_lora(quantised.model, lora, 0.7, "merge")[0])
    effect = float((expected - families.sample(dense, dense.model)).norm())
    assert float((found - expected).norm()) < LOST.get(kind, 0.2) * effect
    assert torch.equal(families.sample(quantised, quantised.model), plain)
    assert all(torch.equal(now, before[name]) for name, now in bits(quantised.model).items())
