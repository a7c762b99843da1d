"""A personal edit: eight pairs of something new are taught to the generator that ships, as the node Teach does it, and
compared with what an artist would do without a generator: a LoRA of its own, trained on the same pairs for the same time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hywu_core.bases.pocket import load_pocket_editor
from hywu_core.generator import Generator
from hywu_core.host import memory
from hywu_core.host.training import teach
from hywu_core.host.training.objective import DiffusionObjective
from hywu_core.host.training.session import Front
from hywu_core.training import SessionOptions, SharedLora, TrainConfig, Trainer
from hywu_core.training.trainable import leaves

from . import evaluation
from .comparison import SIZE, composed
from .edits import EIGHT, Edit, luma
from .methods import ALPHA_PER_RANK, RANK, generator_config
from .task import EditingTask

PAIRS = 8
CASES = 64  # test cases of the old edits
NEW_CASES = 32  # of the new one
SHARED_RATE = 1e-2  # as for the shared LoRA that ships
PROBE = 20  # steps that tell how long one takes
NEW = {
    "sepia": Edit(
        "sepia",
        lambda x: luma(x) * x.new_tensor((1.0, 0.8, 0.55)).view(3, 1, 1),
        ("an old brown photo", "make it sepia", "turn it brown"),
    ),
    "invert": Edit("invert", lambda x: 1 - x, ("a negative", "invert the colours", "make it negative")),
}


class Way(NamedTuple):
    """How one new edit is taught."""

    edit: str
    seed: int
    config: TrainConfig
    anchors: int = 0  # other pictures on which old instructions are asked, beside those of the pairs

    @property
    def name(self) -> str:
        """A key of the results."""
        how = self.config
        return (
            f"{self.edit} s{self.seed} steps {how.steps} rate {how.learning_rate:g} "
            f"memory {how.memory:g} x{how.memory_batch} prediction {how.prediction:g} anchors {self.anchors}"
        )


class Quiet(Front):
    """A session's front that keeps the generator in its folder and says nothing."""

    def __init__(self, folder: Path):
        self.folder = folder

    def generator_file(self, step: int | None) -> Path:
        return self.folder / "generator.safetensors"


class Personal:
    """The base and the generator that ship.

    Args:
        generator: its file. work: folder of the runs; one that was ended goes on.
    """

    def __init__(self, generator: Path, work: Path):
        self.work = work
        self.model, self.clip, self.vae = load_pocket_editor()
        self.handle = memory.load(generator)

    def before(self, edit: str) -> dict[str, list[float]]:
        """PSNR in dB of every test case: of both without a LoRA, and of the old edits with the generator that ships."""
        return {
            "old": self._score(self.handle.generator, EIGHT),
            "base_new": self._score(None, [NEW[edit]]),
            "base_old": self._score(None, EIGHT),
        }

    def taught(self, way: Way) -> dict[str, Any]:
        """The same after teaching, and what it took."""
        start, folder = time.process_time(), self.work / way.name.replace(" ", "-")
        pairs = self._pairs(way)
        sources = pairs.pictures.movedim(1, -1).split(1)
        targets = NEW[way.edit](pairs.pictures).movedim(1, -1).split(1)
        new = teach.NewEdit(sources, targets, NEW[way.edit].wordings)
        about = self._pictures(way.seed, PAIRS + way.anchors).movedim(1, -1).split(1) if way.anchors else ()
        studio = teach.Studio(self.model, self.clip, self.vae)
        # with room for all graphs, recomputing them would only take time
        options = SessionOptions(checkpoint_stack="", checkpoint_generator=False, validate_every=0)
        old = [text for edit in EIGHT for text in edit.wordings]
        task, _ = teach.prepare_teaching(studio, self.handle, new, old, about, way.config, options, teach.BLIND)
        found = teach.do(task, way.config, options, folder, Quiet(folder), way.name)
        seconds = time.process_time() - start
        generator = found.handle.generator
        scores = {"old": self._score(generator, EIGHT), "new": self._score(generator, [NEW[way.edit]])}
        return {**scores, "processor_seconds": round(seconds), "report": found.report}

    def own_lora(self, way: Way, seconds: float) -> dict[str, Any]:
        """A LoRA trained on the same pairs alone, for so many seconds of the processor."""
        objective = DiffusionObjective(self.model)
        objective.prepare()
        pairs = self._pairs(way)

        def train(steps: int) -> tuple[SharedLora, float]:
            shared = SharedLora(generator_config(), RANK, ALPHA_PER_RANK * RANK, way.seed)
            how = TrainConfig(steps=steps, batch=way.config.batch, learning_rate=SHARED_RATE, warmup=steps // 10)
            start = time.process_time()
            Trainer(shared, objective, pairs, how).run()
            return shared, time.process_time() - start

        _, probed = train(PROBE)
        steps = max(1, round(seconds / (probed / PROBE)))
        shared, took = train(steps)
        task = self._task([NEW[way.edit]])
        lora = leaves(shared.lora())
        scores = evaluation.score(self.model, task, task.balanced_cases(NEW_CASES), lambda part: lora)
        return {"new": _rounded(scores), "steps": steps, "processor_seconds": round(took)}

    def _pairs(self, way: Way) -> EditingTask:
        pictures = self._pictures(way.seed, PAIRS)
        return EditingTask(
            self.clip, pictures, [str(i) for i in range(PAIRS)], [NEW[way.edit]], generator_config(), "blind"
        )

    def _pictures(self, seed: int, count: int) -> torch.Tensor:
        """(count, 3, H, W), others for every seed; more pictures begin with the same."""
        pictures, _ = composed("train", SIZE, 1)
        return pictures[torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))[:count]]

    def _task(self, edits: Sequence[Edit]) -> EditingTask:
        return EditingTask(self.clip, *composed("test", SIZE, 1), edits, generator_config(), "blind")

    def _score(self, generator: Generator | None, edits: Sequence[Edit]) -> list[float]:
        task = self._task(edits)
        write = (lambda part: evaluation.write(generator, task, part)) if generator else (lambda part: None)
        count = NEW_CASES if len(edits) == 1 else CASES
        with torch.inference_mode(False), torch.no_grad():
            return _rounded(evaluation.score(self.model, task, task.balanced_cases(count), write))


def _rounded(scores: torch.Tensor) -> list[float]:
    return [round(value, 3) for value in scores.tolist()]
