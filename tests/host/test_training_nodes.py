"""What the training nodes call: generators for any model, pairs from the host's lists, runs that resume, controls."""

import gc
import json
import weakref

import comfy.model_management
import folder_paths
import pytest
import torch
from families import FAMILIES, Family, conditioning, flux, qwen_image, random_lora, weights

from hywu_core import MatchError, SaveError
from hywu_core.bases.pocket import load_pocket_editor
from hywu_core.errors import ConditionError, HywuError
from hywu_core.files.safetensors import open_safetensors
from hywu_core.host import conditions, memory
from hywu_core.host.lora.apply import apply_lora
from hywu_core.host.training import evaluate, in_server, pairs_of_lists, session
from hywu_core.host.training.identity import digest_of_base
from hywu_core.host.training.objective import DiffusionObjective, differentiable_base
from hywu_core.training import SessionOptions, TrainConfig, TrainingError

PAIRS = 6


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """Runs and generators of a test are its own."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "hywu", ([str(tmp_path / "hywu")], {".safetensors"}))
    return tmp_path


def pairs(family, count=PAIRS, width=12):
    """Two kinds of edits of random pictures: what is right is the source, brighter or darker, as the words say."""
    source = torch.Generator().manual_seed(11)
    latents, positive = [], []
    for index in range(count):
        picture = torch.randn(family.latent.shape, generator=source)
        ((tokens, options),) = conditioning(width, 8, seed=index % 2)
        latents.append({"samples": picture + (1.5 if index % 2 else -1.5)})
        positive.append([[tokens, options | {"reference_latents": [picture]}]])
    return latents, positive


def new(family, positive, **settings):
    return memory.new_for(
        family.model, positive[0], settings.pop("source", "instruction and source picture"),
        **{"seed": 0, "rank": 4, "alpha": 8.0, "size": "small", **settings},
    )  # fmt: skip


def run(family, handle, latents, positive, reads=None, steps=12, name="run", **settings):
    given = {"validate_every": 0, "checkpointing": False, "held_out": 0, "vae": None, **settings.pop("options", {})}
    held_out, vae, recompute = (given.pop(name) for name in ("held_out", "vae", "checkpointing"))
    options = SessionOptions(**{"checkpoint_stack": "all" * recompute, "checkpoint_generator": recompute} | given)
    how = TrainConfig(**{"steps": steps, "batch": 4, "learning_rate": 3e-3, "warmup": 2, **settings})
    return in_server.train_on_lists(
        family.model if isinstance(family, Family) else family,
        handle,
        latents,
        positive,
        reads,
        how,
        options,
        name,
        held_out,
        vae,
    )


@pytest.mark.parametrize("family", [lambda: flux(channels=16), qwen_image], ids=["flux", "qwen_image"])
def test_the_loss_falls_and_neither_base_nor_generator_changes(family):
    family = family()
    latents, positive = pairs(family)
    handle, before = new(family, positive), weights(family.model)
    first = {name: tensor.clone() for name, tensor in handle.generator.state_dict().items()}
    trained = run(family, handle, latents, positive, steps=60, batch=PAIRS)
    losses = trained.losses["loss"]
    assert len(losses) == trained.steps == 60
    assert sum(losses[-15:]) < 0.9 * sum(losses[:15])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(family.model).items())
    assert all(torch.equal(tensor, first[name]) for name, tensor in handle.generator.state_dict().items())
    assert trained.handle.config.hywu["training"]["pairs"] == PAIRS
    lora = memory.generate(trained.handle, conditions.from_host(positive[0]))
    assert max(float(pair.up.abs().max()) for pair in lora.pairs) > 0


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


def of_two_sizes(family, wide=4, tall=4):
    """Pairs as `pairs` makes them, some of which are wide and some tall, in turn."""
    latents, positive = pairs(family, wide + tall)
    kinds = [index % 2 == 0 for index in range(2 * min(wide, tall))] + [wide > tall] * abs(wide - tall)
    for latent, entry, is_wide in zip(latents, positive, kinds, strict=True):
        part = (..., slice(None), slice(2)) if is_wide else (..., slice(2), slice(None))
        latent["samples"] = latent["samples"][part]
        entry[0][1]["reference_latents"] = [entry[0][1]["reference_latents"][0][part]]
    return latents, positive


def test_pictures_of_two_sizes_train_in_batches_of_one(monkeypatch):
    family = flux(channels=16)
    latents, positive = of_two_sizes(family)
    sizes = {tuple(latent["samples"].shape) for latent in latents}
    assert len(sizes) == 2
    handle, passes = new(family, positive), []
    losses = DiffusionObjective._losses
    monkeypatch.setattr(
        DiffusionObjective,
        "_losses",
        lambda self, noised: (passes.append(noised.latents.shape), losses(self, noised))[1],
    )
    whole = run(family, handle, latents, positive, steps=8, name="whole")
    trained = [shape for shape in passes if len(shape) and shape[0] == 4]
    assert len(trained) >= 8 and len({shape[1:] for shape in trained}) == 2, "a pass for each batch of four"
    assert not [shape for shape in passes if shape[0] not in (4,)], "no batch was taken apart"
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        interrupted_after(3, lambda: run(family, handle, latents, positive, steps=8, name="paused"))
    again = run(family, handle, latents, positive, steps=8, name="paused")
    assert same(whole.handle, again.handle)


def test_one_odd_pair_costs_one_more_pass_and_its_batch_has_the_same_gradients():
    family = flux(channels=16)
    latents, positive = of_two_sizes(family, wide=5, tall=1)
    together = run(family, new(family, positive), latents, positive, steps=3, batch=6, name="together")
    alone = run(family, new(family, positive), latents, positive, steps=3, batch=6, micro_batch=1, name="alone")
    assert together.losses["loss"] == pytest.approx(alone.losses["loss"], rel=1e-4)


def interrupted_after(steps, work):
    """Press Cancel after some steps of training."""
    show = in_server.ServerFront.show

    def pressing(self, progress):
        if progress.done == steps:
            comfy.model_management.interrupt_current_processing()
        show(self, progress)

    in_server.ServerFront.show = pressing
    try:
        return work()
    finally:
        in_server.ServerFront.show = show
        comfy.model_management.interrupt_current_processing(False)


def same(one, other):
    """Whether two generators have the same weights."""
    states = [handle.generator.state_dict() for handle in (one, other)]
    return all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


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


def test_a_failed_training_leaves_no_leak_behind(caplog):
    family = flux(channels=16)
    latents, positive = pairs(family)
    handle = new(family, positive)
    with pytest.raises(TrainingError) as failure:
        run(family, handle, latents, positive, steps=50, learning_rate=1e30, clip=0.0, warmup=0)
    with pytest.raises(TrainingError) as refusal:
        run(family, handle, latents, positive, steps=50, learning_rate=1e-3)
    comfy.model_management.cleanup_models_gc()
    assert failure.value and refusal.value and "memory leak" not in caplog.text


def test_the_node_says_how_far_it_is(monkeypatch):
    said, family = [], flux(channels=16)
    shown = in_server.ServerFront
    monkeypatch.setattr(shown, "say", lambda self, text: said.append(text))
    monkeypatch.setattr(shown, "show", lambda self, progress: said.append(str(progress)))
    latents, positive = pairs(family)
    run(family, new(family, positive), latents, positive, steps=4, options={"held_out": 2, "validate_every": 2})
    assert " M parameters" in said[0] and said[0].endswith(" GB of memory beside the base while it is trained.")
    assert said[1].startswith("step 1/4: loss ") and " s a step, " in said[1] and said[1].endswith(" left")
    assert "held out" in said[-1] and said[-1].count("without a LoRA") == 2


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "flux_single"])
def test_recomputing_the_blocks_of_any_family_changes_no_number(name):
    family = FAMILIES[name]() if not name.startswith("flux") else flux(channels=16)
    latents, positive = pairs(family, 2)
    handle = new(family, positive)
    kept, recomputed = (
        run(family, handle, latents, positive, steps=2, batch=2, name=f"{on}", options={"checkpointing": on})
        for on in (False, True)
    )
    assert recomputed.losses["loss"] == pytest.approx(kept.losses["loss"], rel=1e-4)
    states = kept.handle.generator.state_dict(), recomputed.handle.generator.state_dict()
    assert all(torch.allclose(tensor, states[1][key], atol=1e-4) for key, tensor in states[0].items())


def test_averages_checkpointing_micro_batches_and_bfloat16():
    family = flux(channels=16)
    latents, positive = pairs(family)
    handle = new(family, positive)
    plain = run(family, handle, latents, positive, steps=3, name="plain")
    lean = run(family, handle, latents, positive, steps=3, name="lean", micro_batch=1, options={"checkpointing": True})
    assert plain.losses["loss"] == pytest.approx(lean.losses["loss"], rel=1e-4)
    averaged = run(family, handle, latents, positive, steps=3, name="averaged", ema=0.5)
    assert averaged.handle.fingerprint != plain.handle.fingerprint
    assert averaged.losses == plain.losses
    half = run(family, handle, latents, positive, steps=3, name="half", options={"precision": "bfloat16"})
    assert half.losses["loss"] == pytest.approx(plain.losses["loss"], rel=0.02)
    assert next(half.handle.generator.parameters()).dtype == torch.float32


def test_a_trained_generator_survives_saving_with_how_it_was_trained(output):
    family = flux(channels=16)
    latents, positive = pairs(family)
    trained = run(family, new(family, positive), latents, positive, steps=2)
    path = memory.save(trained.handle, "mine")
    assert path == output / "hywu" / "mine.safetensors"
    loaded = memory.load(path)
    condition = conditions.from_host(positive[0])
    made, kept = (memory.generate(handle, condition) for handle in (trained.handle, loaded))
    assert all(
        torch.equal(a, b) for x, y in zip(made.pairs, kept.pairs, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert loaded.config.hywu["base"] == "Flux"
    assert {"steps": 2, "pairs": PAIRS, "run": "run"}.items() <= loaded.config.hywu["training"].items()
    assert memory.save(trained.handle, "mine").name == "mine-2.safetensors"


@pytest.mark.parametrize("name", ["", "  ", "../elsewhere", "/tmp/elsewhere", "."])
def test_names_that_lead_elsewhere_are_refused(name):
    family = flux(channels=16)
    with pytest.raises(SaveError, match="no name for a run"):
        in_server.run_folder(name)
    with pytest.raises(SaveError, match="no name for a generator"):
        memory.save(new(family, pairs(family)[1]), name)


def test_a_loss_that_is_not_finite_names_step_and_pair_and_keeps_the_last_good_state(output):
    family = flux(channels=16)
    latents, positive = pairs(family)
    handle = new(family, positive)
    run(family, handle, latents, positive, steps=4, name="good")
    ((tokens, options),) = positive[3]
    poisoned = [*positive[:3], [[tokens * float("nan"), options]], *positive[4:]]
    with pytest.raises(TrainingError, match=r"loss is nan in step \d, sample 'pair 4'"):
        run(family, handle, latents, poisoned, reads=positive, steps=50, name="bad", batch=1)
    state = output / "output" / "hywu" / "bad" / "state.safetensors"
    if state.exists():  # unless it was the first pair
        with open_safetensors(state, HywuError) as handle:
            assert all(torch.isfinite(handle.get_tensor(name)).all() for name in handle.keys())


def test_validation_measures_held_out_pairs_and_draws_them(output):
    class PixelsAreLatents:
        def decode(self, latent):
            return latent.movedim(1, -1)[..., :3].sigmoid()

    family = flux(channels=16)
    latents, positive = pairs(family)
    options = {"validate_every": 2, "held_out": 2, "vae": PixelsAreLatents()}
    trained = run(family, new(family, positive), latents, positive, steps=4, options=options, ema=0.9)
    folder = output / "output" / "hywu" / "run"
    assert trained.handle.config.hywu["training"]["pairs"] == PAIRS - 2
    assert (folder / "validation.csv").read_text().count("\n") == 3
    assert sorted(path.name for path in folder.glob("*.png")) == ["step-000002.png", "step-000004.png"]


def test_validation_changes_nothing():
    family = flux(channels=16)
    latents, positive = pairs(family)
    handle = new(family, positive)
    quiet, measured = (
        run(family, handle, latents, positive, steps=4, name=f"every{every}", ema=0.9,
            options={"validate_every": every, "held_out": 2})
        for every in (0, 1)
    )  # fmt: skip
    assert quiet.handle.generator.state_dict().keys() == measured.handle.generator.state_dict().keys()
    for name, tensor in quiet.handle.generator.state_dict().items():
        assert torch.equal(tensor, measured.handle.generator.state_dict()[name])


def wrong_pairs(family):
    """{what is wrong: (latents, positive, generator_positive, words of the error)}."""
    latents, positive = pairs(family)
    ((tokens, options),) = positive[1]
    other = [[tokens, options | {"reference_latents": [torch.zeros(1, 16, 4, 8)]}]]
    odd = [{"samples": torch.zeros(1, 16, 7, 8)}, *latents[1:]]
    return {
        "none": ([], [], None, "no training pairs"),
        "one": (latents[:1], positive[:1], None, "one training pair"),
        "fewer conditionings": (latents, positive[:4], None, "6 latents but 4 of positive"),
        "fewer for the generator": (latents, positive, positive[:2], "6 latents but 2 of generator_positive"),
        "a batch without entries": (
            [{"samples": torch.zeros(3, 16, 8, 8)}] * 2, positive[:2], None, "holds 3 pictures, but positive 1 holds 1"),
        "another size than its source": (latents, [positive[0], other, *positive[2:]], None, "pair 2 has a latent of 8 x 8"),
        "an odd size": (odd, positive, None, "of pair 1 has 7 x 8 rows and columns, which are no multiples"),
        "another VAE": ([{"samples": torch.zeros(1, 4, 8, 8)}] * 6, positive, None, "works on 16 channels"),
        "not finite": ([{"samples": v["samples"] / 0} for v in latents], positive, None, "NaN or infinity"),
        "a batched conditioning": (
            latents, [[[tokens.expand(2, -1, -1), options]], *positive[1:]], None, "batch of 2"),
        "a ControlNet": (
            latents, [[[tokens, options | {"control": object()}]], *positive[1:]], None, "pair 1 carries control"),
        "a mask and a strength": (
            latents, [[[tokens, options | {"mask": tokens, "strength": 0.5}]], *positive[1:]], None, "mask, strength"),
        "several conditions": (
            latents, positive, [[[tokens.expand(2, -1, -1), options]], *positive[1:]], "reads of pair 1 is a batch of 2"),
    }  # fmt: skip


def test_wrong_pairs_are_one_clear_error_each():
    family = flux(channels=16)
    handle = new(family, pairs(family)[1])
    for what, (latents, positive, reads, words) in wrong_pairs(family).items():
        with pytest.raises(pairs_of_lists.PairError, match=words):
            run(family, handle, latents, positive, reads)
            pytest.fail(what)


def test_other_bad_input_is_one_clear_error():
    family, other = flux(channels=16), qwen_image()
    latents, positive = pairs(family)
    handle = new(family, positive)
    with pytest.raises(pairs_of_lists.PairError, match="5 cannot be held out: at least 2"):
        run(family, handle, latents, positive, options={"held_out": 5})
    with pytest.raises(MatchError, match="None of the LoRA's"):
        run(other, handle, *pairs(other))
    instruction_only = [[[tokens, {}]] for ((tokens, _),) in positive]
    with pytest.raises(ConditionError, match="reads conditioning .* reference_latent"):
        run(family, handle, latents, positive, instruction_only)


def test_a_base_of_fp8_weights_is_trained_on():
    family = flux(channels=16)
    latents, positive = pairs(family)
    handle = new(family, positive)
    for layer in family.model.model.diffusion_model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    losses = run(family, handle, latents, positive, steps=40).losses["loss"]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_memory_is_given_back(monkeypatch):
    copies = []

    class Remembered(session.DiffusionObjective):
        def __init__(self, model, stacks=None):
            super().__init__(model, stacks)
            copies.append(weakref.ref(self.patcher.model))

    monkeypatch.setattr(session, "DiffusionObjective", Remembered)
    monkeypatch.setattr(evaluate, "DiffusionObjective", Remembered)
    with torch.inference_mode():
        model, clip, vae = load_pocket_editor()
        source = vae.encode(torch.rand(1, 16, 16, 3))
        words = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("darker", "brighter")]
        positive = [[[entry[0], entry[1] | {"reference_latents": [source]}]] for (entry,) in words]
        latents = [{"samples": source * 0.5}, {"samples": source}]
        handle = memory.new_for(model, positive[0], "instruction", 0, rank=2, alpha=4.0)
        run(model, handle, latents, positive, steps=1, batch=2, options={"validate_every": 1, "vae": vae})
        evaluate.evaluate_generator(model, handle, latents, positive)
    gc.collect()
    assert len(copies) == 2 and not [copy for copy in copies if copy() is not None]


def test_buckets_and_one_conditioning_for_all():
    family = flux(channels=16)
    latents, positive = pairs(family)
    config = new(family, positive).config
    apart = pairs_of_lists.host_pairs(family.model, config, latents, positive)
    bucket = [{"samples": torch.cat([value["samples"] for value in latents])}]
    together = pairs_of_lists.host_pairs(family.model, config, bucket, [[entry for (entry,) in positive]])
    blind = pairs_of_lists.host_pairs(family.model, config, latents, [positive[0]], positive)
    for one, two, three in zip(apart.samples, together.samples, blind.samples, strict=True):
        assert torch.equal(one.latent, two.latent) and torch.equal(one.condition, two.condition)
        assert torch.equal(one.condition, three.condition)
        assert torch.equal(three.conditioning[0], positive[0][0][0])
    assert len(set(apart.instructions)) == 2


def test_what_pairs_have_in_common_is_kept_once_and_conditions_in_half_their_size():
    family = flux(channels=16)
    latents, positive = pairs(family)
    kept = pairs_of_lists.host_pairs(family.model, new(family, positive).config, latents, positive).kept
    assert kept[0].entry[0] is kept[2].entry[0] and kept[0].entry[0] is not kept[1].entry[0]
    words, picture = kept[0].condition.parts
    assert words.tokens is kept[2].condition.parts[0].tokens and words.tokens.dtype == torch.bfloat16
    assert picture.tokens is kept[0].entry[1]["reference_latents"][0]


def test_a_mixed_batch_passes_through_the_base_shape_by_shape(monkeypatch):
    family, passes = flux(channels=16), []
    latents, positive = pairs(family)
    for index in (1, 4):
        ((tokens, options),) = positive[index]
        latents[index] = {"samples": torch.randn(1, 16, 4, 12)}
        positive[index] = [[tokens, options | {"reference_latents": [torch.randn(1, 16, 4, 12)]}]]
    apply = family.model.model.apply_model
    monkeypatch.setattr(
        family.model.model, "apply_model", lambda x, *a, **k: passes.append(len(x)) or apply(x, *a, **k)
    )
    run(family, new(family, positive), latents, positive, steps=2, batch=6)
    # before the second of each step, the base's own loss
    assert sorted(passes) == [2] * 4 + [4] * 4


def test_pairs_may_have_sizes_of_their_own():
    family = flux(channels=16)
    latents, positive = pairs(family)
    ((tokens, options),) = positive[0]
    latents[0] = {"samples": torch.randn(1, 16, 4, 12)}
    positive[0] = [[tokens, options | {"reference_latents": [torch.randn(1, 16, 4, 12)]}]]
    trained = run(family, new(family, positive), latents, positive, steps=3, batch=6)
    assert all(loss == loss for loss in trained.losses["loss"])


def test_the_generator_in_training_may_be_made_in_inference_mode():
    """As nodes run in."""
    family = flux(channels=16)
    with torch.inference_mode():
        latents, positive = pairs(family)
        handle = new(family, positive)
        trained = run(family, handle, latents, positive, steps=2)
        lora = memory.generate(trained.handle, conditions.from_host(positive[0]))
    assert torch.isfinite(lora.pairs[0].down).all()


def test_evaluation_tells_a_generator_that_reads_from_one_that_does_not():
    family = flux(channels=16)
    latents, positive = pairs(family, 12)
    blind = [[[torch.zeros_like(tokens), options]] for ((tokens, options),) in positive]
    trained = run(family, new(family, positive), latents, blind, positive, steps=60)
    image, table, card = evaluate.evaluate_generator(family.model, trained.handle, latents, blind, positive)
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in table.splitlines()}
    assert len(rows["matched"]) == len(evaluate.LEVELS) + 1
    assert float(rows["than shuffled"][1]) > 0  # the interval's lower end
    assert float(rows["than averaged"][1]) > 0
    assert card.level != "notice" or float(rows["than base"][1]) <= 0
    assert image.ndim == 4 and image.shape[-1] == 3 and 0 <= float(image.min()) and float(image.max()) <= 1
    fresh = new(family, positive)
    objective = evaluate.DiffusionObjective(family.model)
    found = evaluate.evaluate(
        objective, fresh, pairs_of_lists.host_pairs(family.model, fresh.config, latents, positive)
    )
    assert all(torch.equal(losses, found.losses["base"]) for losses in found.losses.values())  # its LoRAs are zero


def test_shuffled_pairs_have_another_instruction_where_there_is_one():
    apart = evaluate.partners(["a", "b", "a", "b", "b"], seed=3)
    assert all("ababb"[i] != "ababb"[other] for i, other in enumerate(apart))
    assert all(i != other for i, other in enumerate(evaluate.partners(["a"] * 4, seed=3)))


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_of_the_base(name):
    family = FAMILIES[name]() if not name.startswith("flux") else flux(channels=16)
    ((tokens, options),) = family.conditioning
    entry = [[tokens, options | {"reference_latents": [torch.randn(family.latent.shape)]}]]
    before = weights(family.model)
    seen = conditions.hidden_states(family.model, entry)
    assert seen.ndim == 3 and seen.shape[0] == 1 and torch.isfinite(seen).all()
    assert torch.equal(seen, conditions.hidden_states(family.model, entry))
    other = [[tokens, options | {"reference_latents": [torch.randn(family.latent.shape)]}]]
    assert not torch.equal(seen, conditions.hidden_states(family.model, other))
    assert not [m for m in family.model.model.diffusion_model.modules() if m._forward_hooks]
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(family.model).items())


def test_hidden_states_are_the_last_blocks_streams_side_by_side():
    family = qwen_image()
    ((tokens, options),) = family.conditioning
    entry = [[tokens, options | {"reference_latents": [torch.randn(family.latent.shape)]}]]
    text, pictures = tokens.shape[1], 2 * 4 * 4  # the noisy picture and its reference, in patches of 2
    assert conditions.hidden_states(family.model, entry).shape == (1, text + pictures, 32)


def test_hooks_are_removed_after_an_error():
    family = flux(channels=16)
    ((tokens, options),) = family.conditioning
    entry = [[tokens[..., :-1], options | {"reference_latents": [family.latent]}]]  # of another text encoder
    with pytest.raises(RuntimeError):
        conditions.hidden_states(family.model, entry)
    assert not [m for m in family.model.model.diffusion_model.modules() if m._forward_hooks]
    with pytest.raises(ConditionError, match="no reference latent"):
        conditions.hidden_states(family.model, family.conditioning)


def test_a_generator_reads_the_hidden_states_that_training_computed():
    family = flux(channels=16)
    latents, positive = pairs(family)
    handle = new(family, positive, source="hidden states of the base")
    assert [part["kind"] for part in handle.config.hywu["condition"]] == ["hidden_states"]
    trained = run(family, handle, latents, positive, steps=2)
    condition = conditions.from_host(positive[0], model=family.model)
    assert memory.generate(trained.handle, condition).batch == 1
    with pytest.raises(ConditionError, match="reads hidden_states"):
        memory.generate(trained.handle, conditions.from_host(positive[0]))


def test_a_deep_copy_is_made_where_weights_came_from_inference_mode():
    """What loaders in nodes give; the copy is what is trained on, and the MODEL given stays."""
    with torch.inference_mode():
        model, _, _ = load_pocket_editor()
    copy = differentiable_base(model)
    assert copy.model is not model.model
    assert not any(parameter.is_inference() for parameter in copy.model.parameters())


def test_what_a_run_is_about_is_written_down(output):
    family = flux(channels=16)
    latents, positive = pairs(family)
    run(family, new(family, positive), latents, positive, steps=1)
    about = json.loads((output / "output" / "hywu" / "run" / "run.json").read_text())
    assert about["pairs"] == PAIRS and about["precision"] == "float32"
