"""Commands that measure run dry on the CPU, in processes of their own as a user starts them."""

import importlib
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


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


@pytest.fixture
def gpu_checks(scripts):
    return importlib.import_module("gpu_check")


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=os.environ)


APART = ("launches", "capped")  # checks that start the host again
FORMATS = ("plain", "fp8", "int8", "nvfp4")


def checked(folder, *checks):
    done = run("gpu_check.py", "--cpu", "--small", "--json", str(folder / "numbers.json"), *checks)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    found = json.loads((folder / "numbers.json").read_text())
    assert found.keys() == set(checks) and not any("failed" in numbers for numbers in found.values())
    return found


def test_the_check_of_a_gpu_runs_dry(tmp_path, gpu_checks):
    found = checked(tmp_path, *(name for name in gpu_checks.CHECKS if name not in APART))
    assert found["applied"]["base_bit_identical"] and found["applied"]["bypass_minus_merge"] < 1e-4
    assert found["exact"]["float32"]["relative_error"] < 1e-5 < found["exact"]["bfloat16"]["relative_error"] < 0.05
    assert found["gradients"]["here"]["relative_error"] < 1e-5
    stages = {"generate", "bypass", "merge", "training"}
    assert stages < found["interrupted"].keys()
    for name in stages:
        assert found["interrupted"][name] == {"stopped": True, "base_bit_identical": True, "forwards_left": 0}
    losses = [found[f"training_{kind}"]["first_loss"] for kind in FORMATS]
    assert all(0 < abs(loss / losses[0] - 1) < 0.01 for loss in losses[1:])
    sizes = [found[f"hunyuan_{kind}"]["weights_gb"] for kind in ("bf16", "fp8", "nvfp4")]
    assert sizes == sorted(sizes, reverse=True)
    for kind in ("bf16", "fp8", "nvfp4"):
        resident = found[f"hunyuan_{kind}"]["resident"]
        assert all(resident[name]["seconds"] > 0 for name in ("step", "step_with_lora", "token"))
        assert "skipped" in found[f"hunyuan_{kind}"]["streamed"]


def test_checks_of_a_gpu_start_the_host_in_other_ways(tmp_path):
    found = checked(tmp_path, *APART)
    assert found["launches"]["default"]["seconds"] and found["launches"]["plain memory"]["off_by"] == 0
    assert found["capped"]["reserve 1 GB"]["seconds"] > 0


def test_a_check_that_fails_says_why_and_the_others_go_on(gpu_checks, monkeypatch, capsys):
    def fails(machine):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_checks, "Machine", lambda *arguments: None)
    monkeypatch.setattr(gpu_checks, "CHECKS", {"first": fails, "second": lambda machine: {"seconds": 1.0}})
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_checks.main() == 1
    said = capsys.readouterr().out
    assert "RuntimeError: no such kernel" in said and '"seconds": 1.0' in said and "1 of 2 checks ran" in said


def test_a_trace_says_what_a_device_did(scripts):
    """A kernel of 4 ms, one of 2 ms that overlaps it by half, and a copy beside the last millisecond, in 10 ms."""
    trace = importlib.import_module("gpu_checks.trace")
    events = [
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel"},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernelExC"},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize"},
        {"cat": "cpu_op", "name": "cudaLaunchKernel"},
        {"cat": "kernel", "name": "gemm", "ts": 1000, "dur": 4000},
        {"cat": "kernel", "name": "norm", "ts": 4000, "dur": 2000},
        {
            "cat": "gpu_memcpy",
            "name": "Memcpy HtoD (Pinned -> Device)",
            "ts": 5000,
            "dur": 2000,
            "args": {"bytes": 5e8},
        },
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pageable)", "ts": 8000, "dur": 1000},
    ]
    found = trace.numbers_of(events, 0.01)
    expected = {"launches": 2, "waits": 1, "copies_to_device": 1, "copied_gb": 0.5}
    assert found == pytest.approx(expected | {"busy": 0.5, "copying": 0.2, "both_at_once": 0.1})


def test_training_on_a_quantised_base_is_measured(tmp_path):
    done = run("bench_training.py", "quantised", "--steps", "4", "--json", str(tmp_path / "losses.json"))
    assert (tmp_path / "losses.json").exists(), done.stderr[-2000:]
    found = json.loads((tmp_path / "losses.json").read_text())
    plain, other = (found["bases"][name] for name in ("float32", "fp8"))
    # the bound is for a whole run: the mean of two steps says little
    assert found["apart"] == other["last"] / plain["last"] - 1 and 0 < abs(found["apart"]) < 0.2
    assert done.returncode == (abs(found["apart"]) > 0.03)
    assert f"after 4 steps {found['apart']:+.2%} apart" in done.stdout


def test_a_quantised_base_that_ends_far_off_fails_its_benchmark(scripts, monkeypatch, capsys):
    bench = importlib.import_module("bench_training")
    monkeypatch.setattr(bench, "trained_on", lambda kind, steps: {"first": 2.0, "last": 1.0 if kind is None else 1.04})
    monkeypatch.setattr(sys, "argv", ["bench_training.py", "quantised"])
    assert bench.main() == 1 and "+4.00% apart" in capsys.readouterr().out


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
