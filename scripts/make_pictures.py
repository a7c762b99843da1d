"""Makes the pictures of README and help pages anew, in a real browser: every node as it looks in a template.

    .venv/bin/python scripts/make_pictures.py [--languages en zh] [--only HYWUApplyLoRA ...] [--still train]

Each template is opened as an artist opens it and run, if all of its files are there; then its nodes are taken, each with
what it shows. A node that is in no template is taken alone. A help page without its picture gets it
below its heading. Playwright and a Chromium are needed (requirements-dev.txt), and a Chinese font, such as
fonts-wqy-microhei.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demo import PICTURE, draw_picture
from host_server import HostServer
from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
HELP, TEMPLATES, DOCS = ROOT / "web" / "docs", ROOT / "workflows", ROOT / "docs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --disable-background-networking".split()
VIEW = {"width": 1800, "height": 1400}
WIDEST, MARGIN = 760, 14  # pixels of a picture in a help page, and around a node
RUN_SECONDS = 900
PACK = "HYWU"
QUIET = {  # nothing lies over the canvas, and text is drawn however small
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
SHARED = ROOT / "hywu_core" / "bases" / "pocket" / "weights" / "shared.safetensors"
GRAPHS = {"quickstart": "quickstart.png", "train": "train.png"}  # template -> the README's picture of its graph


def templates(known: dict[str, Any]) -> list[tuple[str, dict]]:
    """(name, workflow) of all, those that can be run first: a node's picture is best where it has run."""
    found = [(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(TEMPLATES.glob("*.json"))]
    return sorted(found, key=lambda one: (not runs(one[1], known), one[0] not in GRAPHS, "train" in one[0], one[0]))


def runs(workflow: dict, known: dict[str, Any]) -> bool:
    """Whether every file of models that the workflow names is one that the server offers."""
    values = [str(value) for node in workflow["nodes"] for value in node.get("widgets_values") or []]
    offered = json.dumps(known)
    files = [value for value in values if value.endswith(".safetensors")]
    large = any(node["type"] == "HYWULoadHunyuanImage3" for node in workflow["nodes"])
    return not large and all(json.dumps(file) in offered for file in files)


def open_page(browser: Any, server: HostServer, template: str = "", nodes: int = 0) -> Page:
    page = browser.new_page(viewport=VIEW)
    page.goto(f"{server.url}/?template={template}&source=hywu" if template else server.url)
    page.wait_for_function(
        "window.app?.graph && Object.keys(LiteGraph.registered_node_types).some(id => id.startsWith('HYWU'))",
        timeout=90_000,
    )
    if template:
        # a new user's first page shows another graph before
        page.wait_for_function(
            f"app.graph.nodes.length === {nodes} && app.graph.nodes.some(node => node.type.startsWith('{PACK}'))",
            timeout=60_000,
        )
    page.wait_for_timeout(1500)
    return page


def queue(page: Page, server: HostServer) -> None:
    server.post("/free", {"free_memory": True})  # what is cached would show no card
    page.wait_for_timeout(1000)
    before = set(server.get("/history"))
    if not page.evaluate("app.queuePrompt(0)"):
        print(f"  is refused; the server's log is {server.log}", file=sys.stderr)
        return
    deadline = time.monotonic() + RUN_SECONDS
    while time.monotonic() < deadline:
        page.wait_for_timeout(500)
        ended = set(server.get("/history")) - before
        if ended:
            status = server.get("/history")[ended.pop()]["status"]["status_str"]
            if status != "success":
                print(f"  ended with {status}; its log is {server.log}", file=sys.stderr)
            page.wait_for_timeout(2000)  # until cards and pictures are drawn
            return
    raise TimeoutError(f"A template did not end within {RUN_SECONDS} s.")


def picture_of(page: Page, node_id: int) -> Image.Image:
    """One node in the middle of the canvas, as large as it is or as fits."""
    box = page.evaluate(
        """id => {
            const node = app.graph.nodes.find(node => node.id == id), canvas = app.canvas;
            const title = LiteGraph.NODE_TITLE_HEIGHT;
            canvas.deselectAll?.();
            node.title = node.constructor.title;  // and not what a template calls it
            window.hywuMoved = (window.hywuMoved ?? 0) + 20000;  // each to a place where nothing covers it
            node.pos = [node.pos[0], node.pos[1] + window.hywuMoved];
            const width = canvas.canvas.clientWidth, height = canvas.canvas.clientHeight;
            const [wide, high] = [node.size[0], node.flags.collapsed ? 0 : node.size[1]];
            const scale = Math.min(1, (width - 600) / wide, (height - 300) / (high + title));
            canvas.ds.scale = scale;
            canvas.ds.offset = [width / 2 / scale - node.pos[0] - wide / 2, height / 2 / scale - node.pos[1] - high / 2];
            canvas.setDirty(true, true);
            const [x, y] = canvas.ds.offset;
            const left = (node.pos[0] + x) * scale, top = (node.pos[1] - title + y) * scale;
            return {x: left, y: top, width: wide * scale, height: (high + title) * scale};
        }""",
        node_id,
    )
    page.wait_for_timeout(700)
    clip = {
        "x": box["x"] - MARGIN, "y": box["y"] - MARGIN,
        "width": box["width"] + 2 * MARGIN, "height": box["height"] + 2 * MARGIN,
    }  # fmt: skip
    return Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")


def picture_of_graph(page: Page) -> Image.Image:
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(6000)  # until messages of what ran are gone
    clip = {"x": 60, "y": 90, "width": VIEW["width"] - 120, "height": VIEW["height"] - 180}
    return trimmed(Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB"))


def trimmed(picture: Image.Image) -> Image.Image:
    """Without the empty canvas around the graph, whose dots are darker than any node."""
    nodes = (
        picture.convert("L").point(lambda level: 255 * (level > 48)).resize((picture.width // 8, picture.height // 8))
    )
    box = nodes.point(lambda level: 255 * (level > 200)).getbbox()
    if box is None:
        return picture
    left, top, right, bottom = (8 * side for side in box)
    return picture.crop(
        (max(0, left - 24), max(0, top - 24), min(picture.width, right + 24), min(picture.height, bottom + 24))
    )


def save(picture: Image.Image, file: Path, widest: int) -> None:
    if picture.width > widest:
        picture = picture.resize((widest, round(picture.height * widest / picture.width)), Image.Resampling.LANCZOS)
    file.parent.mkdir(exist_ok=True)
    picture.save(file, quality=82, method=6) if file.suffix == ".webp" else picture.quantize(192).save(
        file, optimize=True
    )
    print(
        f"  {file.relative_to(ROOT)}  {picture.width} x {picture.height}, {file.stat().st_size / 1e3:.0f} kB",
        flush=True,
    )


def named(page: Path) -> None:
    """Put the picture below the heading of a help page that has none. The frontend looks for it below web/docs."""
    node, language = page.parent.name, page.stem
    lines = page.read_text(encoding="utf-8").split("\n")
    if not any(line.startswith("![") for line in lines[:4]):
        title = lines[0].removeprefix("# ")
        lines[1:1] = ["", f"![{title}]({node}/{language}.webp)"]
        page.write_text("\n".join(lines), encoding="utf-8")


def alone(browser: Any, server: HostServer, nodes: list[str]) -> Iterator[tuple[str, Image.Image]]:
    for node in nodes:
        page = open_page(browser, server)  # the frontend keeps values by a node's number, also those of another graph's
        made = page.evaluate(
            "kind => { app.graph.clear(); const node = LiteGraph.createNode(kind); app.graph.add(node); return node.id; }",
            node,
        )
        yield node, picture_of(page, made)
        page.close()


def take(browser: Any, server: HostServer, language: str, wanted: set[str], still: list[str], whole: bool) -> None:
    server.post("/api/settings", {"Comfy.Locale": language, **QUIET})
    known, left = server.get("/object_info"), set(wanted)
    for name, workflow in templates(known):
        # that of the README shows what ran, and is taken with all others only
        graph = GRAPHS.get(name) if language == "en" and whole and name not in still else None
        kinds = {node["type"] for node in workflow["nodes"]} & left
        if not kinds and not graph:
            continue
        print(f"{language}: {name}", flush=True)
        page = open_page(browser, server, name, len(workflow["nodes"]))
        if name not in still and runs(workflow, known):
            queue(page, server)
        if graph:
            save(picture_of_graph(page), DOCS / graph, 1500)
        for kind in sorted(kinds):
            node_id = page.evaluate(
                "kind => app.graph.nodes.filter(node => node.type == kind).at(-1)?.id ?? null", kind
            )
            if node_id is None:
                continue
            save(picture_of(page, node_id), HELP / kind / f"{language}.webp", WIDEST)
            left.discard(kind)
        page.close()
    print(f"{language}: in no template", flush=True)
    for kind, picture in alone(browser, server, sorted(left)):
        save(picture, HELP / kind / f"{language}.webp", WIDEST)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", type=Path, default=ROOT / ".host" / "ComfyUI", help="ComfyUI's folder")
    parser.add_argument("--languages", nargs="+", default=["en", "zh"])
    parser.add_argument("--only", nargs="+", default=(), help="ids of nodes; by default all, and the README's graphs")
    parser.add_argument("--still", nargs="+", default=[], help="templates that are opened but not run, such as train")
    arguments = parser.parse_args()
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        sys.exit(f"No browser: none of {', '.join(BROWSERS)} is installed.")
    with tempfile.TemporaryDirectory() as folder, HostServer(sys.executable, arguments.host, Path(folder)) as server:
        draw_picture(server.input / PICTURE)
        shown = server.output / "loras" / "edits" / "warm.safetensors"  # so that lists of LoRAs have something to show
        shown.parent.mkdir(parents=True)
        shutil.copyfile(SHARED, shown)
        ids = {name for name in server.get("/object_info") if name.startswith(PACK)}
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
            for language in arguments.languages:
                take(browser, server, language, ids & set(arguments.only) or ids, arguments.still, not arguments.only)
            browser.close()
    for page in sorted(HELP.glob("*/*.md")):
        if page.with_suffix(".webp").is_file():
            named(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
