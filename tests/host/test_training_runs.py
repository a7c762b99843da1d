"""Runs of the training nodes: resumed, extended, refused, cancelled, and what they leave."""

import json

import comfy.model_management
import pytest
import torch
from families import flux, random_lora
from training_runs import PAIRS, interrupted_after, new, pairs, run, same

from hywu_core import SaveError
from hywu_core.host import memory
from hywu_core.host.lora.apply import apply_lora
from hywu_core.host.training import in_server, session
from hywu_core.host.training.identity import digest_of_base
from hywu_core.training import TrainingError

pytestmark = pytest.mark.usefixtures("output")


def test_one_run_or_two_with_a_pause_give_the_same_generator():
    family = flux(channels=16)
    latents, positive = pairs(family)
    handle = new(family, positive)
    whole = run(family, handle, latents, positive, steps=6, name="whole", ema=0.9)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        interrupted_after(3, lambda: run(family, handle, latents, positive, steps=6, name="paused", ema=0.9))
    again = run(family, handle, latents, positive, steps=6, name="paused", ema=0.9)
    states = whole.handle.generator.state_dict(), again.handle.generator.state_dict()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert whole.losses["loss"][:3] == pytest.approx(again.losses["loss"][:3], rel=1e-5)
    assert again.steps == 6 and len(again.losses["loss"]) == 6


def test_a_finished_run_of_the_same_name_is_returned(output):
    family = flux(channels=16)
    latents, positive = pairs(family)
    handle = new(family, positive)
    first = run(family, handle, latents, positive, steps=2)
    assert (output / "output" / "hywu" / "run" / "log.csv").read_text().count("\n") == 3
    again = run(family, handle, latents, positive, steps=2)
    assert same(first.handle, again.handle) and again.losses["loss"] == pytest.approx(first.losses["loss"], rel=1e-5)


def other_data(latents, positive):
    """{what differs: (latents, positive)} of the same number and sizes."""
    spoken = [[[tokens + 1, options]] for ((tokens, options),) in positive]
    seen = [[[t, o | {"reference_latents": [v + 1 for v in o["reference_latents"]]}]] for ((t, o),) in positive]
    return {
        "pictures": ([{"samples": value["samples"] + 1} for value in latents], positive),
        "instructions": (latents, spoken),
        "conditions": (latents, seen),
    }


@pytest.mark.parametrize("what", ["pictures", "instructions", "conditions"])
@pytest.mark.parametrize("steps", [2, 4])
def test_other_data_under_the_same_name_never_gives_the_old_generator(what, steps):
    family = flux(channels=16)
    latents, positive = pairs(family)
    handle = new(family, positive)
    first = run(family, handle, latents, positive, steps=2)
    other = other_data(latents, positive)[what]
    with pytest.raises(TrainingError, match=f"started with other .*{what}.*restart.*new run name"):
        run(family, handle, *other, steps=steps)
    again = run(family, handle, *other, steps=2, options={"if_exists": "restart"})
    apart = run(family, handle, *other, steps=2, name="apart")
    assert same(again.handle, apart.handle) and not same(again.handle, first.handle)


def test_another_base_generator_or_setting_under_the_same_name_is_refused_by_name():
    family = flux(channels=16)
    latents, positive = pairs(family)
    handle = new(family, positive)
    run(family, handle, latents, positive, steps=2)
    for changes, name in (
        ({"learning_rate": 1.0}, "learning_rate"),
        ({"options": {"precision": "bfloat16"}}, "precision"),
    ):
        with pytest.raises(TrainingError, match=f"other {name} "):
            run(family, handle, latents, positive, steps=2, **changes)
    with pytest.raises(TrainingError, match="other generator"):
        run(family, new(family, positive, seed=1), latents, positive, steps=2)
    with pytest.raises(TrainingError, match="other .*pairs .6, now 4"):
        run(family, handle, latents[:4], positive[:4], steps=2)
    lora = random_lora(flux(channels=16), 1)
    for mode in ("merge", "bypass"):
        other, _ = apply_lora(family.model, lora, mode=mode)
        with pytest.raises(TrainingError, match="other base"):
            run(other, handle, latents, positive, steps=2)
    with torch.no_grad():
        family.model.model.diffusion_model.double_blocks[0].img_attn.qkv.weight += 1
    with pytest.raises(TrainingError, match="other base"):
        run(family, handle, latents, positive, steps=2)


def test_a_base_is_known_again_while_a_lora_is_merged_into_its_weights():
    family = flux(channels=16)
    patched, _ = apply_lora(family.model, random_lora(family, 1), mode="merge")
    before, plain = digest_of_base(patched), digest_of_base(family.model)
    assert before != plain
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    assert patched.backup and digest_of_base(patched) == before
    comfy.model_management.unload_all_models()
    assert digest_of_base(family.model) == plain


def test_a_run_is_extended_shortened_restarted_or_refused_on_purpose(output):
    family = flux(channels=16)
    latents, positive = pairs(family)
    handle = new(family, positive)
    first = run(family, handle, latents, positive, steps=3)
    longer = run(family, handle, latents, positive, steps=6)
    assert longer.steps == 6 and len(longer.losses["loss"]) == 6 and not same(longer.handle, first.handle)
    assert longer.losses["loss"][:3] == pytest.approx(first.losses["loss"], rel=1e-5)
    state = output / "output" / "hywu" / "run" / "state.safetensors"
    before = state.read_bytes()
    shorter = run(family, handle, latents, positive, steps=2)
    assert shorter.steps == 6 and same(shorter.handle, longer.handle) and state.read_bytes() == before
    assert shorter.handle.config.hywu["training"]["steps"] == 6
    with pytest.raises(TrainingError, match="holds a run already"):
        run(family, handle, latents, positive, steps=6, options={"if_exists": "refuse"})
    again = run(family, handle, latents, positive, steps=3, options={"if_exists": "restart"})
    assert again.steps == 3 and same(again.handle, first.handle)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff\xfe", "[" * 100_000])
def test_a_damaged_description_of_a_run_is_one_clear_error(output, text):
    family = flux(channels=16)
    latents, positive = pairs(family)
    handle = new(family, positive)
    run(family, handle, latents, positive, steps=1)
    (output / "output" / "hywu" / "run" / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(TrainingError, match="run.json beside it does not say of which .*restart"):
        run(family, handle, latents, positive, steps=1)
    run(family, handle, latents, positive, steps=1, options={"if_exists": "restart"})


def test_cancelling_leaves_a_generator_and_says_how_to_go_on(output, caplog):
    family = flux(channels=16)
    latents, positive = pairs(family)
    handle = new(family, positive)
    caplog.set_level("INFO")
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        interrupted_after(3, lambda: run(family, handle, latents, positive, steps=6, ema=0.9))
    folder = output / "output" / "hywu" / "run"
    assert "Stopped after step 3 of 6. The state is kept in" in caplog.text and str(folder) in caplog.text
    assert "memory leak" not in caplog.text
    left = memory.load(folder / "generator.safetensors")
    assert left.config.hywu["training"]["steps"] == 3
    taken = run(family, handle, latents, positive, steps=3, ema=0.9)
    assert taken.steps == 3 and same(taken.handle, left)


def test_a_file_ends_a_run_as_if_it_were_done(output):
    family = flux(channels=16)
    latents, positive = pairs(family)
    handle = new(family, positive)
    folder = output / "output" / "hywu" / "run"
    folder.mkdir(parents=True)
    (folder / "finish").touch()
    ended = run(family, handle, latents, positive, steps=50)
    assert ended.steps == 1 and not (folder / "finish").exists()
    assert ended.handle.config.hywu["training"]["steps"] == 1


def test_generators_are_kept_on_the_way(output):
    family = flux(channels=16)
    latents, positive = pairs(family)
    trained = run(family, new(family, positive), latents, positive, steps=5, name="mine/a", options={"keep_every": 2})
    kept = sorted(path.relative_to(output).as_posix() for path in (output / "hywu").rglob("*.safetensors"))
    assert kept == [f"hywu/mine/a/step-00000{step}.safetensors" for step in (2, 4)]
    assert memory.load(output / kept[1]).config.hywu["training"]["steps"] == 4
    assert not same(memory.load(output / kept[0]), trained.handle)


@pytest.mark.parametrize("name", ["", "  ", "../elsewhere", "/tmp/elsewhere", "."])
def test_names_that_lead_elsewhere_are_refused(name):
    family = flux(channels=16)
    with pytest.raises(SaveError, match="no name for a run"):
        in_server.run_folder(name)
    with pytest.raises(SaveError, match="no name for a generator"):
        memory.save(new(family, pairs(family)[1]), name)


def test_what_a_run_is_about_is_written_down(output):
    family = flux(channels=16)
    latents, positive = pairs(family)
    run(family, new(family, positive), latents, positive, steps=1)
    about = json.loads((output / "output" / "hywu" / "run" / "run.json").read_text())
    assert about["pairs"] == PAIRS and about["precision"] == "float32"


def test_a_process_needs_room_for_its_share_of_a_batch(monkeypatch):
    class OneOfFour(session.Alone):
        processes = 4

    asked, room = [], session.DiffusionObjective.room
    monkeypatch.setattr(
        session.DiffusionObjective,
        "room",
        lambda self, pair, count: (asked.append(count), room(self, pair, count))[1],
    )
    family = flux(channels=16)
    latents, positive = pairs(family)
    for communication in (session.Alone, OneOfFour):
        monkeypatch.setattr(session, "Alone", communication)
        run(family, new(family, positive), latents, positive, steps=1, batch=4, name=communication.__name__)
    assert asked == [4, 1]
