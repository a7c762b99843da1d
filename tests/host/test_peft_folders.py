"""Folders of the peft format in the real packages: PEFT around a base of the host, and diffusers' own loaders."""

import families
import pytest
import torch

from hywu_core import InstanceLora, LoraError, LoraFactor
from hywu_core.files.lora_files import load_lora, save_lora
from hywu_core.host.lora import foreign, store
from hywu_core.host.lora.matching import canonical

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def run(model, family, x):
    kwargs = {"context": family.conditioning[0][0]} | (
        {"y": family.conditioning[0][1]["pooled_output"]} if family.conditioning[0][1] else {}
    )
    return model(x, torch.tensor([0.5]), **kwargs)


@pytest.mark.parametrize("name", ["flux_double", "flux_single", "qwen_image", "wan"])
def test_peft_gives_the_same_output(name, tmp_path):
    """Slices of fused weights included, whose pairs have other ranks than the rest."""
    family = families.FAMILIES[name]()
    base = family.model.model.diffusion_model
    lora = families.random_lora(family, seed=5)
    x = torch.randn(family.latent.shape, generator=torch.Generator().manual_seed(3))
    before, weights = run(base, family, x), {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for target, pair in lora.factors.items():
        module, _, rows = target.partition("[")
        weight = base.get_submodule(module).weight
        start, stop = (int(n) for n in rows.partition("/")[0].split(":")) if rows else (0, weight.shape[0])
        weight[start:stop] += lora.scale * (pair.up[0] @ pair.down[0])
    expected = run(base, family, x)
    base.load_state_dict(weights)
    folder = save_lora(lora, tmp_path / "lora.safetensors", "peft")
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    found = run(peft.PeftModel.from_pretrained(base, folder).base_model.model, family, x)
    unit = expected.std()
    torch.testing.assert_close(found / unit, expected / unit, atol=1e-4, rtol=0)
    assert (expected - before).norm() > 0.05 * before.norm()


def qwen_of_diffusers():
    torch.manual_seed(0)
    return diffusers.QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(4, 6, 6)
    ).eval()


def lora_on(model, prefix=""):
    """A LoRA on every linear layer of the blocks of a model of diffusers, in its names."""
    source, factors = torch.Generator().manual_seed(4), {}
    for name, module in model.named_modules():
        if "transformer_blocks" in name and isinstance(module, torch.nn.Linear):
            factors[prefix + name] = LoraFactor(
                torch.randn(1, 4, module.in_features, generator=source) * 0.25,
                torch.randn(1, module.out_features, 4, generator=source) * 0.25,
            )
    return InstanceLora(factors, 1.5, {"base": "QwenImage"}, list(factors) if prefix else ())


def dense_weights(model, lora, prefix=""):
    for name, pair in lora.factors.items():
        model.get_submodule(name.removeprefix(prefix)).weight += lora.scale * (pair.up[0] @ pair.down[0])
    return model


class QwenPipeline(diffusers.loaders.QwenImageLoraLoaderMixin):
    """The loader of the real pipeline, without a text encoder and VAE."""

    def __init__(self, transformer):
        self.transformer, self.components, self.hf_device_map = transformer, {"transformer": transformer}, None


class FluxPipeline(diffusers.loaders.FluxLoraLoaderMixin):
    text_encoder = None

    def __init__(self, transformer):
        self.transformer, self.components, self.hf_device_map = transformer, {"transformer": transformer}, None


def qwen_output(model):
    source = torch.Generator().manual_seed(1)
    return model(
        hidden_states=torch.randn(1, 16, 64, generator=source), encoder_hidden_states=torch.randn(1, 7, 12, generator=source),
        encoder_hidden_states_mask=torch.ones(1, 7).long(), timestep=torch.tensor([0.5]), img_shapes=[[(1, 4, 4)]],
        return_dict=False,
    )[0]  # fmt: skip


def test_the_names_of_qwen_image_are_those_of_diffusers():
    host = families.qwen_image().model.model.diffusion_model
    names = [
        {
            name
            for name, module in model.named_modules()
            if name.startswith("transformer_blocks") and hasattr(module, "in_features")
        }
        for model in (host, qwen_of_diffusers())
    ]
    assert names[0] == names[1] and len(names[0]) > 20
    assert "QwenImage" in store.DIFFUSERS_NAMES


@pytest.mark.parametrize("how", ["folder", "peft"])
def test_diffusers_reads_the_folder_of_a_base_with_its_names(tmp_path, monkeypatch, how):
    monkeypatch.setattr(store, "output_path", lambda prefix: tmp_path / "lora_00001_.safetensors")
    model = qwen_of_diffusers()
    lora = lora_on(model)
    before, expected = qwen_output(model), qwen_output(dense_weights(qwen_of_diffusers(), lora))
    folder = store.save_to_output(lora, "lora", "peft", None)
    assert not store.remarks(lora, "peft")
    if how == "folder":
        QwenPipeline(model).load_lora_weights(str(folder))
    else:
        model = peft.PeftModel.from_pretrained(model, folder).base_model.model
    torch.testing.assert_close(qwen_output(model), expected, atol=1e-4, rtol=0)
    assert (expected - before).norm() > 0.05 * before.norm()
    assert set(load_lora(folder / "adapter_model.safetensors").names) == set(lora.names)


def flux_of_diffusers():
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    ).eval()  # fmt: skip


def flux_output(model):
    source = torch.Generator().manual_seed(1)
    return model(
        hidden_states=torch.randn(1, 16, 16, generator=source), encoder_hidden_states=torch.randn(1, 7, 12, generator=source),
        pooled_projections=torch.randn(1, 8, generator=source), timestep=torch.tensor([0.5]), guidance=torch.tensor([3.0]),
        img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(7, 3), return_dict=False,
    )[0]  # fmt: skip


def test_names_of_diffusers_stay_so_in_the_folder(tmp_path):
    """A LoRA that diffusers named goes back to it, through Load Instance LoRA, for any base."""
    model = flux_of_diffusers()
    lora = lora_on(model, "transformer.")
    state = {}
    for name, pair in lora.factors.items():
        state |= {f"{name}.lora_A.weight": pair.down[0], f"{name}.lora_B.weight": pair.up[0] * lora.scale}
    folder = save_lora(foreign.read(state), tmp_path / "lora", "peft")
    expected = flux_output(dense_weights(flux_of_diffusers(), lora, "transformer."))
    FluxPipeline(model).load_lora_weights(str(folder))
    torch.testing.assert_close(flux_output(model), expected, atol=1e-4, rtol=0)
    wrapped = peft.PeftModel.from_pretrained(flux_of_diffusers(), folder).base_model.model
    torch.testing.assert_close(flux_output(wrapped), expected, atol=1e-4, rtol=0)


def test_a_base_with_other_names_is_said_to_be_one(tmp_path):
    flux = families.flux()
    lora = families.random_lora(flux, seed=5).with_metadata(base="Flux")
    assert "diffusers differ, as for Flux" in store.remarks(lora, "peft")
    folder = save_lora(lora, tmp_path / "lora", "peft")
    assert not (folder / "pytorch_lora_weights.safetensors").exists()
    name = "lora_unet_double_blocks_0_img_attn_proj"
    kohya = foreign.read({f"{name}.lora_down.weight": torch.ones(4, 32), f"{name}.lora_up.weight": torch.ones(32, 4)})
    with pytest.raises(LoraError, match="another tool's name, and the peft format needs the paths of modules"):
        save_lora(kohya, tmp_path / "other", "peft")
    assert not (tmp_path / "other").exists()
    save_lora(canonical(kohya, flux.model.model), tmp_path / "other", "peft")


def test_a_folder_that_is_written_again_is_one_lora(tmp_path, monkeypatch):
    lora = families.random_lora(families.flux(), seed=5)
    folder = save_lora(lora, tmp_path / "lora", "peft")
    monkeypatch.setattr(
        "hywu_core.files.lora_files.write_safetensors", lambda *a: (_ for _ in ()).throw(RuntimeError("stop"))
    )
    with pytest.raises(RuntimeError):
        save_lora(lora, tmp_path / "lora", "peft")
    assert not (folder / "adapter_config.json").exists()
