"""Everything that a reference-compatible edit computes, as named tensors, so that two implementations can be compared.

The random numbers are the reference's: one generator of the seed is consumed by the source pictures' latents, then by the
noise, which is drawn in bfloat16. The steps are Euler's on the reference's schedule, sigma = s * u / (1 + (s - 1) * u).
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from pathlib import Path
from typing import NamedTuple

import comfy.model_patcher
import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ...errors import ConditionError
from ...files.checkpoint import load_generator
from ...generator import Generator
from ...host.lora.apply import apply_lora
from . import vision
from .edit import Edit, Encoder, Wishes, make_edit, to_conditioning
from .loader import load
from .sequence import Grid, SourcePicture
from .sizes import AUTO, Size, aligned_size, resize
from .text_mode import Reading, read_edit
from .vae import LatentVAE

LORA_KEYS = (".lora_A", ".lora_B")


class Case(NamedTuple):
    pictures: tuple[Tensor, ...]  # (1, H, W, 3) in [0, 1]
    prompt: str
    system_prompt: str | None = None  # None: the base folder's own
    reasoning: str | None = None  # None: nothing, "" an empty answer
    size: str = AUTO
    seed: int = 0
    steps: int = 50


class Overrides(NamedTuple):
    """What takes the place of something that another resize or random generator would change; None: nothing."""

    noise: Tensor | None = None  # (1, C, h, w)
    latents: tuple[Tensor, ...] | None = None  # (1, C, h, w) of each picture, scaled as the model reads them
    patches: tuple[Tensor, ...] | None = (
        None  # (slots, 3 * patch^2) of each picture, or its pixels (3, H, W), normalised
    )
    grids: tuple[Grid, ...] | None = None  # of the patches; None: as the picture's size gives


class Parts(NamedTuple):
    model: comfy.model_patcher.ModelPatcher
    vae: LatentVAE
    encoder: Encoder
    generator: Generator

    @classmethod
    def read(cls, base: Path, generator: Path, dtype: torch.dtype) -> Parts:
        """Load both in one dtype."""
        model, vae, encoder = load(base, dtype)
        return cls(model, vae, encoder, load_generator(generator, dtype=dtype))


def dump(parts: Parts, case: Case, overrides: Overrides | None = None) -> dict[str, Tensor]:
    """Run an edit without and with its LoRA.

    Returns:
        ids (rows, L), condition (1, L', H), ratio_logits (1, vocabulary), lora.<key>, {base,lora}.step<i>.pred (1, C, h, w)
        after guidance, {base,lora}.latent_final, and image (1, H, W, 3) of the LoRA run.
    """
    overrides = overrides or Overrides()
    source = torch.Generator().manual_seed(case.seed)
    edit = _override(parts, _make_edit(parts, case, source), overrides)
    read = read_edit(parts.model, edit)
    size = read.size
    condition = read.condition.parts[0].tokens
    found = {"condition": condition, "ratio_logits": read.ratio_logits[None]}
    lora = parts.generator.generate(condition.to(next(parts.generator.parameters()).dtype))
    for name, pair in lora.factors.items():
        found |= {f"lora.{name}{LORA_KEYS[0]}": pair.down, f"lora.{name}{LORA_KEYS[1]}": pair.up}
    found["lora.scale"] = torch.tensor(lora.scale)
    noise = _noise(edit, size, source, overrides.noise)
    rows = [edit, edit._replace(unconditional=True)]
    found["ids"] = torch.tensor([row.sequence(tuple(noise.shape[-2:])).ids for row in rows])
    patched, _ = apply_lora(parts.model, lora, 1.0, "bypass")
    for run, model in (("base", parts.model), ("lora", patched)):
        latent, predictions = _sample(model, rows, noise, case.steps)
        found |= {f"{run}.step{i}.pred": prediction for i, prediction in enumerate(predictions)}
        found[f"{run}.latent_final"] = parts.model.model.process_latent_in(latent)[:, :, 0]
    found["image"] = _image(parts, case, read, latent)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def compare(mine: dict[str, Tensor], others: dict[str, Tensor]) -> list[tuple[str, float | str]]:
    """(name, relative L2 distance) of every tensor; ids are "equal" or "different"; what one lacks says so."""
    lines: list[tuple[str, float | str]] = []
    for name in sorted(mine.keys() | others.keys()):
        if name not in mine or name not in others:
            lines.append((name, "only in the first" if name in mine else "only in the second"))
        elif mine[name].shape != others[name].shape:
            lines.append((name, f"shapes {list(mine[name].shape)} and {list(others[name].shape)}"))
        elif not mine[name].is_floating_point():
            lines.append((name, "equal" if torch.equal(mine[name], others[name]) else "different"))
        else:
            first, second = mine[name].double(), others[name].double()
            lines.append((name, float((first - second).norm() / second.norm().clamp(min=1e-30))))
    return lines


def reference_sigmas(steps: int, shift: float) -> Tensor:
    """(steps + 1,), from 1 to 0."""
    u = torch.linspace(1, 0, steps + 1)
    return shift * u / (1 + (shift - 1) * u)


def _make_edit(parts: Parts, case: Case, source: torch.Generator) -> Edit:
    wishes = Wishes(
        case.reasoning, case.size, seed=case.seed, reference_compatible=True, system_prompt=case.system_prompt
    )
    return make_edit(parts.encoder, case.prompt, case.pictures, wishes, source)


def _override(parts: Parts, edit: Edit, overrides: Overrides) -> Edit:
    pictures, latents, tokens = list(edit.request.pictures), list(edit.latents), list(edit.vision)
    _check_count("source latents", overrides.latents, pictures)
    _check_count("sets of vision patches", overrides.patches, pictures)
    for index, latent in enumerate(overrides.latents or ()):
        latents[index] = latent.unsqueeze(2) / edit.config.vae.scaling_factor
        pictures[index] = pictures[index]._replace(latent=tuple(latent.shape[-2:]))
    for index, patches in enumerate(overrides.patches or ()):
        grid = (overrides.grids or tuple(picture.patches for picture in pictures))[index]
        pixels = patches[None] if patches.ndim == 3 else _as_pixels(patches, grid, edit.config.vision.patch_size)
        tokens[index] = vision.look(parts.encoder.tower, pixels, parts.encoder.tower_dtype)
        pictures[index] = pictures[index]._replace(patches=grid)
    return edit._replace(
        latents=tuple(latents), vision=tuple(tokens), request=edit.request._replace(pictures=tuple(pictures))
    )


def _check_count(what: str, given: Many | None, pictures: list[SourcePicture]) -> None:
    if given is not None and len(given) != len(pictures):
        raise ConditionError(f"There are {len(given)} {what} for {len(pictures)} pictures. Give one for each.")


def _as_pixels(patches: Tensor, grid: Grid, side: int) -> Tensor:
    """(slots, side * side * 3) -> (1, 3, H, W); slots after the grid are padding."""
    rows, columns = grid
    cells = patches[: rows * columns].view(rows, columns, side, side, 3)
    return cells.permute(4, 0, 2, 1, 3).reshape(1, 3, rows * side, columns * side)


def _noise(edit: Edit, size: Size, source: torch.Generator, given: Tensor | None) -> Tensor:
    shape = edit.latent(size)[:, :, 0].shape
    if given is None:
        return torch.randn(shape, generator=source, dtype=torch.bfloat16).float()
    if tuple(given.shape) != tuple(shape):
        raise ConditionError(f"The noise has the shape {list(given.shape)}, but the image's latent has {list(shape)}.")
    return given.float()


def _sample(
    model: comfy.model_patcher.ModelPatcher, rows: list[Edit], noise: Tensor, steps: int
) -> tuple[Tensor, list[Tensor]]:
    """The final latent (1, C, 1, h, w) as the autoencoder takes it, and the velocity of every step."""
    config, predictions = rows[0].config, []
    sigmas = reference_sigmas(steps, config.sampling.flow_shift)

    def keep(step: int, denoised: Tensor, x: Tensor, _total: int) -> None:
        predictions.append(((x - denoised) / sigmas[step])[:, :, 0].cpu())

    latent = comfy.sample.sample_custom(
        model,
        noise.unsqueeze(2),
        1.0 if config.distilled else config.sampling.diff_guidance_scale,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        *(to_conditioning(row) for row in rows),
        torch.zeros_like(noise).unsqueeze(2),
        callback=keep,
        disable_pbar=True,
    )
    return latent, predictions


def _image(parts: Parts, case: Case, read: Reading, latent: Tensor) -> Tensor:
    """(1, H, W, 3); of an automatic size it takes the source's ratio afterwards, as the reference does."""
    decoded = parts.vae.decode(latent)
    image = decoded.reshape(-1, *decoded.shape[-3:])
    if case.size.strip().lower() != AUTO:
        return image
    sources = [Size(*picture.shape[1:3]) for picture in case.pictures]
    wanted = aligned_size(read.size, sources, parts.encoder.config.image_base_size)
    return image if wanted == read.size else resize(image, wanted)
