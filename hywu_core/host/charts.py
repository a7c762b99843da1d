"""Pictures and tables of what LoRAs change, for nodes that show them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..lora import InstanceLora, cosine, norms

_LAYER = re.compile(r"^(?P<stack>.*?)(?P<layer>\d+)\.(?P<target>.+)$")  # the first number of a name is the layer
CELL, MARGIN, LINE = 44, 10, 16  # pixels
LOW, MIDDLE, HIGH = (38, 70, 140), (245, 245, 245), (190, 50, 40)


def norms_by_layer(lora: InstanceLora) -> tuple[Tensor, str]:
    """The Frobenius norm of every dW, layers down and targets across.

    Returns:
        an IMAGE (1, H, W, 3) and a table as tab-separated text.
    """
    places = [_place(name) for name in lora.names]
    layers = sorted({layer for layer, _ in places})
    targets = list(dict.fromkeys(target for _, target in places))
    values = torch.full((len(layers), len(targets)), float("nan"), dtype=torch.float64)
    for (layer, target), norm in zip(places, norms(lora).values(), strict=True):
        values[layers.index(layer), targets.index(target)] = norm.mean()
    rows = [f"layer {layer}" for layer in layers]
    summary = f"norm of dW, rank {lora.rank}, scale {lora.scale:g}"
    peak = float(values.nan_to_num().max()) or 1.0
    return _heat_map(values, rows, targets, summary, (0.0, peak)), _table(values, rows, targets, summary)


def cosines(loras: Sequence[InstanceLora]) -> tuple[Tensor, str]:
    """The cosine of dW between every two LoRAs.

    Returns:
        an IMAGE (1, H, W, 3) and a table as tab-separated text.
    Raises:
        LoraError: if they have not the same targets.
    """
    values = torch.tensor([[float(cosine(a, b).mean()) for b in loras] for a in loras], dtype=torch.float64)
    names = [_label(index, lora) for index, lora in enumerate(loras)]
    return _heat_map(values, names, names, "cosine of dW", (-1.0, 1.0)), _table(values, names, names, "cosine of dW")


def _place(name: str) -> tuple[int, str]:
    match = _LAYER.match(name)
    return (int(match["layer"]), match["target"]) if match else (0, name)


def _label(index: int, lora: InstanceLora) -> str:
    instruction = str(lora.metadata.get("instruction") or "").strip().replace("\n", " ")
    return f"{index + 1} {instruction[:24]}".strip()


def _table(values: Tensor, rows: Sequence[str], columns: Sequence[str], title: str) -> str:
    lines = ["\t".join((title, *columns))]
    lines += ["\t".join((row, *(f"{v:.4g}" for v in line))) for row, line in zip(rows, values.tolist(), strict=True)]
    return "\n".join(lines)


def _heat_map(
    values: Tensor, rows: Sequence[str], columns: Sequence[str], title: str, limits: tuple[float, float]
) -> Tensor:
    font = ImageFont.load_default(12)
    left = MARGIN + int(max(font.getlength(row) for row in rows)) + MARGIN
    top = MARGIN + LINE * (3 + len(columns))
    middles = [left + CELL * c + CELL // 2 for c in range(len(columns))]
    ends = [x + 4 + int(font.getlength(name)) for x, name in zip(middles, columns, strict=True)]
    width = max(left + CELL * len(columns), *ends, MARGIN + int(font.getlength(title))) + MARGIN
    image = Image.new("RGB", (width, top + CELL * len(rows) + MARGIN), "white")
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN), title, fill="black", font=font)
    for c, name in enumerate(columns):  # names step down to the right, so that no line down to a column crosses one
        x, y = middles[c], MARGIN + LINE * (c + 2)
        draw.text((x + 4, y), name, fill="black", font=font)
        draw.line((x, y + LINE // 2, x, top - 4), fill=(170, 170, 170))
    for r, name in enumerate(rows):
        draw.text((MARGIN, top + CELL * r + CELL // 3), name, fill="black", font=font)
        for c in range(len(columns)):
            _cell(draw, (left + CELL * c, top + CELL * r), float(values[r, c]), limits, font)
    return torch.from_numpy(numpy.asarray(image).astype(numpy.float32) / 255).unsqueeze(0)


def _cell(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    value: float,
    limits: tuple[float, float],
    font: ImageFont.FreeTypeFont,
) -> None:
    x, y = corner
    if value != value:  # this layer has not this target
        return
    share = min(1.0, max(0.0, (value - limits[0]) / (limits[1] - limits[0])))
    share = share if limits[0] < 0 else 0.5 + share / 2  # values that cannot be negative start at the middle colour
    start, stop, part = (LOW, MIDDLE, 2 * share) if share < 0.5 else (MIDDLE, HIGH, 2 * share - 1)
    colour = tuple(round(a + (b - a) * part) for a, b in zip(start, stop, strict=True))
    draw.rectangle((x, y, x + CELL - 2, y + CELL - 2), fill=colour)
    text = f"{value:.2f}" if limits[0] < 0 else f"{value:.2g}"
    draw.text((x + 4, y + CELL // 3), text, fill="black" if sum(colour) > 380 else "white", font=font)
