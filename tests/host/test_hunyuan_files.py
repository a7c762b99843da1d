"""HunyuanImage-3 on disk: conversion into quantised formats, and a checkpoint with as many tensors as the released one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import comfy.model_management
import comfy.sample
import hunyuan_tiny as tiny
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from safetensors.torch import load_file, save_file

from hywu_core import InstanceLora, load_generator
from hywu_core.bases.hunyuan_image3 import convert as conversion
from hywu_core.bases.hunyuan_image3.convert import convert, verify
from hywu_core.bases.hunyuan_image3.edit import to_conditioning
from hywu_core.bases.hunyuan_image3.files import decoder_shapes, expert_keys, inspect_base
from hywu_core.bases.hunyuan_image3.loader import load
from hywu_core.bases.hunyuan_image3.quantised import FORMATS, can_be_quantised
from hywu_core.bases.hunyuan_image3.reason import Choice, generate
from hywu_core.bases.hunyuan_image3.text_mode import read_edit
from hywu_core.condition import assemble
from hywu_core.errors import CheckpointError, MatchError, SaveError
from hywu_core.host.lora.apply import apply_lora
from hywu_core.host.lora.experts import Rows

pytestmark = pytest.mark.usefixtures("inference")

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert_hunyuan_image3.py"
# Relative L2. Measured were 0.027, 0.093, 0.025, 0.083 and 0.096, 0.236, 0.086, 0.193. The base's weights are random, so its
# routers are easily brought to choose other experts.
BOUNDS = {
    "fp8": {"weight": 0.03, "condition": 0.14, "lora": 0.04, "latent": 0.14},
    "nvfp4": {"weight": 0.12, "condition": 0.36, "lora": 0.13, "latent": 0.26},
}


def silent(line):
    """Progress that nobody reads."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("hunyuan") / "base")


@pytest.fixture(scope="module")
def converted(base, tmp_path_factory):
    work = tmp_path_factory.mktemp("converted")
    return {kind: convert(base, work / kind, kind, CPU, silent) for kind in FORMATS}


@pytest.fixture(scope="module")
def edits(base, converted, fixtures_dir):
    """{folder: what the tests' edit gives}, each computed once."""
    folders, generator = {"base": base, **converted}, load_generator(fixtures_dir / "pg_tiny")
    with torch.inference_mode():
        return {name: edited(folder, generator) for name, folder in folders.items()}


def edited(folder, generator):
    model, _, encoder = load(folder)
    edit = tiny.golden_edit(encoder)
    condition = read_edit(model, edit).condition
    lora = generator.generate(assemble(condition, generator.config))
    patched, report = apply_lora(model, lora, 1.0, "bypass")
    assert not report.missing and any(found.pair.grouped for found in report.matched)
    products = [(lora.scale * pair.up @ pair.down).flatten() for pair in lora.factors.values()]
    return {
        "model": model,
        "edit": edit,
        "generated": lora,
        "condition": condition.parts[0].tokens.clone(),
        "lora": torch.cat(products),
        "plain": sampled(model, edit),
        "latent": sampled(patched, edit),
    }


def sampled(model, edit, steps=2):
    shape = (1, edit.config.vae.latent_channels, 1, 14, 18)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    rows = to_conditioning(edit), to_conditioning(edit._replace(unconditional=True))
    empty = torch.zeros(shape)
    return comfy.sample.sample(
        model, noise, steps, 2.5, "euler", "simple", *rows, empty, disable_pbar=True, seed=7
    ).clone()


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def floating(model, name):
    """What a quantised weight of a loaded model stands for, a bank's experts stacked."""
    module = model.model.diffusion_model.get_submodule(name.removesuffix(".weight"))
    assert isinstance(module.weight, QuantizedTensor)
    if not hasattr(module, "expert_weight"):
        return module.weight.dequantize()
    return torch.stack([module.expert_weight(expert).dequantize() for expert in range(module.num_experts)])


def change_weights(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, str(folder / WEIGHTS))


def official(state, name, experts):
    keys = expert_keys(name, experts)
    return (torch.stack([state[key] for key in keys]) if keys else state[name]).float()


@pytest.mark.parametrize("kind", FORMATS)
def test_every_large_weight_is_close_to_the_official_one(edits, base, converted, kind):
    files, state = inspect_base(converted[kind]), load_file(base / WEIGHTS)
    names = [name for name in decoder_shapes(files.config) if can_be_quantised(name)]
    assert len(names) == 6 * files.config.num_hidden_layers and set(files.kinds) == set(names)
    for name in names:
        error = tiny.relative(floating(edits[kind]["model"], name), official(state, name, files.config.num_experts))
        assert 0.005 < error < BOUNDS[kind]["weight"], name


@pytest.mark.parametrize("kind", FORMATS)
def test_everything_else_is_kept_as_it_was(base, converted, kind):
    state, found = load_file(base / WEIGHTS), {}
    for file in converted[kind].glob("*.safetensors"):
        found |= load_file(file)
    kept = [name for name in state if name in found and not can_be_quantised(name)]
    assert any(name.startswith("vae.") for name in kept) and any("mlp.gate.wg" in name for name in kept)
    assert all(torch.equal(found[name], state[name]) for name in kept)
    assert all(can_be_quantised(name) or ".experts." in name for name in state.keys() - set(kept))


@pytest.mark.parametrize("kind", FORMATS)
def test_an_edit_stays_near_the_one_of_the_unquantised_base(edits, kind):
    for part, bound in BOUNDS[kind].items():
        if part != "weight":
            error = tiny.relative(edits[kind][part], edits["base"][part])
            assert 0.001 < error < bound, (part, error)


@pytest.mark.parametrize("kind", FORMATS)
def test_only_weights_are_rounded(edits, base, tmp_path, fixtures_dir, kind):
    """A base that holds the rounded weights in floating point gives the same: condition, LoRA, image with it beside banks."""
    twin, model = tmp_path / "twin", edits[kind]["model"]
    shutil.copytree(base, twin)
    state = load_file(base / WEIGHTS)
    experts = model.model.config.num_experts
    for name in filter(can_be_quantised, decoder_shapes(model.model.config)):
        for key in expert_keys(name, experts) or [name]:
            state.pop(key)
        state[name] = floating(model, name).float().contiguous()
    save_file({name: tensor.clone() for name, tensor in state.items()}, str(twin / WEIGHTS))
    found = edited(twin, load_generator(fixtures_dir / "pg_tiny"))
    for part in ("condition", "lora", "plain", "latent"):
        assert tiny.relative(edits[kind][part], found[part]) < 1e-3, part
    assert tiny.relative(edits[kind]["latent"], edits[kind]["plain"]) > 0.01  # the LoRA does something


@pytest.mark.parametrize("kind", FORMATS)
def test_merging_into_a_quantised_bank_is_refused(edits, kind):
    with pytest.raises(MatchError, match=r"layers\.0\.mlp\.experts\.\w+ of this model is a quantised bank.*bypass"):
        apply_lora(edits[kind]["model"], edits[kind]["generated"], 1.0, "merge")
    patched, _ = apply_lora(edits["base"]["model"], edits["base"]["generated"], 1.0, "merge")
    assert tiny.relative(sampled(patched, edits["base"]["edit"]), edits["base"]["latent"]) < 1e-3


@pytest.mark.parametrize("kind", FORMATS)
def test_quantised_linears_are_merged_into_as_the_host_does(edits, kind):
    """W + B . A is rounded to the format again, and the base gets its own bits back."""
    model, edit, lora = (edits[kind][part] for part in ("model", "edit", "generated"))
    linears = InstanceLora({name: pair for name, pair in lora.factors.items() if "experts" not in name}, lora.scale)
    merged, beside = (sampled(apply_lora(model, linears, 1.0, mode)[0], edit) for mode in ("merge", "bypass"))
    assert 0.001 < tiny.relative(merged, beside) < BOUNDS[kind]["latent"]
    assert torch.equal(sampled(model, edit), edits[kind]["plain"])


@pytest.mark.parametrize("kind", FORMATS)
def test_activations_are_never_rounded(edits, converted, kind, monkeypatch):
    """Also where the host could multiply in the format itself, which it would do if the files did not forbid it."""
    for supported in ("supports_fp8_compute", "supports_nvfp4_compute"):
        monkeypatch.setattr(comfy.model_management, supported, lambda device=None: True)
    model, _, encoder = load(converted[kind])
    layers = [module for module in model.model.diffusion_model.modules() if getattr(module, "layout_type", None)]
    assert len(layers) == 6 * model.model.config.num_hidden_layers
    assert all(layer._full_precision_mm and FORMATS[kind] not in layer._disabled_formats for layer in layers)
    assert torch.equal(read_edit(model, tiny.golden_edit(encoder)).condition.parts[0].tokens, edits[kind]["condition"])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_stopped_conversion_goes_on(base, converted, tmp_path, kind):
    target, whole = tmp_path / kind, contents(converted[kind])

    def stop(line):
        if line.startswith("[2/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(base, target, kind, CPU, stop)
    assert sorted(file.name for file in target.glob("*.safetensors")) == ["layer-0.safetensors", "layer-1.safetensors"]
    with pytest.raises(CheckpointError, match="was not finished"):
        load(target)
    (target / ".layer-2.safetensors.123.tmp").write_bytes(b"of a run that was killed")
    said = []
    convert(base, target, kind, CPU, said.append)
    assert [line for line in said if "intact" in line] == [f"layer-{n}.safetensors: there and intact" for n in (0, 1)]
    assert contents(target) == whole


def test_a_full_disk_leaves_no_half_written_file(base, converted, tmp_path, monkeypatch):
    def fill(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    target = tmp_path / "fp8"
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "save_file", fill)
        with pytest.raises(SaveError, match=r"layer-0.safetensors.*No space left"):
            convert(base, target, "fp8", CPU, silent)
        assert [file.name for file in target.iterdir()] == ["conversion.json"]
        patch.setattr(conversion.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 0, 9))
        with pytest.raises(SaveError, match="needs 0.0 GB more"):
            convert(base, target, "fp8", CPU, silent)
    convert(base, target, "fp8", CPU, silent)
    assert contents(target) == contents(converted["fp8"])


def flip(place):
    def change(shard):
        content = bytearray(shard.read_bytes())
        content[place(len(content))] ^= 1
        shard.write_bytes(content)

    return change


DAMAGES = {
    "number": flip(lambda size: size // 2),
    "mark": flip(lambda size: size - 5),  # marks are written last
    "cut short": lambda shard: os.truncate(shard, shard.stat().st_size - 5),
    "lost": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_found_and_made_anew(base, converted, tmp_path, damage):
    target, said = tmp_path / "fp8", []
    shutil.copytree(converted["fp8"], target)
    DAMAGES[damage](target / "layer-1.safetensors")
    with pytest.raises(CheckpointError, match=r": layer-1\.safetensors differ"):
        verify(target, said.append)
    assert len(said) == len(contents(converted["fp8"])) - 2  # the list itself, and what begins a conversion
    assert [line for line in said if "DAMAGED" in line] == ["layer-1.safetensors: DAMAGED"]
    said = []
    convert(base, target, "fp8", CPU, said.append)
    assert damage == "lost" or "layer-1.safetensors: damaged, is converted again" in said
    assert [line for line in said if line.startswith("[")][0].startswith("[2/13] layer-1.safetensors")
    assert contents(target) == contents(converted["fp8"])
    verify(target, silent)


def test_only_a_finished_conversion_can_be_verified(base, tmp_path):
    with pytest.raises(CheckpointError, match="lists no checksum of config.json, model.safetensors"):
        verify(base, silent)
    with pytest.raises(CheckpointError, match="is not a folder"):
        verify(tmp_path / "nowhere", silent)


def test_the_command(base, converted, tmp_path):
    def run(*arguments):
        host = str(Path(comfy.model_management.__file__).resolve().parents[1])
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COMFYUI_DIR": host})

    target = tmp_path / "fp8"
    done = run(base, target, "--format", "fp8")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("is complete: 13 files of weights\n")
    assert contents(target) == contents(converted["fp8"])
    DAMAGES["number"](target / "layer-1.safetensors")
    done = run("--verify", target)
    assert done.returncode == 1 and "layer-1.safetensors: DAMAGED" in done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_target_that_holds_something_else_is_refused(base, converted, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SaveError, match="holds something else"):
        convert(base, tmp_path, "fp8", CPU, silent)
    assert contents(tmp_path) == {"notes.txt": b"mine"}
    with pytest.raises(SaveError, match="holds something else"):
        convert(base, tmp_path / "notes.txt", "fp8", CPU, silent)
    with pytest.raises(SaveError, match="another conversion.*differs in format"):
        convert(base, converted["fp8"], "nvfp4", CPU, silent)
    with pytest.raises(SaveError, match="holds something else"):
        convert(base, base, "fp8", CPU, silent)


def test_another_source_of_the_same_name_is_refused(base, converted, tmp_path):
    other = tmp_path / base.name
    shutil.copytree(base, other)
    change_weights(other, lambda state: state["lm_head.weight"].mul_(2))
    with pytest.raises(SaveError, match="another conversion.*source_sample"):
        convert(other, converted["fp8"], "fp8", CPU, silent)


def test_a_quantised_source_is_refused(converted, tmp_path):
    with pytest.raises(CheckpointError, match=r"quantised already \(fp8\)"):
        convert(converted["fp8"], tmp_path / "twice", "nvfp4", CPU, silent)
    assert not (tmp_path / "twice").exists()


def test_numbers_that_are_not_finite_are_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    change_weights(tmp_path / "base", lambda state: state[name][0].fill_(float("inf")))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.down_proj.weight holds numbers .* not finite"):
        convert(tmp_path / "base", tmp_path / "fp8", "fp8", CPU, silent)


@pytest.mark.parametrize(("distilled", "count"), [(False, 5161), (True, 5169)])
def test_the_released_numbers_of_tensors(distilled, count):
    values = tiny.full_count_config(cfg_distilled=distilled, use_meanflow=distilled)
    assert len(tiny.full_count_shapes(values)) == count


def test_a_checkpoint_of_the_released_count_loads(tmp_path):
    folder = tiny.make_full_count_folder(tmp_path / "full", 7, tiny.full_count_config())
    files, state = inspect_base(folder), {}
    for shard in folder.glob("*.safetensors"):
        state |= load_file(shard)
    assert len(files.headers) == len(state) == 5161
    shards = {name: header.shard for name, header in files.headers.items()}
    banks = {name: expert_keys(name, 64) for name in decoder_shapes(files.config)}
    assert sum(len({shards[key] for key in keys}) > 1 for keys in banks.values()) >= 6
    model, vae, encoder = load(folder)
    loaded = model.model.diffusion_model.state_dict()
    assert loaded.keys() == banks.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor.float(), official(state, name, 64)), name
    decoder = {name: tensor for name, tensor in vae.first_stage_model.state_dict().items() if "temb_proj" not in name}
    assert len(decoder) == 280  # the host makes temb_proj as well, and never uses it without a time embedding
    assert all(torch.equal(tensor.float(), state[f"vae.{name}"].float()) for name, tensor in decoder.items())
    tower = encoder.tower.model.state_dict()
    assert tower and all(torch.equal(tensor.float(), state[name].float()) for name, tensor in tower.items())


@pytest.mark.parametrize("told", [b"{}", b"no JSON", b'{"format": "mxfp8"}'])
def test_a_mark_that_cannot_be_read_is_refused(converted, tmp_path, told):
    folder, name = tmp_path / "fp8", "model.layers.1.mlp.experts.down_proj.comfy_quant"
    shutil.copytree(converted["fp8"], folder)
    state = load_file(folder / "layer-1.safetensors")
    save_file(state | {name: torch.tensor(list(told), dtype=torch.uint8)}, str(folder / "layer-1.safetensors"))
    with pytest.raises(CheckpointError, match=r"experts\.down_proj\.comfy_quant (is damaged|names the format 'mxfp8')"):
        load(folder)


@pytest.mark.parametrize("kind", FORMATS)
def test_experts_brought_one_by_one_are_those_of_the_bank(edits, kind, monkeypatch):
    model, edit = edits[kind]["model"], edits[kind]["edit"]
    whole = generate(model, edit, "recaption", 1, Choice(), 6)
    monkeypatch.setattr(Rows, "_is_elsewhere", lambda bank, x: True)
    assert generate(model, edit, "recaption", 1, Choice(), 6) == whole
