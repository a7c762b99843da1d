"""Generator and LoRA files: there and back, atomically, and what damaged ones say."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hywu_core import CheckpointError, InstanceLora, LoraError, LoraFactor, SaveError, load_generator, save_generator
from hywu_core.files.checkpoint import inspect_generator
from hywu_core.files.lora_files import from_state_dict, load_lora, save_lora, to_peft_state_dict, to_state_dict
from hywu_core.files.safetensors import write_safetensors


@pytest.fixture
def generator(fixtures_dir):
    return load_generator(fixtures_dir / "gen_2")


def sharded(folder, generator):
    """The released form: an index and shards."""
    folder.mkdir()
    state, names = generator.state_dict(), sorted(generator.state_dict())
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: state[name].contiguous() for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(generator.config.to_json())
    return folder


@pytest.fixture(params=["single.safetensors", "folder", "sharded"])
def stored(request, tmp_path, generator):
    path = tmp_path / request.param
    return sharded(path, generator) if request.param == "sharded" else save_generator(generator, path)


def test_every_form_comes_back(stored, generator):
    back = load_generator(stored)
    assert back.config == generator.config and list(back.config.pg_mapping) == list(generator.config.pg_mapping)
    state = generator.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.state_dict().items())
    assert inspect_generator(stored).dtype == torch.float32


def test_types_and_fingerprints(tmp_path, generator):
    half = save_generator(generator, tmp_path / "half.safetensors", torch.bfloat16)
    full = save_generator(generator, tmp_path / "full.safetensors")
    assert next(load_generator(half).parameters()).dtype == torch.float32
    assert next(load_generator(half, dtype=None).parameters()).dtype == torch.bfloat16
    before = inspect_generator(full).fingerprint
    assert before == inspect_generator(save_generator(generator, tmp_path / "same.safetensors")).fingerprint
    with torch.no_grad():
        generator.model.norm_final.weight[0] += 1
    assert inspect_generator(save_generator(generator, tmp_path / "other.safetensors")).fingerprint != before


def test_a_missing_shard_and_a_doubled_tensor_are_named(tmp_path, generator):
    folder = sharded(tmp_path / "shards", generator)
    second = folder / "model-00002-of-00002.safetensors"
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(CheckpointError, match="lacks the shards model-00002-of-00002.safetensors"):
        load_generator(folder)
    first = load_file(folder / "model-00001-of-00002.safetensors")
    save_file(first, second)
    with pytest.raises(CheckpointError, match="is in both model-00001"):
        load_generator(folder)
    second.write_bytes(kept)
    for text in ("{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"hidden_in.bias": 3}}'):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match="is not a shard index"):
            load_generator(folder)


def test_a_truncated_shard_is_named(tmp_path, generator):
    shard = sharded(tmp_path / "shards", generator) / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=r"model-00002-of-00002.safetensors is not a readable.*probably truncated"
    ):
        load_generator(shard.parent)


def test_configuration_files_that_editors_and_downloads_leave(tmp_path, generator):
    config = save_generator(generator, tmp_path / "folder") / "config.json"
    text = config.read_text()
    config.write_text(text, encoding="utf-8-sig")
    assert load_generator(config.parent).config == generator.config
    config.write_text(text, encoding="utf-16")
    with pytest.raises(CheckpointError, match="config.json is not UTF-8 text"):
        load_generator(config.parent)


def test_a_long_list_of_problems_is_cut(tmp_path, generator):
    path = save_generator(generator, tmp_path / "folder")
    save_file({"other": torch.zeros(1)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing hidden_in.weight \[64, 64\].*and \d+ more"):
        load_generator(path)


@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "weights.ckpt"])
def test_pickles_are_refused_unopened(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04anything")
    for read, error in ((load_generator, CheckpointError), (load_lora, LoraError)):
        with pytest.raises(error, match="pickle file, which could run any code"):
            read(tmp_path / name)


def test_what_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no config.json"):
        load_generator(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_generator(tmp_path / "nothing")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="has no generator configuration"):
        load_generator(tmp_path / "plain.safetensors")


def test_a_failed_write_leaves_what_was_there(tmp_path, generator, monkeypatch):
    path = save_generator(generator, tmp_path / "generator.safetensors")
    before = path.read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hywu_core.files.safetensors.save_file", full_disk)
    with pytest.raises(SaveError, match="No space left on device.*Nothing was changed"):
        save_generator(generator, path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, generator, monkeypatch):
    """Weights without their configuration, or beside another one's, would be offered to load."""
    path = save_generator(generator, tmp_path / "folder")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with torch.no_grad():
        generator.hidden_in.bias += 1
    real = os.replace

    def fails_at(name):
        def replace(source, target):
            if Path(target).name == name:
                raise OSError(28, "No space left on device")
            real(source, target)

        return replace

    monkeypatch.setattr("hywu_core.files.safetensors.os.replace", fails_at("model.safetensors"))
    with pytest.raises(SaveError):
        save_generator(generator, path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.fixture(params=[0o555, 0o000], ids=["read-only", "not even readable"])
def locked(request):
    """A folder that its user may not write to. Root may write to any, so the test is somebody else meanwhile."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(request.param)
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o755)
    left = list(folder.iterdir())
    shutil.rmtree(folder)
    assert not left


@pytest.mark.skipif(os.name == "nt", reason="permissions of folders are other ones there")
def test_a_folder_without_permission_to_write(locked, generator):
    with pytest.raises(SaveError, match="Permission denied.*Choose a folder that can be written to"):
        save_generator(generator, locked / "generator.safetensors")
    with pytest.raises(SaveError, match="Permission denied.*Choose a folder that can be written to"):
        save_lora(small_lora(), locked / "loras" / "lora.safetensors")


def test_a_folder_that_cannot_be_made(tmp_path, generator):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(SaveError, match="Choose a folder that can be written to"):
        save_generator(generator, tmp_path / "taken" / "generator.safetensors")


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(tensors, file, metadata):
        with open(file, "wb") as handle:
            handle.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("hywu_core.files.safetensors.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    assert not list(tmp_path.iterdir())


def small_lora(names=("b.0.q", "b.1.q"), scale=2.0):
    source = torch.Generator().manual_seed(0)
    return InstanceLora(
        {n: LoraFactor(torch.randn(1, 4, 6, generator=source), torch.randn(1, 8, 4, generator=source)) for n in names},
        scale,
        {"instruction": "make it warm"},
    )


def test_lora_files_come_back_with_their_metadata(tmp_path):
    lora = small_lora()
    back = load_lora(save_lora(lora, tmp_path / "lora.safetensors"))
    assert back.scale == 2.0 and back.names == lora.names
    assert back.metadata["instruction"] == "make it warm" and back.metadata["rank"] == 4
    assert all(
        torch.equal(a.up, b.up) and torch.equal(a.down, b.down) for a, b in zip(back.pairs, lora.pairs, strict=True)
    )


def test_metadata_of_another_tool_under_our_name_is_left_alone(tmp_path):
    for text in ("[1]", "{no json", '"text"'):
        save_file(to_state_dict(small_lora()), tmp_path / "lora.safetensors", {"hywu": text})
        assert load_lora(tmp_path / "lora.safetensors").names == small_lora().names


def test_damaged_lora_files_are_named(tmp_path):
    path = save_lora(small_lora(), tmp_path / "lora.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LoraError, match="lora.safetensors is not a readable safetensors file.*probably truncated"):
        load_lora(path)
    save_file({"q.lora_A.weight": torch.zeros(4, 6), "q.lora_B.weight": torch.zeros(8, 5)}, path)
    with pytest.raises(LoraError, match=r"lora.safetensors: q: the factors \(1, 4, 6\) and \(1, 8, 5\) do not fit"):
        load_lora(path)
    with pytest.raises(LoraError, match="nothing.safetensors does not exist"):
        load_lora(tmp_path / "nothing.safetensors")


def test_peft_folds_the_scale():
    lora, back = small_lora(), from_state_dict(to_peft_state_dict(small_lora()))
    assert back.scale == 1.0
    torch.testing.assert_close(back.pairs[0].up, lora.pairs[0].up * 2.0)


def test_slices_of_one_weight_become_one_exact_pair():
    lora = small_lora(("b.0.qkv[0:8/24]", "b.0.qkv[16:24/24]"))
    back = from_state_dict(to_state_dict(lora))
    assert back.names == ("b.0.qkv",) and back.rank == 8 and back.scale == lora.scale
    first, second = (pair.up[0] @ pair.down[0] for pair in lora.pairs)
    expected = torch.cat((first, torch.zeros(8, 6), second))
    torch.testing.assert_close(back.pairs[0].up[0] @ back.pairs[0].down[0], expected)


def test_alphas_of_a_foreign_file_are_kept_per_target():
    state = {}
    for name, alpha in (("x", 4.0), ("y", 1.0)):
        state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"] = torch.ones(4, 6), torch.ones(8, 4)
        state[f"{name}.alpha"] = torch.tensor(alpha)
    lora = from_state_dict(state)
    assert lora.scale == 1.0
    assert float(lora.factors["x"].up[0, 0, 0]) == 1.0 and float(lora.factors["y"].up[0, 0, 0]) == 0.25


def test_foreign_files_that_cannot_be_read(tmp_path):
    with pytest.raises(LoraError, match="has no partner q.lora_B.weight"):
        from_state_dict({"q.lora_A.weight": torch.zeros(4, 6)})
    with pytest.raises(LoraError, match=r"experts \[0, 2\], expected all from 0 on"):
        from_state_dict(
            {f"m.experts.{e}.down_proj.{f}.weight": torch.zeros(4, 4) for e in (0, 2) for f in ("lora_A", "lora_B")}
        )
    with pytest.raises(LoraError, match="this LoRA holds 2"):
        pair = LoraFactor(torch.zeros(2, 4, 6), torch.zeros(2, 8, 4))
        save_lora(InstanceLora({"q": pair}), tmp_path / "x.safetensors")
