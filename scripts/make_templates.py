"""Write the templates of workflows/ from their descriptions, run in a real server those that can run here, and make
thumbnails of what came out. To be run again when a node, a description or the pocket editor has changed.

    .venv/bin/python scripts/make_templates.py [quickstart blend ...] [--only-json]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import templates_bases
import templates_pocket
from host_server import FRONTEND_ONLY, HostServer, Run, to_api_format
from PIL import Image, ImageDraw, ImageFont
from workflow_builder import Graph

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT, QUALITY = 520, 300, 88  # of a thumbnail
RUN_SECONDS = 1800  # of a template that trains, on a slow machine
SKETCHED = 2  # times its size, for smooth lines
PAPER = "#20242c"
POCKET = templates_pocket.TEMPLATES
BASES = templates_bases.TEMPLATES


def build(describe, object_info: dict) -> dict:
    """One description as a workflow that can be saved."""
    graph = Graph(describe.__name__, object_info)
    describe(graph)
    return graph.saved()


def run(server: HostServer, workflow: dict, object_info: dict) -> tuple[Run, list[Path]]:
    """Run a workflow; (what the server said, the pictures that its last picture node wrote or showed)."""
    done = server.run(to_api_format(workflow, object_info), seconds=RUN_SECONDS)
    if done.outcome != "execution_success":
        raise RuntimeError(f"{done.messages[-1]}\nThe server's log is {server.log}.")
    shown = [
        [server.folder / ("output" if image["type"] == "output" else "temp") / image["subfolder"] / image["filename"]
         for image in data["output"]["images"]]
        for kind, data in done.messages
        if kind == "executed" and (data.get("output") or {}).get("images")
    ]  # fmt: skip
    return done, shown[-1] if shown else []


def thumbnail(pictures: list[Path]) -> Image.Image:
    """The pictures side by side, each as large as fits."""
    card = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    share = WIDTH // len(pictures)
    for place, path in enumerate(pictures):
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        scale = min(share / picture.width, HEIGHT / picture.height)
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS)
        card.paste(picture, (place * share + (share - size[0]) // 2, (HEIGHT - size[1]) // 2))
    return card


def sketch(workflow: dict) -> Image.Image:
    """The graph itself as a drawing: for what needs models that are not here."""
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] not in FRONTEND_ONLY}
    frames = [group["bounding"] for group in workflow["groups"]]
    left, top = (min(frame[axis] for frame in frames) for axis in (0, 1))
    right, bottom = (max(frame[axis] + frame[axis + 2] for frame in frames) for axis in (0, 1))
    scale = min((SKETCHED * WIDTH - 40) / (right - left), (SKETCHED * HEIGHT - 40) / (bottom - top))
    card = Image.new("RGB", (SKETCHED * WIDTH, SKETCHED * HEIGHT), PAPER)
    draw = ImageDraw.Draw(card)
    shift = [(side - scale * length) / 2 for side, length in zip(card.size, (right - left, bottom - top), strict=True)]

    def at(x: float, y: float) -> tuple[float, float]:
        return shift[0] + scale * (x - left), shift[1] + scale * (y - top)

    for group, (x, y, width, height) in zip(workflow["groups"], frames, strict=True):
        draw.rectangle([at(x, y), at(x + width, y + height)], fill=group["color"])
        draw.text(at(x + 20, y + 12), group["title"], fill="white", font=ImageFont.load_default(16))
    for _, source, slot, target, place, _ in workflow["links"]:
        (x, y), (width, _), (to_x, to_y) = nodes[source]["pos"], nodes[source]["size"], nodes[target]["pos"]
        draw.line([at(x + width, y + 20 * (slot + 1)), at(to_x, to_y + 20 * (place + 1))], fill="#c8ccd4", width=2)
    for node in nodes.values():
        (x, y), (width, height) = node["pos"], node["size"]
        draw.rectangle([at(x, y - 30), at(x + width, y + height)], fill="#353b47", outline="#11141a")
        draw.rectangle([at(x, y - 30), at(x + width, y)], fill="#4b5568")
    return card.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of templates; all if none is named")
    parser.add_argument("--host", type=Path, default=ROOT / ".host" / "ComfyUI", help="ComfyUI's folder")
    parser.add_argument("--out", type=Path, default=ROOT / "workflows", help="where they are written")
    parser.add_argument("--only-json", action="store_true", help="run nothing, keep the thumbnails")
    arguments = parser.parse_args()
    chosen = [d for d in (*POCKET, *BASES) if not arguments.names or d.__name__ in arguments.names]
    with tempfile.TemporaryDirectory() as folder, HostServer(sys.executable, arguments.host, Path(folder)) as server:
        (server.input / templates_pocket.PICTURE).write_bytes((arguments.host / "input" / "example.png").read_bytes())
        object_info = server.get("/object_info")
        for describe in chosen:
            name, start = describe.__name__, time.monotonic()
            workflow = build(describe, object_info)
            text = json.dumps(workflow, indent=1, ensure_ascii=False) + "\n"
            (arguments.out / f"{name}.json").write_text(text, encoding="utf-8")
            if not arguments.only_json:
                picture = thumbnail(run(server, workflow, object_info)[1]) if describe in POCKET else sketch(workflow)
                picture.save(arguments.out / f"{name}.jpg", quality=QUALITY)
            print(f"{name:<28} {len(workflow['nodes']):>3} nodes  {time.monotonic() - start:5.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
