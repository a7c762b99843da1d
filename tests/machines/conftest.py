"""Machines that are not at hand, each played small and real: tests in this folder run inside a real ComfyUI, in process."""

import os
import sys
from pathlib import Path

HOST_TESTS = Path(__file__).resolve().parents[1] / "host"
HOST = Path(os.environ.get("COMFYUI_DIR", Path(__file__).resolve().parents[2] / ".host" / "ComfyUI"))


def _enter_host() -> None:
    """As tests/host/conftest.py does."""
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
    collect_ignore_glob = ["*.py"]

sys.path.append(str(HOST_TESTS))  # its helpers
sys.path.append(str(Path(__file__).resolve().parent))
