"""A two-layer toy with mixtures of experts, as the reference's numbers of tests/fixtures/lora_apply.safetensors were made."""

from types import SimpleNamespace

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.patcher_extension
import torch
from torch import nn

from hywu_core import InstanceLora, LoraFactor
from hywu_core.bases.hunyuan_image3.moe import MixtureOfExperts

HIDDEN, INTERMEDIATE, EXPERTS, LAYERS = 32, 20, 4, 2


class Layer(nn.Module):
    """x += o_proj(tanh(qkv_proj(x))[..., :24]); x += mlp(x), as the fixture was made."""

    def __init__(self, ops):
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.qkv_proj = ops.Linear(HIDDEN, 48, bias=False)
        self.self_attn.o_proj = ops.Linear(24, HIDDEN)
        self.mlp = MixtureOfExperts(HIDDEN, INTERMEDIATE, EXPERTS, 2, ops)

    def forward(self, x):
        x = x + self.self_attn.o_proj(torch.tanh(self.self_attn.qkv_proj(x))[..., :24])
        return x + self.mlp(x)


class Toy(nn.Module):
    """What the host's BaseModel is to a LoRA: a diffusion_model, a model_sampling, and apply_model with its wrappers."""

    def __init__(self):
        super().__init__()
        self.diffusion_model = nn.Module()
        self.diffusion_model.model = nn.Module()
        self.diffusion_model.model.layers = nn.ModuleList(Layer(comfy.ops.disable_weight_init) for _ in range(LAYERS))
        self.model_sampling = comfy.model_sampling.ModelSamplingDiscreteFlow()
        self.model_config = SimpleNamespace(unet_config={})

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None):
        for layer in self.diffusion_model.model.layers:
            x = layer(x)
        return x

    def run(self, patcher, x):
        wrappers = patcher.get_all_wrappers(comfy.patcher_extension.WrappersMP.APPLY_MODEL)
        comfy.model_management.load_models_gpu([patcher, *patcher.get_additional_models()])
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._apply_model, self, wrappers)
        return executor.execute(x, torch.tensor([0.5]))


def base_of(golden) -> comfy.model_patcher.ModelPatcher:
    """The toy as a MODEL."""
    model = Toy().requires_grad_(False)
    state = {}
    for name, tensor in golden.items():
        if name.startswith("base.") and ".experts." not in name:
            state[f"diffusion_model.{name.removeprefix('base.')}"] = tensor
    for layer in range(LAYERS):
        for part in ("gate_and_up_proj", "down_proj"):
            bank = f"model.layers.{layer}.mlp.experts"
            state[f"diffusion_model.{bank}.{part}.weight"] = stacked(golden, "base", bank, part)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("model_sampling" in name for name in missing)
    return comfy.model_patcher.CoreModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def lora_of(golden) -> InstanceLora:
    """The reference's LoRA."""
    names = sorted(name.removesuffix(".lora_A").removeprefix("lora.") for name in golden if name.endswith(".lora_A"))
    factors = {name: LoraFactor(golden[f"lora.{name}.lora_A"], golden[f"lora.{name}.lora_B"]) for name in names}
    return InstanceLora(factors, float(golden["lora.scale"]))


def stacked(golden, which, bank, part):
    return torch.stack([golden[f"{which}.{bank}.{expert}.{part}.weight"] for expert in range(EXPERTS)])
