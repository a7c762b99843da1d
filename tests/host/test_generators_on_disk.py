"""Where generators and LoRAs lie: the folder models/hywu, what is saved, and damaged checkpoints."""

import json

import comfy.utils
import folder_paths
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hywu_core import (
    CheckpointError,
    load_generator,
    save_generator,
)
from hywu_core.condition import CONDITIONING, Condition, ConditionPart
from hywu_core.files.lora_files import load_lora
from hywu_core.host import folders, memory
from hywu_core.host.lora import store

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def hywu_folders(tmp_path):
    """The folder list as extra_model_paths.yaml leaves it: another tool's path is already there."""
    before = dict(folder_paths.folder_names_and_paths)
    folder_paths.folder_names_and_paths["hywu"] = ([str(tmp_path)], set())
    folders.register()
    yield tmp_path
    folder_paths.folder_names_and_paths.clear()
    folder_paths.folder_names_and_paths.update(before)


def test_the_folder_keeps_the_paths_of_others_and_lists_generators(hywu_folders, gen_2):
    roots = folder_paths.get_folder_paths("hywu")
    assert roots[0] == str(hywu_folders) and any(root.endswith("models/hywu") for root in roots)
    folders.register()
    assert folder_paths.get_folder_paths("hywu") == roots
    save_generator(load_generator(gen_2), hywu_folders / "folder")
    save_generator(load_generator(gen_2), hywu_folders / "sub" / "single.safetensors")
    (hywu_folders / "notes.txt").write_text("not a model")
    assert {"folder/", "sub/single.safetensors"} <= set(folders.generator_names())
    assert not any(name.startswith("folder/m") or name.endswith(".txt") for name in folders.generator_names())
    assert folders.generator_path("folder/") == hywu_folders / "folder"
    assert memory.load(folders.generator_path("sub/single.safetensors")).config.rank == 4


def test_a_generator_outside_the_folder_is_refused(hywu_folders):
    for name in ("nothing.safetensors", "../secret.safetensors"):
        with pytest.raises(CheckpointError, match="There is no generator"):
            folders.generator_path(name)


def test_a_lora_is_saved_below_the_output_folder(tmp_path, monkeypatch, gen_2, golden):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    lora = memory.generate(
        memory.load(gen_2), Condition((ConditionPart(CONDITIONING, golden["case2.condition"].squeeze(1)),))
    )
    last = store.save_to_output(lora, "loras/edit", "stock", torch.bfloat16)
    assert last == tmp_path / "loras" / "edit_00002_.safetensors"
    assert sorted(p.name for p in (tmp_path / "loras").iterdir()) == [
        "edit_00001_.safetensors",
        "edit_00002_.safetensors",
    ]
    state = comfy.utils.load_torch_file(str(last))
    assert {t.dtype for k, t in state.items() if "lora_" in k} == {torch.bfloat16}


def test_a_saved_lora_says_where_it_comes_from(tmp_path, monkeypatch, gen_2, golden):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    generator = load_generator(gen_2)
    generator.config.hywu["base"] = "Flux"
    handle = memory.load(save_generator(generator, tmp_path / "edits.safetensors"))
    condition = Condition((ConditionPart(CONDITIONING, golden["case1.condition"]),))._replace(
        instruction="make it blue"
    )
    path = store.save_to_output(memory.generate(handle, condition), "lora", "stock", None)
    with safe_open(str(path), "pt") as file:
        written = json.loads(file.metadata()["hywu"])
    alpha, rank = generator.config.alpha, generator.config.rank
    assert written == {
        "base": "Flux", "generator": "edits.safetensors", "generator_hash": handle.fingerprint,
        "instruction": "make it blue", "rank": rank, "alpha": alpha, "scale": alpha / rank,
    }  # fmt: skip
    assert load_lora(path).metadata == written


def test_a_place_that_cannot_be_written_to_is_one_error(tmp_path, monkeypatch):
    from hywu_core import InstanceLora, LoraFactor, SaveError

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    (tmp_path / "loras").write_text("a file where the folder should be")
    lora = InstanceLora({"q": LoraFactor(torch.zeros(1, 2, 4), torch.zeros(1, 4, 2))})
    for prefix in ("loras/edit", "../../outside"):
        with pytest.raises(SaveError, match="Cannot save"):
            store.save_to_output(lora, prefix, "stock", None)
    assert [p.name for p in tmp_path.iterdir()] == ["loras"]


def test_damaged_checkpoints_are_named_before_anything_is_loaded(gen_2, tmp_path):
    generator = load_generator(gen_2)
    path = save_generator(generator, tmp_path / "folder")
    weights = path / "model.safetensors"
    state, whole = load_file(weights), weights.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            memory.load(path)

    renamed = {name.replace("norm_final", "norm_last"): tensor for name, tensor in state.items()}
    save_file(renamed, weights)
    refused(r"missing model.norm_final.weight \[64\]; unexpected model.norm_last.weight \[64\]")
    save_file(state | {"hidden_in.bias": torch.zeros(64, dtype=torch.int64)}, weights)
    refused("hidden_in.bias is stored as I64, expected a floating-point type")
    save_file(state | {"hidden_in.bias": torch.zeros(3)}, weights)
    refused(r"hidden_in.bias has the shape \[3\], expected \[64\]")
    weights.write_bytes(whole[: len(whole) // 2])
    refused("probably truncated")
    weights.unlink()
    (path / "pytorch_model.bin").write_bytes(b"pickle")
    refused("pytorch_model.bin would be pickles, which are refused")
    (path / "config.json").unlink()
    refused("has no config.json")
