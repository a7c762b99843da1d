"""The template that ships, through the real server: it runs, caches, and can be cancelled anywhere."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from demo import PICTURE, draw_picture
from host_server import HostServer, to_api_format
from PIL import Image
from templates_pocket import SUNSET, WARM

ROOT = Path(__file__).resolve().parents[2]


def test_the_pack_was_imported_without_complaint(server):
    log = server.log.read_text().partition("To see the GUI")[0]
    assert "hywu" in log
    assert "IMPORT FAILED" not in log
    assert "Traceback" not in log


def test_the_quickstart_runs(studio):
    run = studio.run(studio.quickstart())
    assert run.outcome == "execution_success"
    assert set(run.executed) | run.cached == set(studio.quickstart())
    assert run.files(studio.node("SaveImage"))
    assert "matched 16/16 targets" in studio.server.log.read_text()


def test_a_node_that_shows_text_shows_no_pictures(studio):
    run, apply = studio.run(studio.quickstart(HYWUApplyLoRA={"strength": 0.87})), studio.node("HYWUApplyLoRA")
    assert apply in run.executed and run.files(apply) == []


def test_nodes_say_what_they_found(studio):
    """On a card, which web/cards.js draws: the frontend draws texts of a result on its own preview nodes only."""
    run, apply = studio.run(studio.quickstart(HYWUApplyLoRA={"strength": 0.86})), studio.node("HYWUApplyLoRA")
    shown = [data["output"] for kind, data in run.messages if kind == "executed" and data["node"] == apply]
    assert "matched 16/16 targets (bypass)" in shown[0]["text"][0] and shown[0]["hywu_card"][0]["level"] == "good"


def test_the_lora_changes_the_picture_and_strength_zero_does_not(studio):
    with_lora = studio.picture(studio.quickstart())
    switched_off = studio.picture(studio.quickstart(HYWUApplyLoRA={"strength": 0.0}))
    base = studio.quickstart()
    base[studio.node("KSampler")]["inputs"]["model"] = [studio.node("HYWULoadPocketEditor"), 0]
    assert np.array_equal(studio.picture(base), switched_off)
    assert not np.array_equal(with_lora, switched_off)


@pytest.mark.parametrize(
    "changes",
    [{"KSampler": {"seed": 77}}, {"KSampler": {"steps": 3}}, {"HYWUApplyLoRA": {"strength": 0.3}}],
    ids=["seed", "steps", "strength"],
)
def test_seed_sampler_and_strength_generate_nothing_again(studio, changes):
    studio.run(studio.quickstart())
    run = studio.run(studio.quickstart(**changes))
    spared = {studio.node(kind) for kind in ("HYWULoadGenerator", "HYWUGenerateLoRA", "HYWULoadPocketEditor")}
    assert spared <= run.cached
    assert not spared & set(run.executed)
    assert studio.node("KSampler") in run.executed


def test_another_instruction_generates_again_but_loads_nothing(studio):
    studio.run(studio.quickstart())
    run = studio.run(studio.quickstart(CLIPTextEncode={"text": "blur the background"}))
    assert studio.node("HYWUGenerateLoRA") in run.executed
    assert studio.node("HYWULoadGenerator") in run.cached


def test_going_back_to_an_instruction_gives_the_same_picture(studio):
    first = studio.picture(studio.quickstart())
    other = studio.picture(studio.quickstart(CLIPTextEncode={"text": "desaturate the picture"}))
    assert np.array_equal(first, studio.picture(studio.quickstart()))
    assert not np.array_equal(first, other)


def test_bypass_and_merge_agree(studio):
    bypass, merge = (studio.picture(studio.quickstart(HYWUApplyLoRA={"mode": mode})) for mode in ("bypass", "merge"))
    assert np.abs(bypass.astype(int) - merge.astype(int)).max() <= 1  # of 255


def interrupt_at(studio, kind):
    """A callback that presses Cancel when a node of this class first reports progress."""
    node, pressed = studio.node(kind), []

    def on_message(message, data):
        if message == "progress" and data["node"] == node and data["value"] >= 1 and not pressed:
            pressed.append(studio.server.post("/interrupt"))

    return on_message


def test_cancelling_a_generation_leaves_nothing_wrong(studio):
    expected = studio.picture(studio.quickstart())
    slow = {"HYWULoadGenerator": {"generator": "slow.safetensors"}}
    run = studio.run(studio.quickstart(**slow), interrupt_at(studio, "HYWUGenerateLoRA"))
    assert run.outcome == "execution_interrupted"
    assert run.messages[-1][1]["node_id"] == studio.node("HYWUGenerateLoRA")
    assert np.array_equal(expected, studio.picture(studio.quickstart()))
    again = studio.run(studio.quickstart(**slow))
    assert again.outcome == "execution_success"
    assert studio.node("HYWUGenerateLoRA") in again.executed


@pytest.mark.parametrize("mode", ["bypass", "merge"])
def test_cancelling_the_sampler_leaves_the_base_untouched(studio, mode):
    base = {"HYWUApplyLoRA": {"strength": 0.0}}
    expected = studio.picture(studio.quickstart(**base))
    slow = {"KSampler": {"steps": 200}, "HYWUApplyLoRA": {"mode": mode}}
    run = studio.run(studio.quickstart(**slow), interrupt_at(studio, "KSampler"))
    assert run.outcome == "execution_interrupted"
    assert np.array_equal(expected, studio.picture(studio.quickstart(**base)))


def test_a_saved_lora_gives_the_merged_picture_through_the_stock_loader(studio):
    """Bit for bit; and through our own loader, which an artist uses for the modes and the schedule."""
    save, generate, apply = "save", studio.node("HYWUGenerateLoRA"), studio.node("HYWUApplyLoRA")
    prompt = studio.quickstart(HYWUApplyLoRA={"mode": "merge"})
    inputs = {"lora": [generate, 0], "filename_prefix": "loras/stock", "format": "stock", "dtype": "as generated"}
    prompt[save] = {"class_type": "HYWUSaveLoRA", "inputs": inputs}
    merged = studio.picture(prompt)
    (file,) = (studio.server.output / "loras").glob("stock_*.safetensors")

    stock = studio.quickstart()
    model = stock[apply]["inputs"]["model"]
    inputs = {"model": model, "lora_name": file.name, "strength_model": stock[apply]["inputs"]["strength"]}
    stock[apply] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
    assert np.array_equal(studio.picture(stock), merged)

    ours = studio.quickstart(HYWUApplyLoRA={"mode": "merge", "lora": ["load", 0]})
    ours["load"] = {"class_type": "HYWULoadLoRA", "inputs": {"lora": file.name}}
    assert np.array_equal(studio.picture(ours), merged)
    both = studio.quickstart(HYWUApplyLoRA={"mode": "merge", "lora": [generate, 1]})
    assert np.array_equal(studio.picture(both), merged), "a LORA_MODEL is the same LoRA"


def test_loras_are_blended_and_shown(studio):
    """An equal blend of a LoRA with itself is that LoRA; picture and table of what it changes come along."""
    generate = [studio.node("HYWUGenerateLoRA"), 0]
    several = {"loras.lora0": generate, "loras.lora1": generate}
    prompt = studio.quickstart(HYWUApplyLoRA={"lora": ["blend", 0]})
    prompt["blend"] = {"class_type": "HYWUBlendLoRAs", "inputs": {**several, "weights": "0.5, 0.5", "max_rank": 0}}
    prompt["inspect"] = {"class_type": "HYWUInspectLoRA", "inputs": {"lora": ["blend", 0]}}
    prompt["compare"] = {"class_type": "HYWUCompareLoRAs", "inputs": several}
    for name in ("inspect", "compare"):
        prompt[f"show {name}"] = {"class_type": "PreviewImage", "inputs": {"images": [name, 0]}}
        prompt[f"read {name}"] = {"class_type": "PreviewAny", "inputs": {"source": [name, 1]}}
    blended = studio.picture(prompt)
    alone = studio.picture(studio.quickstart())
    assert np.abs(blended.astype(int) - alone.astype(int)).max() <= 1  # of 255


def test_without_dynamic_vram_the_picture_is_the_same(studio, host_dir, tmp_path):
    expected = studio.picture(studio.quickstart())
    pack = os.environ.get("HYWU_PACK_NAME", "hywu")
    with HostServer(sys.executable, host_dir, tmp_path, pack, ("--disable-dynamic-vram", "--cache-none")) as server:
        draw_picture(server.input / PICTURE)
        run = server.run(studio.quickstart())
        assert run.outcome == "execution_success", run.messages[-1]
        (file,) = run.files(studio.node("SaveImage"))
        assert np.array_equal(np.asarray(Image.open(server.output / file)), expected)


def test_the_quickstart_of_0_1_comes_to_the_same_picture_as_todays_nodes(studio):
    """As an artist saved it then, and as the long way and the short way are wired now."""
    then = studio.picture(studio.quickstart())
    for name in ("the_long_way", "quickstart"):
        workflow = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
        prompt = to_api_format(workflow, studio.server.get("/object_info"))
        kinds = {node["class_type"]: id_ for id_, node in prompt.items()}
        prompt[kinds["LoadImage"]]["inputs"]["image"] = PICTURE
        prompt[kinds["ImageScaleToMaxDimension"]]["inputs"]["largest_size"] = then.shape[0]
        prompt[kinds["SaveImage"]]["inputs"]["images"] = [kinds["VAEDecode"], 0]
        for node in prompt.values():
            node["inputs"] |= {field: WARM for field, value in node["inputs"].items() if value == SUNSET}
        run = studio.run(prompt)
        assert run.outcome == "execution_success", run.messages[-1]
        now = np.asarray(Image.open(studio.server.output / run.files(kinds["SaveImage"])[0]))
        assert np.array_equal(now, then), name
