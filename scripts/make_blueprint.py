"""Make the subgraph blueprint that ships: one node in ComfyUI's node library, from a picture and words to the edited picture.

    .venv/bin/python scripts/make_blueprint.py

Inside are the nodes that one would wire oneself, so that it can be opened, looked at and changed.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NAME = "Edit Picture with Instance LoRA"
FILE = ROOT / "subgraphs" / f"{NAME}.json"
OURS, STOCK = {"cnr_id": "hywu", "ver": "0.1.0"}, {"cnr_id": "comfy-core", "ver": "0.30.0"}
INPUT, OUTPUT = -10, -20  # the host's ids of a subgraph's two ends
LOADER, EDIT, SAMPLER, DECODE = 1, 2, 3, 4
LEFT, RIGHT, ROW = -400, 1180, 20  # where the two ends stand, and how far apart their slots are

# (name, type, value of its widget or None, [(node inside, its input)])
OUTSIDE = [
    ("model", "MODEL", None, [(EDIT, "model")]),
    ("clip", "CLIP", None, [(EDIT, "clip")]),
    ("vae", "VAE", None, [(EDIT, "vae"), (DECODE, "vae")]),
    ("image", "IMAGE", None, [(EDIT, "image")]),
    ("instruction", "STRING", "make it look like a sunset", [(EDIT, "instruction")]),
    ("strength", "FLOAT", 1.0, [(EDIT, "strength")]),
    ("generator", "COMBO", "pocket-generator.safetensors", [(LOADER, "generator")]),
    ("steps", "INT", 8, [(SAMPLER, "steps")]),
    ("cfg", "FLOAT", 1.0, [(SAMPLER, "cfg")]),
]
RESULTS = [("image", "IMAGE", DECODE, 0), ("lora", "HYWU_LORA", EDIT, 4)]
# (from, its output, to, its input, type)
INSIDE = [
    (LOADER, 0, EDIT, "generator", "HYWU_GENERATOR"),
    (EDIT, 0, SAMPLER, "model", "MODEL"),
    (EDIT, 1, SAMPLER, "positive", "CONDITIONING"),
    (EDIT, 2, SAMPLER, "negative", "CONDITIONING"),
    (EDIT, 3, SAMPLER, "latent_image", "LATENT"),
    (SAMPLER, 0, DECODE, "samples", "LATENT"),
]
# id: (type, place, size, {socket: type}, {widget that is fed from outside: type}, {output: type}, values of all widgets)
NODES = {
    LOADER: (
        "HYWULoadGenerator", (0, 0), (320, 90), {}, {"generator": "COMBO"}, {"generator": "HYWU_GENERATOR"},
        ["pocket-generator.safetensors", "default"],
    ),
    EDIT: (
        "HYWUEdit", (0, 150), (400, 420),
        {"model": "MODEL", "generator": "HYWU_GENERATOR", "conditioning": "CONDITIONING", "clip": "CLIP", "image": "IMAGE",
         "vae": "VAE", "latent": "LATENT", "empty": "CONDITIONING", "clip_vision_output": "CLIP_VISION_OUTPUT"},
        {"instruction": "STRING", "strength": "FLOAT"},
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent": "LATENT", "lora": "HYWU_LORA",
         "lora_model": "LORA_MODEL"},
        ["make it look like a sunset", 1.0, "auto", 0.0, 1.0, 0.0],
    ),
    SAMPLER: (
        "KSampler", (480, 150), (300, 320),
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        {"steps": "INT", "cfg": "FLOAT"}, {"LATENT": "LATENT"}, [1, "fixed", 8, 1.0, "euler", "simple", 1.0],
    ),
    DECODE: ("VAEDecode", (860, 150), (220, 60), {"samples": "LATENT", "vae": "VAE"}, {}, {"IMAGE": "IMAGE"}, []),
}  # fmt: skip


def blueprint() -> dict[str, Any]:
    """The file's content, always the same."""
    made = str(_identity("subgraph"))
    links = [
        {"origin_id": INPUT, "origin_slot": slot, "target_id": node, "target_slot": _slot(node, name), "type": kind}
        for slot, (_, kind, _, targets) in enumerate(OUTSIDE)
        for node, name in targets
    ]
    links += [
        {"origin_id": a, "origin_slot": out, "target_id": b, "target_slot": _slot(b, name), "type": kind}
        for a, out, b, name, kind in INSIDE
    ]
    links += [
        {"origin_id": node, "origin_slot": out, "target_id": OUTPUT, "target_slot": slot, "type": kind}
        for slot, (_, kind, node, out) in enumerate(RESULTS)
    ]
    links = [{"id": number, **link} for number, link in enumerate(links, 1)]
    subgraph = {
        "id": made,
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": max(NODES), "lastLinkId": len(links), "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": NAME,
        "category": "HY-WU",
        "description": "From a picture and an instruction to the edited picture: writes the LoRA, applies it, samples.",
        "inputNode": {"id": INPUT, "bounding": [LEFT, 150, 120, ROW * (len(OUTSIDE) + 2)]},
        "outputNode": {"id": OUTPUT, "bounding": [RIGHT, 150, 120, ROW * (len(RESULTS) + 2)]},
        "inputs": [_end("in", name, kind, links, INPUT, slot) for slot, (name, kind, *_) in enumerate(OUTSIDE)],
        "outputs": [_end("out", name, kind, links, OUTPUT, slot) for slot, (name, kind, *_) in enumerate(RESULTS)],
        "widgets": [],
        "nodes": [_node(order, node, links) for order, node in enumerate(NODES)],
        "groups": [],
        "links": links,
        "extra": {},
    }
    return {
        "id": str(_identity("workflow")),
        "revision": 0,
        "last_node_id": max(NODES) + 1,
        "last_link_id": 0,
        "nodes": [_outer(made)],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [subgraph]},
        "extra": {},
    }


def _outer(kind: str) -> dict[str, Any]:
    """The one node that is seen. The seed is not fed from outside, so that it keeps what follows each run."""
    fed = [(name, value) for name, _, value, _ in OUTSIDE if value is not None]
    seed = [[str(SAMPLER), "seed"], [str(SAMPLER), "control_after_generate"]]
    return {
        "id": max(NODES) + 1,
        "type": kind,
        "pos": [0, 0],
        "size": [400, 380],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [
            {"name": name, "type": of, "link": None, **({} if value is None else {"widget": {"name": name}})}
            for name, of, value, _ in OUTSIDE
        ],
        "outputs": [{"name": name, "type": of, "links": None} for name, of, *_ in RESULTS],
        "title": NAME,
        "properties": {"proxyWidgets": [["-1", name] for name, _ in fed] + seed, **OURS},
        "widgets_values": [value for _, value in fed],
    }


def _node(order: int, node: int, links: list[dict[str, Any]]) -> dict[str, Any]:
    kind, place, size, sockets, widgets, outputs, values = NODES[node]
    fed = {link["target_slot"]: link["id"] for link in links if link["target_id"] == node}
    slots = [*sockets.items(), *widgets.items()]
    return {
        "id": node,
        "type": kind,
        "pos": list(place),
        "size": list(size),
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [
            {"name": name, "type": of, "link": fed.get(slot), **({"widget": {"name": name}} if name in widgets else {})}
            for slot, (name, of) in enumerate(slots)
        ],
        "outputs": [
            {
                "name": name,
                "type": of,
                "links": [link["id"] for link in links if (link["origin_id"], link["origin_slot"]) == (node, slot)],
            }
            for slot, (name, of) in enumerate(outputs.items())
        ],
        "properties": {"Node name for S&R": kind, **(OURS if kind.startswith("HYWU") else STOCK)},
        "widgets_values": values,
    }


def _end(side: str, name: str, kind: str, links: list[dict[str, Any]], end: int, slot: int) -> dict[str, Any]:
    which = ("origin_id", "origin_slot") if end == INPUT else ("target_id", "target_slot")
    return {
        "id": str(_identity(f"{side} {name}")),
        "name": name,
        "type": kind,
        "linkIds": [link["id"] for link in links if (link[which[0]], link[which[1]]) == (end, slot)],
        "pos": [LEFT + 100 if end == INPUT else RIGHT + 20, 170 + ROW * slot],
    }


def _slot(node: int, name: str) -> int:
    _, _, _, sockets, widgets, *_ = NODES[node]
    return [*sockets, *widgets].index(name)


def _identity(what: str) -> uuid.UUID:
    return uuid.uuid5(uuid.NAMESPACE_URL, f"{NAME}: {what}")


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(blueprint(), indent=1) + "\n", encoding="utf-8")
    print(FILE)
