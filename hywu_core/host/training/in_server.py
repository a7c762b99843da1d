"""A training run inside the host: on its memory management, with its progress bar and its cancel button.

What a run leaves behind is below <output>/hywu/<name>: its state, its log, pictures of validation pairs.
"""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch

from ...files.atomic import atomic_write
from ...files.names import below
from ...training import GeneratorTrainable, RunLog, StepReport, TrainConfig, Trainer, TrainingError
from ...training.log import STATE
from ...training.validation import averaged_weights
from .. import memory
from ..memory import GeneratorHandle
from ..model import find_stacks
from ..new_generator import check_fits
from .evaluate import losses_of
from .objective import DiffusionObjective, refuse_quantised
from .pairs_of_lists import HostPairs, host_pairs
from .previews import contact_sheet

FOLDER = "hywu"  # below the output folder
IDENTITY = "run.json"  # what a resumed run must have in common with the one it goes on with
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PREVIEW_SIDE = 512  # pixels, of the picture shown at the node
COPIES = 5  # of a generator's weights while it is trained: itself, gradients, two moments, averages


class RunOptions(NamedTuple):
    """What of a run does not decide its numbers, precision and held-out pairs excepted."""

    name: str
    precision: str = "float32"  # to compute the generator in; its weights are float32
    checkpointing: bool = True
    save_every: int = 100  # steps; 0: at the end only
    validate_every: int = 0  # steps; 0: never
    held_out: int = 0  # pairs that are not trained on
    vae: Any = None  # for pictures of validation pairs


class Trained(NamedTuple):
    """What a run gives."""

    handle: GeneratorHandle
    losses: dict[str, list[float]]  # the host's LOSS_MAP
    steps: int


def train(
    model: comfy.model_patcher.ModelPatcher,
    handle: GeneratorHandle,
    latents: Sequence[dict],
    positive: Sequence[list],
    generator_positive: Sequence | None,
    config: TrainConfig,
    options: RunOptions,
) -> Trained:
    """Train a copy of a generator to the end of its schedule, going on where a run of the same name stopped.

    Cancelling, or an error, ends it after the step that is being done; the state after the last whole step is kept.

    Raises:
        DataError, ConditionError: see `host_pairs`. MatchError: if generator and model do not fit, or the model is
            quantised. TrainingError: for a loss that is not finite, or a name that belongs to another run.
    """
    folder = run_folder(options.name)
    check_fits(model.model, handle.config)
    refuse_quantised(model.model)  # before all conditions are computed
    with torch.inference_mode(False), torch.enable_grad():
        pairs = host_pairs(model, handle.config, latents, positive, generator_positive)
        identify(folder, handle, pairs, options)
        run = _Run(model, handle, pairs, config, options, folder)
        try:
            run.run()
            return run.result()
        finally:
            run.release()


def run_folder(name: str) -> Path:
    """The folder of a run.

    Raises:
        SaveError: for a name that cannot be one, see `below`.
    """
    return below(os.path.join(folder_paths.get_output_directory(), FOLDER), name, "a run")


def identify(folder: Path, handle: GeneratorHandle, pairs: HostPairs, options: RunOptions) -> None:
    """Write down what a run is about, or make sure that an unfinished one is about the same.

    Raises:
        TrainingError: if it is not. SaveError: if the folder cannot be written to.
    """
    now = {"generator": handle.fingerprint, "pairs": len(pairs), "sizes": pairs.shapes()}
    now |= {"precision": options.precision, "held_out": options.held_out}
    path = folder / IDENTITY
    if (folder / STATE).exists() and path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            name = changed[0]
            raise TrainingError(
                f"The run {options.name!r} in {folder} was started with another {name} ({before.get(name)}, now "
                f"{now[name]}). Use a new run name, or what it was started with to go on."
            )
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(now, indent=1), encoding="utf-8")


class _Run:
    """One run, with everything that it holds in memory."""

    def __init__(
        self,
        model: comfy.model_patcher.ModelPatcher,
        handle: GeneratorHandle,
        pairs: HostPairs,
        config: TrainConfig,
        options: RunOptions,
        folder: Path,
    ):
        self.config, self.options, self.folder, self.pairs = handle.config, options, folder, pairs
        self.training, self.shown = pairs, pairs
        if options.held_out:
            self.training, self.shown = pairs.split(options.held_out)
        stacks = ",".join(stack.path for stack in find_stacks(model.model))
        self.objective = DiffusionObjective(model, stacks if options.checkpointing else None)
        self.generator = memory.trainable_copy(handle)
        self.generator.checkpoint_blocks = options.checkpointing
        self.patcher = memory.manage_training(self.generator)
        self.load()
        trainable = GeneratorTrainable(self.generator, PRECISIONS[options.precision])
        self.trainer = Trainer(trainable, self.objective, self.training, config)
        if (folder / STATE).exists():
            self.trainer.resume(folder / STATE)
            logging.info("HY-WU: the run %r goes on after %d steps.", options.name, self.trainer.done)
        self.log = RunLog(folder, self.trainer.done)
        self.bar = comfy.utils.ProgressBar(config.steps)

    def load(self) -> None:
        """Have the host load base and generator, and make room for what training needs beside them."""
        weights = sum(p.numel() * p.element_size() for p in self.generator.parameters())
        sample = self.training.samples[0]
        room = COPIES * weights + self.objective.base.memory_required((1, *sample.latent.shape))
        patchers = [self.objective.patcher, self.patcher]
        comfy.model_management.load_models_gpu(patchers, memory_required=room, force_full_load=True)

    def run(self) -> None:
        """All steps that are left."""
        self.bar.update_absolute(self.trainer.done)
        self.trainer.run(self._after_step, self.folder / STATE, self.options.save_every)

    def result(self) -> Trained:
        """The trained generator: the averaged weights, where there are such."""
        losses = self.log.losses
        config, trainer = self.config, self.trainer
        provenance = asdict(trainer.config) | {
            "run": self.options.name,
            "pairs": len(self.training),
            "precision": self.options.precision,
            "first_loss": _mean(losses[: len(losses) // 10 or 1]),
            "last_loss": _mean(losses[-(len(losses) // 10 or 1) :]),
        }
        config = replace(config, hywu={**config.hywu, "training": provenance})
        state = trainer.averaged or self.generator.state_dict()
        handle = memory.from_state(config, state, self.options.name)
        return Trained(handle, {"loss": list(losses)}, trainer.done)

    def release(self) -> None:
        """Give back the memory that only this run needed."""
        own_base = self.objective.patcher.model
        self.trainer.optimizer.zero_grad(set_to_none=True)
        self.patcher.detach()
        self.trainer = self.generator = self.patcher = self.objective = None
        del own_base
        gc.collect()
        comfy.model_management.cleanup_models_gc()
        comfy.model_management.soft_empty_cache()

    def _after_step(self, report: StepReport) -> None:
        done, every = report.step + 1, self.options.validate_every
        self.log.step(report)
        preview = self._validate(done) if every and done % every == 0 else None
        self.bar.update_absolute(done, preview=preview)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def _validate(self, done: int) -> tuple | None:
        """Measure and, with a VAE, show the generator as it would be returned now."""
        with averaged_weights(self.trainer), torch.no_grad():
            if self.options.held_out:
                loss = float(losses_of(self.objective, self.shown, self._lora_of).mean())
                self.log.validation(done - 1, loss)
                logging.info("HY-WU: %s, step %d, validation loss %.4g.", self.options.name, done, loss)
            if self.options.vae is None:
                return None
            sheet = contact_sheet(self.objective.patcher, self.options.vae, self.shown, self._lora_of)
        self.load()  # the VAE may have taken the room
        with atomic_write(self.folder / f"step-{done:06}.png") as temporary:
            sheet.save(temporary, format="PNG")
        return "JPEG", sheet, PREVIEW_SIDE

    def _lora_of(self, index: int):
        condition = self.shown.samples[index].condition.unsqueeze(0)
        return self.generator.generate(condition.to(self.patcher.load_device), dtype=PRECISIONS[self.options.precision])


def _mean(losses: list[float]) -> float | None:
    """To as many digits as the log keeps, so that a resumed run says the same."""
    return float(f"{sum(float(f'{loss:.6g}') for loss in losses) / len(losses):.6g}") if losses else None
