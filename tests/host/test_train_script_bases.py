"""scripts/train.py on bases from files: what gets a generator, and what is wrong with a base."""

import json

import families
import pytest
import torch
from safetensors.torch import load_file, save_file

from hywu_core import load_generator
from hywu_core.bases import pocket
from hywu_core.errors import CheckpointError, ConfigError, HywuError
from hywu_core.host.model import StackError
from hywu_core.host.training import base_files

pytest.importorskip("accelerate")
from train_script import folder_of_pairs, run


@pytest.fixture
def flux_files(tmp_path, monkeypatch):
    """A small Flux as the host's own loader reads it. The text encoders and the VAE that belong to it are too large for a
    test; the pocket editor's and pictures cut into 16 channels stand in.
    """
    config = families.comfy.supported_models.Flux(
        {
            "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 64, "context_in_dim": 64,
            "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
            "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False,
            "txt_ids_dims": [],
        }
    )  # fmt: skip
    state = families.build(config).model.diffusion_model.state_dict()
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "flux.safetensors")
    clip = pocket.load_pocket_editor()[1]
    monkeypatch.setattr(base_files.comfy.sd, "load_clip", lambda files, clip_type: clip)
    encode = staticmethod(lambda pixels: torch.nn.functional.pixel_unshuffle(pixels.movedim(-1, 1), 4)[:, :16])
    vae = {"encode": encode, "vae_encode_crop_pixels": staticmethod(lambda pixels: pixels)}
    monkeypatch.setattr(base_files, "_vae", lambda name: type("Vae", (), vae))
    for name in ("clip.safetensors", "vae.safetensors"):
        (tmp_path / name).touch()
    return {
        "pocket": False, "model": str(tmp_path / "flux.safetensors"), "generator": "",
        "vae": str(tmp_path / "vae.safetensors"),
        "text_encoders": [str(tmp_path / "clip.safetensors")], "targets": "img_attn.*", "stack": "double_blocks", "size": 0,
    }  # fmt: skip


def test_a_base_from_its_files_gets_a_new_generator(tmp_path, flux_files):
    folder_of_pairs(tmp_path / "pairs")
    generator = load_generator(run(tmp_path, **flux_files, rank=4))
    assert list(generator.config.pg_mapping) == ["img_attn.qkv", "img_attn.proj"]
    assert generator.config.hywu["training"]["base"] == "flux.safetensors"


def test_the_hosts_own_vae_without_a_file(tmp_path):
    pixels = torch.rand(1, 8, 8, 3)
    found = base_files._vae(base_files.PIXEL_SPACE).encode(pixels)
    torch.testing.assert_close(found.float(), pixels.movedim(-1, 1) * 2 - 1, atol=1e-2, rtol=0)


def test_a_quantised_base_gets_a_new_generator_and_is_trained_on(tmp_path, flux_files):
    folder_of_pairs(tmp_path / "pairs")
    state = load_file(flux_files["model"])
    for name in [name for name in state if name.endswith("img_attn.proj.weight")]:
        state[name] = state[name].to(torch.float8_e4m3fn)
        state[name.replace(".weight", ".weight_scale")] = torch.ones(())
        text = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
        state[name.replace(".weight", ".comfy_quant")] = text
    save_file(state, flux_files["model"])
    trained = load_generator(run(tmp_path, **flux_files, rank=4))
    assert list(trained.config.pg_mapping) == ["img_attn.qkv", "img_attn.proj"]


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"model": "nowhere.safetensors"}, CheckpointError, "nowhere.safetensors does not exist"),
        ({"vae": ""}, CheckpointError, "A run needs a base"),
        ({"clip_type": "fluxx"}, CheckpointError, "The host knows"),
        ({"model": "README.md"}, CheckpointError, "The host cannot load"),
        ({"targets": "no_such.*"}, StackError, "No linear layer"),
        ({"source": "thoughts"}, ConfigError, "source must be one of"),
        ({"generator": "nowhere.json", "targets": "", "stack": "largest"}, ConfigError, "nowhere.json cannot be read"),
        ({"generator": "nowhere.json"}, ConfigError, "stack has no effect with generator"),
        ({"suite": "all"}, ConfigError, "suite has no effect without the pictures that ship"),
        ({"pairs": ""}, ConfigError, "nothing to train on"),
        ({"buckets": True}, ConfigError, "buckets has no effect without size"),
        (
            {"caption_dropout": 0.1, "regime": "blind"},
            ConfigError,
            "caption_dropout has no effect with the regime blind",
        ),
        ({"caption_dropout": 1.0}, ConfigError, "caption_dropout must be at least 0 and below 1"),
    ],
)
def test_bad_bases_and_generators(tmp_path, flux_files, changes, error, said):
    folder_of_pairs(tmp_path / "pairs")
    with pytest.raises(error, match=said):
        run(tmp_path, **flux_files | changes)


def test_a_generator_for_another_base(tmp_path):
    folder_of_pairs(tmp_path / "pairs")
    config = families.generator_config(families.flux("single"))
    (tmp_path / "config.json").write_text(config.to_json())
    with pytest.raises(HywuError, match="None of the LoRA's 6 targets is in this model"):
        run(tmp_path, generator=str(tmp_path / "config.json"))


def test_a_text_encoder_read_as_another_kind_makes_other_encodings(tmp_path):
    (tmp_path / "some.safetensors").write_bytes(b"weights")
    kinds = ("flux", "FLUX", "lumina2", "qwen_image")
    found = [base_files.encoders_fingerprint([tmp_path / "some.safetensors"], kind) for kind in kinds]
    assert found[0] == found[1] == base_files.fingerprint([tmp_path / "some.safetensors"]) and len(set(found)) == 3
