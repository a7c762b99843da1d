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
from ...messages import Message, listed
from ...training.data import Draw
from .. import memory
from ..cards import NOTICE, Card
from ..lora import charts
from ..memory import GeneratorHandle
from ..new_generator import check_fits
from .frozen import refuse_untrainable
from .objective import DiffusionObjective
from .pairs_of_lists import HostPairs, host_pairs

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of the sampling, noise at its start
AVERAGED = 16  # instances whose products are averaged, and that are held at once, at most
ARTISTS = {
    "base": Message("no LoRA"),
    "shuffled": Message("another pair's LoRA"),
    "averaged": Message("one average LoRA for all"),
}
CONTROLS = BASE, MATCHED, SHUFFLED, AVERAGE = "base", "matched", "shuffled", "averaged"


class Evaluation(NamedTuple):
    """Losses of every pair at every noise level."""

    losses: dict[str, Tensor]  # {control: (N, K)}
    levels: tuple[float, ...]

    def gain(self, control: str) -> Interval:
        """By how much the matched LoRA's loss is lower than a control's, averaged over the levels."""
        return bootstrap((self.losses[control] - self.losses[MATCHED]).mean(1))

    @property
    def others(self) -> list[str]:
        return [control for control in self.losses if control != MATCHED]


def evaluate_generator(
    model: comfy.model_patcher.ModelPatcher,
    handle: GeneratorHandle,
    latents: Sequence[dict],
    positive: Sequence[list],
    generator_positive: Sequence | None = None,
    seed: int = 0,
) -> tuple[Tensor, str, Card]:
    """Measure a generator against its controls.

    Returns:
        an IMAGE (1, H, W, 3) and a table as tab-separated text.
    Raises:
        PairError, ConditionError: see `host_pairs`. MatchError: see `DiffusionObjective`.
    """
    check_fits(model.model, handle.config)
    refuse_untrainable(model.model)  # before all conditions are computed
    pairs = host_pairs(model, handle.config, latents, positive, generator_positive)
    found = evaluate(DiffusionObjective(model), handle, pairs, seed)
    means = {name: values.mean(0).tolist() for name, values in found.losses.items()}
    gains = {name: tuple(found.gain(name)) for name in found.others}
    return charts.losses_by_level(found.levels, means, gains), table(found), card(found)


def evaluate(objective: DiffusionObjective, handle: GeneratorHandle, pairs: HostPairs, seed: int = 0) -> Evaluation:
    """The losses under all controls. Every LoRA is written once; a group of them is held at a time."""
    count, apart = len(pairs), partners(pairs.instructions, seed)
    averaged = list(range(0, count, -(-count // AVERAGED)))
    rest = [index for index in range(count) if index not in averaged]
    groups = [averaged, *(rest[start : start + AVERAGED] for start in range(0, len(rest), AVERAGED))]
    losses = {name: torch.zeros(count, len(LEVELS), dtype=torch.float64) for name in CONTROLS}
    bar = comfy.utils.ProgressBar(len(CONTROLS) * count)

    def measure(control: str, index: int, lora: InstanceLora | None) -> None:
        losses[control][index] = _losses(objective, pairs, index, lora, seed, bar)

    def measure_group(group: list[int]) -> None:
        loras = {index: written(handle, pairs.samples[index].condition) for index in group}
        # the generator may have taken the base's place
        objective.prepare()
        if group is averaged:
            mean = blend(list(loras.values()), [1 / len(group)] * len(group))
            for index in range(count):
                measure(BASE, index, None)
                measure(AVERAGE, index, mean)
        for index, lora in loras.items():
            measure(MATCHED, index, lora)
            for other in (place for place, partner in enumerate(apart) if partner == index):
                measure(SHUFFLED, other, lora)

    for group in groups:
        measure_group(group)
    return Evaluation(losses, LEVELS)


def losses_of(
    objective: DiffusionObjective,
    pairs: HostPairs,
    lora_of: Callable[[int], InstanceLora | None],
    seed: int = 0,
    bar: comfy.utils.ProgressBar | None = None,
) -> Tensor:
    """The loss of every pair with its LoRA at every noise level (N, K). The same noise whatever the LoRA."""
    rows = [_losses(objective, pairs, index, lora_of(index), seed, bar) for index in range(len(pairs))]
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


def card(found: Evaluation) -> Card:
    """What the controls say, in a sentence; a notice where the generator ignores what it reads."""
    rows = tuple(
        (Message("Better than {other}", other=ARTISTS[name]), _gain(found.gain(name))) for name in found.others
    )
    tied = [ARTISTS[name] for name in found.others if found.gain(name)[1] <= 0]
    pairs = Message(
        "Measured on {count} pairs; what is compared is the base's error.", count=len(found.losses[MATCHED])
    )
    if tied:
        others = listed(tied, "{first} and {second}")
        note = Message("Not clearly better than {others}: train longer, or on more pairs.", others=others)
        return Card("The right LoRA makes no clear difference", rows, (note, pairs), NOTICE)
    return Card("The right LoRA is better than every other", rows, (pairs,))


def _gain(gain: Interval) -> Message:
    mean, low, high = (f"{number:.3g}" for number in gain)
    return Message("{mean}  (95 %: {low} to {high})", mean=mean, low=low, high=high)


def _losses(
    objective: DiffusionObjective,
    pairs: HostPairs,
    index: int,
    lora: InstanceLora | None,
    seed: int,
    bar: comfy.utils.ProgressBar | None,
) -> Tensor:
    """The loss of one pair at every noise level (K)."""
    near = None if lora is None else lora.to(objective.patcher.load_device)
    noise = (seed * 7919 + index) % 2**63  # what a random generator takes
    row = []
    for level in LEVELS:
        draw = Draw(pairs.samples[index], torch.Generator().manual_seed(noise))
        row.append(float(objective.evaluate(near, [draw], level)))
        comfy.model_management.throw_exception_if_processing_interrupted()
    if bar:
        bar.update(1)
    return torch.tensor(row, dtype=torch.float64)
