"""What saved workflows depend on: node ids, inputs, outputs and their order. A change here breaks somebody's workflow.

After a change that is meant, and only adds:
    HYWU_UPDATE_SNAPSHOTS=1 .venv/bin/python -m pytest tests/server/test_object_info.py
"""

import json
import os
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = Path(__file__).parent / "snapshots" / "object_info.json"
FILE_INPUTS = {  # their options are what lies on the disk
    ("HYWULoadGenerator", "generator"),
    ("HYWULoadLoRA", "lora"),
    ("HYWULoadHunyuanImage3", "folder"),
    ("HYWULearnFromLoRAs", "folder"),
}


@pytest.fixture(scope="module")
def object_info(server) -> dict:
    found = {name: node for name, node in server.get("/object_info").items() if name.startswith("HYWU")}
    for node, name in FILE_INPUTS:
        found[node]["input"]["required"][name][1]["options"] = "files"
    return found


def test_nodes_are_what_saved_workflows_expect(object_info):
    if os.environ.get("HYWU_UPDATE_SNAPSHOTS"):
        SNAPSHOT.parent.mkdir(exist_ok=True)
        SNAPSHOT.write_text(json.dumps(object_info, indent=1) + "\n", encoding="utf-8")
    assert json.dumps(object_info, indent=1) + "\n" == SNAPSHOT.read_text(encoding="utf-8")


def test_every_node_and_every_socket_explains_itself(object_info):
    for name, node in object_info.items():
        assert len(node["description"]) > 40, name
        assert all(node["output_tooltips"]), name
        for section in ("required", "optional"):
            for socket, (_, options) in node["input"].get(section, {}).items():
                assert options.get("tooltip"), f"{name}.{socket}"


def test_every_node_has_a_help_page(object_info, server):
    for name in object_info:
        with urllib.request.urlopen(f"{server.url}/extensions/hywu/docs/{name}/en.md") as response:
            assert response.read().startswith(b"# "), name


def test_templates_are_found_with_their_pictures(server):
    names = server.get("/workflow_templates")["hywu"]
    assert "quickstart" in names
    for name in names:
        assert server.get(f"/api/workflow_templates/hywu/{name}.json")["nodes"]
        assert (ROOT / "workflows" / f"{name}.jpg").is_file(), f"{name} has no thumbnail"
