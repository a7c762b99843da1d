"""A condition says what picture and instruction are, whatever else is wired to the MODEL and the CONDITIONING."""

import comfy.hooks
import comfy.sd
import families
import pytest
import torch

from hywu_core.condition import REFERENCE_LATENT
from hywu_core.files.lora_files import to_state_dict
from hywu_core.host.conditions import from_host, hidden_states
from hywu_core.host.lora.apply import apply_lora

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def flux():
    with torch.inference_mode():
        return families.flux(channels=16)


def seen_by(family, **more):
    """A CONDITIONING with a source picture, and what else a node put on it."""
    ((tokens, options),) = family.conditioning
    picture = torch.randn(family.latent.shape, generator=torch.Generator().manual_seed(7))
    return [[tokens, options | {"reference_latents": [picture]} | more]]


def loaded_with(family, kind):
    lora = families.random_lora(family, seed=5)
    if kind == "the host's bypass":
        return comfy.sd.load_bypass_lora_for_models(family.model, None, to_state_dict(lora), 0.7, 0)[0]
    return apply_lora(family.model, lora, 0.7, kind)[0]


@pytest.mark.parametrize("kind", ["bypass", "merge", "the host's bypass"])
def test_a_lora_on_the_model_is_not_in_its_hidden_states(flux, kind):
    entry = seen_by(flux)
    bare, picture = hidden_states(flux.model, entry), families.sample(flux, flux.model)
    model = loaded_with(flux, kind)
    changed = families.sample(flux, model)
    assert not torch.equal(changed, picture)
    assert torch.equal(hidden_states(model, entry), bare)
    assert torch.equal(families.sample(flux, model), changed), "the MODEL still has it"
    assert torch.equal(families.sample(flux, flux.model), picture)


def test_options_of_other_nodes_do_not_act(flux):
    """Guidance nodes ask the host for both rows, and then a condition would be a batch of two."""
    entry = seen_by(flux)
    bare = hidden_states(flux.model, entry)
    model = flux.model.clone()
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0, disable_cfg1_optimization=True)
    model.set_model_double_block_patch(lambda args: {"img": args["img"] * 0, "txt": args["txt"]})
    found = hidden_states(model, entry)
    assert found.shape[0] == 1 and torch.equal(found, bare)


class Control:
    """A ControlNet that may not be asked."""

    def __getattr__(self, name):
        raise AssertionError(f"asked for {name}")


def test_what_only_the_sampler_reads_is_left_out_and_named(flux, caplog):
    entry, more = seen_by(flux), {"control": Control(), "hooks": comfy.hooks.HookGroup(), "mask": torch.ones(1, 8, 8)}
    expected = from_host(entry, model=flux.model)
    with caplog.at_level("WARNING"):
        found = from_host(seen_by(flux, **more), model=flux.model)
    assert torch.equal(found.parts[0].tokens, expected.parts[0].tokens)
    assert [r.message for r in caplog.records if "condition" in r.message] == [
        "HY-WU: a condition leaves out what only the sampler reads: control, hooks, mask."
    ]


def test_a_second_picture_is_read_by_the_base_and_else_said_not_to_be_read(flux, caplog):
    entry = seen_by(flux)
    first, second = entry[0][1]["reference_latents"][0], torch.ones_like(flux.latent)
    both = [[entry[0][0], entry[0][1] | {"reference_latents": [first, second]}]]
    found = from_host(both)
    assert [torch.equal(part.tokens, first) for part in found.parts if part.kind == REFERENCE_LATENT] == [True]
    assert sum("2 reference latents" in record.message for record in caplog.records) == 1
    caplog.clear()
    assert hidden_states(flux.model, both).shape[1] > hidden_states(flux.model, entry).shape[1]
    from_host(both, model=flux.model)
    assert not [record for record in caplog.records if "reference latents" in record.message]
