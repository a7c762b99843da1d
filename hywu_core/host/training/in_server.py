"""A training session behind the node: its folder, its progress bar and text, its pictures, its cancel button.

What a run leaves behind is below <output>/hywu/<name>; generators that are kept on the way are in models/hywu/<name>.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from comfy_execution.utils import get_executing_context

from ...errors import SaveError
from ...files.safetensors import atomic_write
from ...training import SessionOptions, TrainConfig
from .. import folders, streaming
from ..memory import GeneratorHandle
from ..new_generator import check_fits
from .frozen import refuse_untrainable
from .pairs_of_lists import HostPairs, host_pairs
from .previews import contact_sheet
from .session import Front, Progress, Session, Task

FOLDER = "hywu"  # below the output folder
GENERATOR = "generator.safetensors"  # in a run's folder
PREVIEW_SIDE = 512  # pixels, of the picture shown at the node
SHOW_AGAIN = 1.0  # seconds


class Result(NamedTuple):
    """What a run gives."""

    handle: GeneratorHandle
    losses: dict[str, list[float]]  # the host's LOSS_MAP
    steps: int


def train_on_lists(
    model: comfy.model_patcher.ModelPatcher,
    handle: GeneratorHandle,
    latents: Sequence[dict],
    positive: Sequence[list],
    generator_positive: Sequence | None,
    config: TrainConfig,
    options: SessionOptions,
    name: str,
    held_out: int = 0,
    vae: Any = None,
) -> Result:
    """Train a copy of a generator to the end of its schedule, going on where a run of the same name stopped.

    Cancelling, or an error, ends it after the step that is being done; state and generator of the last whole step are kept.

    Args:
        held_out: pairs that are not trained on.
        vae: for pictures of validation pairs.
    Raises:
        PairError, ConditionError: see `host_pairs`. MatchError: if generator and model do not fit, or the model cannot be
            trained on. TrainingError: for a loss that is not finite, or a name that belongs to another run.
    """
    folder = run_folder(name)
    check_fits(model.model, handle.config)
    # before all conditions are computed
    refuse_untrainable(model.model)
    with torch.inference_mode(False), torch.enable_grad():
        pairs = host_pairs(model, handle.config, latents, positive, generator_positive)
        identity = {**pairs.identity(), "held_out": held_out}
        training, shown = pairs.split(held_out) if held_out else (pairs, pairs)
        task = Task(model, handle, training, shown if held_out else None, identity, {"run": name})
        front = ServerFront(folder, name, config, shown, vae)
        session = Session(task, config, options, folder, front)
        try:
            front.bar.update_absolute(session.trainer.done)
            session.run()
            return Result(session.result(name), {"loss": session.losses}, session.trainer.done)
        finally:
            session.release()


def run_folder(name: str) -> Path:
    """The folder of a run.

    Raises:
        SaveError: for a name that is empty or leads out of the output folder.
    """
    root = Path(os.path.normpath(os.path.join(folder_paths.get_output_directory(), FOLDER)))
    folder = Path(os.path.normpath(root / name.strip()))
    if not name.strip() or folder == root or not folder.is_relative_to(root):
        raise SaveError(
            f"{name!r} is no name for a run. Use a plain name such as my-edits; its folder is made in {root}."
        )
    return folder


class ServerFront(Front):
    """The node that trains."""

    def __init__(self, folder: Path, name: str, config: TrainConfig, shown: HostPairs, vae: Any):
        self.folder, self.name, self.shown, self.vae = folder, name, shown, vae
        self.bar = comfy.utils.ProgressBar(config.steps)
        context = get_executing_context()
        self.text = streaming.on_node(context.node_id if context else None)
        self._next, self._sheet = 0.0, None

    def generator_file(self, step: int | None) -> Path:
        if step is None:
            return self.folder / GENERATOR
        return (
            Path(folder_paths.get_folder_paths(folders.FOLDER)[0]) / self.name.strip() / f"step-{step:06}.safetensors"
        )

    def say(self, text: str) -> None:
        logging.info("HY-WU: %s", text)
        if self.text:
            self.text(text)

    def show(self, progress: Progress) -> None:
        self.bar.update_absolute(progress.done, preview=self._sheet)
        self._sheet = None
        last = progress.done == progress.steps
        if self.text and (last or time.monotonic() >= self._next):
            self._next = time.monotonic() + SHOW_AGAIN
            self.text(str(progress))

    def preview(self, session: Session) -> None:
        if self.vae is None:
            return
        sheet = contact_sheet(session.objective.patcher, self.vae, self.shown, session.lora)
        # the VAE may have taken the room
        session.load()
        with atomic_write(self.folder / f"step-{session.trainer.done:06}.png") as temporary:
            sheet.save(temporary, format="PNG")
        self._sheet = "JPEG", sheet, PREVIEW_SIDE

    def check(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
