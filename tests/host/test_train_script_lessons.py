"""Lessons in weight space in scripts/train.py and scripts/teach.py: resumed bit for bit, and what they lack."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from hywu_core import load_generator
from hywu_core.errors import ConfigError
from hywu_core.files.lora_files import save_lora
from hywu_core.host.training.in_script import GENERATOR
from hywu_core.host.training.session import StoppedError
from hywu_core.training.options import build_run

pytest.importorskip("accelerate")
from train_script import ROOT, WORDS, PocketRun, folder_of_pairs, options, run, write_list

LESSONS = {  # {name: options beside those of a run on pairs}
    "memory": {"memory": 0.5, "memory_batch": 3, "memory_schedule": "falling"},
    "a large teacher alone": {"memory": 1.0, "diffusion": 0.0, "held_out_share": 0.0, "validate_every": 0},
    "LoRA files beside the loss": {"loras": 1.0, "loras_batch": 3},
}


@pytest.mark.parametrize("name", LESSONS)
def test_lessons_in_weight_space_go_on_bit_for_bit(tmp_path, name):
    folder_of_pairs(tmp_path / "pairs")
    given = LESSONS[name]
    old = run(tmp_path, output=str(tmp_path / "old"), steps=2, rank=8, targets="img_attn.*")
    if "memory" in given:
        given = given | {"teacher": str(old)}
    else:
        generator = load_generator(old)
        lora = generator.generate(torch.randn(1, 8, generator.config.input_dim))
        lora = lora.map(lambda pair: type(pair)(pair.down, torch.randn(pair.up.shape) * 0.05))
        (tmp_path / "loras").mkdir()
        save_lora(lora.with_metadata(instruction="make it a dream"), tmp_path / "loras" / "dream.safetensors")
        given = given | {"lora_files": str(tmp_path / "loras")}
    given = given | {"rank": 4, "targets": "img_attn.*"}
    whole = run(tmp_path, output=str(tmp_path / "whole"), **given)
    asked = iter((False, True))
    with pytest.raises(StoppedError):
        run(tmp_path, lambda: next(asked), **given)
    again = run(tmp_path, **given)
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    hywu = load_generator(whole).config.hywu
    assert len(hywu["lineage"]) == 1 and hywu["lineage"][0]["kind"] == "trained"
    assert ("make it a dream" in hywu["instructions"]) == ("loras" in given)
    assert set(WORDS) >= set(hywu["instructions"]) - {"make it a dream"}


WITHOUT = {  # {what is missing: (options, words of the error)}
    "a teacher": ({"memory": 1.0}, "needs a teacher"),
    "a weight": ({"old_instructions": "old.txt", "generator": "x"}, "old_instructions has no effect without memory"),
    "files": ({"loras": 1.0}, "need each other"),
    "pairs of one new edit": ({"prediction": 1.0}, "is for scripts/teach.py"),
    "passes through the base": ({"prediction": 1.0, "memory": 1.0, "diffusion": 0.0}, "needs passes through the base"),
    "anything": ({"diffusion": 0.0}, "nothing to train for"),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_lessons_that_lack_something(tmp_path, name):
    changes, words = WITHOUT[name]
    with pytest.raises(ConfigError, match=words):
        build_run(options(tmp_path, **changes), PocketRun)


def test_the_command_teaches_and_learns(tmp_path):
    lines = folder_of_pairs(tmp_path / "pairs")
    run(tmp_path, output=str(tmp_path / "old"), steps=2, rank=4, targets="img_attn.*")
    write_list(tmp_path / "pairs", [line | {"instruction": "a new edit"} for line in lines])
    common = ["--pocket", "--cpu", "--generator", str(tmp_path / "old" / GENERATOR), "--steps", "2", "--batch", "2"]

    def command(*more):
        script = [sys.executable, str(ROOT / "scripts" / "teach.py"), *common, *more]
        return subprocess.run(script, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    taught = command("--pairs", str(tmp_path / "pairs"), "--output", str(tmp_path / "taught"))
    assert taught.returncode == 0, taught.stderr
    assert "memory: distance" in taught.stdout and "a new edit\t" in taught.stdout
    config = load_generator(tmp_path / "taught" / GENERATOR).config
    assert "a new edit" in config.hywu["instructions"] and set(WORDS) & set(config.hywu["instructions"])
    wrong = command("--loras", str(tmp_path / "nothing"), "--output", str(tmp_path / "learned"))
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: ") and "is not a folder" in wrong.stderr
