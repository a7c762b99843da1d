"""The quickstart in real servers, started in the ways that users start them: whether it makes the same picture, and how long
it takes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from demo import PICTURE, draw_picture
from host_server import HostServer, to_api_format
from in_host import ROOT

from gpu_checks.machine import Machine

DEFAULT = "default"
WAYS = {  # of starting the host
    DEFAULT: (),
    "plain memory": ("--disable-dynamic-vram",),
    "no vram": ("--novram",),
    "one stream": ("--disable-dynamic-vram", "--async-offload", "1"),
    "all on the device": ("--gpu-only",),
}
NOT_ON_A_CPU = {"no vram", "all on the device"}
ENOUGH = 2  # of the ways, to see that the check runs


def launches(machine: Machine) -> dict[str, Any]:
    """Seconds of a run and of one with another instruction; the largest difference from the default's picture, of 255."""
    pack = next((entry.name for entry in (machine.host / "custom_nodes").iterdir() if entry.resolve() == ROOT), None)
    if pack is None:
        return {"skipped": f"this folder is not in {machine.host / 'custom_nodes'}"}
    found: dict[str, Any] = {}
    pictures: dict[str, Any] = {}
    for way in list(WAYS)[: ENOUGH if machine.small else None]:
        if machine.cpu and way in NOT_ON_A_CPU:
            found[way] = {"skipped": "the host refuses it together with --cpu"}
            continue
        with tempfile.TemporaryDirectory() as folder:
            python, place = sys.executable, Path(folder)
            with HostServer(python, machine.host, place, pack, WAYS[way], machine.cpu) as server:
                found[way], pictures[way] = quickstart(server, 1 if machine.small else 2)
        found[way]["off_by"] = int(abs(pictures[way] - pictures[DEFAULT]).max())
    return found


def quickstart(server: HostServer, runs: int) -> tuple[dict[str, Any], Any]:
    """Run it, the second time with another instruction; numbers, and the first run's picture."""
    import numpy
    from PIL import Image

    workflow = json.loads((ROOT / "workflows" / "quickstart.json").read_text(encoding="utf-8"))
    draw_picture(server.input / PICTURE)
    prompt = to_api_format(workflow, server.get("/object_info"))
    edit = next(node for node in prompt.values() if node["class_type"] == "HYWUEdit")
    seconds, saved = [], []
    for instruction in (edit["inputs"]["instruction"], "make the colours cool")[:runs]:
        edit["inputs"]["instruction"] = instruction
        start = time.perf_counter()
        run = server.run(prompt)
        seconds.append(time.perf_counter() - start)
        if run.outcome != "execution_success":
            raise RuntimeError(f"{run.outcome}: {run.messages[-1]}\n{server.log.read_text()[-2000:]}")
        saved += [server.output / file for node in prompt for file in run.files(node)]
    with Image.open(saved[0]) as picture:
        pixels = numpy.asarray(picture.convert("RGB")).astype(int)
    dynamic = "DynamicVRAM support detected" in server.log.read_text()
    return {"seconds": seconds, "dynamic_vram": dynamic}, pixels
