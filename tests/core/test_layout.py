"""The token layout against the reference: exact, padding included, in both directions."""

import json

import pytest
import torch
from safetensors import safe_open

from hywu_core import GeneratorConfig, LoraError
from hywu_core.layout import Placement, detokenize, place, target_names, token_spans, tokenize


@pytest.fixture(params=[f"tok_{kind}_b{batch}" for kind in range(3) for batch in (1, 2)])
def case(request, fixtures_dir):
    with safe_open(fixtures_dir / f"{request.param}.safetensors", "pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}
        metadata = handle.metadata()
    return config_of(fixtures_dir, request.param[4], metadata), tensors, json.loads(metadata["order"])


def config_of(fixtures_dir, kind, metadata) -> GeneratorConfig:
    values = json.loads((fixtures_dir / f"gen_{kind}" / "config.json").read_text())
    return GeneratorConfig.from_dict(
        values | {"pg_mapping": json.loads(metadata["pg_mapping"]), "rank": int(metadata["rank"])}
    )


def part(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def test_the_order_of_factors(case):
    config, _, order = case
    assert [span.key for span in token_spans(config)] == order


def test_tokenize_is_the_references(case):
    config, tensors, _ = case
    found, expected = tokenize(part(tensors, "sd."), config), tensors["tokens_nan"]
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_detokenize_is_the_references(case):
    config, tensors, _ = case
    found = detokenize(tensors["rand_tokens"], config)
    expected = part(tensors, "det.")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_there_and_back(case):
    config, tensors, _ = case
    state = part(tensors, "sd.")
    back = detokenize(tokenize(state, config), config)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_wrong_factors_are_named(case):
    config, tensors, order = case
    state = part(tensors, "sd.")
    with pytest.raises(LoraError, match=f"The factor {order[0]} is missing"):
        tokenize({name: tensor for name, tensor in state.items() if name != order[0]}, config)
    with pytest.raises(LoraError, match="does not have: z.lora_A"):
        tokenize(state | {"z.lora_A": state[order[0]]}, config)
    with pytest.raises(LoraError, match=f"{order[0]} has the shape"):
        tokenize(state | {order[0]: state[order[0]][..., :-1]}, config)
    with pytest.raises(LoraError, match="Tokens have the shape"):
        detokenize(tensors["rand_tokens"][:, 1:], config)


def test_names_are_module_paths(fixtures_dir):
    config = GeneratorConfig.from_json((fixtures_dir / "gen_2" / "config.json").read_text())
    names = target_names(config)
    assert names[0] == "model.layers.0.mlp.experts.w1" and names[-1] == "model.layers.1.self_attn.qkv_proj"
    assert len(names) == len(set(names)) == 14


@pytest.mark.parametrize(
    ("name", "rows", "grouped", "expected"),
    [
        ("a.proj", 8, False, Placement("a.proj")),
        ("a.linear1[4:12/32]", 8, False, Placement("a.linear1", 4, 8, 32)),
        ("a.experts.w3", 8, True, Placement("a.experts.gate_and_up_proj", 0, 8, 16)),
        ("a.experts.w1", 8, True, Placement("a.experts.gate_and_up_proj", 8, 8, 16)),
        ("a.experts.w2", 8, True, Placement("a.experts.down_proj")),
        ("a.experts.down_proj", 8, True, Placement("a.experts.down_proj")),
        ("a.w1", 8, False, Placement("a.w1")),
    ],
)
def test_where_a_target_lands(name, rows, grouped, expected):
    assert place(name, rows, grouped) == expected


@pytest.mark.parametrize("name", ["a[0:4/32]", "a[28:36/32]"])
def test_a_slice_that_contradicts_its_factor(name):
    with pytest.raises(LoraError, match="its up factor has 8 rows"):
        place(name, 8)
