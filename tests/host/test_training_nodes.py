"""What the training nodes call: generators for any model that learn, measure, and leave everything else as it was."""

import gc
import weakref

import comfy.model_management
import pytest
import torch
from families import FAMILIES, flux, qwen_image, weights
from training_runs import PAIRS, new, pairs, run

from hywu_core import MatchError
from hywu_core.bases.pocket import load_pocket_editor
from hywu_core.errors import ConditionError, HywuError
from hywu_core.files.safetensors import open_safetensors
from hywu_core.host import conditions, memory
from hywu_core.host.training import evaluate, in_server, pairs_of_lists, session
from hywu_core.host.training.objective import differentiable_base
from hywu_core.training import TrainingError

pytestmark = pytest.mark.usefixtures("output")


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


def test_a_deep_copy_is_made_where_weights_came_from_inference_mode():
    """What loaders in nodes give; the copy is what is trained on, and the MODEL given stays."""
    with torch.inference_mode():
        model, _, _ = load_pocket_editor()
    copy = differentiable_base(model)
    assert copy.model is not model.model
    assert not any(parameter.is_inference() for parameter in copy.model.parameters())
