"""Checks of training: gradients against float64, and what a step takes on bases in the host's formats. Bases are random, of
the pocket editor's kind, which is the host's own Flux.
"""

from __future__ import annotations

from typing import Any

from bench_training import RandomPairs, generator_for
from quantised_editor import quantised_editor

from gpu_checks.machine import Machine

KINDS = {"plain": None, "fp8": "float8_e4m3fn", "int8": "int8_tensorwise", "nvfp4": "nvfp4"}  # ours: the host's
ROTARY = (16, 56, 56)  # a head's, in every Flux of full width
ROOM_GB = 1.5  # of a device that the base of the gradients, with its activations, does not fit


def gradients(machine: Machine) -> dict[str, Any]:
    """Of a LoRA's factors, in every way that the host manages memory, and on a device too small for the base."""
    found = {"here": gradients_here(machine)}
    if machine.cpu:
        return found
    total = machine.management.get_total_memory(machine.device) / 1024**3
    reserve = "--reserve-vram", f"{total - ROOM_GB:.2f}"
    ways = {"plain memory": (), "plain memory, little of it": reserve}
    found["little memory"] = machine.again("gradients_here", *reserve)
    return found | {
        name: machine.again("gradients_here", "--disable-dynamic-vram", *more) for name, more in ways.items()
    }


def gradients_here(machine: Machine) -> dict[str, Any]:
    """As far off as the device's are from float64 on the CPU."""
    from hywu_core.bases.pocket import EditorConfig, load_editor, save_editor
    from hywu_core.bases.pocket.editor import editor_from_state, initial_state

    torch = machine.torch
    config = EditorConfig(depth=2) if machine.small else EditorConfig(width=1024, heads=32, depth=8)
    state = initial_state(config, 0)
    model = load_editor(save_editor(state, config, machine.folder / "editor.safetensors", dtype=torch.float32))
    found = factor_gradients(machine, model, config)
    reference = editor_from_state(state, config, disable_dynamic=True)
    reference.load_device = torch.device("cpu")
    reference.model.double().diffusion_model.dtype = torch.float64
    reference.model.manual_cast_dtype = None
    expected = factor_gradients(machine, reference, config)
    error = ((found - expected).norm() / expected.norm()).item()
    computed = str(model.model.get_dtype_inference()).removeprefix("torch.")
    return {"relative_error": error, "computed_in": computed, "base_gb": model.model_size() / 1e9}


def factor_gradients(machine: Machine, model: Any, config: Any) -> Any:
    """All of them in one vector, of two pairs, in float64 on the CPU."""
    from hywu_core.host.training.objective import DiffusionObjective
    from hywu_core.layout import all_targets
    from hywu_core.lora import InstanceLora, LoraFactor
    from hywu_core.training.data import batch_of
    from hywu_core.training.trainable import leaves

    torch, source = machine.torch, machine.torch.Generator().manual_seed(2)
    objective = DiffusionObjective(model)
    objective.prepare()
    dtype = torch.float64 if objective.base.get_dtype() == torch.float64 else torch.float32
    written = generator_for(config, d_model=32, num_pg_layers=1, output_dim=32, token_dim=32, rank=8)
    pairs = {}
    for name, target in all_targets(written):
        down = torch.randn(2, *target.down_shape(8), generator=source) / target.in_features**0.5
        up = 0.1 * torch.randn(2, *target.up_shape(8), generator=source)
        pairs[name] = LoraFactor(*(factor.to(objective.patcher.load_device, dtype) for factor in (down, up)))
    lora = leaves(InstanceLora(pairs))
    objective.backward(lora, batch_of(RandomPairs(32), 0, 0, 2, slice(None)), 0.5)
    machine.management.unload_all_models()
    return torch.cat([factor.grad.double().cpu().flatten() for pair in lora.pairs for factor in pair])


def steps(machine: Machine, kind: str) -> dict[str, Any]:
    """Seconds and peak of a training step of one pair at 512x512 with a reference, on four blocks as wide as Flux.1's."""
    from hywu_core import Generator
    from hywu_core.bases.pocket import EditorConfig
    from hywu_core.bases.pocket.editor import editor_from_state, initial_state
    from hywu_core.host.training.objective import DiffusionObjective
    from hywu_core.training import GeneratorTrainable, TrainConfig, Trainer

    torch = machine.torch
    config = EditorConfig(depth=2) if machine.small else EditorConfig(width=3072, heads=24, depth=4, axes_dim=ROTARY)
    state = {name: tensor.to(machine.dtype) for name, tensor in initial_state(config, 0).items()}
    if KINDS[kind] is None:
        model = editor_from_state(state, config, disable_dynamic=True)
    else:
        model = quantised_editor(state, config, KINDS[kind], machine.dtype)
    written = generator_for(config, d_model=128, num_pg_layers=2, output_dim=64, token_dim=64, rank=16)
    generator = Generator(written, dtype=torch.float32).initialize().to(machine.device)
    generator.checkpoint_blocks = True
    objective = DiffusionObjective(model, "double_blocks")
    objective.prepare()
    side = 4 * (4 if machine.small else 32)  # as many tokens as a picture of 512x512 has in Flux
    trainable = GeneratorTrainable(generator, machine.dtype)
    trainer = Trainer(trainable, objective, RandomPairs(side), TrainConfig(steps=100, batch=1))
    losses: list[float] = []

    def step() -> None:
        losses.append(trainer.step().loss)

    seconds = machine.seconds(step)
    found = {"seconds": seconds, **machine.peak_gb(step), "base_gb": model.model_size() / 1e9, "first_loss": losses[0]}
    machine.management.unload_all_models()
    return found
