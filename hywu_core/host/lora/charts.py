"""Pictures and tables of what LoRAs change, for nodes that show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...by_block import place_of
from ...lora import InstanceLora, cosines, norms
from .. import progress

# "<stack>.<layer>.<target>", or with the underscores that some trainers write; the first number is the layer
CELL, MARGIN, LINE = 44, 10, 18  # pixels
WIDE = 640  # pixels, of a picture at least; its cells grow to that
FONT, HEADING = 13, 16  # sizes of letters
MOST = (64, 32)  # rows and columns of a picture; with more, neighbours share a cell
WIDEST = 40  # characters of a name in a picture
LOW, MIDDLE, HIGH = (38, 70, 140), (245, 245, 245), (190, 50, 40)
PLOT = (360, 220)  # pixels of a plot's area
COLOURS = ((110, 110, 110), (38, 70, 140), (190, 50, 40), (205, 140, 30))  # of lines, in their order
GREY, DIM = (170, 170, 170), (90, 90, 90)

Cells = dict[tuple[int, int], float]  # {(row, column): value}; a layer need not have every target


def norms_by_layer(lora: InstanceLora) -> tuple[Tensor, str]:
    """The Frobenius norm of every dW, layers down and targets across.

    Returns:
        an IMAGE (1, H, W, 3) and a table as tab-separated text.
    """
    places = [place_of(name) for name in lora.names]
    stacks = list(dict.fromkeys(stack for stack, _, _ in places))
    layers = sorted({place[:2] for place in places}, key=lambda layer: (stacks.index(layer[0]), layer[1]))
    targets = list(dict.fromkeys(target for _, _, target in places))
    row_of, column_of = ({found: index for index, found in enumerate(all_)} for all_ in (layers, targets))
    cells = {
        (row_of[place[:2]], column_of[place[2]]): float(norm.mean())
        for place, norm in zip(places, norms(lora).values(), strict=True)
    }
    rows = [f"{stack if len(stacks) > 1 else 'layer'} {layer}".strip() for stack, layer in layers]
    summary = f"norm of dW, rank {lora.rank}, scale {lora.scale:g}"
    peak = max((value for value in cells.values() if isfinite(value)), default=0.0) or 1.0
    image = _heat_map(cells, rows, targets, "How much each layer is changed: redder is more", summary, (0.0, peak))
    return image, _table(cells, rows, targets, summary)


def norms_of_layers(lora: InstanceLora) -> list[float]:
    """The Frobenius norm of dW of every layer, all its targets together, in their order; of a batch the mean."""
    squares: dict[tuple[str, int], Tensor] = {}
    for name, norm in norms(lora).items():
        stack, layer, _ = place_of(name)
        squares[stack, layer] = squares.get((stack, layer), 0.0) + norm.square()
    stacks = list(dict.fromkeys(stack for stack, _ in squares))
    layers = sorted(squares, key=lambda place: (stacks.index(place[0]), place[1]))
    return [float(squares[place].sqrt().mean()) for place in layers]


def cosines_of(loras: Sequence[InstanceLora], centred: bool = False) -> tuple[Tensor, str]:
    """The cosine of dW between every two LoRAs, the mean where they are batches. Shows progress and can be cancelled.

    Args:
        centred: without what all of them share, if they are more than two: see `hywu_core.lora.cosines`.
    Returns:
        an IMAGE (1, H, W, 3) and a table as tab-separated text.
    Raises:
        LoraError: see `hywu_core.lora.cosines`.
    """
    centred = centred and len(loras) > 2
    values = cosines(loras, progress.bar(), centred).mean(-1).tolist()
    cells = {(r, c): value for r, line in enumerate(values) for c, value in enumerate(line)}
    names = [_label(index, lora) for index, lora in enumerate(loras)]
    what = "centred cosine of dW" if centred else "cosine of dW"
    heading = "How alike the edits are: red alike, blue opposite"
    return _heat_map(cells, names, names, heading, what, (-1.0, 1.0)), _table(cells, names, names, what)


def losses_by_level(
    levels: Sequence[float], losses: Mapping[str, Sequence[float]], gains: Mapping[str, tuple[float, float, float]]
) -> Tensor:
    """Losses over noise levels, one line for each control, beside the gains over them with their intervals.

    Args:
        levels: shares of the sampling.
        losses: {control: mean loss at every level}.
        gains: {control: (mean, low, high)}.
    Returns:
        an IMAGE (1, H, W, 3).
    """
    font = ImageFont.load_default(FONT)
    left = MARGIN + int(font.getlength("0.0000")) + MARGIN
    top, width = MARGIN + 2 * LINE, left + PLOT[0] + 5 * MARGIN
    image = Image.new("RGB", (2 * width, top + PLOT[1] + 3 * LINE), "white")
    draw = ImageDraw.Draw(image)
    _lines(draw, (left, top), levels, losses, font)
    _intervals(draw, (width + 10 * MARGIN, top), gains, font)
    return _as_image(image)


def _lines(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    levels: Sequence[float],
    losses: Mapping[str, Sequence[float]],
    font: ImageFont.FreeTypeFont,
) -> None:
    x, y = corner
    peak = max(max(values) for values in losses.values()) or 1.0
    draw.text(
        (x, y - 2 * LINE), "Error of the base: lower is better (loss by share of the sampling)", fill="black", font=font
    )
    draw.line((x, y, x, y + PLOT[1], x + PLOT[0], y + PLOT[1]), fill=GREY)
    for share in (0.0, 0.5, 1.0):
        draw.text((MARGIN, y + PLOT[1] * (1 - share) - 6), f"{peak * share:.2g}", fill="black", font=font)
    for level in levels:
        draw.text((x + PLOT[0] * level - 10, y + PLOT[1] + 4), f"{level:.0%}", fill="black", font=font)
    for place, (name, values) in enumerate(losses.items()):
        colour = COLOURS[place % len(COLOURS)]
        points = [(x + PLOT[0] * at, y + PLOT[1] * (1 - v / peak)) for at, v in zip(levels, values, strict=True)]
        draw.line(points, fill=colour, width=2)
        draw.text((x + place * PLOT[0] // len(losses), y + PLOT[1] + LINE + 6), name, fill=colour, font=font)


def _intervals(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    gains: Mapping[str, tuple[float, float, float]],
    font: ImageFont.FreeTypeFont,
) -> None:
    x, y = corner
    ends = [0.0, *(end for _, low, high in gains.values() for end in (low, high))]
    low, reach = min(ends), (max(ends) - min(ends)) or 1.0

    def across(value: float) -> float:
        return x + PLOT[0] * 0.8 * (value - low) / reach

    draw.text((x, y - 2 * LINE), "The right LoRA is better by (loss, 95 %)", fill="black", font=font)
    draw.line((across(0), y, across(0), y + PLOT[1]), fill=GREY)
    for place, (name, (mean, start, stop)) in enumerate(gains.items()):
        middle = y + (place + 0.5) * PLOT[1] / len(gains)
        draw.text((x - 9 * MARGIN, middle - 6), name, fill="black", font=font)
        draw.line((across(start), middle, across(stop), middle), fill=COLOURS[1], width=2)
        draw.ellipse((across(mean) - 4, middle - 4, across(mean) + 4, middle + 4), fill=COLOURS[1])
        draw.text((across(mean) - 10, middle + 6), f"{mean:.3g}", fill="black", font=font)
    draw.text((across(0) - 3, y + PLOT[1] + 4), "0", fill="black", font=font)


def _label(index: int, lora: InstanceLora) -> str:
    instruction = " ".join(str(lora.metadata.get("instruction") or "").split())
    return f"{index + 1} {instruction[:24]}".strip()


def _table(cells: Cells, rows: Sequence[str], columns: Sequence[str], title: str) -> str:
    lines = ["\t".join((title, *columns))]
    for r, row in enumerate(rows):
        lines.append("\t".join((row, *(f"{cells.get((r, c), float('nan')):.4g}" for c in range(len(columns))))))
    return "\n".join(lines)


def _fewer(names: Sequence[str], most: int) -> tuple[list[str], int]:
    """Names for at most so many rows or columns, and how many neighbours share one."""
    share = -(-len(names) // most)
    parts = [names[start : start + share] for start in range(0, len(names), share)]
    return [_short(part[0]) + (f" +{len(part) - 1}" if len(part) > 1 else "") for part in parts], share


def _short(name: str) -> str:
    half = WIDEST // 2
    return name if len(name) <= WIDEST else f"{name[: half - 1]}...{name[2 - half :]}"


def _shared(cells: Cells, down: int, across: int) -> Cells:
    """The means of blocks of cells."""
    blocks: dict[tuple[int, int], list[float]] = {}
    for (row, column), value in cells.items():
        blocks.setdefault((row // down, column // across), []).append(value)
    return {place: sum(values) / len(values) for place, values in blocks.items()}


def _heat_map(
    cells: Cells, rows: Sequence[str], columns: Sequence[str], heading: str, title: str, limits: tuple[float, float]
) -> Tensor:
    font, large = ImageFont.load_default(FONT), ImageFont.load_default(HEADING)
    (rows, down), (columns, across) = _fewer(rows, MOST[0]), _fewer(columns, MOST[1])
    if down * across > 1:
        cells, title = _shared(cells, down, across), f"{title}; means of {down} x {across} cells, all are in the table"
    left = MARGIN + int(max(font.getlength(row) for row in rows)) + MARGIN
    top = MARGIN + LINE * (4 + len(columns))
    wide = max(CELL, (WIDE - left - MARGIN) // len(columns))
    middles = [left + wide * c + wide // 2 for c in range(len(columns))]
    ends = [x + 4 + int(font.getlength(name)) for x, name in zip(middles, columns, strict=True)]
    titles = [MARGIN + int(kind.getlength(text)) for kind, text in ((large, heading), (font, title))]
    width = max(WIDE, left + wide * len(columns) + MARGIN, *(end + MARGIN for end in (*ends, *titles)))
    image = Image.new("RGB", (width, top + CELL * len(rows) + MARGIN), "white")
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN), heading, fill="black", font=large)
    draw.text((MARGIN, MARGIN + LINE + 4), title, fill=DIM, font=font)
    for c, name in enumerate(columns):  # names step down to the right, so that no line down to a column crosses one
        x, y = middles[c], MARGIN + LINE * (c + 3)
        draw.text((x + 4, y), name, fill="black", font=font)
        draw.line((x, y + LINE // 2, x, top - 4), fill=GREY)
    for r, name in enumerate(rows):
        draw.text((MARGIN, top + CELL * r + CELL // 3), name, fill="black", font=font)
    for (r, c), value in cells.items():
        _cell(draw, (left + wide * c, top + CELL * r), wide, value, limits, font)
    return _as_image(image)


def _as_image(picture: Image.Image) -> Tensor:
    return torch.from_numpy(numpy.asarray(picture).astype(numpy.float32) / 255).unsqueeze(0)


def _cell(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    wide: int,
    value: float,
    limits: tuple[float, float],
    font: ImageFont.FreeTypeFont,
) -> None:
    x, y = corner
    if not isfinite(value):
        draw.text((x + 4, y + CELL // 3), f"{value}", fill="black", font=font)
        return
    share = min(1.0, max(0.0, (value - limits[0]) / (limits[1] - limits[0])))
    share = share if limits[0] < 0 else 0.5 + share / 2  # values that cannot be negative start at the middle colour
    start, stop, part = (LOW, MIDDLE, 2 * share) if share < 0.5 else (MIDDLE, HIGH, 2 * share - 1)
    colour = tuple(round(a + (b - a) * part) for a, b in zip(start, stop, strict=True))
    draw.rectangle((x, y, x + wide - 2, y + CELL - 2), fill=colour)
    text = f"{value:.2f}" if limits[0] < 0 else f"{value:.2g}"
    draw.text((x + 4, y + CELL // 3), text, fill="black" if sum(colour) > 380 else "white", font=font)
