"""A base model from its files, through the host's own loaders, outside the server."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.sd
import comfy.utils
import torch

from ...errors import CheckpointError
from ...training.options import RunConfig
from .pairs_of_folder import Encoders

PIXEL_SPACE = "pixel_space"
SAMPLED, SAMPLES, SAMPLE = 1 << 20, 2048, 4096  # bytes at a file's beginning; samples of so many bytes beyond
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_files(run: RunConfig) -> None:
    """Look for every file that a run names, before anything is loaded.

    Raises:
        CheckpointError: naming what is missing, or what more is needed.
    """
    if not run.checkpoint and not (run.model and run.text_encoders and run.vae):
        raise CheckpointError(
            "A run needs a base: --model, --text-encoders and --vae (or --checkpoint with all three)."
        )
    if run.clip_type.upper() not in comfy.sd.CLIPType.__members__:
        kinds = ", ".join(sorted(name.lower() for name in comfy.sd.CLIPType.__members__))
        raise CheckpointError(f"There is no kind of text encoder {run.clip_type!r}. The host knows {kinds}.")
    for path in base_files(run):
        if not path.is_file():
            raise CheckpointError(f"The base's file {path} does not exist.")


def base_files(run: RunConfig) -> list[Path]:
    """All files that a run's base is made of."""
    vae = "" if run.vae == PIXEL_SPACE else run.vae
    return [Path(name) for name in (run.checkpoint, run.model, *run.text_encoders, vae, run.clip_vision) if name]


def fingerprint(files: Sequence[Path]) -> str:
    """Of files' sizes and a sample of their bytes, to tell apart what different encoders made."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with open(path, "rb") as handle:
            digest.update(handle.read(SAMPLED))  # names and shapes, in a safetensors file
            for place in range(SAMPLES):  # so many that every large matrix is met
                handle.seek(max(0, size - SAMPLE) * place // (SAMPLES - 1))
                digest.update(handle.read(SAMPLE))
    return digest.hexdigest()[:16]


def encoders_fingerprint(files: Sequence[Path], clip_type: str) -> str:
    """The same of encoders: what one file of a text encoder makes depends on the kind that it is read as."""
    found, kind = fingerprint(files), clip_type.lower()
    return found if kind == RunConfig.clip_type else hashlib.sha256(f"{found} {kind}".encode()).hexdigest()[:16]


def load_model(run: RunConfig) -> Any:
    """The base's MODEL.

    Raises:
        CheckpointError: if the host cannot read it.
    """
    options = {"dtype": DTYPES[run.weight_dtype]} if run.weight_dtype in DTYPES else {}
    if run.model:
        return _loaded(run.model, lambda: comfy.sd.load_diffusion_model(run.model, model_options=options))
    return _loaded(run.checkpoint, lambda: _checkpoint(run, output_model=True, model_options=options)[0])


def load_encoders(run: RunConfig) -> Encoders:
    """What encodes pairs.

    Raises:
        CheckpointError: naming the file that the host cannot read.
    """
    clip, vae = None, None
    if run.checkpoint and not (run.text_encoders and run.vae):
        _, clip, vae = _loaded(run.checkpoint, lambda: _checkpoint(run, output_model=False))[:3]
    if run.text_encoders:
        kind, files = comfy.sd.CLIPType[run.clip_type.upper()], list(run.text_encoders)
        clip = _loaded(", ".join(files), lambda: comfy.sd.load_clip(files, clip_type=kind))
    if run.vae:
        vae = _loaded(run.vae, lambda: _vae(run.vae))
    if clip is None or vae is None:
        raise CheckpointError(f"{run.checkpoint} holds no {'VAE' if clip else 'text encoder'}. Give its file as well.")
    vision = _loaded(run.clip_vision, lambda: comfy.clip_vision.load(run.clip_vision)) if run.clip_vision else None
    return Encoders(clip, vae, vision)


def _checkpoint(run: RunConfig, output_model: bool, **options) -> Any:
    return comfy.sd.load_checkpoint_guess_config(
        run.checkpoint, output_vae=not output_model, output_clip=not output_model, output_model=output_model, **options
    )


def _vae(name: str) -> comfy.sd.VAE:
    if name == PIXEL_SPACE:
        return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    state, metadata = comfy.utils.load_torch_file(name, return_metadata=True)
    vae = comfy.sd.VAE(sd=state, metadata=metadata)
    vae.throw_exception_if_invalid()
    return vae


def _loaded(name: str, load) -> Any:
    try:
        found = load()
    except Exception as error:  # the host's loaders raise whatever reading a foreign file led to
        raise CheckpointError(f"The host cannot load {name}: {error}") from error
    if found is None:
        raise CheckpointError(f"The host does not know the kind of model in {name}.")
    return found
