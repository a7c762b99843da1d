"""How well a generator does on held-out pairs, with the controls that tell routing by the condition from luck.

All losses are the base's own diffusion loss, with the same noise for every control.

Letters: N pairs · K noise levels
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from ...analysis.statistics import Interval, bootstrap
from ...lora import InstanceLora, blend
from ...training.data import Draw
from .. import memory
from ..lora import charts
from ..memory import GeneratorHandle
from ..new_generator import check_fits
from .objective import DiffusionObjective, refuse_quantised
from .pairs_of_lists import HostPairs, host_pairs

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of the sampling, noise at its start
AVERAGED = 16  # instances whose products are averaged, at most
BASE, MATCHED, SHUFFLED, AVERAGE = "base", "matched", "shuffled", "averaged"


class Evaluation(NamedTuple):
    """Losses of every pair at every noise level."""

    losses: dict[str, Tensor]  # {control: (N, K)}
    levels: tuple[float, ...]

    def gain(self, control: str) -> Interval:
        """By how much the matched LoRA's loss is lower than a control's, averaged over the levels."""
        return bootstrap((self.losses[control] - self.losses[MATCHED]).mean(1))

    @property
    def others(self) -> list[str]:
        """What the matched LoRA is compared to."""
        return [control for control in self.losses if control != MATCHED]


def evaluate_generator(
    model: comfy.model_patcher.ModelPatcher,
    handle: GeneratorHandle,
    latents: Sequence[dict],
    positive: Sequence[list],
    generator_positive: Sequence | None = None,
    seed: int = 0,
) -> tuple[Tensor, str]:
    """Measure a generator against its controls.

    Returns:
        an IMAGE (1, H, W, 3) and a table as tab-separated text.
    Raises:
        DataError, ConditionError: see `host_pairs`. MatchError: see `DiffusionObjective`.
    """
    check_fits(model.model, handle.config)
    refuse_quantised(model.model)  # before all conditions are computed
    pairs = host_pairs(model, handle.config, latents, positive, generator_positive)
    found = evaluate(DiffusionObjective(model), handle, pairs, seed)
    means = {name: values.mean(0).tolist() for name, values in found.losses.items()}
    gains = {name: tuple(found.gain(name)) for name in found.others}
    return charts.losses_by_level(found.levels, means, gains), table(found)


def evaluate(objective: DiffusionObjective, handle: GeneratorHandle, pairs: HostPairs, seed: int = 0) -> Evaluation:
    """The losses under all controls."""
    loras = [written(handle, sample.condition) for sample in pairs.samples]
    apart = partners(pairs.instructions, seed)
    chosen = range(0, len(loras), -(-len(loras) // AVERAGED))
    mean = blend([loras[i] for i in chosen], [1 / len(chosen)] * len(chosen))
    by_control: dict[str, Callable[[int], InstanceLora | None]] = {
        BASE: lambda index: None,
        MATCHED: lambda index: loras[index],
        SHUFFLED: lambda index: loras[apart[index]],
        AVERAGE: lambda index: mean,
    }
    bar = comfy.utils.ProgressBar(len(by_control) * len(pairs))
    objective.prepare()
    losses = {name: losses_of(objective, pairs, lora_of, seed, bar) for name, lora_of in by_control.items()}
    return Evaluation(losses, LEVELS)


def losses_of(
    objective: DiffusionObjective,
    pairs: HostPairs,
    lora_of: Callable[[int], InstanceLora | None],
    seed: int = 0,
    bar: comfy.utils.ProgressBar | None = None,
) -> Tensor:
    """The loss of every pair with its LoRA at every noise level (N, K). The same noise whatever the LoRA."""
    rows = []
    for index, sample in enumerate(pairs.samples):
        lora = lora_of(index)
        near = None if lora is None else lora.to(objective.patcher.load_device)
        row = [_loss(objective, near, sample, seed * 7919 + index, level) for level in LEVELS]
        rows.append(torch.tensor(row, dtype=torch.float64))
        comfy.model_management.throw_exception_if_processing_interrupted()
        if bar:
            bar.update(1)
    return torch.stack(rows)


def written(handle: GeneratorHandle, condition: Tensor) -> InstanceLora:
    """The LoRA of one assembled condition (L, input_dim)."""
    return memory.write(handle, condition.unsqueeze(0))


def partners(instructions: Sequence[str], seed: int) -> list[int]:
    """For every pair another one, of another instruction where there is one."""
    source, chosen = torch.Generator().manual_seed(seed), []
    for index, instruction in enumerate(instructions):
        others = [i for i, other in enumerate(instructions) if other != instruction]
        others = others or [i for i in range(len(instructions)) if i != index]
        chosen.append(others[int(torch.randint(len(others), (), generator=source))])
    return chosen


def table(found: Evaluation) -> str:
    """Mean losses by noise level, and how much better the matched LoRA is than each control, as tab-separated text."""
    pairs = len(found.losses[MATCHED])
    lines = ["\t".join((f"mean loss, {pairs} pairs", *(f"{level:.0%}" for level in found.levels), "all"))]
    for control, values in found.losses.items():
        numbers = [*values.mean(0).tolist(), float(values.mean())]
        lines.append("\t".join((control, *(f"{number:.4g}" for number in numbers))))
    lines.append("\t".join(("matched is better by", "mean", "95 % from", "to")))
    lines += ["\t".join((f"than {name}", *(f"{n:.4g}" for n in found.gain(name)))) for name in found.others]
    return "\n".join(lines)


def _loss(objective: DiffusionObjective, lora: InstanceLora | None, sample, seed: int, level: float) -> float:
    draw = Draw(sample, torch.Generator().manual_seed(seed))
    return float(objective.evaluate(lora, [draw], level))
