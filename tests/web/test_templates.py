"""Every template in the real frontends, the host's own with classic nodes and a newer one with Nodes 2.0: it opens whole, and
runs from the page.
"""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
RUN_SECONDS = 400  # on a machine that is busy
# what is not there under the frontend's own addresses; sizes of models that it asks the hub for, which this server forbids
NOT_OURS = ("Failed to load resource", "https://huggingface.co/")
OPEN = """name => fetch(`/api/workflow_templates/hywu/${name}.json`).then(answer => answer.json())
    .then(workflow => app.loadGraphData(workflow, true, true, name, {openSource: 'template'}))"""
BOXES = """app.graph.nodes.map(node => ({id: String(node.id), type: node.type,
    box: [node.pos[0], node.pos[1] - 30, node.pos[0] + node.size[0], node.pos[1] + node.size[1]]}))"""


@pytest.fixture(scope="module")
def page(browser, server):
    """A page with one of the two renderers in each frontend; all four pairs take minutes."""
    page = browser.new_page(viewport={"width": 1800, "height": 1100})
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.goto(f"{server.url}/?template=quickstart&source=hywu")
    page.wait_for_function("window.app?.graph?.nodes.length > 10", timeout=90_000)
    page.evaluate(f"app.extensionManager.setting.set('Comfy.VueNodes.Enabled', {str(server.newer).lower()})")
    yield page
    page.close()


def open_template(page, name: str) -> dict:
    workflow = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    page.evaluate(OPEN, name)
    page.wait_for_function(f"app.graph.nodes.length === {len(workflow['nodes'])}", timeout=20_000)
    return workflow


def node_of(page, kind: str) -> str:
    return page.evaluate("kind => String(app.graph.nodes.find(node => node.type === kind).id)", kind)


def set_widget(page, kind: str, widget: str, value) -> None:
    page.evaluate(
        """([kind, name, value]) => {
            const widget = app.graph.nodes.find(node => node.type === kind).widgets.find(widget => widget.name === name)
            widget.value = value
            widget.callback?.(value)
        }""",
        [kind, widget, value],
    )


def press_run(page, server) -> dict:
    """Press the button and wait; the server's record of what it ran."""
    before = set(server.get("/history"))
    page.get_by_test_id("queue-button").click()
    deadline = time.monotonic() + RUN_SECONDS
    while time.monotonic() < deadline:
        new = {id_: run for id_, run in server.get("/history").items() if id_ not in before}
        if new:
            return next(iter(new.values()))
        page.wait_for_timeout(200)
    raise TimeoutError(f"Nothing ran; the server's log is {server.log}")


def saved_picture(server, run: dict) -> np.ndarray:
    assert run["status"]["status_str"] == "success", run["status"]["messages"][-1]
    files = [
        image for output in run["outputs"].values() for image in output.get("images", ()) if image["type"] == "output"
    ]
    return np.asarray(Image.open(server.output / files[-1]["subfolder"] / files[-1]["filename"])).astype(int)


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_whole(page, name):
    page.errors.clear()
    workflow = open_template(page, name)
    page.wait_for_timeout(700)
    missing = "app.graph.nodes.filter(node => !(node.type in LiteGraph.registered_node_types)).map(node => node.type)"
    assert page.evaluate(missing) == []
    assert page.evaluate("[...app.graph.links.values()].length") == len(workflow["links"])
    assert [error for error in page.errors if not any(words in error for words in NOT_OURS)] == []
    page.keyboard.press("Escape")  # what the frontend says about files that are not here
    boxes = page.evaluate(BOXES)
    for place, one in enumerate(boxes):
        for two in boxes[place + 1 :]:
            a, b = one["box"], two["box"]
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart, f"{one['type']} {a} covers {two['type']} {b}"


def test_the_quickstart_runs_and_shows_its_picture(page, server):
    workflow = open_template(page, "quickstart")
    set_widget(page, "HYWUEdit", "strength", 0.8 + time.monotonic_ns() % 1000 / 10000)  # not from the cache
    picture = saved_picture(server, press_run(page, server))
    assert picture.shape[0] >= 256 and picture.shape[1] >= 512
    (shown,) = [node["id"] for node in workflow["nodes"] if node["type"] == "SaveImage"]
    page.wait_for_function(
        f"""app.graph.nodes.find(node => node.id == {shown}).imgs?.[0]?.naturalWidth === {picture.shape[1]}
        || [...document.querySelectorAll('[data-node-id="{shown}"] img')].some(image => image.naturalWidth > 0)""",
        timeout=30_000,
    )
    page.wait_for_function(
        "[...document.querySelectorAll('.hywu-card-page')].some(page => page.innerText.includes('matched'))",
        timeout=20_000,
    )


def test_a_changed_widget_changes_the_result(page, server):
    open_template(page, "quickstart")
    set_widget(page, "KSampler", "seed", 102)
    set_widget(page, "HYWUEdit", "strength", 1.0)
    full = saved_picture(server, press_run(page, server))
    set_widget(page, "HYWUEdit", "strength", 0.0)
    none = saved_picture(server, press_run(page, server))
    set_widget(page, "HYWUEdit", "strength", 1.0)
    set_widget(page, "HYWUEdit", "instruction", "darken the picture")
    dark = saved_picture(server, press_run(page, server))
    half = full.shape[1] // 2 + 8
    assert np.abs(full[:, half:] - none[:, half:]).mean() > 5
    assert dark[:, half:].mean() < full[:, half:].mean() - 20
    assert np.array_equal(full[:, : half - 16], dark[:, : half - 16]), "the picture before stays"


def test_an_error_shows_its_sentence_at_the_right_node(page, server):
    open_template(page, "quickstart")
    edit = node_of(page, "HYWUEdit")
    page.evaluate(
        "id => { const node = app.graph.getNodeById(id); node.disconnectInput(node.findInputSlot('vae')) }", edit
    )
    run = press_run(page, server)
    assert run["status"]["status_str"] == "error"
    (said,) = [data for kind, data in run["status"]["messages"] if kind == "execution_error"]
    assert said["node_id"] == edit and "vae" in said["exception_message"]
    sentence = said["exception_message"].strip().splitlines()[0]
    page.get_by_text("Edit with Instance LoRA", exact=False).first.wait_for(timeout=20_000)
    page.wait_for_function(f"app.lastExecutionError?.node_id == '{edit}'", timeout=20_000)
    page.get_by_text("View details", exact=False).first.click()
    page.get_by_text(sentence[:60], exact=False).first.wait_for(timeout=20_000)
    page.keyboard.press("Escape")


def test_training_from_a_click_to_an_edited_picture(page, server):
    open_template(page, "train")
    set_widget(page, "HYWUTrainGenerator", "steps", 6)
    set_widget(page, "HYWUTrainGenerator", "keep_every", 6)
    set_widget(page, "HYWUTrainGenerator", "validate_every", 3)
    set_widget(page, "HYWUTrainGenerator", "run_name", f"clicked-{time.monotonic_ns()}")
    picture = saved_picture(server, press_run(page, server))
    assert picture.ndim == 3 and picture.std() > 10
    page.wait_for_function(
        "[...document.querySelectorAll('.hywu-card-page')].some(page => page.innerText.includes('6'))", timeout=20_000
    )
