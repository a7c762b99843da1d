"""Training on a base in each of the host's quantised formats: gradients are those of the weights that they stand for."""

import json

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import families
import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from test_objective import draws

from hywu_core.host.training.objective import DiffusionObjective
from hywu_core.training.trainable import leaves

FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "nvfp4", "mxfp8", "convrot_w4a4")
CONFIG = {
    "image_model": "flux", "in_channels": 4, "out_channels": 4, "vec_in_dim": 8, "context_in_dim": 12,
    "hidden_size": 256, "mlp_ratio": 1.0, "num_heads": 4, "depth": 2, "depth_single_blocks": 1,
    "axes_dim": [16, 24, 24], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
    "txt_ids_dims": [],
}  # fmt: skip


def base(operations=None):
    config = comfy.supported_models.Flux(dict(CONFIG))
    if operations is None:
        return families.build(config)
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = operations
    model = config.get_model({}, "", device=None)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def both(kind):
    """(a base in that format, the same with the weights that it stands for)."""
    plain, layout = base(), QUANT_ALGOS[kind]["comfy_tensor_layout"]
    state = {}
    for path, module in plain.model.diffusion_model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            whole = f"{path}.{name}"
            if name != "weight" or not isinstance(module, torch.nn.Linear) or "_blocks" not in path:
                state[whole] = parameter.data
                continue
            options = {"scale": "recalculate"} if kind.startswith("float8") else {}
            stored = QuantizedTensor.from_float(parameter.data, layout, **options)
            parameter.data.copy_(stored.dequantize())
            state |= stored.state_dict(whole)
            mark = json.dumps({"format": kind}).encode()
            state[f"{path}.comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)
    quantised = base(comfy.ops.mixed_precision_ops({}, torch.float32))
    missing, unexpected = quantised.model.diffusion_model.load_state_dict(state, strict=False)
    assert not missing and not unexpected
    layer = quantised.model.diffusion_model.double_blocks[0].img_attn.qkv
    assert isinstance(layer.weight, QuantizedTensor) and layer.quant_format == kind
    return quantised, plain


def gradients(model, stack=None):
    family = families.flux()._replace(model=model)
    objective = DiffusionObjective(model, stack)
    objective.prepare()
    found = leaves(families.random_lora(family, 5, batch=2))
    losses = objective.backward(found, draws(family), 0.5)
    return losses, torch.cat(
        [factor.grad.flatten() for pair in found.pairs for factor in pair if factor.grad is not None]
    )


@pytest.mark.parametrize("stack", ["", "double_blocks,single_blocks"])
@pytest.mark.parametrize("kind", FORMATS)
def test_gradients_through_a_format_are_those_of_what_it_stands_for(kind, stack):
    quantised, plain = both(kind)
    before = {name: value.clone() for name, value in quantised.model.state_dict().items()}
    losses, found = gradients(quantised, stack)
    expected_losses, expected = gradients(plain)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    after = quantised.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any("forward" in vars(module) for module in quantised.model.modules())
