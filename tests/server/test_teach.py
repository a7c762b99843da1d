"""Teach and Learn from LoRAs through the real server: cancel, resume, save, load, use, and what an artist can get wrong."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

STEPS = 4
OLD = "brighten the picture\nmake the colours warm"
COLOURS = (0x204060, 0x806040, 0x30A030, 0x9050B0)


def pictures(prompt: dict, size: int = 24) -> None:
    """Four plain pictures as a batch, and the same inverted, by stock nodes."""
    for number, colour in enumerate(COLOURS):
        prompt[f"plain{number}"] = {
            "class_type": "EmptyImage",
            "inputs": {"width": size, "height": size, "batch_size": 1, "color": colour},
        }
    batch = "plain0"
    for number in range(1, len(COLOURS)):
        prompt[f"batch{number}"] = {
            "class_type": "ImageBatch",
            "inputs": {"image1": [batch, 0], "image2": [f"plain{number}", 0]},
        }
        batch = f"batch{number}"
    prompt["before"] = prompt.pop(batch)
    prompt["after"] = {"class_type": "ImageInvert", "inputs": {"image": ["before", 0]}}


def graph(kind: str, **inputs) -> dict:
    """A prompt that teaches and saves."""
    prompt = {
        "base": {"class_type": "HYWULoadPocketEditor", "inputs": {}},
        "load": {
            "class_type": "HYWULoadGenerator",
            "inputs": {"generator": "pocket-generator.safetensors", "weight_dtype": "default"},
        },
        "save": {
            "class_type": "HYWUSaveGenerator",
            "inputs": {"generator": ["teach", 0], "filename": "taught", "dtype": "as trained"},
        },
    }
    prompt["load forgetful"] = {  # its file names no instructions
        "class_type": "HYWULoadGenerator",
        "inputs": {"generator": "forgetful.safetensors", "weight_dtype": "default"},
    }
    pictures(prompt)
    common = {"model": ["base", 0], "clip": ["base", 1], "vae": ["base", 2], "generator": ["load", 0]}
    run = {"steps": STEPS, "learning_rate": 1e-3, "batch_size": 2, "seed": 0}
    own = {
        "HYWUTeachGenerator": {
            "before": ["before", 0],
            "after": ["after", 0],
            "instruction": "make it a negative\ninvert it",
            "memory": 1.0,
            "old_instructions": OLD,
        },
        "HYWULearnFromLoRAs": {"folder": ".", "pictures": ["before", 0]},
    }[kind]
    prompt["teach"] = {"class_type": kind, "inputs": common | run | own | inputs}
    return prompt


def pressing_cancel_at(server, step: int):
    pressed = []

    def on_message(message, data):
        if message == "progress" and data["node"] == "teach" and data["value"] >= step and not pressed:
            pressed.append(server.post("/interrupt"))

    return on_message


def losses(server, name: str) -> list[dict]:
    with open(server.output / "hywu" / name / "log.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tensors(path: str) -> dict[str, np.ndarray]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).float().numpy() for name in file.keys()}


def said(run, node: str) -> str:
    return next(data["output"]["text"][0] for kind, data in run.messages if kind == "executed" and data["node"] == node)


def saved_as(run) -> str:
    """The file that the card of Save HY-WU Generator names."""
    return re.search(r"^File: (.+)$", said(run, "save"), re.MULTILINE)[1]


def test_taught_cancelled_resumed_saved_loaded_and_used(server, studio):
    whole = server.run(graph("HYWUTeachGenerator", run_name="taught whole"))
    assert whole.outcome == "execution_success", whole.messages[-1]
    report = said(whole, "teach")
    assert "\nnew edit" in report and all(text in report for text in OLD.split("\n"))
    assert all("memory" in row for row in losses(server, "taught whole"))
    server.run(graph("HYWUTeachGenerator", run_name="taught paused"), pressing_cancel_at(server, 2))
    again = server.run(graph("HYWUTeachGenerator", run_name="taught paused"))
    assert again.outcome == "execution_success", again.messages[-1]
    assert losses(server, "taught paused") == losses(server, "taught whole")
    states = [tensors(saved_as(run)) for run in (whole, again)]
    assert all(np.array_equal(values, states[1][name]) for name, values in states[0].items())
    path = Path(saved_as(again))
    with safe_open(path, "pt") as file:
        hywu = json.loads(file.metadata()["hywu_config"])["hywu"]
    assert hywu["instructions"][-4:] == [*OLD.split("\n"), "make it a negative", "invert it"]
    assert hywu["lineage"][-1]["kind"] == "taught"
    picture = studio.picture(studio.quickstart(HYWULoadGenerator={"generator": path.name}))
    assert not np.array_equal(picture, studio.picture(studio.quickstart(HYWUApplyLoRA={"strength": 0.0})))


def test_learned_from_a_lora_that_was_saved_here(server, studio):
    prompt = studio.quickstart()
    generate = prompt[studio.node("HYWUGenerateLoRA")]["inputs"]
    prompt["words"] = {
        "class_type": "HYWUCondition",
        "inputs": {"conditioning": [studio.node("ReferenceLatent"), 0], "instruction": "brighten the picture"},
    }
    generate["condition"] = ["words", 0]
    prompt["keep"] = {
        "class_type": "HYWUSaveLoRA",
        "inputs": {
            "lora": [studio.node("HYWUGenerateLoRA"), 0],
            "filename_prefix": "loras/to learn/kept",
            "format": "stock",
            "dtype": "as generated",
        },
    }
    kept = server.run(prompt)
    assert kept.outcome == "execution_success", kept.messages[-1]
    run = server.run(graph("HYWULearnFromLoRAs", run_name="learned", folder="to learn"))
    assert run.outcome == "execution_success", run.error
    assert "brighten the picture" in said(run, "teach")


WRONG = {  # {name: (inputs, words of the error)}
    "no old instructions": ({"generator": ["load forgetful", 0], "old_instructions": ""}, "no old instructions"),
    "an old one": ({"instruction": "Brighten the picture"}, "among the old instructions"),
    "no instruction": ({"instruction": " "}, "has no instruction"),
    "one pair": ({"before": ["plain0", 0], "after": ["plain1", 0]}, "one pair of the new edit"),
    "nothing edited": ({"after": ["before", 0]}, "nothing is edited"),
    "run name": ({"run_name": "../outside"}, "no name for a run"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_clear_error(server, name):
    inputs, words = WRONG[name]
    run = server.run(graph("HYWUTeachGenerator", **{"run_name": "wrongly taught", **inputs}))
    assert run.outcome == "execution_error"
    assert run.messages[-1][1]["node_id"] == "teach" and words in run.error
    assert not (server.output / "hywu" / "wrongly taught").exists()
