"""The base's own hidden states as a condition."""

import pytest
import torch
from families import FAMILIES, flux, qwen_image, weights
from training_runs import new, pairs, run

from hywu_core.errors import ConditionError
from hywu_core.host import conditions, memory

pytestmark = pytest.mark.usefixtures("output")


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
