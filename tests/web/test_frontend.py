"""The quickstart as an artist meets it: opened from the template browser, queued with the Run button."""

import json
import time
from pathlib import Path

import pytest
from host_server import FRONTEND_ONLY, to_api_format

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def workflow() -> dict:
    return json.loads((ROOT / "workflows" / "quickstart.json").read_text(encoding="utf-8"))


def test_no_node_of_the_template_is_missing(page, workflow):
    known = page.evaluate("app.graph.nodes.map(node => [node.type, node.type in LiteGraph.registered_node_types])")
    assert len(known) == len(workflow["nodes"])
    assert [kind for kind, registered in known if not registered] == []
    assert not page.get_by_role("dialog").count(), page.get_by_role("dialog").all_inner_texts()


def test_the_frontend_knows_every_node_of_the_pack(page, server):
    ids = {name for name in server.get("/object_info") if name.startswith("HYWU")}
    assert ids
    assert ids == set(page.evaluate("Object.keys(LiteGraph.registered_node_types).filter(id => id.startsWith('HYWU'))"))


def test_the_frontend_queues_what_the_demo_queues(page, server, workflow):
    queued = page.evaluate("app.graphToPrompt().then(prompt => prompt.output)")
    expected = to_api_format(workflow, server.get("/object_info"))
    assert {node: found["inputs"] for node, found in queued.items() if found["class_type"] not in FRONTEND_ONLY} == {
        node: made["inputs"] for node, made in expected.items()
    }


def test_the_run_button_runs_it_and_shows_the_pictures(page, server, workflow):
    page.get_by_test_id("queue-button").click()
    deadline = time.monotonic() + 120
    while not (history := server.get("/history")) and time.monotonic() < deadline:
        page.wait_for_timeout(200)
    (run,) = history.values()
    assert run["status"]["status_str"] == "success"
    for node in workflow["nodes"]:
        if node["type"] == "SaveImage":
            page.wait_for_function(
                f"app.graph.nodes.find(node => node.id == {node['id']}).imgs?.[0]?.naturalWidth > 500", timeout=20_000
            )


CARD = "[...document.querySelectorAll('.hywu-card-page')].map(page => page.innerText)"


def test_nodes_show_what_they_found_and_nothing_of_it_is_saved(page, workflow):
    page.wait_for_function(f"{CARD}.some(text => text.includes('matched 16/16 targets'))", timeout=20_000)
    shown = page.evaluate(CARD)
    assert any("What this generator knows" in text for text in shown)
    assert any("The LoRA is on the model" in text for text in shown)
    saved = page.evaluate("app.graph.serialize().nodes.map(node => [node.id, node.widgets_values?.length ?? 0])")
    assert dict(saved) == {node["id"]: len(node.get("widgets_values") or []) for node in workflow["nodes"]}


def test_cards_stay_in_the_other_renderer(page):
    """Nodes 2.0 draws nodes as elements, without their canvas."""
    page.evaluate("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
    page.wait_for_function(
        "[...document.querySelectorAll('[data-node-id] .hywu-card-page')].some(page => page.offsetHeight > 20)",
        timeout=20_000,
    )
    page.evaluate("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


def test_the_template_browser_shows_it_with_its_picture(page):
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("hywu", exact=True).first.click()
    dialog.get_by_text("quickstart", exact=False).first.wait_for(timeout=20_000)
    page.wait_for_function(  # the frontend fetches thumbnails itself and shows them from memory
        "[...document.querySelectorAll('img')].some(image => image.src.startsWith('blob:') && image.naturalWidth === 520)",
        timeout=20_000,
    )
    page.keyboard.press("Escape")


def test_nothing_of_the_pack_complains_in_the_browser(page):
    assert [error for error in page.errors if "hywu" in error.lower()] == []


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "workflows").glob("*.json")))
def test_the_frontend_reads_every_template_as_the_server_tests_do(page, server, name):
    """Widgets are saved by their order, and the frontend adds some of its own."""
    workflow = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    queued = page.evaluate(
        "workflow => app.loadGraphData(workflow).then(() => app.graphToPrompt()).then(prompt => prompt.output)",
        workflow,
    )
    expected = to_api_format(workflow, server.get("/object_info"))
    assert {node: found["inputs"] for node, found in queued.items() if found["class_type"] not in FRONTEND_ONLY} == {
        node: made["inputs"] for node, made in expected.items()
    }
