"""Ask one server for many different edits and see what grows: the server's memory, the cache on the disk.

Every prompt has an instruction and a seed of its own, so each needs a LoRA of its own; every tenth is followed by one that
was asked for shortly before, whose LoRA is to come from the disk. A pass of the generator is told by the progress that its
node reports: a LoRA that is read reports none.

Memory after a prompt is the resident set of the server's process. Its slope is fitted to the means of blocks of prompts,
which are far less alike than neighbours are, and told with its interval of 95 %. The host remembers what it was asked the
last 10,000 times; it is told to forget after every prompt, unless --history keeps that, which grows.
Run: .venv/bin/python scripts/soak.py [--prompts N] [--keep-gb GB] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from demo import PICTURE, draw_picture
from host_server import HostServer, to_api_format
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
EDITS = (
    "make the colours warm",
    "make the colours cool",
    "brighten the picture",
    "darken the picture",
    "blur the picture",
)
SIDE = 32  # pixels
AGAIN, BACK = 10, 5  # after so many prompts, one is asked for again: that of so many before
SETTLED, BLOCKS = 50, 19  # prompts that are left out of the slope; means that it is fitted to
STUDENT = 2.110  # two-sided, 95 %, for BLOCKS - 2 degrees of freedom


class Record(NamedTuple):
    """One prompt."""

    number: int  # of the edit that was asked for
    again: bool  # whether it had been asked for before
    generated: bool  # whether the generator was run
    seconds: float
    resident: int  # bytes
    kept: int  # bytes of the cache on the disk


class Slope(NamedTuple):
    """Bytes a prompt, with its interval."""

    value: float
    low: float
    high: float


def edits(prompt: dict, count: int, keep_gb: float) -> Iterator[tuple[int, bool, dict]]:
    """(number, whether it comes again, prompt) of so many different edits, small and quick."""
    for number in range(count):
        yield number, False, edit(prompt, number, keep_gb)
        if number % AGAIN == AGAIN - 1:
            yield number - BACK, True, edit(prompt, number - BACK, keep_gb)


def edit(prompt: dict, number: int, keep_gb: float) -> dict:
    """The long way's picture, before and after, with another instruction and noise."""
    prompt = copy.deepcopy(prompt)
    told = f"{EDITS[number % len(EDITS)]}, {number}"
    changes = {
        "CLIPTextEncode": {"text": told}, "KSampler": {"seed": number, "steps": 2},
        "ImageScaleToMaxDimension": {"largest_size": SIDE}, "HYWUGenerateLoRA": {"keep_gb": keep_gb},
    }  # fmt: skip
    kinds = {node["class_type"]: name for name, node in prompt.items()}  # the last of its kind, which the edit is of
    for kind, inputs in changes.items():
        prompt[kinds[kind]]["inputs"] |= inputs
    shown = kinds.pop("SaveImage")
    return {name: node for name, node in prompt.items() if node["class_type"] != "SaveImage" or name == shown}


def soak(
    server: HostServer,
    prompt: dict,
    count: int,
    keep_gb: float,
    tell: Callable[[Record], None] = lambda record: None,
    forget: bool = True,
) -> list[Record]:
    """Ask a server for so many different edits. `forget`: have the host forget each.

    Raises:
        RuntimeError: if one fails.
    """
    node = next(name for name, node in prompt.items() if node["class_type"] == "HYWUGenerateLoRA")
    records = []
    for number, again, asked in edits(prompt, count, keep_gb):
        start = time.monotonic()
        run = server.run(asked)
        if forget:
            server.post("/history", {"clear": True})
        if run.outcome != "execution_success" or node not in run.executed:
            raise RuntimeError(f"Prompt {number} did not write a LoRA: {run.messages[-1]}. The log is {server.log}.")
        generated = any(kind == "progress" and data["node"] == node for kind, data in run.messages)
        kept = sum(file.stat().st_size for file in (server.folder / "user").rglob("*.lora.safetensors"))
        records.append(Record(number, again, generated, time.monotonic() - start, server.resident, kept))
        tell(records[-1])
    return records


def slope(values: Sequence[float]) -> Slope:
    """Of values at equal distances, by least squares over the means of equal blocks; what is left over at the front is not
    used.
    """
    size = len(values) // BLOCKS
    used = list(values)[len(values) - size * BLOCKS :]
    means = [statistics.fmean(used[start : start + size]) for start in range(0, len(used), size)]
    x = [size * number for number in range(BLOCKS)]
    found = statistics.linear_regression(x, means)
    rest = sum((y - found.slope * at - found.intercept) ** 2 for at, y in zip(x, means, strict=True))
    spread = sum((at - statistics.fmean(x)) ** 2 for at in x)
    error = STUDENT * math.sqrt(rest / (BLOCKS - 2) / spread)
    return Slope(found.slope, found.slope - error, found.slope + error)


def summary(records: Sequence[Record], keep_gb: float) -> dict:
    """What was found, as JSON holds it."""
    settled = [record.resident for record in records[SETTLED:]]
    found = slope(settled) if len(settled) >= 2 * BLOCKS else None
    again = [record for record in records if record.again]
    return {
        "prompts": len(records), "different": len(records) - len(again), "again": len(again),
        "read_from_the_disk": sum(not record.generated for record in again),
        "generated": sum(record.generated for record in records),
        "resident_mb": {"first": records[0].resident / 1e6, "last": records[-1].resident / 1e6,
                        "most": max(record.resident for record in records) / 1e6},
        "slope_bytes_a_prompt": found and found._asdict(),
        "kept_mb": {"most": max(record.kept for record in records) / 1e6, "limit": 1e3 * keep_gb},
        "seconds_a_prompt": statistics.median(record.seconds for record in records),
    }  # fmt: skip


def draw(records: Sequence[Record]) -> Image.Image:
    """Resident memory over the prompts, from 0."""
    width, height, left, top = 720, 300, 60, 30
    picture = Image.new("RGB", (width + left + 20, height + top + 30), "white")
    pen, most = ImageDraw.Draw(picture), 1.1 * max(record.resident for record in records)
    points = [
        (left + width * place / max(1, len(records) - 1), top + height * (1 - record.resident / most))
        for place, record in enumerate(records)
    ]
    pen.rectangle((left, top, left + width, top + height), outline="black")
    pen.line(points, "#4a7dbb", 2)
    pen.text((left, 8), "resident memory of the server, MB, after each prompt", "black")
    pen.text((6, top), f"{most / 1e6:.0f}", "black")
    pen.text((6, top + height - 10), "0", "black")
    pen.text((left + width - 40, top + height + 8), str(len(records)), "black")
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--keep-gb", type=float, default=0.05, help="of the disk, for generated LoRAs")
    parser.add_argument("--history", action="store_true", help="let the host remember all prompts")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--host", type=Path, default=ROOT / ".host" / "ComfyUI", help="ComfyUI's folder")
    parser.add_argument("--pack", default="hywu", help="this pack's name in custom_nodes")
    arguments = parser.parse_args()
    workflow = json.loads((ROOT / "workflows" / "the_long_way.json").read_text(encoding="utf-8"))

    def tell(record: Record) -> None:
        if (record.number + 1) % 50 == 0 and not record.again:
            print(f"{record.number + 1}: {record.resident / 1e6:.1f} MB, {record.seconds:.2f} s", flush=True)

    with (
        tempfile.TemporaryDirectory() as folder,
        HostServer(sys.executable, arguments.host, Path(folder), arguments.pack) as server,
    ):
        draw_picture(server.input / PICTURE)
        prompt = to_api_format(workflow, server.get("/object_info"))
        records = soak(server, prompt, arguments.prompts, arguments.keep_gb, tell, not arguments.history)
        host = server.get("/system_stats")["system"]["comfyui_version"]
    machine = f"{platform.machine()} {platform.system()}, torch {version('torch')}, ComfyUI {host}"
    told = {"machine": machine, "history_kept": arguments.history, **summary(records, arguments.keep_gb)}
    print(json.dumps(told, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps({**told, "records": records}), encoding="utf-8")
    if arguments.plot:
        draw(records).save(arguments.plot)


if __name__ == "__main__":
    sys.exit(main())
