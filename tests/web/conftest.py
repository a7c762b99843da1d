"""The real frontend in a real browser, against a real server. Skipped where there is no browser."""

import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

from demo import PICTURE, draw_picture  # noqa: E402
from host_server import HostServer  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="session")
def browser():
    path = os.environ.get("HYWU_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed and HYWU_BROWSER is not set")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (requirements-dev.txt)")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=path, args=FLAGS)
        yield opened
        opened.close()


def frontends() -> dict[str, tuple[str, ...]]:
    """{name: the host's arguments}: its own frontend, and those that scripts/test.sh fetched."""
    newer = sorted((ROOT / ".host" / "frontend").glob("*/index.html"))
    return {"own": ()} | {file.parent.name: ("--front-end-root", str(file.parent)) for file in newer}


@pytest.fixture(scope="session", params=frontends().items(), ids=lambda frontend: frontend[0])
def server(request, browser, host_dir, tmp_path_factory) -> HostServer:
    _, arguments = request.param
    with HostServer(sys.executable, host_dir, tmp_path_factory.mktemp("web"), arguments=arguments) as server:
        draw_picture(server.input / PICTURE)
        server.newer = bool(arguments)
        yield server


@pytest.fixture(scope="session")
def page(browser, server):
    """The frontend with the quickstart opened from the pack's templates, as by a click on its card."""
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.goto(f"{server.url}/?template=quickstart&source=hywu")
    page.wait_for_function("window.app?.graph?.nodes.length > 10", timeout=90_000)
    return page
