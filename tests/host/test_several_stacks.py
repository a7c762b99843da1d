"""One generator for several stacks of a real base, from training to the file that the stock loader reads."""

import json

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from families import conditioning, flux, sample, weights, z_image
from safetensors import safe_open

from hywu_core import InstanceLora, MatchError
from hywu_core.files.lora_files import load_lora, save_lora
from hywu_core.host import conditions, memory
from hywu_core.host.lora import charts
from hywu_core.host.lora.apply import apply_lora
from hywu_core.host.training import in_server, lessons, lora_lessons
from hywu_core.layout import target_names
from hywu_core.plan import plan
from hywu_core.training import SessionOptions, TrainConfig

STACKS = {"flux": ("double_blocks", "single_blocks"), "z_image": ("noise_refiner", "context_refiner", "layers")}


pytestmark = pytest.mark.usefixtures("output")


@pytest.fixture(params=STACKS)
def family(request):
    return {"flux": lambda: flux(channels=16), "z_image": lambda: z_image(refiners=2)}[request.param]()


def new(family, positive, **settings):
    return memory.new_for(
        family.model, positive[0], "instruction and source picture",
        **{"seed": 0, "rank": 4, "alpha": 8.0, "size": "small", "stack": "all stacks", **settings},
    )  # fmt: skip


def pairs(family, count=4):
    """Two kinds of edits: what is right is the source, brighter or darker, as the words say."""
    source = torch.Generator().manual_seed(11)
    latents, positive = [], []
    for index in range(count):
        picture = torch.randn(family.latent.shape, generator=source)
        ((tokens, options),) = conditioning(12, 8, seed=index % 2)
        latents.append({"samples": picture + (1.5 if index % 2 else -1.5)})
        positive.append([[tokens, options | {"reference_latents": [picture]}]])
    return latents, positive


def train(family, handle, latents, positive, steps=4, name="run", **settings):
    config = TrainConfig(steps=steps, batch=2, learning_rate=3e-3, warmup=1, **settings)
    options = SessionOptions(validate_every=0, checkpoint_stack="all", checkpoint_generator=True)
    return in_server.train_on_lists(family.model, handle, latents, positive, None, config, options, name)


def excited(handle: memory.GeneratorHandle, std=0.01) -> memory.GeneratorHandle:
    """The same generator, writing something."""
    state = dict(handle.generator.state_dict())
    source = torch.Generator().manual_seed(5)
    weight = state["model.proj_out_B.weight"]
    state["model.proj_out_B.weight"] = torch.randn(weight.shape, generator=source) * std
    return memory.from_state(handle.config, state, "excited")


def with_dense_weights(family, lora: InstanceLora, strength: float) -> torch.Tensor:
    """What sampling gives when W + strength * scale * B . A is written into the weights by hand."""
    saved = weights(family.model)
    with torch.inference_mode():
        for name, pair in lora.factors.items():
            weight = family.model.model.diffusion_model.get_submodule(name).weight
            weight += strength * lora.scale * (pair.up[0] @ pair.down[0])
        result = sample(family, family.model)
        for name, tensor in family.model.model.state_dict().items():
            tensor.copy_(saved[name])
    return result


def stacks_of(names) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_trained_saved_loaded_and_applied_it_is_the_dense_change(family, output):
    expected = next(set(stacks) for stacks in STACKS.values() if hasattr(family.model.model.diffusion_model, stacks[0]))
    latents, positive = pairs(family)
    handle, before = new(family, positive), weights(family.model)
    assert {stack.prefix.rstrip(".") for stack in handle.config.stacks} == expected
    condition = conditions.from_host(positive[0])
    with torch.inference_mode():
        picture = sample(family, family.model)
        patched, _ = apply_lora(family.model, memory.generate(handle, condition), 1.0)
        assert torch.equal(sample(family, patched), picture), "before the first step nothing changes"
    trained = train(family, handle, latents, positive)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(family.model).items())
    changed = (
        handle.generator.state_dict()["model.layer_pos.weight"]
        != trained.handle.generator.state_dict()["model.layer_pos.weight"]
    )
    assert changed.any(1).all(), "every layer of every stack has learned"

    loaded = memory.load(memory.save(excited(trained.handle), "edits"))
    with torch.inference_mode():
        lora = memory.generate(loaded, condition)
        assert lora.names == target_names(loaded.config) and stacks_of(lora.names) == expected
        assert all(pair.up.any() for pair in lora.pairs)
        dense = with_dense_weights(family, lora, 0.8)
        for mode in ("bypass", "merge"):
            patched, report = apply_lora(family.model, lora, 0.8, mode)
            assert report.found == report.total == len(lora.names)
            found = sample(family, patched)
            torch.testing.assert_close(found / dense.std(), dense / dense.std(), atol=1e-5, rtol=0)
        assert (dense - picture).norm() > 0.02 * picture.norm(), "or nothing was tested"

        path = save_lora(lora, output / "lora.safetensors")
        stock, _ = comfy.sd.load_lora_for_models(family.model, None, comfy.utils.load_torch_file(str(path)), 0.8, 0)
        found = sample(family, stock)
        torch.testing.assert_close(found / dense.std(), dense / dense.std(), atol=1e-5, rtol=0)
        assert stacks_of(load_lora(path).names) == expected
        table = charts.norms_by_layer(lora)[1].split("\n")
    assert stacks_of(line.replace(" ", ".") for line in table[1:]) == expected
    assert len(table) == 1 + sum(stack.num_base_model_layers for stack in loaded.config.stacks)
    comfy.model_management.unload_all_models()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(family.model).items())


def test_what_is_written_for_either_stack_counts_in_the_loss():
    family = flux(channels=16)
    latents, positive = pairs(family)
    handle, losses = excited(new(family, positive)), set()
    for number, rows in enumerate((slice(0), slice(0, 2), slice(2, 4))):
        state = {name: tensor.clone() for name, tensor in handle.generator.state_dict().items()}
        state["model.layer_pos.weight"][rows] += 0.5
        other = memory.from_state(handle.config, state, "other")
        losses |= {train(family, other, latents, positive, steps=1, name=f"run {number}").losses["loss"][0]}
    assert len(losses) == 3


def test_a_pause_changes_nothing_and_the_run_says_its_sizes():
    family = flux(channels=16)
    latents, positive = pairs(family)
    handle = new(family, positive)
    whole = train(family, handle, latents, positive, steps=4, name="whole")
    train_until(2, family, handle, latents, positive)
    again = train(family, handle, latents, positive, steps=4, name="paused")
    one, other = (found.handle.generator.state_dict() for found in (whole, again))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    said = memory.describe_new(handle)
    assert " + " in said and said.count(" x 2") == 2


def train_until(steps, family, handle, latents, positive):
    """Cancel the run called paused after some steps."""
    show = in_server.ServerFront.show

    def pressing(self, progress):
        if progress.done == steps:
            comfy.model_management.interrupt_current_processing()
        show(self, progress)

    in_server.ServerFront.show = pressing
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(family, handle, latents, positive, steps=4, name="paused")
    finally:
        in_server.ServerFront.show = show
        comfy.model_management.interrupt_current_processing(False)


@pytest.mark.parametrize("kind", ["default", "int8", "fp8_e4m3fn"])
def test_every_block_is_fetched_once_for_all_stacks(monkeypatch, kind):
    """The host as with --novram."""
    family = flux(channels=16)
    _, positive = pairs(family)
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
    path = memory.save(excited(new(family, positive)), "edits", memory.SAVE_DTYPES.get(kind))
    handle, cast, fetched = memory.load(path), comfy.ops.cast_bias_weight, []

    def counted(layer, *args, **kwargs):
        fetched.append(layer)
        return cast(layer, *args, **kwargs)

    with torch.inference_mode():
        monkeypatch.setattr(comfy.ops, "cast_bias_weight", counted)
        lora = memory.generate(handle, conditions.from_host(positive[0]))
        layers = [module for module in handle.generator.model.blocks.modules() if hasattr(module, "comfy_cast_weights")]
        assert layers and {fetched.count(layer) for layer in layers} == {1}
        exact = memory.trainable_copy(handle)(memory.assemble(conditions.from_host(positive[0]), handle.config))
    ours, theirs = (torch.cat([pair.up.flatten().float() for pair in found.pairs]) for found in (lora, exact))
    assert (ours - theirs).norm() < (1e-5 if kind == "default" else 0.05) * theirs.norm()


def test_what_a_new_one_needs_is_planned_for_all_grids():
    family = flux(channels=16)
    _, positive = pairs(family)
    one, both = (new(family, positive, stack=stack).config for stack in ("double_blocks", "all stacks"))
    assert plan(both, 1, 64, torch.float32).peak > plan(one, 1, 64, torch.float32).peak


def test_teaching_and_learning_from_files_know_all_stacks(output):
    family = flux(channels=16)
    _, positive = pairs(family)
    handle, double = new(family, positive), new(family, positive, stack="double_blocks")
    with pytest.raises(MatchError, match="write for other weights, such as single_blocks.0"):
        lessons.check_teacher(double, handle.config)
    lessons.check_teacher(new(family, positive, size="medium", seed=3), handle.config)
    lora = memory.generate(excited(handle), conditions.from_host(positive[0]))
    aligned = lora_lessons.aligned(lora, family.model.model, handle.config, "lora")
    assert aligned.names == lora.names
    for name, pair in aligned.factors.items():
        assert torch.equal(pair.up, lora.factors[name].up) and torch.equal(pair.down, lora.factors[name].down)


def test_a_generators_file_says_which_stacks_and_its_past(output):
    family = flux(channels=16)
    latents, positive = pairs(family)
    trained = train(family, new(family, positive), latents, positive, steps=1)
    with safe_open(str(memory.save(trained.handle, "edits")), "pt") as file:
        written = json.loads(file.metadata()["hywu_config"])
    assert written["prefix"] == "double_blocks." and written["hywu"]["training"]["pairs"] == 4
    (further,) = written["hywu"]["further_stacks"]
    assert further["prefix"] == "single_blocks." and list(further["pg_mapping"]) == ["linear1", "linear2"]
