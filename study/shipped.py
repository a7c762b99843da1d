"""The pictures that ship, with the edits of a suite, as what scripts/train.py --pocket trains on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hywu_core.bases import pocket
from hywu_core.condition import CONDITIONING, REFERENCE_LATENT, Condition, ConditionPart
from hywu_core.config import GeneratorConfig
from hywu_core.host.training.identity import digest
from hywu_core.host.training.lessons import Picture
from hywu_core.lineage import instructions as as_kept

from . import pictures
from .edits import SUITES
from .task import Case, EditingTask, to_latent


class ShippedPictures:
    """See `hywu_core.host.training.in_script.Pairs`. The run is a `PocketRun` of scripts/."""

    def __init__(self, run: Any, base: Any):
        self.run, self.clip = run, pocket.load_text_encoder(pocket.pocket_files().text)
        self.composed = {
            split: pictures.compose(split, run.side, variants)
            for split, variants in (("train", run.variants), ("validation", 1))
        }
        words = [edit.wordings for edit in SUITES[run.suite]]
        self.identity = {
            "pictures": digest(found for found, _ in self.composed.values()),
            "instructions": digest(words),
        }
        self.origin = f"shipped pictures, suite {run.suite}"
        self.instructions = as_kept(text for wordings in words for text in wordings)

    def encode(self, progress: Callable[[int, int], None], communication: Any) -> None:
        """Nothing: pictures are edited as they are drawn."""

    def example(self) -> Condition:
        task, case = self._task("train", None), Case(0, 0)
        words = task.words[case.edit][case.wording].tokens
        return Condition((ConditionPart(CONDITIONING, words), ConditionPart(REFERENCE_LATENT, task.sources([case]))))

    def sources(self, config: GeneratorConfig) -> tuple[EditingTask, EditingTask | None]:
        return self._task("train", config), self._task("validation", config) if self.run.held_out_share else None

    def pictures(self, count: int) -> list[Picture]:
        found = self.composed["train"][0][:count]
        return [Picture(to_latent(picture.unsqueeze(0))) for picture in found]

    def _task(self, split: str, config: GeneratorConfig | None) -> EditingTask:
        found, names = self.composed[split]
        return EditingTask(self.clip, found, names, SUITES[self.run.suite], config, self.run.regime)
