"""Computing blocks again in the backward pass saves memory and changes nothing."""

import families
import pytest
import torch

from hywu_core import Generator
from hywu_core.host.training.objective import DiffusionObjective
from hywu_core.training import GeneratorTrainable, Sample, TrainConfig, Trainer
from hywu_core.training.data import batch_of
from hywu_core.training.trainable import leaves

STACKS = {
    "flux_double": ("double_blocks", "single_blocks"),
    "flux_single": ("double_blocks", "single_blocks"),
    "qwen_image": ("transformer_blocks",),
    "z_image": ("layers",),
    "wan": ("blocks",),
    "sd3": ("joint_blocks",),
}


class Pairs:
    """Random latents, each with a conditioning of its own."""

    def __init__(self, family):
        self.family = family

    def __len__(self):
        return 3

    def sample(self, index, source):
        entry = families.conditioning(12, 8, seed=20 + index)[0]
        return Sample(torch.randn(self.family.latent.shape[1:], generator=source), entry, entry[0][0], f"pair {index}")


def factor_gradients(family, stack):
    """(losses, gradients of every factor) of one pass through the base."""
    objective = DiffusionObjective(family.model, stack)
    objective.prepare()
    lora = leaves(families.random_lora(family, seed=5, batch=3))
    losses = objective.backward(lora, batch_of(Pairs(family), 0, 0, 3, slice(None)), 1 / 3)
    return losses, [factor.grad for pair in lora.pairs for factor in pair]


@pytest.mark.parametrize(("name", "stack"), [(name, stack) for name, stacks in STACKS.items() for stack in stacks])
def test_gradients_of_a_checkpointed_base_are_the_same(name, stack):
    family = families.FAMILIES[name]()
    losses, expected = factor_gradients(family, None)
    again, found = factor_gradients(family, stack)
    assert torch.equal(losses, again)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    assert any(gradient.any() for gradient in found)


def test_gradients_of_a_checkpointed_generator_are_the_same():
    family = families.flux()
    gradients = []
    for recompute in (False, True):
        generator = Generator(families.generator_config(family)).initialize()
        torch.nn.init.normal_(generator.model.proj_out_B.weight, std=0.02, generator=torch.Generator().manual_seed(0))
        generator.checkpoint_blocks = recompute
        config = TrainConfig(steps=1, batch=3, warmup=0, clip=0)
        objective = DiffusionObjective(family.model, "double_blocks" if recompute else None)
        trainer = Trainer(GeneratorTrainable(generator), objective, Pairs(family), config)
        objective.prepare()
        trainer.step()
        gradients.append({name: parameter.grad for name, parameter in trainer.parameters.items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8)
    assert gradients[0]["hidden_in.weight"].any()
