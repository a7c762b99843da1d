"""Pictures for people: a contact sheet of edits, and a map of generated LoRAs."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .pictures import to_image

CELL, GAP, LABEL = 128, 8, 26  # pixels
INK, PAPER = (30, 30, 30), (255, 255, 255)


def contact_sheet(blocks: Sequence[tuple[str, Tensor]], columns: Sequence[str], title: str) -> Image.Image:
    """Rows of pictures under column names.

    Args:
        blocks: for every row its name and its pictures (columns, 3, H, W) in [0, 1].
    """
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    left = GAP + max(int(small.getlength(line)) for name, _ in blocks for line in name.split("\n")) + GAP
    top = LABEL * 2 + GAP
    width, height = left + len(columns) * (CELL + GAP), top + len(blocks) * (CELL + GAP)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), title, fill=INK, font=font)
    for index, name in enumerate(columns):
        draw.text((left + index * (CELL + GAP), LABEL + GAP), name, fill=INK, font=small)
    for row, (name, pictures) in enumerate(blocks):
        y = top + row * (CELL + GAP)
        draw.multiline_text((GAP, y + CELL // 2 - 8), name, fill=INK, font=small)
        for index, picture in enumerate(pictures):
            tile = to_image(picture).resize((CELL, CELL), Image.NEAREST)
            sheet.paste(tile, (left + index * (CELL + GAP), y))
    return sheet


def lora_map(points: Tensor, groups: Sequence[int], names: Sequence[str], title: str, side: int = 640) -> Image.Image:
    """Points (N, 2), one for each generated LoRA, coloured by edit; an edit's name stands at the middle of its points."""
    font = ImageFont.load_default(13)
    canvas = Image.new("RGB", (side, side + LABEL), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, GAP), title, fill=INK, font=font)
    low, high = points.min(0).values, points.max(0).values
    spread = float((high - low).max().clamp(min=1e-9))
    margin = 60
    places = ((points - (low + high) / 2) / spread * (side - 2 * margin) + side / 2).tolist()
    labels = torch.as_tensor(groups)
    for (x, y), group in zip(places, groups, strict=True):
        draw.ellipse((x - 4, y + LABEL - 4, x + 4, y + LABEL + 4), fill=_colour(group, len(names)))
    for group, name in enumerate(names):
        members = torch.tensor(places)[labels == group]
        if len(members):
            x, y = members.mean(0).tolist()
            draw.text((x + 7, y + LABEL - 8), name, fill=INK, font=font)
    return canvas


def _colour(index: int, count: int) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(index / max(1, count), 0.75, 0.85))
