"""The subgraph blueprint in the real frontend: the node library has it, and its widgets reach the nodes inside."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
(FILE,) = (ROOT / "subgraphs").glob("*.json")


@pytest.fixture(scope="module")
def page(browser, server):
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(server.url)
    page.wait_for_function(
        "window.app?.graph && Object.keys(LiteGraph.registered_node_types).length > 100", timeout=90_000
    )
    yield page
    page.close()


def queued(page) -> dict:
    """{class: inputs} of what the frontend would send."""
    output = page.evaluate("app.graphToPrompt().then(prompt => prompt.output)")
    return {node["class_type"]: node["inputs"] for node in output.values()}


# the newest frontend keeps blueprints with the other definitions of nodes
LIBRARY = """name => {
    const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s;
    const found = stores.get('subgraph').subgraphBlueprints ?? [...stores.get('nodeDef').blueprintNodeDefsByName.values()];
    return found.some(blueprint => blueprint.display_name === name);
}"""


def test_the_library_has_it(page):
    page.wait_for_function(LIBRARY, arg=FILE.stem, timeout=30_000)


def test_its_widgets_reach_the_nodes_inside(page):
    page.evaluate("workflow => app.loadGraphData(workflow)", json.loads(FILE.read_text(encoding="utf-8")))
    (titles,) = page.evaluate("app.graph.nodes.map(node => node.widgets.map(widget => widget.name))")
    assert titles[:5] == ["instruction", "strength", "generator", "steps", "cfg"] and "seed" in titles
    before = queued(page)
    assert before["HYWUEdit"]["instruction"] == "make it look like a sunset" and before["HYWUEdit"]["strength"] == 1
    page.evaluate(
        """app.graph.nodes[0].widgets.forEach(widget => {
            const value = {instruction: 'darken the picture', strength: 0.5, steps: 3, seed: 9}[widget.name];
            if (value !== undefined) { widget.value = value; widget.callback?.(value); }
        })"""
    )
    after = queued(page)
    assert (after["HYWUEdit"]["instruction"], after["HYWUEdit"]["strength"]) == ("darken the picture", 0.5)
    assert (after["KSampler"]["steps"], after["KSampler"]["seed"]) == (3, 9)
    assert after["HYWULoadGenerator"] == before["HYWULoadGenerator"]
    assert page.errors == []
