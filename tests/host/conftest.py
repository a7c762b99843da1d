"""Tests in this folder run inside a real ComfyUI, in process, on the CPU."""

import os
import sys
from pathlib import Path

import pytest

HOST = Path(os.environ.get("COMFYUI_DIR", Path(__file__).resolve().parents[2] / ".host" / "ComfyUI"))


def _enter_host() -> None:
    """Make `import comfy` work as main.py does: the arguments must be parsed before anything asks for a device."""
    if str(HOST) not in sys.path:
        sys.path.insert(0, str(HOST))
    argv, sys.argv = sys.argv, ["comfyui", "--cpu"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
    finally:
        sys.argv = argv


if (HOST / "main.py").is_file():
    _enter_host()
else:
    collect_ignore_glob = ["*.py"]  # they import the host; without one, the others are still collected

sys.path.append(str(Path(__file__).resolve().parent))  # helpers beside the tests
sys.path.append(str(Path(__file__).resolve().parents[1] / "machines"))


@pytest.fixture(scope="session", autouse=True)
def machine():
    """HYWU_DYNAMIC_VRAM=1 runs these tests as on a default NVIDIA install; tests/machines does so."""
    if not os.environ.get("HYWU_DYNAMIC_VRAM"):
        yield
        return
    from dynamic import dynamic_vram

    with dynamic_vram():
        yield


@pytest.fixture
def inference():
    """As the host runs nodes. For all tests of a file: `pytestmark = pytest.mark.usefixtures("inference")`."""
    import torch

    with torch.inference_mode():
        yield


@pytest.fixture
def output(tmp_path, monkeypatch):
    """Runs and generators of a test are its own."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "hywu", ([str(tmp_path / "hywu")], {".safetensors"}))
    return tmp_path


@pytest.fixture
def gen_2(fixtures_dir):
    """The folder of a golden generator."""
    return fixtures_dir / "gen_2"


@pytest.fixture
def golden(gen_2):
    """What that generator reads and gives."""
    from safetensors.torch import load_file

    return load_file(gen_2 / "io.safetensors")
