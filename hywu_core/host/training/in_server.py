"""A training session behind the node: its folder, its progress bar and text, its pictures, its cancel button.

What a run leaves behind is below <output>/hywu/<name>; generators that are kept on the way are in models/hywu/<name>.
"""

from __future__ import annotations

import hashlib
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

from ...errors import SaveError
from ...files.atomic import atomic_write
from ...files.names import below
from ...lineage import instructions as as_kept
from ...messages import Message
from ...training import SessionOptions, TrainConfig
from .. import cards, folders
from ..cards import CURVE, GOOD, NOTICE, Card, Chart
from ..memory import GeneratorHandle
from ..new_generator import check_fits
from . import teach
from .frozen import refuse_untrainable
from .lessons import Encoding, HostLesson, LessonError, Picture, ask, remembering
from .pairs_of_lists import HostPairs, host_pairs
from .previews import contact_sheet
from .session import Front, Progress, Session, Task, step_of
from .teach import NewEdit, Studio

FOLDER = "hywu"  # below the output folder
GENERATOR = "generator.safetensors"  # in a run's folder
LORA_FOLDER = "loras"  # the host's
SHOW_AGAIN = 1.0  # seconds


class Result(NamedTuple):
    """What a node gives of a session."""

    handle: GeneratorHandle
    losses: dict[str, list[float]]  # the host's LOSS_MAP
    steps: int
    card: Card
    report: Message | str = ""


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
    instructions: Sequence[str] = (),
    remember: Remember | None = None,
) -> Result:
    """Train a copy of a generator to the end of its schedule, going on where a run of the same name stopped.

    Cancelling, or an error, ends it after the step that is being done; state and generator of the last whole step are kept.

    Args:
        held_out: pairs that are not trained on.
        vae: for pictures of validation pairs.
        instructions: those of the pairs, for the generator's file.
        remember: what to stay with, where `config` gives it a weight.
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
        lessons, kept = _lessons(model, handle, training, config, options, remember)
        texts = as_kept(instructions)
        regime = training.regime
        provenance = {"run": name} | ({"regime": regime} if regime else {})
        task = Task(model, handle, training, shown if held_out else None, identity, provenance, texts, kept, lessons)
        front = ServerFront(folder, name, config.steps, shown, vae)
        session = Session(task, config, options, folder, front)
        try:
            front.bar.update_absolute(session.trainer.done)
            session.run()
            losses, done = session.losses, session.trainer.done
            return Result(session.result(name), {"loss": losses}, done, front.finished(losses, done))
        finally:
            session.release()


class Remember(NamedTuple):
    """What a run is to stay with while it learns other pairs."""

    clip: Any = None  # the host's CLIP, for the old instructions
    old_instructions: Sequence[str] = ()  # by default those that the teacher's file names
    teacher: GeneratorHandle | None = None  # by default the generator that is trained further


def _lessons(
    model: comfy.model_patcher.ModelPatcher,
    handle: GeneratorHandle,
    pairs: HostPairs,
    config: TrainConfig,
    options: SessionOptions,
    remember: Remember | None,
) -> tuple[tuple[HostLesson, ...], tuple[str, ...]]:
    """A memory on the sources of pairs, if it has a weight; and its instructions."""
    remember = remember or Remember()
    old = as_kept(remember.old_instructions)
    if not config.memory:
        if remember.clip is not None or old or remember.teacher:
            raise LessonError("clip, old_instructions and teacher have no effect with a memory of 0. Give it a weight.")
        return (), ()
    if remember.clip is None:
        raise LessonError("memory asks old instructions, so it needs the base's text encoder. Wire clip.")
    teacher = remember.teacher or handle
    texts = teach.old_instructions(teacher, old)
    sources = [Picture(latent) for latent in pairs.sources(teach.ASKED_ABOUT)]
    asked = ask(texts, sources, Encoding(remember.clip, model), handle.config, progress=_interruptible)
    return (remembering(teacher, handle.config, asked, config, options.precision),), texts


def teach_on_server(
    studio: Studio,
    handle: GeneratorHandle,
    new: NewEdit,
    old: Sequence[str],
    pictures: Sequence[torch.Tensor],
    config: TrainConfig,
    options: SessionOptions,
    name: str,
    regime: str,
) -> Result:
    """Teach a copy of a generator one new edit.

    Raises:
        HywuError: see `teach.prepare_teaching` and `Session`.
    """
    folder = run_folder(name)
    task, pairs = teach.prepare_teaching(studio, handle, new, old, pictures, config, options, regime, _interruptible)
    front = ServerFront(folder, name, config.steps, pairs, studio.vae)
    return _result(teach.do(_named(task, name), config, options, folder, front, name), front)


def learn_on_server(
    studio: Studio,
    handle: GeneratorHandle,
    loras: str,
    pictures: Sequence[torch.Tensor],
    config: TrainConfig,
    options: SessionOptions,
    name: str,
) -> Result:
    """Train a copy of a generator on the LoRAs of a folder below models/loras.

    Raises:
        HywuError: see `teach.prepare_learning` and `Session`.
    """
    folder = run_folder(name)
    task = teach.prepare_learning(studio, handle, lora_folder(loras), pictures, config, _interruptible)
    front = ServerFront(folder, name, config.steps)
    return _result(teach.do(_named(task, name), config, options, folder, front, name), front)


def _result(found: teach.Result, front: ServerFront) -> Result:
    card = front.finished(found.losses, found.steps, (found.summary,))
    return Result(found.handle, {"loss": found.losses}, found.steps, card, found.report)


def lora_folders() -> list[str]:
    """Folders below the host's folders of LoRAs that hold files, to choose from; "." is the first of those folders itself."""
    return sorted(_lora_folders())


def lora_folder(name: str) -> Path:
    """Resolve a name that `lora_folders` listed.

    Raises:
        LessonError: if none of the host's folders has it.
    """
    found = _lora_folders().get(name)
    if found is None:
        roots = folder_paths.get_folder_paths(LORA_FOLDER)
        raise LessonError(f"There is no folder {name!r} with LoRA files in {', '.join(roots)}.")
    return found


def _lora_folders() -> dict[str, Path]:
    """By their names. Where two roots have folders of one name, the later one's begins with the root's own: output/loras."""
    below = {Path(name).parent.as_posix() for name in folder_paths.get_filename_list(LORA_FOLDER)}
    found: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths(LORA_FOLDER)):
        for name in sorted(below):
            path = Path(os.path.normpath(root / name))
            if any(path.glob("*.safetensors")):
                longer = Path(root.parent.name, root.name, name).as_posix()
                found.setdefault(longer if name in found else name, path)
    return found


def fingerprint(name: str) -> str:
    """Changes with every file of a folder of LoRAs, so that it is learned from again."""
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in lora_folder(name).iterdir())
    return hashlib.sha256(repr(files).encode()).hexdigest()


def run_folder(name: str) -> Path:
    """The folder of a run.

    Raises:
        SaveError: for a name that cannot be one, see `below`.
    """
    return below(os.path.join(folder_paths.get_output_directory(), FOLDER), name, "a run")


def _named(task: Task, name: str) -> Task:
    return task._replace(provenance={**task.provenance, "run": name})


def _interruptible(done: int, total: int) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


class ServerFront(Front):
    """The node that trains: its bar, its card, its cancel button."""

    def __init__(self, folder: Path, name: str, steps: int, shown: HostPairs | None = None, vae: Any = None):
        self.folder, self.name, self.steps, self.shown, self.vae = folder, name, steps, shown, vae
        self.bar = comfy.utils.ProgressBar(steps)
        self.draw = cards.of_this_node()
        self._next, self._picture, self._progress = 0.0, None, None

    def generator_file(self, step: int | None) -> Path:
        if step is None:
            return self.folder / GENERATOR
        root = folder_paths.get_folder_paths(folders.FOLDER)[0]
        return below(root, self.name, "a run") / f"step-{step:06}.safetensors"

    def say(self, text: Message) -> None:
        logging.info("HY-WU: %s", text)
        self._draw(self._card("Getting ready" if self._progress is None else "Training", notes=(text,)))

    def stopped(self, text: Message) -> None:
        logging.info("HY-WU: %s", text)
        again = Message("Run the workflow again to go on from here.")
        self._draw(self._card("Stopped. Nothing is lost.", NOTICE, (again, text)))

    def show(self, progress: Progress) -> None:
        self.bar.update_absolute(progress.done)
        self._progress, last = progress, progress.done == progress.steps
        if last or time.monotonic() >= self._next:
            self._next = time.monotonic() + SHOW_AGAIN
            self._draw(self._card("Training"))

    def preview(self, session: Session) -> None:
        if self.vae is None or self.shown is None:
            return
        sheet = contact_sheet(session.objective.patcher, self.vae, self.shown, session.lora)
        # the VAE may have taken the room
        session.load()
        name = f"step-{session.trainer.done:06}.png"
        try:
            with atomic_write(self.folder / name) as temporary:
                sheet.save(temporary, format="PNG")
        except SaveError as error:
            logging.warning("HY-WU: %s The run goes on.", error)
            return
        below_output = os.path.relpath(self.folder, folder_paths.get_output_directory())
        self._picture = {"filename": name, "subfolder": Path(below_output).as_posix(), "type": "output"}

    def check(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    def finished(self, losses: Sequence[float], done: int, notes: Sequence[Message] = ()) -> Card:
        """What the node shows from then on."""
        # as an artist looks for it
        shown = os.path.relpath(self.folder, os.path.dirname(folder_paths.get_output_directory()))
        where = Message("Logs and the generator are in {folder}.", folder=Path(shown).as_posix())
        card = self._card("Trained", notes=(*notes, where))
        if self._progress is None:
            # nothing was left to do
            curve = (Chart(CURVE, "Loss", tuple(losses)),) if losses else ()
            card = card._replace(rows=(("Step", step_of(done, self.steps)),), charts=curve)
        return card

    def _draw(self, card: Card) -> None:
        if self.draw:
            self.draw(card)

    def _card(self, title: str, level: str = GOOD, notes: Sequence[Message] = ()) -> Card:
        rows = self._progress.rows() if self._progress else ()
        losses = self._progress.losses if self._progress else ()
        charts = (Chart(CURVE, "Loss, step by step", tuple(losses)),) if len(losses) > 1 else ()
        return Card(title, rows, tuple(notes), level, charts, self._picture)
