"""Training through the real server: pairs from stock nodes, train, cancel, resume, save, load, generate, evaluate; and what
an artist can get wrong.
"""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from host_server import to_api_format
from PIL import Image
from safetensors import safe_open

SAVED = Path(__file__).resolve().parents[1] / "fixtures" / "workflows_0_1"
STEPS = 4


class Workshop:
    """The training template as a prompt, made small, and changed a little for each test."""

    def __init__(self, server):
        self.server = server
        workflow = json.loads((SAVED / "train.json").read_text(encoding="utf-8"))
        self.prompt = to_api_format(workflow, server.get("/object_info"))
        self.train = self.node("HYWUTrainGenerator")
        quick = {"steps": STEPS, "batch_size": 2, "warmup": 1, "validate_every": 0, "held_out": 0, "save_every": 0}
        self.prompt[self.train]["inputs"] |= quick

    def node(self, kind: str) -> str:
        """The id of the template's node of a class."""
        return next(name for name, node in self.prompt.items() if node["class_type"] == kind)

    def graph(self, *kinds: str, **changes: dict) -> dict:
        """The part of the template that the nodes of these classes need; changes are `NodeClass={"input": value}`."""
        wanted, found = [self.node(kind) for kind in kinds], {}
        while wanted:
            name = wanted.pop()
            node = self.prompt[name]
            found[name] = {**node, "inputs": {**node["inputs"], **changes.get(node["class_type"], {})}}
            wanted += [value[0] for value in found[name]["inputs"].values() if isinstance(value, list)]
        return found

    def run(self, *kinds: str, on_message=None, **changes: dict):
        return self.server.run(self.graph(*kinds, **changes), on_message)

    def folder(self, name: str) -> Path:
        return self.server.output / "hywu" / name

    def losses(self, name: str) -> list[str]:
        with open(self.folder(name) / "log.csv", newline="", encoding="utf-8") as file:
            return [row["loss"] for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def workshop(server) -> Workshop:
    return Workshop(server)


def train(name: str, **settings) -> dict:
    return {"HYWUTrainGenerator": {"run_name": name, **settings}}


def pressing_cancel_at(workshop, step: int):
    """A callback that presses Cancel when training reports a step."""
    pressed = []

    def on_message(message, data):
        if message == "progress" and data["node"] == workshop.train and data["value"] >= step and not pressed:
            pressed.append(workshop.server.post("/interrupt"))

    return on_message


def test_the_template_trains_saves_and_evaluates(workshop):
    kinds = ("HYWUSaveGenerator", "LossGraphNode", "PreviewAny", "PreviewImage")
    run = workshop.run(*kinds, **train("whole", validate_every=2, held_out=4), HYWUSaveGenerator={"filename": "whole"})
    assert run.outcome == "execution_success", run.messages[-1]
    said = {data["node"]: data["output"] for message, data in run.messages if message == "executed"}
    table = said[workshop.node("PreviewAny")]["text"][0]
    assert [line.split("\t")[0] for line in table.splitlines()] == [
        "mean loss, 8 pairs", "base", "matched", "shuffled", "averaged",
        "matched is better by", "than base", "than shuffled", "than averaged",
    ]  # fmt: skip
    assert run.files(workshop.node("LossGraphNode")) and run.files(workshop.node("PreviewImage"))
    assert len(workshop.losses("whole")) == STEPS
    pictures = sorted(workshop.folder("whole").glob("step-*.png"))
    assert [path.name for path in pictures] == ["step-000002.png", "step-000004.png"]
    assert np.asarray(Image.open(pictures[0])).std() > 0


def test_cancelled_and_resumed_is_the_same_as_not_cancelled(workshop):
    whole = workshop.run("HYWUSaveGenerator", **train("straight"), HYWUSaveGenerator={"filename": "straight"})
    assert whole.outcome == "execution_success", whole.messages[-1]
    cancelled = workshop.run(
        "HYWUSaveGenerator", on_message=pressing_cancel_at(workshop, 2), **train("paused", steps=STEPS)
    )
    if cancelled.outcome == "execution_interrupted":  # a fast machine may be done before the button is
        assert cancelled.messages[-1][1]["node_id"] == workshop.train
        assert (workshop.folder("paused") / "state.safetensors").is_file()
        assert 1 <= len(workshop.losses("paused")) < STEPS
    again = workshop.run("HYWUSaveGenerator", **train("paused"), HYWUSaveGenerator={"filename": "paused"})
    assert again.outcome == "execution_success", again.messages[-1]
    assert workshop.losses("paused") == workshop.losses("straight")
    states = [tensors(path_of(run, workshop)) for run in (whole, again)]
    assert states[0].keys() == states[1].keys()
    assert all(np.array_equal(values, states[1][name]) for name, values in states[0].items())


def test_a_long_run_can_be_cancelled_and_the_next_one_is_right(workshop):
    run = workshop.run("HYWUSaveGenerator", on_message=pressing_cancel_at(workshop, 1), **train("long", steps=5000))
    assert run.outcome == "execution_interrupted"
    assert run.messages[-1][1]["node_id"] == workshop.train
    assert (workshop.folder("long") / "state.safetensors").is_file()
    again = workshop.run("LossGraphNode", **train("after cancelling"))
    assert again.outcome == "execution_success"


def test_a_saved_generator_is_listed_and_edits(workshop, studio):
    changes = {**train("saved"), "HYWUSaveGenerator": {"filename": "edits/saved", "dtype": "bfloat16"}}
    run = workshop.run("HYWUSaveGenerator", **changes)
    path = Path(path_of(run, workshop))
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["hywu_config"])
        assert {str(file.get_slice(name).get_dtype()) for name in file.keys()} == {"BF16"}
    assert config["hywu"]["base"] == "Flux" and config["hywu"]["training"]["steps"] == STEPS
    prompt = studio.quickstart(HYWULoadGenerator={"generator": "edits/saved.safetensors"})
    prompt[studio.node("HYWUGenerateLoRA")]["inputs"]["condition"] = [studio.node("ReferenceLatent"), 0]
    picture = studio.picture(prompt)
    without = studio.quickstart(HYWUApplyLoRA={"strength": 0.0})
    assert not np.array_equal(picture, studio.picture(without))
    number = workshop.run("HYWUSaveGenerator", **changes | {"HYWUSaveGenerator": {"filename": "edits/saved"}})
    assert Path(path_of(number, workshop)).name == "saved-2.safetensors"


def test_a_generator_still_in_memory_writes_a_lora(workshop):
    prompt = workshop.graph("HYWUSaveGenerator", **train("memory"))
    condition = prompt[workshop.train]["inputs"]["positive"]
    prompt["one"] = {
        "class_type": "HYWUGenerateLoRA",
        "inputs": {"generator": [workshop.train, 0], "condition": condition},
    }
    prompt["look"] = {"class_type": "HYWUInspectLoRA", "inputs": {"lora": ["one", 0]}}
    prompt["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["look", 1]}}
    run = workshop.server.run(prompt)
    assert run.outcome == "execution_success", run.messages[-1]
    shown = next(data["output"]["text"] for kind, data in run.messages if kind == "executed" and data["node"] == "show")
    assert shown[0].startswith("norm of dW, rank 4")


def test_hidden_states_of_the_base_through_the_condition_node(workshop):
    changes = {**train("seeing"), "HYWUNewGenerator": {"condition_source": "hidden states of the base"}}
    prompt = workshop.graph("HYWUSaveGenerator", **changes, HYWUSaveGenerator={"filename": "seeing"})
    source, model = prompt[workshop.train]["inputs"]["generator_positive"], prompt[workshop.train]["inputs"]["model"]
    prompt["see"] = {
        "class_type": "HYWUCondition",
        "inputs": {"conditioning": source, "instruction": "", "model": model},
    }
    prompt[workshop.train]["inputs"]["generator_positive"] = ["see", 0]
    prompt[workshop.node("HYWUNewGenerator")]["inputs"]["condition"] = ["see", 0]
    run = workshop.server.run(prompt)
    assert run.outcome == "execution_success", run.messages[-1]
    with safe_open(path_of(run, workshop), "pt") as file:
        parts = json.loads(file.metadata()["hywu_config"])["hywu"]["condition"]
    assert parts == [{"kind": "hidden_states", "width": 128}]


WRONG = {  # {name: (changes, the node that says so, words of its error)}
    "stack": (
        {"HYWUNewGenerator": {"stack": "blocks"}},
        "HYWUNewGenerator",
        ["no stack 'blocks'", "double_blocks (4 blocks)"],
    ),
    "names": ({"HYWUNewGenerator": {"target_names": "to_q"}}, "HYWUNewGenerator", ["matches to_q", "img_attn.qkv"]),
    "part": (
        {"HYWUNewGenerator": {"condition_source": "instruction and CLIP Vision"}},
        "HYWUNewGenerator",
        ["no clip_vision", "HY-WU Condition"],
    ),
    "run name": (train("../outside"), "HYWUTrainGenerator", ["no name for a run"]),
    "too many held out": (train("held", held_out=23), "HYWUTrainGenerator", ["23 cannot be held out"]),
    "file name": ({"HYWUSaveGenerator": {"filename": "../outside"}}, "HYWUSaveGenerator", ["no name for a generator"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_one_clear_error(workshop, name):
    changes, kind, words = WRONG[name]
    run = workshop.run("HYWUSaveGenerator", **{**train("wrong"), **changes})
    assert run.outcome == "execution_error"
    assert run.messages[-1][1]["node_id"] == workshop.node(kind)
    for word in words:
        assert word in run.error


def test_lists_that_do_not_fit_are_one_clear_error(workshop):
    prompt = workshop.graph("HYWUSaveGenerator", **train("unequal"))
    latents = prompt[prompt[workshop.train]["inputs"]["latents"][0]]["inputs"]
    prompt[workshop.train]["inputs"]["latents"] = latents["inputs.input0"]  # of one edit only
    run = workshop.server.run(prompt)
    assert run.outcome == "execution_error"
    assert "12 latents but 24 of positive" in run.error


def test_one_pair_is_one_clear_error(workshop):
    prompt = workshop.graph("HYWUSaveGenerator", **train("single"))
    for node in prompt.values():
        if node["class_type"] == "ImageCrop":
            node["inputs"] |= {"width": 64, "height": 64}
    inputs = prompt[workshop.train]["inputs"]
    for name in ("latents", "positive", "generator_positive"):
        inputs[name] = prompt[inputs[name][0]]["inputs"]["inputs.input0"]
    run = workshop.server.run(prompt)
    assert run.outcome == "execution_error"
    assert "one training pair" in run.error


def test_other_settings_or_pictures_under_the_same_name_are_refused_and_nothing_is_lost(workshop):
    assert workshop.run("HYWUSaveGenerator", **train("kept")).outcome == "execution_success"
    state = workshop.folder("kept") / "state.safetensors"
    before = state.read_bytes()
    run = workshop.run("HYWUSaveGenerator", **train("kept", learning_rate=0.5))
    assert run.outcome == "execution_error"
    assert "learning_rate" in run.error and "new run name" in run.error
    prompt = workshop.graph("HYWUSaveGenerator", **train("kept"))
    crops = [node["inputs"] for node in prompt.values() if node["class_type"] == "ImageCrop"]
    for crop in crops:
        crop["x"] = 8 if crop["x"] == 0 else crop["x"]
    other = workshop.server.run(prompt)
    assert other.outcome == "execution_error" and "other pictures" in other.error, other.error
    assert state.read_bytes() == before


def test_a_cancelled_run_gives_its_generator_and_a_finished_one_goes_on(workshop):
    run = workshop.run("HYWUSaveGenerator", on_message=pressing_cancel_at(workshop, 2), **train("taken", steps=5000))
    assert run.outcome == "execution_interrupted"
    done = len(workshop.losses("taken"))
    left = tensors(str(workshop.folder("taken") / "generator.safetensors"))
    whole = {"filename": "taken", "dtype": "as trained"}
    taken = workshop.run("HYWUSaveGenerator", **train("taken", steps=done), HYWUSaveGenerator=whole)
    assert taken.outcome == "execution_success" and len(workshop.losses("taken")) == done
    assert all(np.array_equal(values, left[name]) for name, values in tensors(path_of(taken, workshop)).items())
    longer = workshop.run("HYWUSaveGenerator", **train("taken", steps=done + 2))
    assert longer.outcome == "execution_success" and len(workshop.losses("taken")) == done + 2
    again = workshop.run("HYWUSaveGenerator", **train("taken", steps=1, if_exists="restart"))
    assert again.outcome == "execution_success" and len(workshop.losses("taken")) == 1


def test_generators_that_are_kept_on_the_way_can_be_chosen(workshop):
    run = workshop.run("HYWUSaveGenerator", **train("spoken", keep_every=2))
    assert run.outcome == "execution_success", run.messages[-1]
    options = workshop.server.get("/object_info/HYWULoadGenerator")["HYWULoadGenerator"]
    assert "spoken/step-000002.safetensors" in json.dumps(options)


def test_a_run_folder_that_cannot_be_written_to(workshop):
    blocked = workshop.server.output / "hywu" / "blocked"
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("a file where a folder should be")
    run = workshop.run("HYWUSaveGenerator", **train("blocked/run"))
    assert run.outcome == "execution_error"
    assert run.messages[-1][1]["node_id"] == workshop.train
    assert str(blocked) in run.error
    assert blocked.read_text() == "a file where a folder should be"


def path_of(run, workshop) -> str:
    node = workshop.node("HYWUSaveGenerator")
    shown = next(
        data["output"]["text"][0] for kind, data in run.messages if kind == "executed" and data["node"] == node
    )
    return re.search(r"^File: (.+)$", shown, re.MULTILINE)[1]


def tensors(path: str) -> dict[str, np.ndarray]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).float().numpy() for name in file.keys()}
