"""What scripts/train.py --pocket trains on: the pocket editor, and the pictures that ship unless the run names pairs."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from hywu_core.errors import ConfigError
from hywu_core.training.options import FILES_OF_A_BASE, RunConfig, option

SIDE = 32  # pixels


@dataclass(frozen=True)
class PocketRun(RunConfig):
    """A run that may be for the pocket editor."""

    pocket: bool = option(False, f"train for the pocket editor; pictures have {SIDE} pixels then, unless size is given")
    suite: str = option(
        "eight", "edits of the pictures that ship (pocket, without pairs)", ("eight", "sixteen", "instance", "all")
    )
    variants: int = option(4, "compositions of each picture that ships")

    @property
    def side(self) -> int:
        return self.size or (SIDE if self.pocket else 0)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"suite": self.suite, "variants": self.variants}

    def _without_effect(self) -> dict[str, tuple[str, ...]]:
        found = super()._without_effect()
        if self.pocket:
            found["with pocket, whose files ship with it"] = FILES_OF_A_BASE
        if self.pairs or not self.pocket:
            found["without the pictures that ship (pocket, and no pairs)"] = ("suite", "variants")
        else:
            found["with the pictures that ship: give pairs"] = (
                "held_out",
                "text_sees_source",
                "guidance",
                "background",
                "buckets",
                "caption_dropout",
            )
        return found


def sources(run: PocketRun) -> dict[str, Any]:
    """What `train_on_folder` gets for this run. The host must have been entered.

    Raises:
        ConfigError: if the pictures that ship are not here: the published pack leaves them out.
    """
    if not run.pocket:
        return {}
    from hywu_core.bases import pocket
    from hywu_core.host.training.in_script import Base
    from hywu_core.host.training.pairs_of_folder import Encoders

    def base(_run: RunConfig) -> Base:
        model, clip, vae = pocket.load_pocket_editor()
        return Base(model, lambda: Encoders(clip, vae), list(pocket.pocket_files()), "pocket editor")

    if run.pairs:
        return {"base_of": base}
    if importlib.util.find_spec("study") is None:
        raise ConfigError("The pictures that ship are part of the repository only. Give a folder of pairs (--pairs).")
    from study.shipped import ShippedPictures

    return {"base_of": base, "pairs_of": ShippedPictures}
