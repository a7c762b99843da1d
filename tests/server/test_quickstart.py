"""The template that ships, through the real server: it runs, caches, and can be cancelled anywhere."""

import numpy as np
import pytest


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
