"""Tiny random instances of the host's own model families, as MODELs, with latents and conditioning that fit them."""

from contextlib import contextmanager
from typing import NamedTuple

import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.supported_models
import torch

from hywu_core import GeneratorConfig, InstanceLora, LoraFactor
from hywu_core.layout import all_targets


class Family(NamedTuple):
    model: comfy.model_patcher.ModelPatcher
    latent: torch.Tensor
    conditioning: list
    prefix: str
    blocks: int
    targets: tuple[str, ...]  # uniform over the blocks; a name may carry a row slice


@contextmanager
def weights_at_once():
    """Layers make their weights when they are built, also under dynamic VRAM: there is no file that they would come from."""
    before, comfy.memory_management.aimdo_enabled = comfy.memory_management.aimdo_enabled, False
    try:
        yield
    finally:
        comfy.memory_management.aimdo_enabled = before


def build(config) -> comfy.model_patcher.ModelPatcher:
    """A MODEL from one of the host's configurations, float32, every parameter seeded random."""
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = None
    with weights_at_once():
        model = config.get_model({}, "", device=None)
    model.diffusion_model.eval().requires_grad_(False)
    source = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=source)
        if parameter.ndim == 1:
            parameter.copy_(noise * 0.05 + (0.0 if name.endswith("bias") else 1.0))
        elif parameter.numel():
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
    for buffer in model.diffusion_model.buffers():  # tables that a checkpoint would bring
        buffer.copy_(torch.randn(buffer.shape, generator=source))
    return comfy.model_patcher.CoreModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def flux(stack: str = "double", channels: int = 4) -> Family:
    """Flux with both kinds of blocks; `stack` chooses which of them the LoRA is on. Real ones have 16 channels."""
    config = comfy.supported_models.Flux(
        {
            "image_model": "flux", "in_channels": channels, "out_channels": channels, "vec_in_dim": 8, "context_in_dim": 12,
            "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
            "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
            "txt_ids_dims": [],
        }
    )  # fmt: skip
    double = ("img_attn.qkv", "img_mlp.0", "txt_attn.proj", "img_mod.lin")
    single = ("linear1[0:32/160]", "linear1[64:160/160]", "linear2")
    return Family(
        build(config), torch.zeros(1, channels, 8, 8), conditioning(12, 8), f"{stack}_blocks.", 2,
        double if stack == "double" else single,
    )  # fmt: skip


def qwen_image() -> Family:
    config = comfy.supported_models.QwenImage(
        {
            "image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": 2,
            "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 12, "axes_dims_rope": (4, 6, 6),
        }
    )  # fmt: skip
    names = ("attn.to_q", "attn.add_v_proj", "img_mlp.net.0.proj", "txt_mlp.net.2")
    return Family(build(config), torch.zeros(1, 16, 1, 8, 8), conditioning(12), "transformer_blocks.", 2, names)


def z_image(refiners: int = 1) -> Family:
    """Real ones have 2 blocks in each of their refiners, which are stacks then."""
    config = comfy.supported_models.ZImage(
        {
            "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 256, "n_layers": 2,
            "n_refiner_layers": refiners, "n_heads": 8, "n_kv_heads": 8, "cap_feat_dim": 12, "axes_dims": [8, 12, 12],
            "axes_lens": [64, 64, 64], "qk_norm": True, "z_image_modulation": True, "multiple_of": 16,
            "ffn_dim_multiplier": 2.0, "rope_theta": 256.0, "time_scale": 1000.0, "pad_tokens_multiple": 32,
        }
    )  # fmt: skip
    names = ("attention.qkv[0:256/768]", "attention.qkv[512:768/768]", "attention.out", "feed_forward.w2")
    return Family(build(config), torch.zeros(1, 16, 8, 8), conditioning(12), "layers.", 2, names)


def wan() -> Family:
    config = comfy.supported_models.WAN21_T2V(
        {
            "image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "in_dim": 16, "dim": 32,
            "ffn_dim": 48, "freq_dim": 16, "text_dim": 12, "out_dim": 16, "num_heads": 2, "num_layers": 2,
        }
    )  # fmt: skip
    names = ("self_attn.q", "cross_attn.v", "ffn.0", "ffn.2")
    return Family(build(config), torch.zeros(1, 16, 2, 8, 8), conditioning(12), "blocks.", 2, names)


def sd3() -> Family:
    config = comfy.supported_models.SD3(
        {
            "in_channels": 16, "out_channels": 16, "depth": 2, "patch_size": 2, "adm_in_channels": 8, "input_size": None,
            "pos_embed_scaling_factor": None, "pos_embed_max_size": 8, "num_patches": 64, "context_size": 12,
            "context_embedder_config": {
                "target": "torch.nn.Linear", "params": {"in_features": 12, "out_features": 128},
            },
        }
    )  # fmt: skip
    names = ("x_block.attn.qkv", "x_block.attn.proj", "x_block.mlp.fc1", "context_block.attn.qkv[128:256/384]")
    return Family(build(config), torch.zeros(1, 16, 8, 8), conditioning(12, 8), "joint_blocks.", 2, names)


def deep_flux() -> Family:
    """As many blocks as the real one, which is how the host knows some LoRA files."""
    config = comfy.supported_models.Flux(
        {
            "image_model": "flux", "in_channels": 4, "out_channels": 4, "vec_in_dim": 8, "context_in_dim": 12,
            "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 19, "depth_single_blocks": 38,
            "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
            "txt_ids_dims": [],
        }
    )  # fmt: skip
    return Family(build(config), torch.zeros(1, 4, 8, 8), conditioning(12, 8), "double_blocks.", 19, ("img_attn.qkv",))


def unet(kind: type, width: int, linear: bool, adm: int | None) -> Family:
    """A UNet with two levels: convolutions of both kernels beside the linear layers."""
    config = kind(
        {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": width, "num_res_blocks": [1, 1],
            "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
            "transformer_depth_middle": 1, "context_dim": 12, "num_heads": 2, "num_head_channels": -1,
            "use_spatial_transformer": True, "use_linear_in_transformer": linear, "legacy": False, "adm_in_channels": adm,
            "num_classes": "sequential" if adm else None, "use_temporal_attention": False,
        }
    )  # fmt: skip
    names = ("transformer_blocks.0.attn1.to_q",)
    return Family(build(config), torch.zeros(1, 4, 8, 8), conditioning(12, 8), "middle_block.", 1, names)


UNETS = {
    "sd15": lambda: unet(comfy.supported_models.SD15, 32, False, None),
    "sdxl": lambda: unet(comfy.supported_models.SDXL, 64, True, 24),
}
FAMILIES = {
    "flux_double": flux,
    "flux_single": lambda: flux("single"),
    "qwen_image": qwen_image,
    "z_image": z_image,
    "wan": wan,
    "sd3": sd3,
}


def conditioning(width: int, pooled: int | None = None, seed: int = 2) -> list:
    """A CONDITIONING of one entry, as a text encoder gives it."""
    source = torch.Generator().manual_seed(seed)
    extra = {} if pooled is None else {"pooled_output": torch.randn(1, pooled, generator=source)}
    return [[torch.randn(1, 7, width, generator=source), extra]]


def shapes(family: Family) -> dict[str, tuple[int, int]]:
    """{target: (out, in)} of one block, read off the model."""
    found = {}
    for target in family.targets:
        module, _, rows = target.partition("[")
        layer = family.model.model.diffusion_model.get_submodule(f"{family.prefix}0.{module}")
        start, stop = (int(n) for n in rows.partition("/")[0].split(":")) if rows else (0, layer.out_features)
        found[target] = (stop - start, layer.in_features)
    return found


def generator_config(family: Family, **changes) -> GeneratorConfig:
    """A small generator's configuration whose targets are the family's."""
    values = {
        "d_model": 32, "head_dim": 8, "num_pg_layers": 2, "input_dim": 12, "output_dim": 16, "token_dim": 16,
        "num_base_model_layers": family.blocks, "rank": 4, "alpha": 8, "dim_accumulation": 2, "prefix": family.prefix,
        "pg_mapping": {n: {"lora_A_dim": i, "lora_B_dim": o} for n, (o, i) in shapes(family).items()},
        "hywu": {"condition": [{"kind": "conditioning", "width": 12}]},
    }  # fmt: skip
    return GeneratorConfig.from_dict(values | changes)


def random_lora(family: Family, seed: int, batch: int = 1, rank: int = 4, size: float = 0.03) -> InstanceLora:
    """A LoRA on all targets of a family, with factors large enough to change the picture."""
    source = torch.Generator().manual_seed(seed)
    config = generator_config(family, rank=rank, alpha=2 * rank)
    factors = {}
    for name, target in all_targets(config):
        down, up = (torch.randn(batch, *shape, generator=source) * size ** 0.5 for shape in
                    (target.down_shape(rank), target.up_shape(rank)))  # fmt: skip
        factors[name] = LoraFactor(down, up)
    return InstanceLora(factors, config.scale)


def sample(family: Family, model, seed: int = 3, batch: int = 1, steps: int = 2, cfg: float = 2.0) -> torch.Tensor:
    """A latent from the host's own sampler."""
    latent = family.latent.expand(batch, *family.latent.shape[1:]).contiguous()
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "simple", family.conditioning, conditioning(12, 8, seed=9), latent, seed=seed,
        disable_pbar=True,
    )  # fmt: skip


def weights(model) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the base."""
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
