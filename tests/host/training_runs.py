"""Pairs, generators and runs of the training nodes, for the tests of them; `output` keeps what a test writes its own."""

import comfy.model_management
import torch
from families import Family, conditioning

from hywu_core.host import memory
from hywu_core.host.training import in_server
from hywu_core.training import SessionOptions, TrainConfig

PAIRS = 6


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
    return memory.new_for(
        family.model, positive[0], settings.pop("source", "instruction and source picture"),
        **{"seed": 0, "rank": 4, "alpha": 8.0, "size": "small", **settings},
    )  # fmt: skip


def run(family, handle, latents, positive, reads=None, steps=12, name="run", **settings):
    given = {"validate_every": 0, "checkpointing": False, "held_out": 0, "vae": None, **settings.pop("options", {})}
    held_out, vae, recompute = (given.pop(name) for name in ("held_out", "vae", "checkpointing"))
    options = SessionOptions(**{"checkpoint_stack": "all" * recompute, "checkpoint_generator": recompute} | given)
    how = TrainConfig(**{"steps": steps, "batch": 4, "learning_rate": 3e-3, "warmup": 2, **settings})
    return in_server.train_on_lists(
        family.model if isinstance(family, Family) else family,
        handle,
        latents,
        positive,
        reads,
        how,
        options,
        name,
        held_out,
        vae,
    )


def interrupted_after(steps, work):
    """Press Cancel after some steps of training."""
    show = in_server.ServerFront.show

    def pressing(self, progress):
        if progress.done == steps:
            comfy.model_management.interrupt_current_processing()
        show(self, progress)

    in_server.ServerFront.show = pressing
    try:
        return work()
    finally:
        in_server.ServerFront.show = show
        comfy.model_management.interrupt_current_processing(False)


def same(one, other):
    """Whether two generators have the same weights."""
    states = [handle.generator.state_dict() for handle in (one, other)]
    return all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
