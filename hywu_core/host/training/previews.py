"""Pictures of what a generator does during training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_patcher
import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...lora import InstanceLora
from ...training.data import Sample
from ..lora.apply import apply_lora
from ..sampling import sample
from .pairs_of_lists import HostPairs

PAIRS, SIDE, GAP = 4, 256, 4  # shown at most; pixels of a picture, and between pictures
CAPTION, FONT = 24, 14  # pixels of the line above the pictures, and of its letters
CAPTIONS = ("before", "with the LoRA", "as it should be")


def contact_sheet(
    model: comfy.model_patcher.ModelPatcher, vae: Any, pairs: HostPairs, lora_of: Callable[[Sample], InstanceLora]
) -> Image.Image:
    """For some pairs, one below the other: the source picture, what the base makes of it with its LoRA, the edited picture
    that is right.
    """
    count = len(pairs)
    shown = sorted({place * count // min(PAIRS, count) for place in range(min(PAIRS, count))})
    rows = []
    for index in shown:
        pair = pairs.samples[index]
        patched, _ = apply_lora(model, lora_of(pair), mode="bypass")
        made = sample(patched, [pair.conditioning], pair.latent.unsqueeze(0))
        sources = pair.conditioning[1].get("reference_latents", ())[:1]
        rows.append([_picture(vae, latent) for latent in (*sources, made, pair.latent.unsqueeze(0))])
    return _grid(rows)


def _picture(vae: Any, latent: Tensor) -> Image.Image:
    with torch.inference_mode():
        pixels = vae.decode(latent)
    pixels = pixels.reshape(-1, *pixels.shape[-3:])[0]  # a video's first frame
    picture = Image.fromarray((pixels.float().clamp(0, 1) * 255).round().cpu().numpy().astype(numpy.uint8))
    return picture.resize((SIDE, SIDE * picture.height // picture.width), Image.Resampling.LANCZOS)


def _grid(rows: list[list[Image.Image]]) -> Image.Image:
    """Rows of pictures below what they are; without a source picture the first is left out."""
    height, width = max(picture.height for row in rows for picture in row), max(len(row) for row in rows)
    sheet = Image.new("RGB", (width * (SIDE + GAP) - GAP, CAPTION + len(rows) * (height + GAP) - GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    for c, caption in enumerate(CAPTIONS[-width:]):
        draw.text((c * (SIDE + GAP) + SIDE // 2, CAPTION // 2), caption, fill="black", font=font, anchor="mm")
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            sheet.paste(picture, (c * (SIDE + GAP), CAPTION + r * (height + GAP)))
    return sheet
