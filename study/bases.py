"""The editors that the study can be run on.

The first editor is what results/pocket.json and results/continual.json were measured on, and what today's training begins
with: the same architecture as the pocket editor that ships, with another text encoder (`first_text`: fixed random features
for each word) and other weights. It is kept in `weights/`, outside the published pack.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from hywu_core.bases import pocket
from hywu_core.bases.pocket.editor import load_editor

from . import first_text

WEIGHTS = Path(__file__).resolve().parent / "weights"
FIRST, POCKET = "first", "pocket"
BASES = (FIRST, POCKET)


class Base(NamedTuple):
    """An editor and its text encoder, as the host's own loaders give them."""

    model: Any
    clip: Any


def load(name: str) -> Base:
    """One of BASES, from its files."""
    return Base(load_model(name), load_clip(name))


def load_model(name: str) -> Any:
    """The MODEL of one of BASES."""
    return load_editor({FIRST: WEIGHTS / "first-editor.safetensors", POCKET: pocket.pocket_files().editor}[name])


def load_clip(name: str) -> Any:
    """The CLIP of one of BASES."""
    if name == FIRST:
        return first_text.load_text_encoder(WEIGHTS / "first-text.safetensors")
    return pocket.load_text_encoder(pocket.pocket_files().text)


def first_generator(suffix: str = "") -> Path:
    """The file of the first editor's generator; "-told" for the regime in which the base reads the instruction too."""
    return WEIGHTS / f"first-generator{suffix}.safetensors"
