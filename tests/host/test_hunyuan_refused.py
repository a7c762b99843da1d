"""Folders of HunyuanImage-3 that do not fit are refused with one error that names what is wrong."""

import json
import os
import shutil

import hunyuan_tiny as tiny
import pytest
from safetensors.torch import load_file, save_file

from hywu_core.bases.hunyuan_image3.files import read_system_prompt
from hywu_core.bases.hunyuan_image3.loader import load, load_model
from hywu_core.errors import CheckpointError, MatchError
from hywu_core.host.training.frozen import refuse_untrainable

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("hunyuan") / "base")


def change_weights(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, str(folder / WEIGHTS))


def change_json(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def exchange(state):
    first, second = "model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.self_attn.o_proj.weight"
    state[first], state[second] = state[second], state[first]


def in_shards(folder):
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    parts = {f"part-{n}.safetensors": sorted(state)[n::2] for n in range(2)}
    for file, names in parts.items():
        save_file({name: state[name] for name in names}, str(folder / file))
    weights = {name: file for file, names in parts.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"weight_map": weights}))


def lose_shard(folder):
    in_shards(folder)
    (folder / "part-1.safetensors").unlink()


def truncate(folder):
    in_shards(folder)
    os.truncate(folder / "part-1.safetensors", (folder / "part-1.safetensors").stat().st_size - 10)


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def pickled_shard(folder):
    (folder / WEIGHTS).rename(folder / "part-0.bin")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "part-0.bin"}}))


def rename_token(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"<recaption>"', '"<another>"'))


def prompt(text):
    return lambda folder: (folder / "system_prompt.py").write_text(text)


QKV = r"self_attn\.qkv_proj\.weight has the shape \[64, 64\], expected \[128, 64\]"
REFUSED = {
    "missing shard": (lose_shard, r"lacks the shards part-1\.safetensors"),
    "exchanged tensors": (lambda folder: change_weights(folder, exchange), QKV),
    "missing tensor": (lambda f: change_weights(f, lambda s: s.pop("lm_head.weight")), r"missing lm_head\.weight"),
    "whole numbers": (
        lambda f: change_weights(f, lambda s: s.update({"lm_head.weight": s["lm_head.weight"].int()})),
        r"lm_head\.weight is stored as I32, expected a floating-point type",
    ),
    "more experts": (
        lambda folder: change_json(folder, "config.json", num_experts=5),
        r"config\.json describes.*missing model\.layers\.0\.mlp\.experts\.4\.",
    ),
    "fewer experts": (
        lambda folder: change_json(folder, "config.json", num_experts=3),
        r"config\.json describes.*unexpected model\.layers\.0\.mlp\.experts\.3\.",
    ),
    "truncated shard": (truncate, r"part-1\.safetensors is not a readable .*truncated"),
    "pickle": (pickled, r"pytorch_model\.bin would be pickles, which are refused"),
    "pickle as a shard": (pickled_shard, r"part-0\.bin is a pickle file"),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
    "config.json of another model": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
        r"config\.json is not the configuration of a HunyuanImage-3",
    ),
    "no tokenizer.json": (lambda folder: (folder / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
    "token missing": (rename_token, r"tokenizer\.json lacks the tokens <recaption>\."),
    "no prompt in it": (prompt("other = 'text'"), r"system_prompt\.py assigns no text to unified_system_prompt_en"),
    "prompt computed": (prompt("unified_system_prompt_en = open('x').read()"), r"system_prompt\.py assigns no text"),
    "no Python": (prompt("unified_system_prompt_en = '"), r"system_prompt\.py cannot be parsed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_does_not_fit_is_refused(base, tmp_path, case):
    folder, (spoil, message) = tmp_path / "base", REFUSED[case]
    shutil.copytree(base, folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value) and len(str(error.value)) < 900 and "\n" not in str(error.value)


def test_a_file_instead_of_a_folder_is_refused(base):
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a folder"):
        load_model(base / WEIGHTS)


def test_a_system_prompt_is_parsed_and_never_run(base, tmp_path, caplog):
    trace = tmp_path / "it-ran"
    lines = f"open({str(trace)!r}, 'w')\nunified_system_prompt_en = '''Ours.\n'''\nraise SystemExit\n"
    (tmp_path / "system_prompt.py").write_text(lines)
    assert read_system_prompt(tmp_path) == "Ours." and not trace.exists()
    assert "not the one that the released generator was trained with" in caplog.text
    (tmp_path / "system_prompt.txt").write_text("Of a text file.\n")
    assert read_system_prompt(tmp_path) == "Of a text file."


def test_no_generator_is_trained_on_it_and_that_is_said_at_once(base):
    model = load_model(base)
    with pytest.raises(MatchError, match="cannot be trained on this base: HunyuanImage-3 is there for sampling only"):
        refuse_untrainable(model.model)
