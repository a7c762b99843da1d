"""Generator files: there and back, and what damaged ones say."""

import pytest
import torch
from made_files import sharded
from safetensors.torch import load_file, save_file

from hywu_core import (
    CheckpointError,
    LoraError,
    load_generator,
    save_generator,
)
from hywu_core.files.checkpoint import fingerprint, inspect_generator
from hywu_core.files.lora_files import load_lora


@pytest.fixture
def generator(fixtures_dir):
    return load_generator(fixtures_dir / "gen_2")


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
    said = r"index\.json(: not valid JSON|: expected a JSON object| is not a shard index)"
    for text in ("{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"hidden_in.bias": 3}}'):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match=said):
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


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 1234\n"


PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"


NOT_WEIGHTS = {
    "LFS pointer": (POINTER, r"Git LFS pointer.*git lfs pull"),
    "web page": (PAGE, r"is a web page.*Download the file"),
    "web page in capitals": (b"\n<HTML>", "is a web page"),
    "nothing": (b"", "is empty"),
    "zip": (b"PK\x03\x04archive/data.pkl", "is a pickle or a zip archive"),
    "pickle": (b"\x80\x02}q\x00", "is a pickle or a zip archive"),
    "GGUF": (b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
    "noise": (bytes(range(256)), "damaged or probably truncated: it has 256 bytes"),
}


@pytest.mark.parametrize("kind", NOT_WEIGHTS)
def test_what_is_no_safetensors_file_is_called_what_it_is(tmp_path, generator, kind):
    content, said = NOT_WEIGHTS[kind]
    path = save_generator(generator, tmp_path / "folder") / "model.safetensors"
    path.write_bytes(content)
    for read, error in ((load_generator, CheckpointError), (load_lora, LoraError)):
        with pytest.raises(error, match=rf"model\.safetensors is not a readable safetensors file: .*{said}"):
            read(path)


def test_half_a_file_says_how_much_is_missing(tmp_path, generator):
    path = save_generator(generator, tmp_path / "x.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=f"it has {len(whole) // 2:,} of {len(whole):,} bytes"):
        load_generator(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(
        CheckpointError, match=f"it has {len(whole) + 4:,} bytes where its header describes {len(whole):,}"
    ):
        load_generator(path)


@pytest.mark.parametrize("kind", ["LFS pointer", "web page", "nothing"])
def test_what_is_no_configuration_is_called_what_it_is(tmp_path, generator, kind):
    content, said = NOT_WEIGHTS[kind]
    config = save_generator(generator, tmp_path / "folder") / "config.json"
    config.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{said}"):
        load_generator(config.parent)
    (config.parent / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"index\.json.*{said}"):
        load_generator(config.parent)


def test_fingerprints_do_not_depend_on_how_it_is_kept(tmp_path, generator):
    one = save_generator(generator, tmp_path / "one.safetensors")
    known = {
        inspect_generator(path).fingerprint
        for path in (one, save_generator(generator, tmp_path / "folder"), sharded(tmp_path / "shards", generator))
    }
    assert known == {fingerprint(generator.config, generator.state_dict())}
    half = load_generator(one, dtype=torch.bfloat16)
    assert fingerprint(half.config, half.state_dict()) not in known
