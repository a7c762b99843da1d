"""Templates of 0.1.0, as artists have saved them, in the frontend: nothing is missing, no wire and no value is lost."""

import json
from pathlib import Path

import pytest
from host_server import FRONTEND_ONLY, to_api_format

SAVED = Path(__file__).resolve().parents[1] / "fixtures" / "workflows_0_1"
# what is not there under the frontend's own addresses; sizes of models that it asks the hub for, which this server forbids
NOT_OURS = ("Failed to load resource", "https://huggingface.co/")
MISSING = "app.graph.nodes.filter(node => !(node.type in LiteGraph.registered_node_types)).map(node => node.type)"
TITLES = "[...document.querySelectorAll('[role=dialog]')].map(dialog => dialog.innerText)"


@pytest.fixture(params=sorted(SAVED.glob("*.json")), ids=lambda file: file.stem)
def workflow(request) -> dict:
    return json.loads(request.param.read_text(encoding="utf-8"))


def test_it_opens_as_it_was_saved(page, server, workflow):
    # newer frontends look after an Autogrow input once more when its node is gone, and complain of that
    page.evaluate("app.graph.clear()")
    page.wait_for_timeout(300)
    page.errors.clear()
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.wait_for_timeout(700)  # dialogs come after the graph
    assert page.evaluate("app.graph.nodes.length") == len(workflow["nodes"])
    assert page.evaluate(MISSING) == [] and page.evaluate(TITLES) == []
    assert page.evaluate("[...app.graph.links.values()].length") == len(workflow["links"])
    assert [error for error in page.errors if not any(words in error for words in NOT_OURS)] == []
    queued = page.evaluate("app.graphToPrompt().then(prompt => prompt.output)")
    expected = to_api_format(workflow, server.get("/object_info"))
    assert {node: found["inputs"] for node, found in queued.items() if found["class_type"] not in FRONTEND_ONLY} == {
        node: made["inputs"] for node, made in expected.items()
    }
