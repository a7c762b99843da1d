"""LoRAs as values in the host: strength over the sampling, hooks from memory, instances of a batch, sliders of a blend."""

import comfy.hooks
import comfy.sample
import comfy.samplers
import comfy_api.latest
import comfy_extras.nodes_hooks as host_hooks
import families
import folder_paths
import pytest
import torch

from hywu_core import LoraError, MatchError
from hywu_core.files.lora_files import save_lora
from hywu_core.host.lora import store
from hywu_core.host.lora.apply import apply_lora
from hywu_core.host.lora.hooks import hook_of
from hywu_core.host.lora.schedule import Schedule, done_of
from hywu_core.lora import blend

pytestmark = pytest.mark.usefixtures("inference")

STEPS = 5
POINTS = [(0.0, 1.0), (0.5, 0.3), (1.0, -0.5)]


@pytest.fixture
def flux():
    return families.flux()


def curve(points=POINTS, interpolation="linear"):
    return comfy_api.latest._input.CurveInput.from_raw({"points": points, "interpolation": interpolation})


def sampled(family, model, positive=None, first=0, last=STEPS, latent=None):
    """A part of the sampling, as KSampler (Advanced) does it."""
    latent = family.latent if latent is None else latent
    noise = comfy.sample.prepare_noise(family.latent, 7) if first == 0 else torch.zeros_like(latent)
    return comfy.sample.sample(
        model, noise, STEPS, 1.0, "euler", "simple", positive or family.conditioning, family.conditioning, latent,
        disable_noise=first > 0, start_step=first, last_step=last, disable_pbar=True,
    )  # fmt: skip


def close(found, expected):
    unit = expected.std()
    torch.testing.assert_close(found / unit, expected / unit, atol=1e-5, rtol=0)


@pytest.mark.parametrize("interpolation", ["linear", "monotone_cubic"])
def test_a_curve_is_the_lora_at_every_steps_own_strength(flux, interpolation):
    lora, wanted = families.random_lora(flux, seed=5), curve(interpolation=interpolation)
    sampling = flux.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", STEPS)
    strengths = [0.8 * wanted.interp(done_of(sampling, float(sigma))) for sigma in sigmas[:-1]]
    assert strengths[0] == pytest.approx(0.8, abs=1e-3) and len({round(value, 3) for value in strengths}) == STEPS
    latent = None
    for step, strength in enumerate(strengths):
        merged, _ = apply_lora(flux.model, lora, strength, "merge")
        latent = sampled(flux, merged, first=step, last=step + 1, latent=latent)
    found = sampled(flux, apply_lora(flux.model, lora, 0.8, curve=wanted)[0])
    close(found, latent)
    assert (found - sampled(flux, apply_lora(flux.model, lora, 0.8)[0])).norm() > 1e-2 * found.norm()


def test_where_a_curve_is_zero_nothing_runs_beside_and_where_it_is_one_it_is_the_lora(flux):
    lora = families.random_lora(flux, seed=5)
    nothing, _ = apply_lora(flux.model, lora, curve=curve([(0, 0), (1, 0)]))
    assert torch.equal(sampled(flux, nothing), sampled(flux, flux.model))
    all_of_it, _ = apply_lora(flux.model, lora, curve=curve([(0, 1), (1, 1)]))
    assert torch.equal(sampled(flux, all_of_it), sampled(flux, apply_lora(flux.model, lora)[0]))


def test_a_curve_needs_bypass_and_points(flux):
    lora = families.random_lora(flux, seed=5)
    with pytest.raises(MatchError, match="mode bypass for start, end and curve"):
        apply_lora(flux.model, lora, mode="merge", curve=curve())
    with pytest.raises(MatchError, match="curve has no points"):
        Schedule(curve=curve([])).check()


def test_how_far_the_sampling_is_inverts_the_hosts_function(flux):
    sampling = flux.model.get_model_object("model_sampling")
    for share in (0.01, 0.2, 0.5, 0.77, 0.99):
        assert done_of(sampling, float(sampling.percent_to_sigma(share))) == pytest.approx(share, abs=2e-3)


def hooked(family, hooks):
    """The positive with hooks on it, as Cond Set Props does."""
    return comfy.hooks.set_conds_props(
        conds=[family.conditioning], strength=1.0, set_cond_area="default", hooks=hooks, timesteps_range=None
    )[0]


def test_a_hook_from_memory_is_the_hosts_hook_of_the_saved_file(flux, tmp_path, monkeypatch):
    lora = families.random_lora(flux, seed=5)
    path = save_lora(lora, tmp_path / "one.safetensors")
    monkeypatch.setattr(folder_paths, "get_full_path", lambda kind, name: str(path))
    (expected,) = host_hooks.CreateHookLora().create_hook("one.safetensors", 0.7, 0.0)
    pictures = [sampled(flux, flux.model, hooked(flux, group)) for group in (hook_of(lora, 0.7), expected)]
    assert torch.equal(*pictures)
    by_hand = sampled(flux, apply_lora(flux.model, lora, 0.7, "merge")[0])
    close(pictures[0], by_hand)
    assert (by_hand - sampled(flux, flux.model)).norm() > 1e-2 * by_hand.norm()


def test_hooks_join_others_and_zero_is_none(flux):
    one, two = families.random_lora(flux, seed=5), families.random_lora(flux, seed=6)
    first = hook_of(one, 0.5)
    both = hook_of(two, -0.3, first)
    assert [len(group.hooks) for group in (first, both, hook_of(two, 0.0, first))] == [1, 2, 1]
    found = sampled(flux, flux.model, hooked(flux, both))
    close(found, sampled(flux, apply_lora(flux.model, blend([one, two], [0.5, -0.3]), 1.0)[0]))


def test_a_hook_of_a_batch_says_what_to_do(flux):
    lora = families.random_lora(flux, seed=5, batch=2)
    with pytest.raises(LoraError, match="holds 2 instances. Choose one with Pick Instance LoRA"):
        hook_of(lora, 1.0)
    close(
        sampled(flux, flux.model, hooked(flux, hook_of(lora.select(1), 1.0))),
        sampled(flux, apply_lora(flux.model, lora.select(1))[0]),
    )


def test_sliders_are_weights_and_the_text_is_not_both(flux):
    loras = [families.random_lora(flux, seed=5), families.random_lora(flux, seed=6).with_metadata(instruction="warmer")]
    found = store.blend_of(loras, sliders=[0.7, -0.2])
    for name, pair in blend(loras, [0.7, -0.2]).factors.items():
        assert torch.equal(found.factors[name].up, pair.up) and torch.equal(found.factors[name].down, pair.down)
    assert found.metadata["instruction"] == "-0.2 warmer"
    with pytest.raises(LoraError, match="given twice"):
        store.blend_of(loras, "1 1", [0.5, 0.5])
    with pytest.raises(LoraError, match="2 LoRAs and 3 weights"):
        store.blend_of(loras, sliders=[0.5, 0.5, 0.5])


def test_blending_equals_applying_both(flux):
    one, two = families.random_lora(flux, seed=5), families.random_lora(flux, seed=6)
    stacked, _ = apply_lora(apply_lora(flux.model, one, 0.6)[0], two, -0.4)
    blended, _ = apply_lora(flux.model, store.blend_of([one, two], sliders=[0.6, -0.4]))
    close(sampled(flux, blended), sampled(flux, stacked))
