"""A generator for several stacks of a base: one grid each, from shared blocks; with one stack it is what it was."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from counting import Alive
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hywu_core import ConfigError, GenerationError, Generator, GeneratorConfig, load_generator, save_generator
from hywu_core.chunked import generate_layers
from hywu_core.files.convert import convert_generator
from hywu_core.files.quantised import INT8
from hywu_core.layout import (
    all_targets,
    detokenize,
    layer_places,
    lora_elements,
    target_names,
    token_counts,
    token_spans,
    tokenize,
)
from hywu_core.plan import parameters, plan, positions, summary
from hywu_core.training import GeneratorTrainable, Sample
from hywu_core.training.memory import graph_bytes
from hywu_core.training.trainable import SharedLora
from hywu_core.transformer import Tables


def stack(prefix: str, layers: int, mapping: dict) -> dict:
    return {"prefix": prefix, "num_base_model_layers": layers, "pg_mapping": mapping}


def dims(columns: int, rows: int) -> dict:
    return {"lora_A_dim": columns, "lora_B_dim": rows}


DOUBLE = stack("double_blocks.", 2, {"qkv": dims(24, 72), "proj": dims(24, 24)})
SINGLE = stack("single_blocks.", 3, {"linear2": dims(40, 24)})
GROUP = {"type": "grouped", "num_experts": 3, "sub_weights": {"w1": dims(8, 12), "w2": dims(12, 8)}}
EXPERTS = stack("moe.", 1, {"experts": GROUP})


def config(*stacks, **changes) -> GeneratorConfig:
    first, *further = stacks or (DOUBLE, SINGLE)
    values = {
        "d_model": 32, "head_dim": 8, "num_pg_layers": 2, "input_dim": 12, "output_dim": 8, "token_dim": 8, "rank": 4,
        "alpha": 8, "dim_accumulation": 2, **first, "hywu": {"further_stacks": further} if further else {},
    }  # fmt: skip
    return GeneratorConfig.from_dict(values | changes)


def random_generator(made: GeneratorConfig, dtype=torch.float32) -> Generator:
    generator = Generator(made, dtype=dtype).initialize(3)
    torch.nn.init.normal_(generator.model.proj_out_B.weight, std=0.1)
    return generator


def condition(length=5, batch=1, seed=0, dtype=torch.float32):
    return torch.randn(batch, length, 12, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_equal(found, expected, **tolerance):
    assert found.names == expected.names
    for name, ours, theirs in zip(found.names, found.pairs, expected.pairs, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_names_shapes_and_sizes_of_every_stack():
    made = config(DOUBLE, SINGLE, EXPERTS)
    assert target_names(made) == (
        *(f"double_blocks.{layer}.{name}" for layer in range(2) for name in ("qkv", "proj")),
        *(f"single_blocks.{layer}.linear2" for layer in range(3)),
        "moe.0.experts.w1", "moe.0.experts.w2",
    )  # fmt: skip
    shapes = {name: (*target.up_shape(4), *target.down_shape(4)) for name, target in all_targets(made)}
    assert shapes["single_blocks.2.linear2"] == (24, 4, 4, 40) and shapes["moe.0.experts.w1"] == (3, 12, 4, 3, 4, 8)
    assert [tuple(place) for place in layer_places(made)] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0)]
    lora = random_generator(made).generate(condition())
    assert lora_elements(made) == lora.elements == 4 * (2 * (96 + 48) + 3 * 64 + 3 * (20 + 20))


@pytest.mark.parametrize("stack", range(3))
def test_tokens_of_each_stack_there_and_back(stack):
    made = config(DOUBLE, EXPERTS, SINGLE)
    spans = token_spans(made, stack)
    state = {span.key: torch.randn(2, *span.shape) for span in spans}
    tokens = tokenize(state, made, stack)
    assert tokens.shape == (2, sum(token_counts(made, stack)), 4, 8)
    back = detokenize(tokens, made, stack)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    alone = config((DOUBLE, EXPERTS, SINGLE)[stack])
    assert token_spans(alone) == spans and torch.equal(tokenize(state, alone).nan_to_num(), tokens.nan_to_num())


def test_the_configuration_survives_its_file_and_one_stack_has_todays_keys(tmp_path):
    made = config(DOUBLE, SINGLE, EXPERTS)
    back = GeneratorConfig.from_json(made.to_json())
    assert back == made and back.stacks == made.stacks and len(made.stacks) == 3
    keys = list(json.loads(made.to_json()))
    assert keys == [*json.loads(config(DOUBLE).to_json()), "hywu"]
    one, several = (Generator(found, device="meta").state_dict() for found in (config(DOUBLE), made))
    assert one.keys() == several.keys(), "further stacks add rows to the learned positions and nothing else"
    changed = {name for name in one if one[name].shape != several[name].shape}
    assert changed == {"model.hw_pos.weight", "model.layer_pos.weight"}


def test_a_further_stack_changes_nothing_of_what_the_first_gets_but_where_the_condition_lies():
    """The rows of the first stack are the first rows; its grid never sees the other's."""
    several = random_generator(config(DOUBLE, SINGLE))
    alone = Generator(config(DOUBLE))
    state = several.state_dict()
    rows = {name: tensor.shape[0] for name, tensor in alone.state_dict().items()}
    alone.load_state_dict({name: tensor[: rows[name]] for name, tensor in state.items()})
    assert sum(token_counts(several.config, 0)) > sum(token_counts(several.config, 1)), "so that it lies where it did"
    whole, part = several.generate(condition()), alone.generate(condition())
    for name, pair in part.factors.items():
        assert torch.equal(pair.up, whole.factors[name].up) and torch.equal(pair.down, whole.factors[name].down)


def test_equal_stacks_are_told_apart_by_their_learned_and_their_rotary_positions():
    made = config(DOUBLE, {**DOUBLE, "prefix": "other_blocks."})
    generator = random_generator(made)
    pairs = generator.generate(condition()).factors
    assert not torch.allclose(pairs["double_blocks.0.qkv"].up, pairs["other_blocks.0.qkv"].up, atol=1e-3)
    for positions_of in (generator.model.hw_pos, generator.model.layer_pos):
        half = positions_of.weight.shape[0] // 2
        with torch.no_grad():
            positions_of.weight[half:] = positions_of.weight[:half]
    pairs = generator.generate(condition()).factors
    first, second = pairs["double_blocks.0.qkv"].up, pairs["other_blocks.0.qkv"].up
    assert not torch.equal(first, second), "alike in every weight, they still stand at other layers"
    tables = Tables(made, torch.device("cpu"))
    other = tables.of_stack(1)
    grid = torch.view_as_real(torch.cat((tables.grid().table, other.grid().table)))
    assert len(grid.unique(dim=0)) == len(grid), "no place of the grids is another one's"
    assert other.condition(5).table is tables.condition(5).table


@pytest.mark.parametrize("chunk_bytes", [1, 2_000, 20_000, None])
@pytest.mark.parametrize("encoder_layers", [0, 1])
def test_chunked_generation_is_forward(chunk_bytes, encoder_layers):
    made = config(DOUBLE, SINGLE, EXPERTS)
    made = dataclasses.replace(made, hywu={**made.hywu, "encoder_layers": encoder_layers})
    generator = random_generator(made, torch.float64)
    with torch.no_grad():
        expected = generator(condition(batch=2, dtype=torch.float64))
    found = generator.generate(condition(batch=2, dtype=torch.float64), chunk_bytes=chunk_bytes)
    assert_equal(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_reach_every_stack_and_every_parameter(checkpoint):
    generator = random_generator(config(DOUBLE, SINGLE, EXPERTS), torch.float64)

    def gradients(names):
        generator.zero_grad()
        lora = generator(condition(dtype=torch.float64))
        sum(
            pair.up.square().sum() + pair.down.square().sum() for n, pair in lora.factors.items() if names in n
        ).backward()
        return {name: parameter.grad for name, parameter in generator.named_parameters()}

    whole = gradients("")
    assert all(gradient is not None and gradient.any() for gradient in whole.values())
    generator.checkpoint_blocks = checkpoint
    parts = [gradients(prefix) for prefix in ("double_blocks", "single_blocks", "moe")]
    rows = [part["model.hw_pos.weight"].any(1) for part in parts]
    assert torch.stack(rows).sum(0).eq(1).all(), "each row of the learned positions is of one stack"
    for name, gradient in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), gradient)


def test_a_new_generator_changes_nothing_and_one_of_one_stack_begins_as_ever():
    lora = Generator(config(DOUBLE, SINGLE)).initialize(7).generate(condition())
    assert all(not pair.up.any() and pair.down.any() for pair in lora.pairs) and len(lora.pairs) == 7


def test_not_finite_names_the_layer_and_the_stack():
    generator = random_generator(config())
    with torch.no_grad():
        generator.model.layer_pos.weight[3] = float("nan")
    with pytest.raises(GenerationError, match="not finite in layer [012] of single_blocks"):
        generator.generate(condition())


def test_files_of_every_kind(tmp_path):
    generator = random_generator(config(DOUBLE, SINGLE, EXPERTS))
    expected = generator.generate(condition())
    for path in (tmp_path / "one.safetensors", tmp_path / "folder"):
        back = load_generator(save_generator(generator, path))
        assert back.config == generator.config
        assert_equal(back.generate(condition()), expected, atol=0, rtol=0)
    int8 = load_generator(convert_generator(tmp_path / "folder", tmp_path / "int8", INT8))
    flat, wanted = (
        torch.cat([pair.up.flatten() for pair in lora.pairs]) for lora in (int8.generate(condition()), expected)
    )
    assert 0 < (flat - wanted).norm() < 0.05 * wanted.norm()


def test_the_plan_counts_all_grids():
    made = config(DOUBLE, SINGLE, EXPERTS, hywu={"further_stacks": [SINGLE, EXPERTS], "encoder_layers": 1})
    generator = random_generator(made)
    assert parameters(made) == sum(parameter.numel() for parameter in generator.parameters())
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        generator.generate(condition(60, batch=2))
    assert plan(made, 2, 60, torch.float32).flops == pytest.approx(counted.get_total_flops(), rel=1e-3)
    grids = [(grid.layers, grid.each) for grid in positions(made).grids]
    assert grids == [(layers, 2 * sum(token_counts(made, n))) for n, layers in enumerate((2, 3, 1))]
    assert positions(made).all == sum(layers * each for layers, each in grids)
    assert " + ".join(f"{each} x {layers}" for layers, each in grids) + " positions" in summary(made, 0)


def large(stacks, d_model=128) -> GeneratorConfig:
    """Large enough that what one chunk costs stands out from what a tensor costs."""
    mappings = ((4, 300, 290), (6, 500, 100))
    first, *further = (
        {"prefix": f"s{n}.", "num_base_model_layers": layers,
         "pg_mapping": {"q": {"lora_A_dim": 32 * a, "lora_B_dim": 32 * b}}}
        for n, (layers, a, b) in enumerate(mappings[:stacks])
    )  # fmt: skip
    return config(
        first, *further, d_model=d_model, head_dim=32, rank=8, alpha=8, token_dim=32, output_dim=32, dim_accumulation=4
    )


@pytest.mark.parametrize("lengths", [[16], [900], [16, 900, 40], [900, 900, 16]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_knows_the_peak(lengths, dtype):
    generator = Generator(large(2)).initialize(0).to(dtype)
    planned = plan(generator.config, len(lengths), lengths, dtype)
    given = [torch.randn(lengths.count(length), length, 12, dtype=dtype) for length in dict.fromkeys(lengths)]
    tables = Tables(generator.config, torch.device("cpu"))
    with torch.no_grad(), Alive() as alive:
        contexts = [generator.context(one.clone(), tables) for one in given]
        for _ in generate_layers(generator.model, contexts, tables, planned.chunk):
            pass
    assert alive.peak == pytest.approx(planned.peak, rel=0.1)


class FusedAttention(torch.autograd.Function):
    """Attention as one kernel remembers it; the meta device would write all scores out."""

    @staticmethod
    def forward(ctx, queries, keys, values):
        result = torch.empty_like(queries)
        ctx.save_for_backward(queries, keys, values, result, queries.new_empty(queries.shape[:-1]))
        return result

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@pytest.mark.parametrize("recomputed", [True, False])
def test_a_graph_takes_what_it_is_said_to(monkeypatch, recomputed):
    """All linear layers of Flux: 19 double and 38 single blocks."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", FusedAttention.apply)
    sides = {"attn.qkv": (1, 3), "attn.proj": (1, 1), "mlp.0": (1, 4), "mlp.2": (4, 1)}
    double = {f"{stream}_{name}": s for stream in ("img", "txt") for name, s in sides.items()}
    first, second = (
        {"prefix": prefix, "num_base_model_layers": layers,
         "pg_mapping": {n: {"lora_A_dim": 3072 * a, "lora_B_dim": 3072 * b} for n, (a, b) in mapping.items()}}
        for prefix, layers, mapping in (
            ("double_blocks.", 19, double), ("single_blocks.", 38, {"linear1": (1, 7), "linear2": (5, 1)})
        )
    )  # fmt: skip
    made = config(first, second, d_model=128, head_dim=32, rank=16, alpha=32, token_dim=64, output_dim=64)
    generator = Generator(made, device="meta", dtype=torch.float32)
    generator.checkpoint_blocks = recomputed
    with Alive() as alive:
        lora = generator(torch.empty(1, 512, 12, device="meta"))
        factors = [factor for pair in lora.pairs for factor in pair]
        torch.autograd.backward(factors, [torch.empty_like(factor) for factor in factors])
    said = graph_bytes(made, 512, torch.float32, recomputed)
    assert 0.8 * said < alive.peak < 1.05 * said


def test_what_is_trained_beside_generators_knows_all_stacks():
    made = config(DOUBLE, SINGLE, EXPERTS)
    shared = SharedLora(made, rank=2, alpha=2.0)
    assert shared.lora().names == target_names(made)
    generator = random_generator(made)
    samples = [Sample(torch.empty(0), None, condition(length, seed=length)[0], "") for length in (5, 3, 5)]
    together = GeneratorTrainable(generator).lora(samples)
    for number, sample in enumerate(samples):
        assert_equal(together.select(number), generator(sample.condition[None]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({}, r"hywu.further_stacks must be a list of less than 32 stacks, found \{\}"),
        ([3], r"further_stacks\[0\] must be an object with prefix, num_base_model_layers, pg_mapping, found 3"),
        ([SINGLE | {"rank": 3}], r"further_stacks\[0\] must be an object with"),
        ([SINGLE, {**SINGLE, "num_base_model_layers": 0}], r"further_stacks\[1\].num_base_model_layers must be a positive"),
        ([{**SINGLE, "prefix": 1}], r"further_stacks\[0\].prefix must be text, found 1"),
        ([{**SINGLE, "pg_mapping": {}}], r"further_stacks\[0\].pg_mapping must name at least one target"),
        ([{**SINGLE, "pg_mapping": {"q": {"lora_A_dim": 4}}}], r"further_stacks\[0\].pg_mapping\['q'\].lora_B_dim must be"),
        ([DOUBLE], "the prefix 'double_blocks.' begins with that of another stack, 'double_blocks.'"),
        ([{**SINGLE, "prefix": "double_blocks.0."}], "'double_blocks.0.' begins with that of another stack"),
        ([{**SINGLE, "prefix": f"s{n}."} for n in range(32)], "must be a list of less than 32 stacks"),
        ([{**SINGLE, "num_base_model_layers": 2**17}], r"1 targets in each of 131072 layers are more than 131,072"),
        (
            [{**SINGLE, "num_base_model_layers": 2**16, "pg_mapping": {"q": {"lora_A_dim": 2**20, "lora_B_dim": 1}}}],
            "Its LoRAs would have .* elements, more than",
        ),
    ],
)  # fmt: skip
def test_further_stacks_that_contradict(further, message):
    with pytest.raises(ConfigError, match=message):
        config(hywu={"further_stacks": further})
