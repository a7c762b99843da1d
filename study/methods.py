"""What is compared on the pocket editor, all trained by the same loop on the same data: one generator, one LoRA shared by all
edits at the same rank and at four times the rank, a LoRA for each edit with the right one chosen by hand, and the whole base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from hywu_core.bases.pocket.editor import EditorConfig
from hywu_core.condition import CONDITIONING, REFERENCE_LATENT, part_entry
from hywu_core.config import GeneratorConfig
from hywu_core.generator import Generator
from hywu_core.host.training.objective import DiffusionObjective
from hywu_core.lora import InstanceLora
from hywu_core.training import FullFineTuning, GeneratorTrainable, Sample, SharedLora, Trainable, TrainConfig
from hywu_core.training.trainable import concatenate

from .bases import FIRST
from .edits import SUITES
from .task import Case, Regime, edit_named_by

METHODS = ("shared", "shared_x4", "each", "full", "generator")
RANK, ALPHA_PER_RANK = 4, 2
PICTURE_TARGETS = {"img_attn.qkv": (1, 3), "img_attn.proj": (1, 1), "img_mlp.0": (1, 4), "img_mlp.2": (4, 1)}
TEXT_TARGETS = {name.replace("img_", "txt_"): sizes for name, sizes in PICTURE_TARGETS.items()}
# what might help the generator where it loses
GENERATORS: dict[str, dict[str, Any]] = {
    "generator": {},
    "generator_text": {"targets": PICTURE_TARGETS | TEXT_TARGETS},
    "generator_wide": {"width": 256},
}


class Run(NamedTuple):
    regime: Regime
    suite: str
    method: str
    rate: float
    seed: int = 0
    steps: int = 300
    batch: int = 8
    base: str = FIRST  # one of study.bases.BASES

    @property
    def name(self) -> str:
        """A file name; what results name is measured on the first editor unless they say so."""
        other = "" if self.base == FIRST else f"{self.base}-"
        return f"{other}{self.regime}-{self.suite}-{self.method}-{self.rate:g}-{self.steps}-s{self.seed}"

    def config(self) -> TrainConfig:
        """The same for every method but for the learning rate."""
        return TrainConfig(
            steps=self.steps, batch=self.batch, learning_rate=self.rate, warmup=self.steps // 10, seed=self.seed
        )


class LoraForEachEdit(nn.ModuleList):
    """A LoRA for every edit, of which somebody who knows the edit chooses the right one.

    Its steps are those of all: a batch trains the LoRAs of the edits that are in it.
    """

    def __init__(self, config: GeneratorConfig, edits: Sequence[str], rank: int, alpha: float, seed: int = 0):
        super().__init__(SharedLora(config, rank, alpha, seed) for _ in edits)
        self.edits = list(edits)

    def named_parameters(self, *args: Any, **kwargs: Any) -> dict[str, nn.Parameter]:
        """The factors by the edit's place."""
        return dict(super().named_parameters(*args, **kwargs))

    def graphs_at_once(self, samples: Sequence[Sample]) -> None:
        """None: the factors are the parameters."""

    def lora(self, samples: Sequence[Sample]) -> InstanceLora:
        """One instance for each sample, by the edit that its key names."""
        return concatenate([self[self.edits.index(edit_named_by(sample.key))].lora() for sample in samples])

    def chosen(self, cases: Sequence[Case]) -> InstanceLora:
        """One instance for each case, without a graph."""
        with torch.no_grad():
            return concatenate([self[case.edit].lora() for case in cases])


def generator_config(
    rank: int = RANK,
    width: int = 128,
    blocks: int = 2,
    targets: dict[str, tuple[int, int]] = PICTURE_TARGETS,
    **provenance: Any,
) -> GeneratorConfig:
    """A generator for the pocket editor, by default on the picture's attention and feed-forward of all blocks.

    It reads the encoded instruction and the source picture's latent, through one encoder layer that is trained with it.
    """
    base, patch = EditorConfig(), EditorConfig().patch_size
    parts = [part_entry(CONDITIONING, base.context_dim), part_entry(REFERENCE_LATENT, 3 * patch * patch, patch)]
    return GeneratorConfig(
        d_model=width,
        head_dim=32,
        num_pg_layers=blocks,
        input_dim=sum(part["width"] for part in parts),
        output_dim=64,
        num_base_model_layers=base.depth,
        rank=rank,
        alpha=ALPHA_PER_RANK * rank,
        token_dim=64,
        dim_accumulation=2,
        pg_mapping={
            name: {"lora_A_dim": base.width * rows, "lora_B_dim": base.width * out}
            for name, (rows, out) in targets.items()
        },
        prefix="double_blocks.",
        hywu={"base": "pocket editor", "condition": parts, "encoder_layers": 1, **provenance},
    )


def build(run: Run, model: Any) -> tuple[Trainable, DiffusionObjective]:
    """What a run trains, freshly initialised, and the objective on the base `model`."""
    if run.method == "full":
        objective = DiffusionObjective(model, train_base=True)
        return FullFineTuning(dict(objective.base.diffusion_model.named_parameters())), objective
    config = generator_config()
    if run.method in GENERATORS:
        generator = Generator(generator_config(**GENERATORS[run.method]), dtype=torch.float32).initialize(run.seed)
        return GeneratorTrainable(generator), DiffusionObjective(model)
    if run.method == "each":
        edits = [edit.name for edit in SUITES[run.suite]]
        return LoraForEachEdit(config, edits, RANK, ALPHA_PER_RANK * RANK, run.seed), DiffusionObjective(model)
    rank = RANK * (4 if run.method == "shared_x4" else 1)
    return SharedLora(config, rank, ALPHA_PER_RANK * rank, run.seed), DiffusionObjective(model)
