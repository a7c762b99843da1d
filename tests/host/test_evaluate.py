"""Evaluation in bounded memory: the numbers of the controls, however many pairs there are."""

import weakref

import families
import pytest
import torch

from hywu_core.host import memory
from hywu_core.host.training import evaluate, pairs_of_lists
from hywu_core.lora import blend

COUNT = 7


@pytest.fixture
def held_out():
    source = torch.Generator().manual_seed(3)
    family = families.flux(channels=16)
    latents = [{"samples": torch.randn(family.latent.shape, generator=source)} for _ in range(COUNT)]
    positive = []
    for index in range(COUNT):
        ((tokens, options),) = families.conditioning(12, 8, seed=index % 4)
        positive.append([[tokens, options | {"reference_latents": [latents[index - 1]["samples"]]}]])
    handle = memory.new_for(family.model, positive[0], "instruction", 0, rank=2, alpha=4.0)
    handle.generator.requires_grad_(False)
    for parameter in handle.generator.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=source) * 0.05)
    return family.model, handle, pairs_of_lists.host_pairs(family.model, handle.config, latents, positive)


def test_a_few_loras_are_held_at_a_time_and_the_numbers_are_those_of_all(held_out, monkeypatch):
    model, handle, pairs = held_out
    monkeypatch.setattr(evaluate, "AVERAGED", 2)
    write, alive, most = evaluate.written, [], 0

    def counted(*arguments):
        nonlocal most
        lora = write(*arguments)
        alive.append(weakref.ref(lora.pairs[0].up))
        most = max(most, sum(one() is not None for one in alive))
        return lora

    monkeypatch.setattr(evaluate, "written", counted)
    objective = evaluate.DiffusionObjective(model)
    found = evaluate.evaluate(objective, handle, pairs, seed=5)
    assert most == 2 and len(alive) == COUNT

    loras = [write(handle, sample.condition) for sample in pairs.samples]
    apart = evaluate.partners(pairs.instructions, 5)
    mean = blend([loras[0], loras[4]], [0.5, 0.5])
    expected = {
        "base": lambda index: None,
        "matched": lambda index: loras[index],
        "shuffled": lambda index: loras[apart[index]],
        "averaged": lambda index: mean,
    }
    assert list(found.losses) == list(expected)
    for name, lora_of in expected.items():
        torch.testing.assert_close(
            found.losses[name], evaluate.losses_of(objective, pairs, lora_of, 5), atol=1e-6, rtol=1e-6
        )
    assert not torch.equal(found.losses["matched"], found.losses["shuffled"])


def test_the_largest_seed_that_the_node_takes(held_out):
    model, handle, pairs = held_out
    found = evaluate.evaluate(evaluate.DiffusionObjective(model), handle, pairs.chosen([0, 1]), seed=0x7FFFFFFFFFFFFFFF)
    assert all(torch.isfinite(losses).all() for losses in found.losses.values())


def test_an_empty_latent_is_named(held_out):
    model, handle, _ = held_out
    empty = [{"samples": torch.zeros(1, 16, 0, 0)}] * 2
    with pytest.raises(pairs_of_lists.PairError, match="latent of pair 1 is empty: its picture is too small"):
        pairs_of_lists.host_pairs(model, handle.config, empty, [families.conditioning(12, 8)] * 2)
