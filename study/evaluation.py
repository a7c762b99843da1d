"""Measuring a method on held-out pictures: sampled PSNR case by case, with the controls that tell routing from luck."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hywu_core.analysis.statistics import psnr
from hywu_core.generator import Generator
from hywu_core.host.lora.apply import apply_lora
from hywu_core.host.sampling import sample
from hywu_core.host.training.objective import DiffusionObjective
from hywu_core.lora import InstanceLora, LoraFactor, blend
from hywu_core.training.data import Draw
from hywu_core.training.trainable import leaves

from .edits import opposite
from .task import Case, EditingTask, from_latent

STEPS, SEED = 8, 0
CHUNK = 32  # pictures of one pass
CONTROLS = ("matched", "words", "other_image", "averaged", "shuffled", "opposite")


def edited(model: Any, task: EditingTask, cases: Sequence[Case], lora: InstanceLora | None = None) -> Tensor:
    """The editor's answers to the cases: pictures (B, 3, H, W) in [0, 1].

    Args:
        lora: one instance for each case, or one for all, or none.
    """
    if lora is not None:
        model, _ = apply_lora(model, lora, mode="bypass")
    return from_latent(sample(model, task.conditioning(cases), task.sources(cases), STEPS, SEED))


def score(
    model: Any,
    task: EditingTask,
    cases: Sequence[Case],
    lora_of: Callable[[Sequence[Case]], InstanceLora | None] = lambda cases: None,
) -> Tensor:
    """PSNR in dB of every case (N,)."""
    scores = [psnr(edited(model, task, part, lora_of(part)), task.targets(part)) for part in chunks(cases)]
    return torch.cat(scores)


def control_cases(task: EditingTask, cases: Sequence[Case]) -> dict[str, list[Case]]:
    """For every control, from which case's condition the LoRA of each case is generated."""
    count, edits = len(cases), len(task.edits)
    return {
        "matched": list(cases),
        "words": [case._replace(wording=(case.wording + 1) % len(task.words[case.edit])) for case in cases],
        "other_image": [case._replace(picture=cases[(i + edits) % count].picture) for i, case in enumerate(cases)],
        "shuffled": [case._replace(edit=(case.edit + 3) % edits) for case in cases],  # never itself nor its opposite
        "opposite": [case._replace(edit=opposite(task.edits, case.edit)) for case in cases],
    }


def score_generator(generator: Generator, model: Any, task: EditingTask, cases: Sequence[Case]) -> dict[str, Tensor]:
    """PSNR (N,) of every case under each of CONTROLS."""
    scores = {}
    for control, sources in control_cases(task, cases).items():
        source_of = dict(zip(cases, sources, strict=True))
        scores[control] = score(
            model, task, cases, lambda part, of=source_of: write(generator, task, [of[case] for case in part])
        )
    mean = averaged(generator, task, cases)
    scores["averaged"] = score(model, task, cases, lambda part: mean)
    return {control: scores[control] for control in CONTROLS}


def write(generator: Generator, task: EditingTask, cases: Sequence[Case]) -> InstanceLora:
    """The LoRAs of cases, one instance each."""
    return generator.generate(task.condition(cases))


def averaged(generator: Generator, task: EditingTask, cases: Sequence[Case], per_edit: int = 2) -> InstanceLora:
    """The mean of the products B.A over instances of all edits, exactly, as one LoRA of a higher rank."""
    chosen = [case for edit in range(len(task.edits)) for case in [c for c in cases if c.edit == edit][:per_edit]]
    lora = write(generator, task, chosen)
    return blend([lora.select(index) for index in range(lora.batch)], [1 / lora.batch] * lora.batch)


def write_all(generator: Generator, task: EditingTask, cases: Sequence[Case]) -> InstanceLora:
    """The LoRAs of many cases, written in parts."""
    parts = [write(generator, task, part) for part in chunks(cases)]
    joined = {
        name: LoraFactor(*(torch.cat(factors) for factors in zip(*(part.factors[name] for part in parts), strict=True)))
        for name in parts[0].names
    }
    return InstanceLora(joined, parts[0].scale, parts[0].metadata)


def gradient_products(
    objective: DiffusionObjective, lora: InstanceLora, task: EditingTask, pictures: int = 16, seed: int = 0
) -> Tensor:
    """Inner products (edits, edits) of the gradients that edits send to one shared LoRA, over the same pictures and noise."""
    objective.prepare()
    rows = []
    for edit in range(len(task.edits)):
        leaf = leaves(lora)
        draws = [
            Draw(task.pair(Case(picture, edit)), torch.Generator().manual_seed(seed + picture))
            for picture in range(pictures)
        ]
        objective.backward(leaf, draws, 1 / pictures)
        rows.append(torch.cat([factor.grad.flatten() for pair in leaf.pairs for factor in pair]))
    gradients = torch.stack(rows).double()
    return gradients @ gradients.T


def chunks(cases: Sequence[Case]) -> Iterator[Sequence[Case]]:
    """Parts small enough for one pass."""
    return (cases[start : start + CHUNK] for start in range(0, len(cases), CHUNK))
