"""The generator against the reference's numbers, and the chunked path against the plain one."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hywu_core import ConditionError, GenerationError, Generator, GeneratorConfig, load_generator
from hywu_core.layout import lora_elements, token_counts
from hywu_core.transformer import Tables

GENERATORS = ("gen_0", "gen_1", "gen_2")


@pytest.fixture(params=GENERATORS)
def case(request, fixtures_dir):
    folder = fixtures_dir / request.param
    return load_generator(folder), load_file(folder / "io.safetensors")


@pytest.fixture
def generator(fixtures_dir):
    return load_generator(fixtures_dir / "gen_2")


def conditions(golden):
    return {name.partition(".")[0]: tensor for name, tensor in golden.items() if name.endswith(".condition")}


def assert_reference(lora, golden, case_name):
    expected = {name for name in golden if name.startswith(f"{case_name}.out.")}
    found = {f"{case_name}.out.scale"}
    assert lora.scale == pytest.approx(float(golden[f"{case_name}.out.scale"]))
    for name, pair in lora.factors.items():
        for suffix, factor in (("lora_A", pair.down), ("lora_B", pair.up)):
            key = f"{case_name}.out.{name}.{suffix}"
            torch.testing.assert_close(factor, golden[key], atol=2e-5, rtol=0)
            found.add(key)
    assert found == expected


def test_every_output_is_the_references(case):
    generator, golden = case
    for name, condition in conditions(golden).items():
        with torch.no_grad():
            assert_reference(generator(condition), golden, name)


@pytest.mark.parametrize("chunk_bytes", [1, 5_000, 100_000, None])
def test_chunked_generation_is_the_references(case, chunk_bytes):
    generator, golden = case
    for name, condition in conditions(golden).items():
        assert_reference(generator.generate(condition, chunk_bytes=chunk_bytes), golden, name)


def test_token_grid_and_initial_tokens(case):
    generator, golden = case
    with torch.no_grad():
        tokens = generator.tokens(golden["case0.condition"])
        initial = generator.model.initial_tokens(torch.device("cpu"), torch.float32)
    torch.testing.assert_close(tokens, golden["case0.tokens"], atol=2e-5, rtol=0)
    torch.testing.assert_close(initial, golden["tokens0"], atol=1e-6, rtol=0)


def test_rotary_tables(case):
    generator, golden = case
    tables = Tables(generator.config, torch.device("cpu"))
    named = {"hw": tables.tokens(), "n": tables.layers(), "all": tables.grid(), "l7": tables.condition(7)}
    for name, (cos, sin) in named.items():
        expected = golden[f"freqs.{name}"][0, 0]
        torch.testing.assert_close(cos, expected[..., 0, 0], atol=1e-6, rtol=0)
        torch.testing.assert_close(sin, expected[..., 1, 0], atol=1e-6, rtol=0)
    whole, part = tables.grid(), tables.grid(3, 9)
    assert torch.equal(part[0], whole[0][3:9])


def test_bfloat16_stays_in_its_band(case):
    generator, golden = case
    with torch.no_grad():
        tokens = generator.bfloat16().tokens(golden["case0.condition"].bfloat16()).float()
    expected = golden["case0.bf16.tokens"].float()
    assert (tokens - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generate_computes_and_delivers_in_the_types_asked_for(generator, dtype):
    condition = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    exact = generator.generate(condition)
    half = generator.to(dtype).generate(condition, result_dtype=torch.float32)
    assert {pair.up.dtype for pair in half.pairs} == {torch.float32}
    assert {pair.up.dtype for pair in generator.generate(condition).pairs} == {dtype}
    error = torch.cat([(a.up - b.up).flatten() for a, b in zip(exact.pairs, half.pairs, strict=True)]).norm()
    assert error < 2e-2 * torch.cat([pair.up.flatten() for pair in exact.pairs]).norm()


def test_the_released_configuration(fixtures_dir):
    config = GeneratorConfig.from_json((fixtures_dir / "released_config.json").read_text())
    assert token_counts(config) == (719, 660)
    assert lora_elements(config) == 722_993_152
    generator = Generator(config, device="meta")
    assert sum(parameter.numel() for parameter in generator.parameters()) == 8_096_647_168
    assert config.scale == 4.0


def test_no_tensor_of_all_tokens_times_four_widths_exists():
    """What makes the released generator fit: its feed-forward over all tokens at once would take 5.8 GB in bfloat16."""
    config = GeneratorConfig(
        d_model=64, head_dim=16, num_pg_layers=2, input_dim=32, output_dim=16, num_base_model_layers=4, rank=4, alpha=4,
        token_dim=16, dim_accumulation=4, pg_mapping={"q": {"lora_A_dim": 640, "lora_B_dim": 960}},
    )  # fmt: skip
    generator = Generator(config).initialize(0)
    tables = Tables(config, torch.device("cpu"))
    grid = tables.num_layers * tables.positions * config.d_model

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            Largest.elements = max([Largest.elements, *sizes])
            return result

    with Largest():
        generator.generate(torch.randn(1, 8, 32), chunk_bytes=200_000)
    assert grid <= Largest.elements < 2 * grid
    with Largest(), torch.no_grad():
        generator(torch.randn(1, 8, 32))
    assert Largest.elements >= 4 * grid, "the plain path must show what the chunked one avoids"


def test_a_batch_is_its_samples(generator):
    condition = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    batch = generator.generate(condition)
    for index in range(3):
        alone = generator.generate(condition[index : index + 1])
        for found, expected in zip(batch.select(index).pairs, alone.pairs, strict=True):
            torch.testing.assert_close(found.up, expected.up, atol=2e-5, rtol=0)


def test_initialised_for_training_the_first_change_is_zero(fixtures_dir):
    config = GeneratorConfig.from_json((fixtures_dir / "gen_1" / "config.json").read_text())
    generator = Generator(config).initialize(7)
    lora = generator.generate(torch.randn(2, 5, config.input_dim))
    assert all(not pair.up.any() and pair.down.any() for pair in lora.pairs)
    assert generator.model.proj_out_A.weight.std().item() == pytest.approx(0.02, rel=0.2)
    again = Generator(config).initialize(7).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in generator.state_dict().items())


def test_gradients_reach_every_parameter_and_checkpointing_changes_none(generator):
    condition = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))

    def gradients():
        generator.zero_grad()
        sum((pair.down.square().sum() + pair.up.square().sum()) for pair in generator(condition).pairs).backward()
        return {name: parameter.grad.clone() for name, parameter in generator.named_parameters()}

    plain = gradients()
    assert all(gradient.any() for gradient in plain.values())
    generator.checkpoint_blocks = True
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-5)


def test_progress_goes_forward_and_can_cancel(generator):
    condition, seen = torch.randn(1, 5, 64), []
    whole = generator.generate(condition, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] and len({total for _, total in seen}) == 1

    class Cancelled(BaseException):
        pass

    def cancel(done, total):
        if done >= total // 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        generator.generate(condition, progress=cancel)
    again = generator.generate(condition)
    assert all(torch.equal(a.up, b.up) for a, b in zip(again.pairs, whole.pairs, strict=True))


def test_not_finite_names_the_layer(generator):
    with torch.no_grad():
        generator.model.proj_out_B.weight[0, 0] = float("inf")
    with pytest.raises(GenerationError, match="not finite in layer 0"):
        generator.generate(torch.randn(1, 5, 64))


@pytest.mark.parametrize("shape", [(1, 5, 63), (5, 64), (1, 2, 5, 64), (1, 0, 64)])
def test_a_wrong_condition_names_what_is_read(generator, shape):
    for run in (generator, generator.generate):
        with pytest.raises(ConditionError, match=r"reads \(batch, length, 64\)"):
            run(torch.zeros(shape))


def test_the_released_config_file_keeps_its_order(fixtures_dir):
    text = (fixtures_dir / "released_config.json").read_text()
    assert list(GeneratorConfig.from_json(text).pg_mapping) == list(json.loads(text)["pg_mapping"])
