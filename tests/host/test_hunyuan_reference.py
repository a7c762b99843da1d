"""A whole edit with HunyuanImage-3 against the reference: every layer, the condition, the LoRA, the steps and the pixels."""

from types import SimpleNamespace

import comfy.model_management
import comfy.sample
import comfy.samplers
import hunyuan_tiny as tiny
import pytest
import torch

from hywu_core import load_generator
from hywu_core.bases.hunyuan_image3 import geometry
from hywu_core.bases.hunyuan_image3.edit import to_conditioning
from hywu_core.bases.hunyuan_image3.loader import load
from hywu_core.bases.hunyuan_image3.sizes import buckets
from hywu_core.bases.hunyuan_image3.text_mode import prepare, read_edit
from hywu_core.condition import assemble
from hywu_core.host.lora.apply import apply_lora

pytestmark = pytest.mark.usefixtures("inference")

GRID = (14, 18)
LAYERS, STEPS = 3, 3
STATES, VELOCITY, LATENT, PIXELS = 1e-5, 2e-5, 5e-5, 1e-4  # relative L2
MODES = ("bypass", "merge")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    with torch.inference_mode():
        model, vae, encoder = load(tiny.make_folder(tmp_path_factory.mktemp("hunyuan") / "base"), torch.float32)
        edit = tiny.golden_edit(encoder)
    weights = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    return SimpleNamespace(model=model, vae=vae, encoder=encoder, edit=edit, weights=weights)


@pytest.fixture(scope="module")
def stored():
    return {name: tiny.golden(name) for name in ("condition", "base", "lora", "pg_state_dict")}


@pytest.fixture(scope="module")
def lora(base):
    """What the generator gives for our own condition."""
    with torch.inference_mode():
        generator = load_generator(tiny.FIXTURES / "pg_tiny")
        return generator.generate(assemble(read_edit(base.model, base.edit).condition, generator.config))


@pytest.fixture(scope="module")
def runs(base, stored, lora):
    """{mode: the recorded run}, base last: it must not remember the others."""
    with torch.inference_mode():
        found = {mode: run(base, apply_lora(base.model, lora, 1.0, mode)[0], stored) for mode in MODES}
        return found | {"base": run(base, base.model, stored)}


class Recorder:
    """What goes through the layers in every call of the model, rows in the reference's order: [cond; uncond]."""

    def __init__(self, model, cfg=None):
        self.decoder, self.cfg, self.calls = model.model.diffusion_model, cfg, []

    def __enter__(self):
        layers = self.decoder.model.layers
        self.handles = [self.decoder.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self.handles.append(layers[0].register_forward_pre_hook(lambda module, inputs: self._put("in", inputs[0])))
        for index, layer in enumerate(layers):
            self.handles.append(layer.register_forward_hook(self._layer(f"layer{index}.out")))
        self.handles.append(self.decoder.register_forward_hook(lambda module, inputs, out: self._put("velocity", out)))
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def _begin(self, module, inputs, named):
        ids = named["ids"]
        self.order = torch.argsort((ids == self.cfg).any(dim=1).int(), stable=True)
        self.calls.append({"ids": ids[self.order].clone(), "timesteps": inputs[1][self.order].clone()})

    def _put(self, name, tensor):
        self.calls[-1][name] = tensor[self.order].clone()

    def _layer(self, name):
        return lambda module, inputs, outputs: self._put(name, outputs[0])


def run(base, model, stored):
    """The three steps of the fixture: every call, and the final latent as the model reads it."""
    rows = (base.edit, base.edit._replace(unconditional=True))
    noise = stored["lora"]["step0.sample"].unsqueeze(2)
    with Recorder(model, base.encoder.builder.tokenizer.special.cfg) as recorder:
        latent = comfy.sample.sample_custom(
            model,
            noise,
            tiny.facts()["guidance"],
            comfy.samplers.sampler_object("euler"),
            stored["base"]["step0.sigma"],
            *(to_conditioning(row) for row in rows),
            torch.zeros_like(noise),
            disable_pbar=True,
        )
    final = base.model.model.process_latent_in(latent)[:, :, 0]
    return SimpleNamespace(calls=recorder.calls, latent=latent, final=final)


def of_mode(stored, mode):
    return stored["base" if mode == "base" else "lora"]


def condition_of(model, edit):
    return read_edit(model, edit).condition.parts[0].tokens


def test_ids_and_positions_of_the_condition(base, stored):
    sequence, expected = base.edit.ratio_sequence(), stored["condition"]
    assert list(sequence.ids) == expected["call0.in.input_ids"][0].tolist()
    tables = geometry.rotary(geometry.positions(sequence.layout), 16, 10000.0)
    for name, table in zip(("cos", "sin"), tables, strict=True):
        torch.testing.assert_close(table, expected[f"call0.rope.{name}"][0], atol=1e-6, rtol=0)


def test_ids_and_positions_of_the_image_pass(base, stored):
    expected = stored["lora"]
    for row in (0, 1):
        sequence = base.edit._replace(unconditional=bool(row)).sequence(GRID)
        assert list(sequence.ids) == expected["call0.in.input_ids"][row].tolist()
        tables = geometry.rotary(geometry.positions(sequence.layout), 16, 10000.0)
        for name, table in zip(("cos", "sin"), tables, strict=True):
            torch.testing.assert_close(table, expected[f"call0.rope.{name}"][row], atol=1e-6, rtol=0)


def test_pictures_become_the_references_tokens(base, stored):
    expected, picture = stored["condition"]["call0.layer0.in"], base.edit.ratio_sequence().layout.pictures[0]
    assert tiny.relative(base.edit.vision[0], expected[:, picture.vision.start : picture.vision.stop]) < STATES
    ready = prepare(base.model, base.edit, base.edit.ratio_sequence())
    found = ready.decoder._tokens(ready.ids, base.edit.ratio_sequence().layout, ready.sources, ready.dtype)
    assert tiny.relative(found, expected) < STATES
    for span in (picture.latent, picture.vision, type(picture.latent)(picture.timestep, picture.timestep + 1)):
        part = slice(span.start, span.stop)
        assert tiny.relative(found[:, part], expected[:, part]) < STATES


def test_every_layer_of_the_condition(base, stored):
    found = {}
    layers = base.model.model.diffusion_model.model.layers
    handles = [
        layer.register_forward_hook(lambda module, inputs, outputs, index=index: found.update({index: outputs[0]}))
        for index, layer in enumerate(layers)
    ]
    try:
        read = read_edit(base.model, base.edit)
    finally:
        [handle.remove() for handle in handles]
    assert len(found) == LAYERS
    for index, hidden in found.items():
        assert tiny.relative(hidden, stored["condition"][f"call0.layer{index}.out"]) < STATES
    assert tiny.relative(read.condition.parts[0].tokens, stored["condition"]["condition"]) < STATES


def test_the_ratio_that_the_model_chooses(base, stored):
    read = read_edit(base.model, base.edit)
    logits = stored["condition"]["call0.out.logits_last"][0]
    assert tiny.relative(read.ratio_logits, logits) < STATES
    ratios = list(base.encoder.builder.tokenizer.special.ratios)
    assert read.size == buckets(base.encoder.config.image_base_size)[int(logits[ratios].argmax())]
    assert logits[ratios].topk(2).values.diff().abs() > 1e-3  # no near tie, so the choice says something


def test_the_generator_on_our_condition(lora, stored):
    expected = stored["pg_state_dict"]
    names = {name.removesuffix(".lora_A") for name in expected if name.endswith(".lora_A")}
    assert lora.factors.keys() == names
    for name, pair in lora.factors.items():
        torch.testing.assert_close(pair.down, expected[f"{name}.lora_A"], atol=2e-5, rtol=0)
        torch.testing.assert_close(pair.up, expected[f"{name}.lora_B"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_every_layer_of_the_first_steps(runs, stored, mode):
    first, second = runs[mode].calls[:2]
    ids = stored["lora"]["call0.in.input_ids"]
    for index, call in enumerate((first, second)):
        assert torch.equal(call["ids"], ids)
        names = {"in": "layer0.in"} | {f"layer{layer}.out": f"layer{layer}.out" for layer in range(LAYERS)}
        compared = 0
        for name, golden in names.items():
            if f"call{index}.{golden}" not in stored["lora"]:
                continue
            expected = stored["lora"][f"call{index}.{golden}"][:, : call[name].shape[1]]
            assert expected.shape == call[name].shape
            assert all(tiny.relative(call[name][row], expected[row]) < STATES for row in (0, 1)), (index, name)
            compared += 1
        assert compared == (LAYERS + 1, 2)[index]
    assert first["in"].shape[1] == ids.shape[1] - 4 and second["in"].shape[1] == 1 + GRID[0] * GRID[1]


@pytest.mark.parametrize("mode", ["base", *MODES])
def test_velocities_and_the_final_latent(runs, stored, mode):
    found, expected = runs[mode], of_mode(stored, mode)
    assert len(found.calls) == STEPS
    for index, call in enumerate(found.calls):
        torch.testing.assert_close(call["timesteps"], expected[f"call{index}.in.timesteps"], atol=1e-3, rtol=0)
        velocity = call["velocity"][:, :, 0]
        for row in (0, 1):
            assert tiny.relative(velocity[row], expected[f"call{index}.out.diffusion_prediction"][row]) < VELOCITY
    assert tiny.relative(found.final, expected["step2.prev"]) < LATENT
    assert tiny.relative(stored["base"]["step2.prev"], stored["lora"]["step2.prev"]) > 0.1  # the LoRA does something


@pytest.mark.parametrize("mode", ["base", *MODES])
def test_the_png(base, runs, mode):
    found = base.vae.decode(runs[mode].latent).reshape(224, 288, 3)
    expected = tiny.picture("one_base" if mode == "base" else "one_lora")[0]
    assert ((found * 255).round() - expected * 255).abs().max() < 1.01  # levels


def test_the_autoencoder(base, stored):
    comfy.model_management.load_models_gpu([base.vae.patcher])
    pixels = (tiny.picture("a_vae_center") * 2 - 1).movedim(-1, 1).unsqueeze(2)
    moments = base.vae.first_stage_model.encoder(pixels)
    assert tiny.relative(moments, stored["condition"]["vae0_enc.out"]) < PIXELS
    decoded = base.vae.first_stage_model.decoder(stored["lora"]["vae2_dec.in"])
    assert tiny.relative(decoded, stored["lora"]["vae2_dec.out"]) < PIXELS


def test_a_latent_is_drawn_as_in_the_reference(base, stored):
    source = torch.Generator().manual_seed(tiny.facts()["seed"])
    latent = base.vae.sample_posterior(tiny.picture("a_vae_center"), source)
    scaled = base.model.model.process_latent_in(latent)[:, :, 0]
    assert tiny.relative(scaled, stored["condition"]["call0.in.cond_vae_images"]) < STATES
    mean = base.vae.encode(tiny.picture("a_vae_center"))
    assert tiny.relative(mean, stored["condition"]["vae0_enc.out"].chunk(2, dim=1)[0]) < PIXELS


@pytest.mark.parametrize("mode", MODES)
def test_a_lora_never_changes_the_condition(base, lora, stored, runs, mode):
    bare = condition_of(base.model, base.edit)
    patched, _ = apply_lora(base.model, lora, 1.0, mode)
    assert torch.equal(condition_of(patched, base.edit), bare)
    after = run(base, patched, stored)  # the same MODEL still has its LoRA where it samples
    assert tiny.relative(after.final, stored["lora"]["step2.prev"]) < LATENT
    assert torch.equal(condition_of(patched, base.edit), bare)
    assert torch.equal(run(base, patched, stored).final, after.final)


@pytest.mark.parametrize("mode", MODES)
def test_the_base_is_bit_identical_afterwards(base, lora, stored, runs, mode):
    run(base, apply_lora(base.model, lora, 1.0, mode)[0], stored)
    assert torch.equal(run(base, base.model, stored).final, runs["base"].final)
    state = base.model.model.state_dict()
    assert state.keys() == base.weights.keys()
    assert all(torch.equal(tensor, base.weights[name]) for name, tensor in state.items())
