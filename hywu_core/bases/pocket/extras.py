"""What comes with the pocket editor beside it, offered where an artist chooses files: so that templates run at once."""

from __future__ import annotations

from pathlib import Path

from ...host.lora import store
from ...host.training import pairs_in_server
from . import WEIGHTS

PAIRS = Path(__file__).resolve().parent / "pairs"  # darkened and brightened pictures, with a pairs.jsonl


def register() -> None:
    store.ship("HY-WU pocket-shared.safetensors", WEIGHTS / "shared.safetensors")
    pairs_in_server.ship("HY-WU example pairs", PAIRS)
