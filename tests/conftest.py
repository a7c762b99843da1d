"""Paths shared by every test: the fixtures, and the host that scripts/setup.sh made (or COMFYUI_DIR)."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST = Path(os.environ.get("COMFYUI_DIR", ROOT / ".host" / "ComfyUI"))

if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: the host's own nodes.py must win over our nodes/ package
sys.path.append(str(ROOT / "tests"))  # helpers of several folders


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """Golden numbers of the reference implementation, see tests/fixtures/README.md."""
    return ROOT / "tests" / "fixtures"


@pytest.fixture(scope="session")
def host_dir() -> Path:
    """The ComfyUI folder under test."""
    if not (HOST / "main.py").is_file():
        pytest.fail(f"No ComfyUI host at {HOST}. Run: bash scripts/setup.sh")
    return HOST
