"""The generator against the reference's numbers, and the chunked path against the plain one."""

import dataclasses
import json
from contextlib import contextmanager

import counting
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hywu_core import ConditionError, GenerationError, Generator, GeneratorConfig, load_generator
from hywu_core.chunked import Engine, generate_layers
from hywu_core.layout import lora_elements, token_counts
from hywu_core.plan import parameters, plan, positions, summary
from hywu_core.transformer import COMPLEX, MOST_SEQUENCES, REAL, Attention, Tables

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
    for name, rotary in named.items():
        expected = golden[f"freqs.{name}"][0, 0]
        torch.testing.assert_close(rotary.table.real, expected[..., 0, 0], atol=1e-6, rtol=0)
        torch.testing.assert_close(rotary.table.imag, expected[..., 1, 0], atol=1e-6, rtol=0)
    whole, last = tables.grid().table, tables.positions * tables.num_layers
    for start, stop in ((3, 9), (0, last), (tables.positions - 2, last - 1)):
        assert torch.equal(tables.grid(start, stop).table, whole[start:stop])


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


def test_conditions_of_any_lengths_are_one_batch_in_their_order(case):
    """Nothing is padded: what a sample gets does not depend on the others."""
    generator, _ = case
    width, source = generator.config.input_dim, torch.Generator().manual_seed(0)
    lengths, held = (5, 9, 5, 3, 9), []
    given = [torch.randn(1 + (length == 3), length, width, generator=source) for length in lengths]
    given[1] = given[1].unsqueeze(1)

    @contextmanager
    def hold(block):
        held.append(block)
        yield block

    batch = generator.generate(given, engine=Engine(hold=hold))
    assert held == list(generator.model.blocks), "each block once, whatever the lengths"
    samples = [one.reshape(-1, 1, one.shape[-2], width)[n] for one in given for n in range(one.shape[0])]
    assert batch.batch == len(samples) == 6
    for number, sample in enumerate(samples):
        alone = generator.generate(sample)
        for found, expected in zip(batch.select(number).pairs, alone.pairs, strict=True):
            torch.testing.assert_close(found.up, expected.up, atol=2e-5, rtol=0)
            torch.testing.assert_close(found.down, expected.down, atol=2e-5, rtol=0)


def test_a_batch_of_conditions_is_checked_one_by_one(generator):
    good, others = torch.zeros(1, 5, 64), torch.zeros(2, 7, 64)
    for wrong, message in (
        ([good, torch.zeros(1, 5, 63)], r"\(1, 5, 63\), but this generator reads"),
        ([], "no condition"),
    ):
        with pytest.raises(ConditionError, match=message):
            generator.generate(wrong)
    engine = Engine(is_out_of_memory=lambda error: isinstance(error, NoRoomError))
    with (
        small_device(50),
        pytest.raises(GenerationError, match=r"needs 0\.0 GB for these 3 conditions of up to 7 tokens"),
    ):
        generator.generate([good, others], engine=engine)


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


@pytest.fixture
def released(fixtures_dir):
    return GeneratorConfig.from_json((fixtures_dir / "released_config.json").read_text())


def medium(**changes) -> GeneratorConfig:
    """Large enough that what one chunk costs stands out from what a tensor costs."""
    values = dict(
        d_model=128, head_dim=32, num_pg_layers=2, input_dim=96, output_dim=32, num_base_model_layers=4, rank=8, alpha=8,
        token_dim=32, dim_accumulation=4, pg_mapping={"q": {"lora_A_dim": 32 * 300, "lora_B_dim": 32 * 290}},
    )  # fmt: skip
    return GeneratorConfig(**values | changes)


def released_run(released, blocks: int, rotation=COMPLEX):
    """Kernels, angles and copies of a generate of the released shape on the meta device, with so many blocks."""
    config = dataclasses.replace(released, num_pg_layers=blocks)
    generator = Generator(config, device="meta", dtype=torch.bfloat16)
    tables = Tables(config, torch.device("meta"), rotation)
    with torch.no_grad(), counting.Fused() as fused, counting.Kernels() as counted:
        context = generator.context(torch.empty(1, 7000, 4096, device="meta", dtype=torch.bfloat16), tables)
        for _ in generate_layers(generator.model, [context], tables, chunk_bytes=2**28):
            pass
    return fused.kernels + sum(counted.launched.values()), counted


def test_a_released_generate_makes_its_tables_once_and_launches_few_kernels(released):
    distinct = (positions(released).each + released.num_base_model_layers + 7000) * released.head_dim // 2
    (one, counted), (two, more) = released_run(released, 1), released_run(released, 2)
    assert distinct <= counted.angles <= 1.5 * distinct and more.angles == counted.angles
    assert 0 < counted.copied <= 10 and more.copied == counted.copied
    assert two - one < 0.6 * 4695, "kernels of a block; 4,695 is one rotation, mask and product at a time"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation_without_complex_numbers_is_the_same(dtype):
    config, cpu = medium(), torch.device("cpu")
    heads = torch.randn(2, 3, 17, 32, dtype=dtype)
    complex_, real = (Tables(config, cpu, rotation).grid(600, 617) for rotation in (COMPLEX, REAL))
    torch.testing.assert_close(complex_(heads), real(heads), atol=1e-6, rtol=0)
    assert not torch.equal(heads, real(heads))


def test_a_device_without_complex_numbers_gets_none_and_the_references_numbers(case):
    generator, golden = case
    assert Tables(generator.config, torch.device("mps")).rotation is REAL

    class NoComplex(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            assert not any(tensor.is_complex() for tensor in counting.tensors(result)), func
            return result

    for name, condition in conditions(golden).items():
        with NoComplex():
            lora = generator.generate(condition, engine=Engine(rotation=REAL))
        assert_reference(lora, golden, name)


def test_fused_products_keep_names_and_numbers(generator):
    attention = generator.model.blocks[0].self_attn_n
    x, rotary = torch.randn(2, 3, 4, 64), Tables(generator.config, torch.device("cpu")).layers()
    x = torch.randn(2, rotary.table.shape[0], 64)
    apart, together = (
        attention.queries_keys_values(x, rotary),
        attention.queries_keys_values(x, rotary, attention.fused()),
    )
    for found, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    names = {name.rpartition(".")[0] for name in attention.state_dict()}
    assert names == {"W_q", "W_k", "W_v", "W_o"}


class NoRoomError(Exception):
    """What a device says."""


def small_device(most_elements: int):
    """A device that cannot make a tensor of more elements."""

    class SmallDevice(TorchDispatchMode):
        refused = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            inputs = {tensor.untyped_storage().data_ptr() for tensor in counting.tensors((args, kwargs))}
            for tensor in counting.tensors(result):
                if tensor.numel() > most_elements and tensor.untyped_storage().data_ptr() not in inputs:
                    SmallDevice.refused += 1
                    raise NoRoomError
            return result

    return SmallDevice()


def test_out_of_memory_halves_the_chunks_and_changes_no_number():
    generator, condition = Generator(medium()).initialize(0), torch.randn(1, 8, 96)
    torch.nn.init.normal_(generator.model.proj_out_B.weight)
    expected = generator.generate(condition)
    grid = positions(generator.config).all * 128
    engine = Engine(is_out_of_memory=lambda error: isinstance(error, NoRoomError))
    with small_device(grid) as device:
        found = generator.generate(condition, chunk_bytes=2**40, engine=engine)
    assert 0 < device.refused < 30, "found out once for a kind of work, not for every chunk"
    for ours, theirs in zip(found.pairs, expected.pairs, strict=True):
        torch.testing.assert_close(ours.up, theirs.up, atol=1e-5, rtol=0)


def test_what_fits_in_no_way_is_one_error_with_its_size():
    generator, condition = Generator(medium()).initialize(0), torch.randn(1, 8, 96)
    engine = Engine(is_out_of_memory=lambda error: isinstance(error, NoRoomError))
    with small_device(50), pytest.raises(GenerationError, match=r"Out of memory on cpu.*needs 0\.\d GB.*8 tokens"):
        generator.generate(condition, engine=engine)
    with small_device(50), pytest.raises(NoRoomError):
        generator.generate(condition)


@pytest.mark.parametrize("sequences", [MOST_SEQUENCES + 1, 2 * MOST_SEQUENCES + 7])
def test_attention_over_layers_stays_within_what_kernels_can_index(sequences, monkeypatch):
    """Forward and backward: a leading axis of more than 65,535, or more than 2^31 padded elements, crashes on GPUs."""
    seen, plain = [], torch.nn.functional.scaled_dot_product_attention

    def attention(queries, keys, values):
        seen.append(queries.shape[0])
        return plain(queries, keys, values)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    module = Attention(8, 2, torch.nn)
    heads = [torch.randn(sequences, 2, 3, 4, requires_grad=True) for _ in range(3)]
    split = module.attend(*heads)
    assert sum(seen) == sequences and len(seen) > 1
    assert all(size <= MOST_SEQUENCES and size * 2 * 128 * 32 <= 2**31 for size in seen)
    whole = module.W_o(plain(*heads).transpose(1, 2).flatten(-2))
    assert torch.equal(split, whole)
    gradients = [torch.autograd.grad(out.square().sum(), heads) for out in (split, whole)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


@pytest.mark.parametrize("changes", [{}, {"hywu": {"encoder_layers": 2}}, {"num_pg_layers": 3, "dim_accumulation": 2}])
def test_the_plan_counts_what_is_there(changes, released):
    for config in (medium(**changes), released):
        generator = Generator(config, device="meta")
        assert parameters(config) == sum(parameter.numel() for parameter in generator.parameters())
    generator, condition = Generator(medium(**changes)).initialize(0), torch.randn(2, 60, 96)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        generator(condition)
    assert plan(generator.config, 2, 60, torch.float32).flops == pytest.approx(counted.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [16, 900])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_knows_the_peak(batch, length, dtype):
    """What is alive at most during a run, weights and result left out, is what the plan says."""
    generator = Generator(medium(d_model=256)).initialize(0).to(dtype)
    condition = torch.randn(batch, length, 96, dtype=dtype)
    planned = plan(generator.config, batch, length, dtype)
    tables = Tables(generator.config, torch.device("cpu"))
    with torch.no_grad(), counting.Alive() as alive:
        context = generator.context(condition.clone(), tables)
        for _ in generate_layers(generator.model, [context], tables, planned.chunk):
            pass
    assert alive.peak == pytest.approx(planned.peak, rel=0.1)


def test_the_plan_of_the_released_generator(released):
    whole = plan(released, 1, 7000, torch.bfloat16)
    assert whole.weights == 2 * 8_096_647_168 and 3.4e15 < whole.flops < 3.6e15
    assert 2.0e9 < whole.peak < 2.8e9 and whole.streamed == 0
    small = plan(released, 1, 7000, torch.bfloat16, budget=8 * 2**30)
    assert small.peak < whole.peak and small.streamed == small.weights + small.peak + small.block - 8 * 2**30
    int8 = plan(released, 1, 7000, torch.bfloat16, matrix_bytes=1)
    assert 0.5 * whole.weights < int8.weights < 0.52 * whole.weights
    assert summary(released, whole.weights) == ("8,096.6 M parameters (16.19 GB), 5,516 x 32 positions, LoRA 723.0 M")
