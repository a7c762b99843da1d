"""Sampling with HunyuanImage-3: the cache of the prefix, rows and batches, what is refused, and Instruct-Distil."""

import dataclasses
import gc
import json
import weakref
from types import SimpleNamespace

import comfy.model_management
import comfy.sample
import comfy.samplers
import hunyuan_tiny as tiny
import pytest
import torch
from safetensors.torch import load_file, save_file

from hywu_core import load_generator
from hywu_core.bases.hunyuan_image3 import prefix_cache, sizes, transformer
from hywu_core.bases.hunyuan_image3.base_model import HostModel
from hywu_core.bases.hunyuan_image3.edit import Wishes, for_sampler, from_conditioning, make_edit, to_conditioning
from hywu_core.bases.hunyuan_image3.loader import load
from hywu_core.bases.hunyuan_image3.text_mode import read_edit
from hywu_core.condition import assemble
from hywu_core.errors import ConditionError
from hywu_core.host.lora.apply import apply_lora

pytestmark = pytest.mark.usefixtures("inference")

BASE = 256
PREFIX, CELLS = 415, 14 * 18  # tokens before the timestep, and of the image that is generated
SIGMAS = tiny.golden("base")["step0.sigma"]
SAME = 5e-6  # relative L2
ROUNDING = 5e-5  # of the same sum in another order, which the steps enlarge


class StopError(Exception):
    """Raised by a test in the middle of a run."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("hunyuan") / "base")


@pytest.fixture(scope="module")
def base(folder):
    with torch.inference_mode():
        model, _, encoder = load(folder, torch.float32)
        edit = tiny.golden_edit(encoder)
        generator = load_generator(tiny.FIXTURES / "pg_tiny")
        lora = generator.generate(assemble(read_edit(model, edit).condition, generator.config))
    weights = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    return SimpleNamespace(model=model, encoder=encoder, edit=edit, lora=lora, weights=weights)


@pytest.fixture(scope="module")
def distil(folder, tmp_path_factory):
    """The tiny base as Instruct-Distil, which embeds two more numbers."""
    target = tiny.make_folder(tmp_path_factory.mktemp("distil") / "base")
    config = json.loads((target / "config.json").read_text()) | {"cfg_distilled": True, "use_meanflow": True}
    (target / "config.json").write_text(json.dumps(config))
    tensors, source = load_file(target / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.startswith("timestep_emb.")]:
        for other in ("guidance_emb", "timestep_r_emb"):
            numbers = torch.randn(tensors[name].shape, generator=source).mul(0.2).to(tensors[name].dtype)
            tensors[name.replace("timestep_emb", other)] = numbers
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    with torch.inference_mode():
        model, _, encoder = load(target, torch.float32)
        return SimpleNamespace(model=model, encoder=encoder, edit=tiny.golden_edit(encoder))


@pytest.fixture
def passes(base):
    """(rows, tokens) of every run through the layers."""
    seen = []
    first = base.model.model.diffusion_model.model.layers[0]
    handle = first.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[:2])))
    yield seen
    handle.remove()


@pytest.fixture
def caches(monkeypatch):
    """Every cache that a run was given; each remembers what it found and how full it was at most."""
    made = []

    class Watched(prefix_cache.PrefixCache):
        def __init__(self):
            super().__init__()
            self.found, self.most, self.tensors = [], 0, []
            made.append(self)

        def find(self, key):
            kept = super().find(key)
            self.found.append(kept is not None)
            return kept

        def keep(self, key, layers):
            super().keep(key, layers)
            self.most = max(self.most, len(self))
            self.tensors += [weakref.ref(tensor) for pair in layers for tensor in pair]

    monkeypatch.setattr(prefix_cache, "PrefixCache", Watched)
    return made


def noise_of(batch=1, grid=(14, 18)):
    return torch.randn((batch, 8, 1, *grid), generator=torch.Generator().manual_seed(0))


def sample(model, edit, noise=None, cfg=2.5, callback=None, positive=None, negative=None):
    noise = noise_of() if noise is None else noise
    return comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        comfy.samplers.sampler_object("euler"),
        SIGMAS,
        positive or to_conditioning(edit),
        negative or to_conditioning(edit._replace(unconditional=True)),
        torch.zeros_like(noise),
        callback=callback,
        disable_pbar=True,
    )


def gone(cache, model):
    """Whether nothing of a cache is reachable any more."""
    gc.collect()
    held = prefix_cache.KEY in model.model_options.get("transformer_options", {})
    return not (held or len(cache) or any(tensor() is not None for tensor in cache.tensors))


def uncached(*args, **kwargs):
    """The same without a cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "usable", lambda options: None)
        return sample(*args, **kwargs)


def test_the_cache_changes_nothing(base, passes, caches):
    cached, plain = sample(base.model, base.edit), uncached(base.model, base.edit)
    assert tiny.relative(cached, plain) < SAME
    assert caches[0].found == [False, True, True] and not caches[1].found
    whole, image = (2, PREFIX + 1 + CELLS), (2, 1 + CELLS)  # later steps: the timestep and the image
    assert passes == [whole, image, image, whole, whole, whole]


@pytest.mark.parametrize("patch", ["attn1_patch", "double_block"])
def test_a_patch_on_the_model_turns_the_cache_off(base, passes, caches, patch):
    patched = base.model.clone()
    patched.set_model_patch(lambda *args: args, patch)
    assert tiny.relative(sample(patched, base.edit), sample(base.model, base.edit)) < SAME
    assert [tokens for _, tokens in passes[:3]] == [PREFIX + 1 + CELLS] * 3
    assert not caches[0].found and caches[1].found


@pytest.mark.parametrize("mode", ["bypass", "merge"])
def test_the_cache_changes_nothing_with_a_lora(base, passes, mode):
    patched, _ = apply_lora(base.model, base.lora, 1.0, mode)
    cached, plain = sample(patched, base.edit), uncached(patched, base.edit)
    assert tiny.relative(cached, plain) < SAME
    assert [tokens for _, tokens in passes[:3]] == [PREFIX + 1 + CELLS, 1 + CELLS, 1 + CELLS]
    assert tiny.relative(cached, sample(base.model, base.edit)) > 0.1


def test_a_lora_that_ends_early_takes_its_prefix_with_it(base, passes, caches):
    patched, _ = apply_lora(base.model, base.lora, 1.0, "bypass", end=0.4)
    cached, plain = sample(patched, base.edit), uncached(patched, base.edit)
    assert tiny.relative(cached, plain) < SAME
    assert caches[0].found == [False, True, False]  # computed again where the LoRA has ended
    assert [tokens for _, tokens in passes[:3]] == [PREFIX + 1 + CELLS, 1 + CELLS, PREFIX + 1 + CELLS]
    always = sample(apply_lora(base.model, base.lora, 1.0, "bypass")[0], base.edit)
    assert tiny.relative(cached, always) > 1e-3 and tiny.relative(cached, sample(base.model, base.edit)) > 1e-3


@pytest.mark.parametrize("mode", ["bypass", "merge"])
def test_strengths_of_stacked_loras_add_up(base, mode):
    half, _ = apply_lora(base.model, base.lora, 0.5, mode)
    twice, _ = apply_lora(half, base.lora, 0.5, "bypass")
    found, whole = sample(twice, base.edit), sample(apply_lora(base.model, base.lora, 1.0, "bypass")[0], base.edit)
    assert tiny.relative(found, whole) < ROUNDING < 1e-3 < tiny.relative(found, sample(half, base.edit))
    assert tiny.relative(found, uncached(twice, base.edit)) < SAME


def test_no_cache_outlives_its_run(base, caches):
    sample(base.model, base.edit)
    assert caches[0].most == 1 and gone(caches[0], base.model)
    sample(base.model, base.edit)
    assert len(caches) == 2 and not caches[1].found[0]


def test_no_cache_outlives_an_exception(base, caches):
    expected = sample(base.model, base.edit)
    decoder, calls = base.model.model.diffusion_model, []

    def fail(module, inputs):
        calls.append(module)
        if len(calls) == 2:
            raise StopError

    handle = decoder.final_layer.register_forward_pre_hook(fail)
    try:
        with pytest.raises(StopError):
            sample(base.model, base.edit)
    finally:
        handle.remove()
    assert caches[1].found == [False, True] and gone(caches[1], base.model)
    assert torch.equal(sample(base.model, base.edit), expected)


@pytest.mark.parametrize("mode", [None, "bypass", "merge"])
def test_no_cache_outlives_a_cancel(base, caches, mode):
    expected = sample(base.model, base.edit)
    patched = base.model if mode is None else apply_lora(base.model, base.lora, 1.0, mode)[0]

    def press(step, *_):
        comfy.model_management.interrupt_current_processing(step == 0)

    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(patched, base.edit, callback=press)
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert caches[1].most == 1 and gone(caches[1], patched)
    assert torch.equal(sample(base.model, base.edit), expected)


def test_rows_one_at_a_time_give_the_same(base, passes, caches, monkeypatch):
    together = sample(base.model, base.edit)
    monkeypatch.setattr(HostModel, "memory_required", lambda *args, **kwargs: 1 << 60)  # no room for two
    assert tiny.relative(sample(base.model, base.edit), together) < SAME
    assert [rows for rows, _ in passes] == [2] * 3 + [1] * 6
    assert caches[1].most == 2 and caches[1].found == [False] * 2 + [True] * 4


@pytest.mark.parametrize("mode", ["bypass", "merge"])
def test_a_batch_of_two_equals_two_runs(base, mode):
    patched, _ = apply_lora(base.model, base.lora, 1.0, mode)
    noise = noise_of(2)
    both = sample(patched, base.edit, noise)
    for index in range(2):
        alone = sample(patched, base.edit, noise[index : index + 1])
        assert tiny.relative(both[index : index + 1], alone) < SAME
    assert tiny.relative(both[:1], both[1:]) > 0.1


@pytest.mark.parametrize("mode", ["bypass", "merge"])
def test_every_layer_offloaded_gives_the_same(base, mode, monkeypatch):
    """The host as with --novram: weights and adapters are brought to the device for each forward."""
    patched, _ = apply_lora(base.model, base.lora, 1.0, mode)
    expected, bare = sample(patched, base.edit), sample(base.model, base.edit)
    condition = read_edit(base.model, base.edit).condition.parts[0].tokens
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
    assert tiny.relative(sample(patched, base.edit), expected) < SAME
    assert not any(model.model_loaded_memory() for model in comfy.model_management.current_loaded_models)
    assert torch.equal(read_edit(patched, base.edit).condition.parts[0].tokens, condition)
    assert tiny.relative(sample(base.model, base.edit), bare) < SAME
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize("place", ["positive", "negative"])
def test_a_foreign_conditioning_is_refused(base, caches, place):
    with pytest.raises(ConditionError, match="only the node HunyuanImage-3 Edit makes"):
        sample(base.model, base.edit, **{place: [[torch.zeros(1, 4, 8), {"pooled_output": None}]]})
    assert all(gone(cache, base.model) for cache in caches)


def test_only_one_conditioning_of_ours_is_read(base):
    ours, foreign = to_conditioning(base.edit), [[torch.zeros(1, 4, 8), {}]]
    for wrong in ([], foreign, [*ours, *ours], [*ours, *foreign]):
        with pytest.raises(ConditionError, match="one CONDITIONING from the node HunyuanImage-3 Edit"):
            from_conditioning(wrong)


@pytest.mark.parametrize("run, limit, tokens", [(sample, 671, 672), (sample, 413, 672), (read_edit, 413, 414)])
def test_too_many_tokens_are_refused(base, run, limit, tokens):
    config = base.encoder.config
    sampling = dataclasses.replace(config.sampling, max_length=limit)
    for changed in ({"max_position_embeddings": limit}, {"sampling": sampling}):
        with pytest.raises(ConditionError, match=f"takes {tokens} tokens, but the model reads at most {limit}"):
            run(base.model, base.edit._replace(config=dataclasses.replace(config, **changed)))


@pytest.mark.parametrize("count", [0, 2])
def test_other_numbers_of_pictures(base, count):
    pictures = [tiny.picture(), torch.rand(1, 300, 200, 3)][:count]
    edit = make_edit(base.encoder, "swap the hat", pictures, Wishes(size="1:1"))
    positive, negative, latent = for_sampler(edit)
    noise = noise_of(grid=latent["samples"].shape[-2:])
    found = sample(base.model, edit, noise, positive=positive, negative=negative)
    assert found.shape == latent["samples"].shape and found.isfinite().all()
    assert tiny.relative(found, uncached(base.model, edit, noise)) < SAME
    assert len(edit.latents) == len(edit.request.pictures) == count
    assert read_edit(base.model, edit).condition.parts[0].tokens.shape[1] == edit.ratio_sequence().layout.length


def test_pictures_come_in_their_order(base, monkeypatch):
    monkeypatch.setattr(base.encoder.vae, "encode", lambda pixels: pixels[:, ::16, ::16].movedim(-1, 1).unsqueeze(2))
    first, second = tiny.picture(), torch.rand(1, 300, 200, 3)
    forth, back = (make_edit(base.encoder, "swap", pictures) for pictures in ([first, second], [second, first]))
    assert forth.request.pictures == back.request.pictures[::-1]
    assert all(torch.equal(*pair) for pair in zip(forth.latents, back.latents[::-1], strict=True))
    batched = make_edit(base.encoder, "swap", [torch.cat((first, first))])
    assert batched.request.pictures == forth.request.pictures[:1] * 2


def test_an_edit_that_cannot_be_is_refused(base):
    picture = tiny.picture()
    for prompt, pictures, wishes, message in (
        ("  ", [picture], None, "instruction is empty"),
        ("x", [picture] * 4, None, "4 source pictures, but the model reads at most 3"),
        ("x", [torch.cat([picture] * 4)], None, "4 source pictures"),
        ("x", [picture], Wishes(size="large"), "'large' is no size"),
    ):
        with pytest.raises(ConditionError, match=message):
            make_edit(base.encoder, prompt, pictures, wishes)


def test_a_base_without_a_system_prompt_needs_one_in_the_edit(tmp_path):
    folder = tiny.make_folder(tmp_path / "base")
    (folder / "system_prompt.py").unlink()
    silent = load(folder, torch.float32)[2]
    with pytest.raises(ConditionError, match=r"no system_prompt\.py"):
        make_edit(silent, "x", [])
    assert make_edit(silent, "x", [], Wishes(system_prompt="Mine.")).request.system_prompt == "Mine."


def test_the_latent_has_the_size_asked_for(base):
    picture, table = tiny.picture(), sizes.buckets(BASE)
    for wishes, pictures, size in (
        (Wishes(), [picture], table[15]),  # the first picture's
        (Wishes(), [], sizes.Size(BASE, BASE)),
        (Wishes(size="224x288", batch=3), [picture], table[14]),
    ):
        edit = make_edit(base.encoder, "x", pictures, wishes)
        positive, negative, latent = for_sampler(edit)
        assert latent["samples"].shape == (wishes.batch, 8, 1, size.height // 16, size.width // 16)
        assert from_conditioning(positive) is edit
        with pytest.raises(ConditionError, match="its positive output"):
            from_conditioning(negative)
        assert read_edit(base.model, edit).size in (table if wishes.size == "auto" else [size])


def test_reference_compatible_draws_latents_and_answers_empty_reasoning(base):
    picture = tiny.picture()
    mean, again, drawn, same, other = (
        make_edit(base.encoder, "x", [picture], Wishes("", "224x288", "auto", seed, compatible))
        for compatible, seed in ((False, 1), (False, 2), (True, 1), (True, 1), (True, 2))
    )
    assert torch.equal(mean.latents[0], again.latents[0]) and torch.equal(drawn.latents[0], same.latents[0])
    assert not torch.equal(drawn.latents[0], other.latents[0]) and not torch.equal(drawn.latents[0], mean.latents[0])
    assert mean.request.reasoning is None and drawn.request.reasoning == ""
    answer = base.encoder.builder.tokenizer.encode("<answer></answer>")
    bare, answered = mean.ratio_sequence().ids, drawn.ratio_sequence().ids
    assert answered == (*bare[:-3], *answer, *bare[-3:])


def test_distil_reacts_to_guidance_and_to_the_next_timestep(distil, monkeypatch):
    def guided(scale):
        options = {} if scale is None else {"guidance": scale}
        positive = [[tensor, {**found, **options}] for tensor, found in to_conditioning(distil.edit)]
        return sample(distil.model, distil.edit, cfg=1.0, positive=positive)

    default, weak, released = guided(None), guided(1.0), guided(2.5)
    assert default.isfinite().all() and torch.equal(default, released)
    assert tiny.relative(released, uncached(distil.model, distil.edit, cfg=1.0)) < SAME
    assert tiny.relative(weak, released) > 1e-4
    with monkeypatch.context() as patch:
        patch.setattr(transformer, "_next_timesteps", lambda timesteps, options: torch.zeros_like(timesteps))
        assert tiny.relative(guided(2.5), released) > 1e-4
    image = distil.edit.sequence((14, 18)).layout.image
    assert (image.guidance, image.timestep_r, image.image.start) == tuple(image.timestep + n for n in (1, 2, 3))


def test_distil_is_told_where_the_sampler_goes():
    options = {"sample_sigmas": SIGMAS}
    schedule = [1000 * float(sigma) for sigma in SIGMAS]
    for now, following in zip(schedule, [*schedule[1:], 0.0], strict=True):
        found = transformer._next_timesteps(torch.tensor([now, now]), options)
        torch.testing.assert_close(found, torch.tensor([following] * 2), atol=1e-2, rtol=0)
    assert not transformer._next_timesteps(torch.tensor([500.0]), {}).any()


def test_the_base_is_bit_identical_after_everything(base):
    sample(apply_lora(base.model, base.lora, 1.0, "merge")[0], base.edit)
    sample(base.model, base.edit)
    state = base.model.model.state_dict()
    assert state.keys() == base.weights.keys() and all(torch.equal(state[key], base.weights[key]) for key in state)
