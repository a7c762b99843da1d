"""The subgraph blueprint that ships, through the real server: it is served, its wires fit, and what is inside runs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from demo import PICTURE
from host_server import to_api_format
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))
from make_blueprint import FILE, NAME, blueprint  # noqa: E402

INPUT, OUTPUT = -10, -20


@pytest.fixture(scope="module")
def served(server) -> dict:
    """The blueprint, as the frontend gets it."""
    found = {key: entry for key, entry in server.get("/global_subgraphs").items() if entry["name"] == NAME}
    (pack,) = (entry["info"]["node_pack"] for entry in found.values())
    assert pack.startswith("custom_nodes.")
    return json.loads(server.get(f"/global_subgraphs/{next(iter(found))}")["data"])


def test_the_file_is_what_the_script_makes():
    assert json.loads(FILE.read_text(encoding="utf-8")) == blueprint()


def test_its_wires_fit(served, server):
    """Every slot that a wire names is there, is of the wire's type, and knows the wire."""
    (inside,), known = served["definitions"]["subgraphs"], server.get("/object_info")
    nodes = {node["id"]: node for node in inside["nodes"]}
    assert served["nodes"][0]["type"] == inside["id"]
    for link in inside["links"]:
        start, end = link["origin_id"], link["target_id"]
        out = inside["inputs"][link["origin_slot"]] if start == INPUT else nodes[start]["outputs"][link["origin_slot"]]
        into = inside["outputs"][link["target_slot"]] if end == OUTPUT else nodes[end]["inputs"][link["target_slot"]]
        assert out["type"] == into["type"] == link["type"]
        assert link["id"] in (out["linkIds"] if start == INPUT else out["links"])
        assert link["id"] in into["linkIds"] if end == OUTPUT else link["id"] == into["link"]
    for node in nodes.values():
        schema = known[node["type"]]
        takes = {**schema["input"]["required"], **schema["input"].get("optional", {})}
        assert {slot["name"] for slot in node["inputs"]} <= set(takes)
        assert [(slot["name"], slot["type"]) for slot in node["outputs"]] == list(
            zip(schema["output_name"], schema["output"], strict=True)
        )


def prompt_of(served: dict, known: dict, **outside) -> dict:
    """What the frontend queues for it, with these wires and values from outside, between stock nodes."""
    (inside,) = served["definitions"]["subgraphs"]
    links = [[link["id"], link["origin_id"], link["origin_slot"]] for link in inside["links"]]
    prompt = to_api_format({"nodes": inside["nodes"], "links": links}, known)
    names = [slot["name"] for slot in inside["inputs"]]
    outer = served["nodes"][0]
    widgets = [name for end, name in outer["properties"]["proxyWidgets"] if end == "-1"]
    given = dict(zip(widgets, outer["widgets_values"], strict=True)) | outside
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == str(INPUT):
                node["inputs"][name] = given[names[value[1]]]
    return prompt


def test_it_edits_a_picture(served, server):
    known, pictures = server.get("/object_info"), []
    for strength in (1.0, 0.0):
        wires = {name: ["editor", slot] for slot, name in enumerate(("model", "clip", "vae"))}
        prompt = prompt_of(served, known, **wires, image=["scaled", 0], strength=strength)
        (last,) = [name for name, node in prompt.items() if node["class_type"] == "VAEDecode"]
        scale = {"upscale_method": "area", "width": 64, "height": 64, "crop": "center"}
        prompt |= {
            "editor": {"class_type": "HYWULoadPocketEditor", "inputs": {}},
            "picture": {"class_type": "LoadImage", "inputs": {"image": PICTURE}},
            "scaled": {"class_type": "ImageScale", "inputs": {"image": ["picture", 0], **scale}},
            "save": {
                "class_type": "SaveImage",
                "inputs": {"images": [last, 0], "filename_prefix": f"blueprint{strength:g}"},
            },
        }
        run = server.run(prompt)
        assert run.outcome == "execution_success", run.messages[-1]
        pictures.append(np.asarray(Image.open(server.output / run.files("save")[0])).astype(int))
    warmer = (pictures[0] - pictures[1]).mean((0, 1))
    assert warmer[0] > 1 > -1 > warmer[2], warmer
