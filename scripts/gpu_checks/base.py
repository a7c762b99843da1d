"""Checks of a base with a LoRA on it: the pocket editor, whose weights ship."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from in_host import ROOT

from gpu_checks.machine import Machine


class Edit(NamedTuple):
    """An edit of a random picture by the pocket editor and its own generator."""

    model: Any  # MODEL
    conditioning: list
    picture: Any  # (1, 3, H, W)
    lora: Any  # InstanceLora
    before: dict[str, Any]  # the base's weights, {name: tensor}

    @property
    def untouched(self) -> bool:
        """Whether the base is bit for bit as it was."""
        import torch

        after = self.model.model.state_dict()
        return all(torch.equal(tensor, after[name].cpu()) for name, tensor in self.before.items())


def edit_of(machine: Machine) -> Edit:
    from hywu_core import load_generator
    from hywu_core.bases import pocket
    from hywu_core.condition import CONDITIONING, Condition, ConditionPart, assemble

    model, clip, _ = pocket.load_pocket_editor()
    before = {name: tensor.to("cpu", copy=True) for name, tensor in model.model.state_dict().items()}
    (words,) = clip.encode_from_tokens_scheduled(clip.tokenize("make it brighter"))
    picture = machine.torch.rand(1, 3, 32, 32, generator=machine.torch.Generator().manual_seed(0))
    conditioning = [[words[0], words[1] | {"reference_latents": [picture * 2 - 1]}]]
    generator = load_generator(ROOT / "models" / "pocket-generator.safetensors")
    parts = {CONDITIONING: words[0]}
    wanted = [part["kind"] for part in generator.config.hywu["condition"]]
    parts |= {kind: picture * 2 - 1 for kind in wanted if kind != CONDITIONING}
    condition = Condition(tuple(ConditionPart(kind, parts[kind]) for kind in wanted))
    return Edit(model, conditioning, picture, generator.generate(assemble(condition, generator.config)), before)


def applied(machine: Machine) -> dict[str, Any]:
    """Bypass against merge, and the base afterwards, bit for bit."""
    from hywu_core.host.lora.apply import apply_lora
    from hywu_core.host.sampling import sample

    edit, pictures = edit_of(machine), {}
    for mode in ("bypass", "merge"):
        pictures[mode] = sample(
            apply_lora(edit.model, edit.lora, mode=mode)[0], edit.conditioning, edit.picture, steps=4
        )
    pictures["none"] = sample(edit.model, edit.conditioning, edit.picture, steps=4)
    return {
        "bypass_minus_merge": (pictures["bypass"] - pictures["merge"]).abs().max().item(),
        "lora_changes": (pictures["bypass"] - pictures["none"]).abs().max().item(),
        "base_bit_identical": edit.untouched,
    }


def interrupted(machine: Machine) -> dict[str, Any]:
    """The cancel button in the middle of a generate, of a sampling in either mode, and of a training step: whether it stops,
    and what is left of it on the base and in the device's memory.
    """
    held = machine.held_gb()
    found = cancelled(machine)
    return found | {"gb_not_given_back": machine.held_gb() - held}


def cancelled(machine: Machine) -> dict[str, Any]:
    """Stage by stage. A function of its own, so that nothing here keeps a model alive when memory is counted."""
    from hywu_core.host import memory

    tokens, edit, handle = machine.condition(), edit_of(machine), machine.handle()
    stages: dict[str, Callable[[], Any]] = {
        "generate": lambda: memory.write(handle, tokens, lambda done, total: press(machine)),
        "bypass": lambda: sample_and_press(machine, edit, "bypass"),
        "merge": lambda: sample_and_press(machine, edit, "merge"),
        "training": lambda: train_and_press(machine, edit),
    }
    found: dict[str, Any] = {}
    for name, run in stages.items():
        stopped = stops(machine, run)
        machine.management.unload_all_models()
        left = sum("forward" in vars(module) for module in edit.model.model.modules())
        found[name] = {"stopped": stopped, "base_bit_identical": edit.untouched, "forwards_left": left}
    return found


def press(machine: Machine) -> None:
    """The cancel button."""
    machine.management.interrupt_current_processing(True)


def stops(machine: Machine, run: Callable[[], None]) -> bool:
    """Whether it ended as the host ends what is cancelled."""
    try:
        run()
    except machine.management.InterruptProcessingException:
        return True
    finally:
        machine.management.interrupt_current_processing(False)
    return False


def sample_and_press(machine: Machine, edit: Edit, mode: str) -> None:
    import comfy.sample

    from hywu_core.host.lora.apply import apply_lora

    model, _ = apply_lora(edit.model, edit.lora, mode=mode)
    noise, empty = machine.torch.randn_like(edit.picture), machine.torch.zeros_like(edit.picture)
    with machine.torch.inference_mode():
        comfy.sample.sample(
            model, noise, 4, 1.0, "euler", "simple", edit.conditioning, edit.conditioning, empty, disable_pbar=True,
            callback=lambda *_: press(machine),
        )  # fmt: skip


def train_and_press(machine: Machine, edit: Edit) -> None:
    from hywu_core.host.training.objective import DiffusionObjective
    from hywu_core.training import Sample
    from hywu_core.training.data import Draw
    from hywu_core.training.trainable import leaves

    objective = DiffusionObjective(edit.model)
    objective.prepare()
    sample = Sample(edit.picture[0], edit.conditioning[0], edit.conditioning[0][0][0])
    second = objective.base.diffusion_model.double_blocks[1]
    hook = second.register_forward_pre_hook(lambda *_: press(machine))
    try:
        objective.backward(leaves(edit.lora), [Draw(sample, machine.torch.Generator().manual_seed(0))], 1.0)
    finally:
        hook.remove()
