"""The pocket editor: a tiny but genuine editing model that ships with the pack and runs on a CPU in seconds.

A native ComfyUI Flux with reference latents in pixel space (`editor`), a table of what words mean as a stock CLIP (`text`)
and the host's own pixel-space VAE (`vae`). Stock nodes use it like any other model. What ships is in `weights/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .editor import EditorConfig, build_editor, load_editor, save_editor
from .text import TextConfig, build_text_encoder, load_text_encoder, save_text_encoder
from .vae import load_vae

WEIGHTS = Path(__file__).resolve().parent / "weights"

__all__ = [
    "EditorConfig",
    "PocketFiles",
    "TextConfig",
    "build_editor",
    "build_text_encoder",
    "load_editor",
    "load_pocket_editor",
    "load_text_encoder",
    "load_vae",
    "pocket_files",
    "save_editor",
    "save_text_encoder",
]


class PocketFiles(NamedTuple):
    """What the pocket editor consists of on disk."""

    editor: Path
    text: Path


def pocket_files(folder: Path = WEIGHTS) -> PocketFiles:
    """Paths of the editor's and the text encoder's weights in a folder; by default the one that ships."""
    return PocketFiles(folder / "editor.safetensors", folder / "words.safetensors")


def load_pocket_editor(folder: Path = WEIGHTS):
    """Load the editor from its files.

    Returns:
        (MODEL, CLIP, VAE), each as the host's own loaders give them.
    Raises:
        CheckpointError: naming the file that is missing, damaged, or of another kind.
    """
    files = pocket_files(folder)
    model, clip = load_editor(files.editor), load_text_encoder(files.text)
    return model, clip, load_vae(model.model.diffusion_model.patch_size)
