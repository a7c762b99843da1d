"""Every bad value that a reader was found to stumble over: one typed error, in bounded time and memory."""

import json
import os

import pytest
import torch
from bounded import bounded
from safetensors.torch import load_file, save_file

from hywu_core import Generator, GeneratorConfig, load_generator, save_generator
from hywu_core.errors import CheckpointError, ConfigError, SaveError
from hywu_core.files.text import read_json
from hywu_core.training import GeneratorTrainable, RunLog, TrainConfig, Trainer
from hywu_core.training.log import COLUMNS
from hywu_core.training.state import KEY, StateError

DEEP = 50_000
NESTED = "[" * DEEP + "]" * DEEP
VALUES = {
    "d_model": 16, "head_dim": 8, "num_pg_layers": 1, "input_dim": 8, "output_dim": 8, "token_dim": 8, "rank": 2,
    "num_base_model_layers": 2, "alpha": 4, "dim_accumulation": 2, "pg_mapping": {"q": {"lora_A_dim": 6, "lora_B_dim": 10}},
}  # fmt: skip


def target(**dims):
    return {"pg_mapping": {"q": {"lora_A_dim": 6, "lora_B_dim": 10} | dims}}


def group(**more):
    part = {"w1": {"lora_A_dim": 6, "lora_B_dim": 10}}
    return {"pg_mapping": {"e": {"type": "grouped", "num_experts": 2, "sub_weights": part} | more}}


CONFIGS = {
    "a million blocks": ({"num_pg_layers": 10**6}, "num_pg_layers must be at most 128, found 1000000"),
    "a million encoder layers": (
        {"hywu": {"encoder_layers": 10**6}},
        "encoder_layers must be a number of layers from 0 to",
    ),
    "encoder layers that are true": ({"hywu": {"encoder_layers": True}}, "encoder_layers must be a number of layers"),
    "2^63": ({"input_dim": 2**63}, "input_dim must be at most 1,048,576"),
    "2^40": ({"d_model": 2**40, "head_dim": 2**40}, "d_model must be at most 1,048,576"),
    "a thousand digits": ({"rank": 10**1000}, "rank must be at most 4,096, found a far larger number"),
    "alpha of 400 digits": ({"alpha": 10**400}, "alpha must be a positive number, found a far larger number"),
    "a base of 10^9 layers": ({"num_base_model_layers": 10**9}, "num_base_model_layers must be at most"),
    "a target of 2^63": (target(lora_A_dim=2**63), "lora_A_dim must be at most"),
    "2^40 experts": (group(num_experts=2**40), "num_experts must be at most 4,096"),
    "a type that is a list": (group(type=["grouped"]), "has the unknown type"),
    "parts that are a list": (group(sub_weights=[1]), "sub_weights must name at least one weight"),
    "a LoRA of 10^15 elements": (
        {"num_base_model_layers": 10**5, "rank": 4096, **target(lora_A_dim=2**20, lora_B_dim=2**20)},
        "Its LoRAs would have .* elements, more than",
    ),
    "more targets than 131,072": (
        {
            "num_base_model_layers": 1000,
            "pg_mapping": {f"q{n}": {"lora_A_dim": 1, "lora_B_dim": 1} for n in range(200)},
        },
        "200 targets in each of 1000 layers are more than",
    ),
    "a target twice": (
        {"pg_mapping": {**group()["pg_mapping"], "e.w1": {"lora_A_dim": 6, "lora_B_dim": 10}}},
        "the target 'e.w1' is named twice",
    ),
    "a name of 140,000 characters": ({"pg_mapping": {"x" * 140_000: {}}}, "lora_A_dim must be a positive integer"),
    "a width of 2^63": ({"hywu": {"condition": [{"kind": "a", "width": 2**63}]}}, "the width of 'a' must be at most"),
    "a patch of none": ({"hywu": {"condition": [{"kind": "a", "width": 8, "patch": "2"}]}}, "the patch of 'a' must be"),
    "a base that is a list": ({"hywu": {"base": [1]}}, "hywu.base must be the name of a base"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_generator_configurations(case):
    change, said = CONFIGS[case]
    with bounded(), pytest.raises(ConfigError, match=f"here: .*{said}") as error:
        GeneratorConfig.from_json(json.dumps(VALUES | change), "here")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "text", [NESTED, '{"a":' * DEEP + "1" + "}" * DEEP, json.dumps(VALUES)[:-1] + f', "x": {"[" * 70}{"]" * 70}}}']
)
def test_json_that_is_nested_too_deep(tmp_path, text):
    file = tmp_path / "config.json"
    file.write_text(text)
    with bounded(), pytest.raises(ConfigError, match="config.json: nested"):
        GeneratorConfig.from_json(text, str(file))
    with bounded(), pytest.raises(CheckpointError, match="config.json: nested"):
        read_json(file, CheckpointError)


def test_the_largest_that_is_allowed_is_built_soon():
    allowed = {"num_pg_layers": 128, "num_base_model_layers": 2**17, "hywu": {"encoder_layers": 128}}
    with bounded():
        config = GeneratorConfig.from_dict(VALUES | allowed)
        Generator(config, device="meta")


@pytest.fixture
def folder(tmp_path):
    return save_generator(Generator(GeneratorConfig.from_dict(VALUES)).initialize(), tmp_path / "folder")


INDICES = {
    "nested": (NESTED, "index.json: nested"),
    "a name of 300 characters": ('{"weight_map": {"a": "' + "x" * 300 + '"}}', "is not a shard index"),
    "a number for a name": ('{"weight_map": {"a": 3}}', "is not a shard index"),
    "no names": ('{"weight_map": {}}', "is not a shard index"),
    "a list": ('{"weight_map": ["a"]}', "is not a shard index"),
    "another folder": ('{"weight_map": {"a": "../secret.safetensors"}}', "is no file beside it"),
    "the root": ('{"weight_map": {"a": "/etc/passwd"}}', "is no file beside it"),
    "NUL": ('{"weight_map": {"a": "a\\u0000b"}}', "is no file beside it"),
    "half a character": ('{"weight_map": {"a": "\\ud800"}}', "is not a shard index|lacks the shards"),
    "not UTF-8": (b"\xff\xfe{", "is not UTF-8 text"),
}


@pytest.mark.parametrize("case", INDICES)
def test_shard_indices(folder, case):
    content, said = INDICES[case]
    index = folder / "model.safetensors.index.json"
    index.write_bytes(content if isinstance(content, bytes) else content.encode())
    with bounded(), pytest.raises(CheckpointError, match=said) as error:
        load_generator(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("path", ["x" * 300 + ".safetensors", "a\0b.safetensors", "\ud800.safetensors", "x" * 300])
def test_paths_that_cannot_be(tmp_path, path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_generator(tmp_path / path)
    with pytest.raises(SaveError, match="Cannot write"):
        save_generator(Generator(GeneratorConfig.from_dict(VALUES)).initialize(), tmp_path / path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["CON", "a:b", "dots.", "a\0b"])
def test_folders_that_some_system_cannot_hold(tmp_path, name):
    with pytest.raises(SaveError, match="Cannot write"):
        save_generator(Generator(GeneratorConfig.from_dict(VALUES)).initialize(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_text_file_that_is_far_too_large(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(10**12)
    with bounded(), pytest.raises(CheckpointError, match="has 1,000,000,000,000 bytes, and no such file has more"):
        read_json(tmp_path / "config.json", CheckpointError)


def trainer(**changes):
    generator = Generator(GeneratorConfig.from_dict(VALUES)).initialize()
    return Trainer(
        GeneratorTrainable(generator), None, [], TrainConfig(**{"steps": 9, "batch": 1, "ema": 0.5} | changes)
    )


@pytest.fixture
def state(tmp_path):
    """The file of a run after one step, and a function that writes it anew, changed."""
    run, path = trainer(), tmp_path / "state.safetensors"
    for parameter in run.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    run.optimizer.step()
    run.done = 1
    run.save(path)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    told = {"done": 1, "config": json.loads(json.dumps(trainer().config.__dict__))}

    def write(change):
        text = change(tensors, told)
        save_file(tensors, path, {KEY: json.dumps(told) if text is None else text})
        return path

    return write


BIAS = "hidden_in.bias"
STATES = {
    "text": (lambda t, told: '"x"', "expected a JSON object, found str"),
    "a list": (lambda t, told: "[]", "expected a JSON object, found list"),
    "no JSON": (lambda t, told: "x", "not valid JSON"),
    "nothing": (lambda t, told: "{}", "does not say what it was trained with"),
    "nested": (lambda t, told: NESTED, "nested too deep"),
    "a configuration that is a list": (
        lambda t, told: told.update(config=[1]),
        "does not say what it was trained with",
    ),
    "2^63 steps done": (lambda t, told: told.update(done=2**63), "it says 9223372036854775808 of 9 steps are done"),
    "-1 steps done": (lambda t, told: told.update(done=-1), "it says -1 of 9 steps are done"),
    "half a step done": (lambda t, told: told.update(done=0.5), "it says 0.5 of 9"),
    "steps done that are true": (lambda t, told: told.update(done=True), "it says True of 9"),
    "another rate": (lambda t, told: told["config"].update(learning_rate=2.0), "was trained with learning_rate 2.0"),
    "no average": (lambda t, told: [t.pop(f"average.{BIAS}")] and None, f"average.{BIAS} is missing"),
    "no second moment": (lambda t, told: [t.pop(f"exp_avg_sq.{BIAS}")] and None, f"exp_avg_sq.{BIAS} is missing"),
    "no moments of one": (lambda t, told: [t.pop(f"exp_avg.{BIAS}")] and None, f"exp_avg.{BIAS} is missing"),
    "a moment of another shape": (
        lambda t, told: t.update({f"exp_avg.{BIAS}": torch.zeros(3)}),
        rf"exp_avg.{BIAS} is \[3\] of torch.float32, expected \[16\]",
    ),
    "an average of another shape": (
        lambda t, told: t.update({f"average.{BIAS}": torch.zeros(1)}),
        f"average.{BIAS} is ",
    ),
    "whole numbers": (lambda t, told: t.update({f"parameter.{BIAS}": torch.zeros(16).int()}), "of torch.int32"),
}


@pytest.mark.parametrize("case", STATES)
def test_states_of_runs(state, case):
    change, said = STATES[case]
    path, run = state(change), trainer()
    before = {name: parameter.clone() for name, parameter in run.parameters.items()}
    with bounded(), pytest.raises(StateError, match=said) as error:
        run.resume(path)
    assert str(path) in str(error.value) and "Download" not in str(error.value)
    assert (
        all(torch.equal(parameter, before[name]) for name, parameter in run.parameters.items())
        and not run.optimizer.state
    )


def test_the_state_itself_is_read(state):
    run = trainer()
    run.resume(state(lambda tensors, told: None))
    assert run.done == 1


def test_a_damaged_state_says_what_to_do(tmp_path):
    path = tmp_path / "state.safetensors"
    path.write_bytes(b"\x00" * 100)
    with pytest.raises(StateError, match=r"Use a new run name, or delete the file to begin again\."):
        trainer().resume(path)


HEADING = ",".join(COLUMNS) + "\r\n"
LOGS = {
    "half a row": (HEADING + "0,0.5,0.1,1\r\n1,0.25,0.1,1\r\n2,0.", [0.5, 0.25]),
    "half a heading": ("step,lo", []),
    "another heading": ("a,b,c,d\r\n0,0.5,0.1,1\r\n", [0.5]),
    "no heading": ("0,0.5,0.1,1\r\n", [0.5]),
    "empty": ("", []),
    "a word": (HEADING + "0,0.5,0.1,1\r\none,two,three,four\r\n", [0.5]),
    "NUL": (HEADING + "0,0.5,0.1,1\r\n\0\0\0\0\0", [0.5]),
    "not UTF-8": (HEADING.encode() + b"0,0.5,0.1,1\r\n\xff\xfe", [0.5]),
    "a field of 200,000 characters": (HEADING + "0,0.5,0.1,1\r\n" + "x" * 200_000 + ",1,1,1\r\n", [0.5]),
    "a step of 5,000 digits": (HEADING + "9" * 5000 + ",1,1,1\r\n", []),
    "half a step": (HEADING + "0.5,1,1,1\r\n0,0.5,0.1,1\r\n", [0.5]),
}


@pytest.mark.parametrize("case", LOGS)
def test_logs_of_runs(tmp_path, caplog, case):
    """A run that was killed, or had no room left, must not be kept from going on by half a row."""
    content, losses = LOGS[case]
    path = tmp_path / "log.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with bounded():
        log = RunLog(tmp_path, 3)
    assert log.losses == losses
    assert case == "empty" or "log.csv is damaged" in caplog.text
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)


def test_a_log_that_cannot_be_written_stays(tmp_path, monkeypatch):
    (tmp_path / "log.csv").write_bytes((HEADING + "0,0.5,0.1,1\n").encode())

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(SaveError, match=r"log\.csv.*No space left"):
        RunLog(tmp_path, 1)
    assert (tmp_path / "log.csv").read_bytes() == (HEADING + "0,0.5,0.1,1\n").encode()


def test_a_message_that_names_something_endless_is_cut_in_its_middle():
    assert str(ConfigError("short")) == "short"
    text = str(ConfigError(f"what is wrong: {'x' * 10**6}. What to do."))
    assert text.startswith("what is wrong: x") and text.endswith("x. What to do.") and len(text) < 3100
