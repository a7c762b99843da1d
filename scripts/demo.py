"""Run workflows/quickstart.json in a real ComfyUI server and save the picture before and after. Started by demo.sh."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from host_server import HostServer, to_api_format
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
PICTURE = "example.png"  # the name that the workflow loads


def draw_picture(path: Path, size: int = 256) -> None:
    """A small landscape: sky, sun, hills, a house and a tree."""
    picture = Image.new("RGB", (size, size))
    draw = ImageDraw.Draw(picture)
    for y in range(size):
        t = y / size
        draw.line([(0, y), (size, y)], (int(90 + 130 * t), int(150 + 60 * t), int(225 - 30 * t)))
    draw.ellipse([170, 28, 218, 76], (255, 226, 120))
    draw.ellipse([-60, 150, 190, 380], (74, 130, 72))
    draw.ellipse([100, 170, 340, 400], (98, 156, 80))
    draw.rectangle([52, 128, 112, 186], (206, 178, 148))
    draw.polygon([(42, 130), (82, 92), (122, 130)], (156, 62, 50))
    draw.rectangle([74, 152, 92, 186], (92, 62, 44))
    draw.rectangle([186, 140, 196, 200], (96, 66, 44))
    draw.ellipse([164, 92, 218, 152], (44, 106, 56))
    picture.save(path)


def show(names: dict[str, str]):
    """A callback that prints what the server is doing, one line for each node."""

    def on_message(kind: str, data: dict) -> None:
        if kind == "executing" and data["node"]:
            print(f"  {names[data['node']]}", flush=True)
        elif kind == "progress":
            done, total = int(data["value"]), int(data["max"])
            print(
                f"    {'#' * (20 * done // total):<20} {done}/{total}", end="\n" if done == total else "\r", flush=True
            )

    return on_message


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", type=Path, default=ROOT / ".host" / "ComfyUI", help="ComfyUI's folder")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that runs it")
    parser.add_argument("--pack", default="hywu", help="this pack's name in custom_nodes")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo", help="where pictures and the log go")
    arguments = parser.parse_args()
    workflow = json.loads((ROOT / "workflows" / "quickstart.json").read_text(encoding="utf-8"))
    names = {str(node["id"]): node.get("title", node["type"]) for node in workflow["nodes"]}

    print("demo: starting ComfyUI")
    with HostServer(arguments.python, arguments.host, arguments.out, arguments.pack) as server:
        draw_picture(server.input / PICTURE)
        prompt = to_api_format(workflow, server.get("/object_info"))
        print(f"demo: running quickstart at {server.url}")
        start = time.monotonic()
        run = server.run(prompt, show(names))
        seconds = time.monotonic() - start
    if run.outcome != "execution_success":
        print(f"demo: {run.outcome}; the server's log is {server.log}", file=sys.stderr)
        return 1
    saved = {names[node].lower(): server.output / run.files(node)[0] for node in prompt if run.files(node)}
    for name, path in saved.items():
        shutil.copy(path, arguments.out / f"{name}.png")
    print(f"demo: done in {seconds:.1f} s")
    for name in saved:
        print(f"  {name:<7} {arguments.out / f'{name}.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
