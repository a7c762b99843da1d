"""The parity script on the fixtures: what it dumps is what the reference computed, drawn from the seed or given by files."""

import sys
from pathlib import Path

import hunyuan_tiny as tiny
import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
import parity_hunyuan_image3 as script

ASKED = tiny.facts()
LORA, BASE, CONDITION = tiny.golden("lora"), tiny.golden("base"), tiny.golden("condition")


def command(out, *more, image=True):
    return [
        *("dump", "--base", str(tiny.FIXTURES / "base_tiny"), "--generator", str(tiny.FIXTURES / "pg_tiny")),
        *(("--image", str(tiny.FIXTURES / "images" / "a_272x240.png")) if image else ()),
        *("--prompt", ASKED["prompt"], "--system-prompt", ASKED["system_prompt"], "--reasoning", ASKED["cot_text"]),
        *("--size", ASKED["image_size"], "--seed", str(ASKED["seed"]), "--steps", "3", "--dtype", "float32"),
        *("--out", str(out)),
        *more,
    ]


@pytest.fixture(autouse=True)
def in_the_host(monkeypatch):
    """The tests are in it already."""
    monkeypatch.setattr(script, "enter_host", lambda **_: None)


def dump(out, *more):
    assert script.run_dump(script.arguments_of(command(out, *more))) == 0
    return load_file(out)


def check(found):
    assert torch.equal(found["ids"], LORA["call0.in.input_ids"])
    assert tiny.relative(found["condition"], CONDITION["condition"]) < 1e-5
    assert tiny.relative(found["ratio_logits"], LORA["ratio_logits_last"]) < 1e-5
    for name, expected in tiny.golden("pg_state_dict").items():
        assert tiny.relative(found[f"lora.{name}"], expected) < 1e-5
    for index in range(3):
        assert tiny.relative(found[f"base.step{index}.pred"], BASE[f"step{index}.pred"]) < 2e-5
        assert tiny.relative(found[f"lora.step{index}.pred"], LORA[f"step{index}.pred"]) < 2e-5
    assert tiny.relative(found["base.latent_final"], BASE["step2.prev"]) < 5e-5
    assert tiny.relative(found["lora.latent_final"], LORA["step2.prev"]) < 5e-5
    assert (found["image"] - tiny.picture("one_lora")).abs().max() <= 1.01 / 255


def test_a_dump_is_the_references_from_the_seed_alone(tmp_path):
    check(dump(tmp_path / "out.safetensors"))


def test_a_dump_takes_noise_latents_and_patches_from_files(tmp_path):
    save_file({"noise": BASE["step0.sample"]}, tmp_path / "noise.safetensors")
    save_file({"latents": CONDITION["call0.in.cond_vae_images"]}, tmp_path / "latents.safetensors")
    save_file({"0": CONDITION["call0.in.cond_vit_images.0"]}, tmp_path / "patches.safetensors")
    files = ("--noise", "noise"), ("--cond-latents", "latents"), ("--vit-pixels", "patches")
    given = [part for option, name in files for part in (option, str(tmp_path / f"{name}.safetensors"))]
    check(dump(tmp_path / "out.safetensors", *given, "--seed", "7"))  # nothing of the seed is left


def test_two_pictures_and_an_automatic_size(tmp_path):
    tall = tmp_path / "tall.png"
    from PIL import Image

    Image.open(tiny.FIXTURES / "images" / "a_272x240.png").resize((150, 333)).save(tall)
    found = dump(tmp_path / "out.safetensors", "--image", str(tall), "--size", "auto", "--reasoning", "")
    assert found["condition"].shape[1] > CONDITION["condition"].shape[1] and found["image"].isfinite().all()


def test_dumps_are_compared(tmp_path, capsys):
    first = {"ids": torch.arange(4), "condition": torch.ones(3), "only": torch.ones(1)}
    second = {"ids": torch.arange(4), "condition": torch.ones(3) * 1.5}
    for name, tensors in (("a", first), ("b", second)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("a", "b", "a")]
    assert script.run_compare(script.arguments_of(["compare", *paths[:2]])) == 1
    said = capsys.readouterr().out
    assert "only in the first" in said and "3.33e-01" in said and "1 of 3 tensors" in said
    assert script.run_compare(script.arguments_of(["compare", paths[0], paths[2]])) == 0


@pytest.mark.parametrize("option", ["--noise", "--cond-latents"])
def test_a_file_of_another_shape_says_so(tmp_path, option, capsys, monkeypatch):
    save_file({"x": torch.ones(2, 8, 5, 5)}, tmp_path / "wrong.safetensors")
    monkeypatch.setattr(
        sys, "argv", ["parity", *command(tmp_path / "out", option, str(tmp_path / "wrong.safetensors"))]
    )
    assert script.main() == 2
    assert "parity: " in capsys.readouterr().err
