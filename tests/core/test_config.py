"""The configuration: every contradiction is one clear error, and what is read comes back as it was."""

import json

import pytest

from hywu_core import ConfigError, GeneratorConfig


@pytest.fixture
def values(fixtures_dir):
    return json.loads((fixtures_dir / "gen_2" / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim_accumulation": 3}, "rank 4 must be divisible by dim_accumulation 3"),
        ({"output_dim": 16}, "output_dim 16 must equal token_dim 32"),
        ({"head_dim": 24}, "d_model 64 must be divisible by head_dim 24"),
        ({"head_dim": 2, "d_model": 64}, "head_dim 2 must be divisible by 4"),
        ({"rank": 6, "dim_accumulation": 6}, "d_model 64 must be divisible by dim_accumulation 6"),
        ({"rank": 0}, "rank must be a positive integer, found 0"),
        ({"rank": 4.0}, "rank must be a positive integer, found 4.0"),
        ({"num_pg_layers": True}, "num_pg_layers must be a positive integer, found True"),
        ({"alpha": 0}, "alpha must be a positive number, found 0"),
        ({"alpha": "16"}, "alpha must be a positive number, found '16'"),
        ({"alpha": float("inf")}, "alpha must be a positive number, found inf"),
        ({"prefix": None}, "prefix must be text, found None"),
        ({"hywu": []}, r"hywu must be an object, found \[\]"),
        ({"pg_mapping": {}}, "pg_mapping must name at least one target"),
        ({"pg_mapping": {"q": 3}}, r"pg_mapping\['q'\] must be an object, found 3"),
        ({"pg_mapping": {"q": {"type": "conv"}}}, r"pg_mapping\['q'\] has the unknown type 'conv'"),
        (
            {"pg_mapping": {"q": {"lora_A_dim": 4}}},
            r"pg_mapping\['q'\].lora_B_dim must be a positive integer, found None",
        ),
        (
            {"pg_mapping": {"q": {"type": "grouped", "sub_weights": {"w": {}}}}},
            "num_experts must be a positive integer",
        ),
        ({"pg_mapping": {"q": {"type": "grouped", "num_experts": 2}}}, "sub_weights must name at least one weight"),
        (
            {"pg_mapping": {"q": {"type": "grouped", "num_experts": 2, "sub_weights": {"w": {"lora_A_dim": -1}}}}},
            r"sub_weights\['w'\].lora_A_dim must be a positive integer, found -1",
        ),
        (
            {"pg_mapping": {"q": {"type": "grouped", "num_experts": True, "sub_weights": {"w": {}}}}},
            "num_experts must be a positive integer, found True",
        ),
        ({"hywu": {"condition": []}}, r"hywu.condition must be a list of parts, each with kind and width, found \[\]"),
        ({"hywu": {"condition": ["text"]}}, "hywu.condition must be a list of parts"),
        ({"hywu": {"condition": [{"width": 64}]}}, r"a kind of its own, found \[None\]"),
        ({"hywu": {"condition": [{"kind": "a", "width": 32}] * 2}}, r"a kind of its own, found \['a', 'a'\]"),
        ({"hywu": {"condition": [{"kind": "a"}]}}, "the width of 'a' must be a positive integer, found None"),
        (
            {"hywu": {"condition": [{"kind": "a", "width": 60}, {"kind": "b", "width": 3}]}},
            r"input_dim 64 must be the sum of the condition's widths 60 \+ 3",
        ),
    ],
)
def test_contradictions(values, change, message):
    with pytest.raises(ConfigError, match=f"here: .*{message}"):
        GeneratorConfig.from_dict(values | change, "here")


def test_missing_keys_are_named(values):
    del values["rank"], values["d_model"]
    with pytest.raises(ConfigError, match="not the configuration of a HY-WU generator, missing d_model, rank"):
        GeneratorConfig.from_dict(values)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[1]", "expected a JSON object, found list")])
def test_text_that_is_no_configuration(text, message):
    with pytest.raises(ConfigError, match=message):
        GeneratorConfig.from_json(text)


def test_unknown_keys_and_the_order_of_targets_survive(values):
    values["future_key"] = {"b": 1, "a": 2}
    values["pg_mapping"] = dict(reversed(values["pg_mapping"].items()))
    config = GeneratorConfig.from_dict(values)
    back = json.loads(config.to_json())
    assert {**back} == {**values}
    assert list(back["pg_mapping"]) == list(values["pg_mapping"])
    assert GeneratorConfig.from_json(config.to_json()) == config
