"""What the training nodes call: generators for any model, pairs from the host's lists, runs that resume, controls."""

import folder_paths
import pytest
import torch
from families import conditioning, flux, qwen_image, weights

from hywu_core.host import conditions, generators, train
from hywu_core.training import TrainConfig

PAIRS = 6


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """Runs and generators of a test are its own."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "hywu", ([str(tmp_path / "hywu")], {".safetensors"}))
    return tmp_path


def pairs(family, count=PAIRS, width=12):
    """Two kinds of edits of random pictures: what is right is the source, brighter or darker, as the words say."""
    source = torch.Generator().manual_seed(11)
    latents, positive = [], []
    for index in range(count):
        picture = torch.randn(family.latent.shape, generator=source)
        ((tokens, options),) = conditioning(width, 8, seed=index % 2)
        latents.append({"samples": picture + (1.5 if index % 2 else -1.5)})
        positive.append([[tokens, options | {"reference_latents": [picture]}]])
    return latents, positive


def new(family, positive, **settings):
    return generators.new_for(
        family.model, positive[0], settings.pop("source", "instruction and source picture"),
        **{"seed": 0, "rank": 4, "alpha": 8.0, "size": "small", **settings},
    )  # fmt: skip


def run(family, handle, latents, positive, reads=None, steps=12, name="run", **settings):
    options = train.RunOptions(**{"name": name, "checkpointing": False, **settings.pop("options", {})})
    how = TrainConfig(**{"steps": steps, "batch": 4, "learning_rate": 3e-3, "warmup": 2, **settings})
    return train.train(family.model, handle, latents, positive, reads, how, options)


@pytest.mark.parametrize("family", [lambda: flux(channels=16), qwen_image], ids=["flux", "qwen_image"])
def test_the_loss_falls_and_neither_base_nor_generator_changes(family):
    family = family()
    latents, positive = pairs(family)
    handle, before = new(family, positive), weights(family.model)
    first = {name: tensor.clone() for name, tensor in handle.generator.state_dict().items()}
    trained = run(family, handle, latents, positive, steps=60)
    losses = trained.losses["loss"]
    assert len(losses) == trained.steps == 60
    assert sum(losses[-15:]) < 0.9 * sum(losses[:15])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(family.model).items())
    assert all(torch.equal(tensor, first[name]) for name, tensor in handle.generator.state_dict().items())
    assert trained.handle.config.hywu["training"]["pairs"] == PAIRS
    lora = generators.generate(trained.handle, conditions.from_host(positive[0]))
    assert max(float(pair.up.abs().max()) for pair in lora.pairs) > 0
