"""Generators with one byte a number: files in the host's format, read back exactly, and how far their LoRAs are off."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hywu_core import CheckpointError, Generator, GeneratorConfig, SaveError, load_generator, save_generator
from hywu_core.files.checkpoint import inspect_generator
from hywu_core.files.convert import convert_generator
from hywu_core.files.quantised import FP8, INT8, STORED, is_block_matrix, plain, quantise, quantised


def flat(lora) -> torch.Tensor:
    return torch.cat([factor.float().flatten() for pair in lora.pairs for factor in pair])


@pytest.fixture
def generator(fixtures_dir):
    return load_generator(fixtures_dir / "gen_2")


@pytest.mark.parametrize(("kind", "weight_error", "lora_error"), [(INT8, 0.01, 0.02), (FP8, 0.04, 0.08)])
def test_a_quantised_file_is_small_and_its_lora_near(generator, tmp_path, kind, weight_error, lora_error):
    condition = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    halves = save_generator(generator, tmp_path / "bf16.safetensors", torch.bfloat16)
    path = save_generator(generator, tmp_path / "small.safetensors", kind)
    assert path.stat().st_size < 0.62 * halves.stat().st_size  # 0.52 at release width, where scales weigh less
    files = inspect_generator(path)
    assert files.quantised == kind and files.dtype == torch.bfloat16
    read, stored = load_generator(path), load_file(path)
    weights = {name: tensor for name, tensor in generator.state_dict().items() if is_block_matrix(name, tensor.ndim)}
    assert len(weights) == 14 * len(generator.model.blocks)
    assert {stored[name].dtype for name in weights} == {STORED[kind]}
    for name, weight in weights.items():
        assert (read.state_dict()[name] - weight).norm() < weight_error * weight.norm(), name
    for name, tensor in generator.state_dict().items():
        if name not in weights:
            assert torch.equal(read.state_dict()[name], tensor.bfloat16().float()), name
    expected = flat(generator.generate(condition))
    assert 0 < (flat(read.generate(condition)) - expected).norm() < lora_error * expected.norm()


def test_the_released_generator_fits_into_half_of_its_file(fixtures_dir):
    config = GeneratorConfig.from_json((fixtures_dir / "released_config.json").read_text())
    state = Generator(config, device="meta", dtype=torch.bfloat16).state_dict()
    whole = sum(tensor.nbytes for tensor in state.values())
    assert sum(tensor.nbytes for _, tensor in quantised(state, INT8)) <= 0.52 * whole


@pytest.mark.parametrize("kind", STORED)
def test_extreme_rows_stay_finite_and_zero_stays_zero(kind):
    weight = torch.tensor([[0.0, 0.0], [3e38, -3e38], [1e-30, 0.0], [1.0, -127.0]])
    numbers, scale = quantise(weight, kind)
    back = numbers.float() * scale
    assert torch.isfinite(back).all() and not back[0].any()
    if kind == INT8:
        torch.testing.assert_close(back[3], weight[3])
        assert torch.equal(quantise(back, kind)[0], numbers), "a second time changes nothing"


def test_widened_again_it_is_the_plain_generator_of_those_weights(generator):
    state = dict(quantised(generator.state_dict(), INT8))
    again = plain(state, torch.float32)
    assert again.keys() == generator.state_dict().keys()
    assert {tensor.dtype for tensor in plain(state).values()} == {torch.bfloat16}


def damaged(state, change):
    layer = "model.blocks.0.self_attn_n.W_q"
    if change == "no scale":
        state.pop(f"{layer}.weight_scale")
    elif change == "no mark":
        state.pop(f"{layer}.comfy_quant")
    elif change == "two kinds":
        state[f"{layer}.weight"] = state[f"{layer}.weight"].to(torch.float8_e4m3fn)
    elif change == "scale of another width":
        state[f"{layer}.weight_scale"] = torch.ones(3, 1)
    elif change == "packed":
        state[f"{layer}.weight"] = state[f"{layer}.weight"][:, ::2].contiguous().view(torch.uint8)
    elif change == "a head":
        state["hidden_in.weight"] = state["hidden_in.weight"].to(torch.int8)
        state["hidden_in.weight_scale"] = torch.ones(64, 1)
        state["hidden_in.comfy_quant"] = state[f"{layer}.comfy_quant"].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no scale", "W_q is marked as quantised, but is no matrix"),
        ("no mark", "W_q.weight is stored as I8"),
        ("two kinds", "quantised in more than one way"),
        ("scale of another width", r"weight_scale is F32 \[3, 1\], expected one number"),
        ("packed", "quantised as U8, expected I8 or F8_E4M3"),
        ("a head", "hidden_in is marked as quantised, but is no matrix of a block"),
    ],
)
def test_what_is_wrong_with_a_quantised_file_is_said_before_it_is_loaded(generator, tmp_path, change, message):
    state = dict(quantised(generator.state_dict(), INT8))
    damaged(state, change)
    path = tmp_path / "damaged.safetensors"
    save_file(state, path, {"hywu_config": generator.config.to_json()})
    with pytest.raises(CheckpointError, match=message):
        load_generator(path)


@pytest.mark.parametrize("kind", STORED)
def test_marks_are_what_the_host_reads(generator, kind):
    marks = [tensor for name, tensor in quantised(generator.state_dict(), kind) if name.endswith("comfy_quant")]
    read = [json.loads(bytes(mark.tolist())) for mark in marks]
    assert all(mark["format"] == kind for mark in read) and len(read) == 14 * len(generator.model.blocks)


@pytest.mark.parametrize("kind", [INT8, FP8, torch.bfloat16])
def test_a_stopped_conversion_goes_on_and_gives_what_saving_gives(generator, tmp_path, kind):
    source, target = save_generator(generator, tmp_path / "plain.safetensors"), tmp_path / "converted"

    class StoppedError(Exception):
        pass

    def stop(line: str) -> None:
        raise StoppedError(line)

    with pytest.raises(StoppedError):
        convert_generator(source, target, kind, stop)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        inspect_generator(target)
    said = []
    convert_generator(source, target, kind, said.append)
    assert "already" in said[0] and not any("already" in line for line in said[1:])
    assert len(said) == 1 + len(generator.model.blocks)
    direct = load_generator(save_generator(generator, tmp_path / "direct.safetensors", kind)).state_dict()
    converted = load_generator(target).state_dict()
    assert all(torch.equal(tensor, converted[name]) for name, tensor in direct.items())
    assert inspect_generator(target).quantised == (kind if isinstance(kind, str) else None)


def test_a_conversion_touches_nothing_else(generator, tmp_path):
    source, target = save_generator(generator, tmp_path / "plain.safetensors"), tmp_path / "converted"
    convert_generator(source, target, INT8)
    with pytest.raises(SaveError, match="of another conversion"):
        convert_generator(source, target, FP8)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(SaveError, match=r"holds other files \(notes\.txt\)"):
        convert_generator(source, target, INT8)
    with pytest.raises(SaveError, match="is a file"):
        convert_generator(source, source, INT8)
    assert load_generator(target).config == generator.config


@pytest.mark.parametrize(
    ("mark", "match"),
    [
        (b'{"format": "int8_tensorwise"', "not valid JSON"),
        (b"\xff\xfe", "does not say how"),
        (b"[1]", "expected a JSON object"),
        (b'{"format": "float8_e4m3fn"}', "does not say how"),
        (b'{"format": ["int8_tensorwise"]}', "does not say how"),
        (b'{"format": "int8_tensorwise", "full_precision_matrix_mult": "no"}', "does not say how"),
        (b"[" * 3000, "nested too deep"),
        (b" " * 5000, "does not say how"),
    ],
)
def test_what_a_layer_says_of_itself_is_checked_before_the_host_reads_it(generator, tmp_path, mark, match):
    path = save_generator(generator, tmp_path / "small.safetensors", INT8)
    with safe_open(str(path), "pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    name = next(name for name in state if name.endswith(".comfy_quant"))
    save_file(state | {name: torch.tensor(list(mark), dtype=torch.uint8)}, path, metadata)
    with pytest.raises(CheckpointError, match=match):
        inspect_generator(path)
