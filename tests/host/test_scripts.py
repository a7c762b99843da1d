"""Commands that measure run dry on the CPU, in processes of their own as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hywu_core import load_generator, save_generator
from hywu_core.files.checkpoint import inspect_generator

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=os.environ)


def test_the_check_of_a_gpu_runs_dry(tmp_path):
    done = run("gpu_check.py", "--cpu", "--small", "--json", str(tmp_path / "numbers.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert len(found) == 8 and not any("failed" in numbers for numbers in found.values())
    assert found["applied"]["base_bit_identical"] and found["applied"]["bypass_minus_merge"] < 1e-4
    assert found["exact"]["float32"]["relative_error"] < 1e-5 < found["exact"]["bfloat16"]["relative_error"] < 0.05


def test_the_benchmark_runs_small(tmp_path):
    files = [str(tmp_path / name) for name in ("bench.json", "bench.png")]
    done = run(
        "bench.py", "--small", "--turns", "1", "generate", "apply", "load", "--json", files[0], "--plot", files[1]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(Path(files[0]).read_text())
    assert list(found["suites"]) == ["generate", "apply", "load"] and "torch" in found["machine"]
    assert all(suite["ratio"] > 0 for suite in found["suites"].values()) and Path(files[1]).stat().st_size > 1000


def test_a_change_of_lora_is_measured_in_a_server(tmp_path):
    done = run("bench_switch.py", "--small", "--prompts", "2", "--json", str(tmp_path / "switch.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "switch.json").read_text())
    assert all(len(way["changes"]) == 2 and way["changed_prompt"] > 0 for way in found["ways"].values())


@pytest.fixture
def plain(tmp_path, fixtures_dir):
    return save_generator(load_generator(fixtures_dir / "gen_2"), tmp_path / "plain.safetensors")


def test_a_generator_is_converted_by_a_command(tmp_path, plain):
    target = tmp_path / "int8"
    done = run("convert_generator.py", str(plain), str(target), "--format", "int8")
    assert done.returncode == 0 and inspect_generator(target).quantised == "int8_tensorwise", done.stderr
    again = run("convert_generator.py", str(plain), str(target), "--format", "fp8")
    assert again.returncode == 1 and again.stderr.startswith("error: ") and "another conversion" in again.stderr
    assert torch.isfinite(load_generator(target).hidden_in.weight).all()


def test_what_a_card_needs_is_printed(fixtures_dir):
    done = run("convert_generator.py", "--plan", str(fixtures_dir / "released_config.json"))
    assert done.returncode == 0, done.stderr
    assert "| bfloat16 | 16.2 | resident |" in done.stdout and "Derived by arithmetic, not measured" in done.stdout


def test_the_readme_says_what_the_plan_of_training_prints():
    """Derived for the released sizes of real bases, on shapes alone."""
    printed = [line for line in run("plan_training.py").stdout.splitlines() if line.startswith("| ")]
    assert len(printed) == 6
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [line for line in printed if line not in readme] == []
