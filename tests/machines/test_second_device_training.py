"""A training step on a device that is not the CPU."""

import families
import pytest
import torch
from second_device import DEVICE, Elsewhere, Machine, host_on

from hywu_core import Generator
from hywu_core.host.training.objective import DiffusionObjective
from hywu_core.training import GeneratorTrainable, Sample, TrainConfig, Trainer


class Pairs:
    """Random latents, each with a conditioning of its own."""

    def __init__(self, family, count=4):
        source = torch.Generator().manual_seed(3)
        self.latents = torch.randn(count, *family.latent.shape[1:], generator=source)
        self.words = [families.conditioning(12, 8, seed=20 + index)[0] for index in range(count)]

    def __len__(self):
        return len(self.latents)

    def sample(self, index, source):
        return Sample(self.latents[index], self.words[index], self.words[index][0][0], f"pair {index}")


def train(device):
    family = families.FAMILIES["flux_double"]()
    generator, source = Generator(families.generator_config(family)).initialize(), torch.Generator().manual_seed(4)
    with torch.no_grad():  # a fresh one writes zeros, through which no gradient comes
        for parameter in generator.parameters():
            parameter += torch.randn(parameter.shape, generator=source) * 0.02
    objective = DiffusionObjective(family.model)
    objective.prepare()
    generator.to(device)
    config = TrainConfig(steps=1, batch=2, warmup=0)
    trainer = Trainer(GeneratorTrainable(generator), objective, Pairs(family), config)
    return trainer.step().loss, generator


def test_a_step_is_the_cpus():
    expected, known = train("cpu")
    with host_on(Machine()):
        found, generator = train(DEVICE)
        gradients = {name: parameter.grad.cpu() for name, parameter in generator.named_parameters()}
        assert all(isinstance(parameter.data, Elsewhere) for parameter in generator.parameters())
    assert found == pytest.approx(expected, rel=1e-4)
    for name, parameter in known.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-3)
