"""Train everything that the pocket editor ships: the base, its generators and shared LoRAs.

About an hour on two cores by the times of its stages; it was never timed as a whole.

    .venv/bin/python scripts/train_pocket.py [--only base|adapters] [--seed N] [--work out/pocket] [--threads N]

Resumable: run it again after an interruption and it goes on where it stopped. The pictures that it trains on ship with the
pack (scripts/make_pocket_pictures.py made them); nothing is downloaded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from in_host import ROOT, enter_host, hurry

enter_host()
import torch  # noqa: E402

from hywu_core import Generator, save_generator  # noqa: E402
from hywu_core.bases import pocket  # noqa: E402
from hywu_core.bases.pocket import editor, text  # noqa: E402
from hywu_core.files.lora_files import save_lora  # noqa: E402
from hywu_core.host.training.objective import DiffusionObjective  # noqa: E402
from hywu_core.training import FullFineTuning, GeneratorTrainable, SharedLora, StepReport, TrainConfig, Trainer  # noqa: E402
from hywu_core.training.trainable import leaves  # noqa: E402
from study import methods, pictures  # noqa: E402
from study.edits import BASE_EDITS, SUITES  # noqa: E402
from study.task import EditingTask, Regime  # noqa: E402

VARIANTS = 6  # of every training tile
SAVE_EVERY = 100
PICTURES = "tiles/train.webp: Noto Emoji (Apache-2.0), public-domain photographs"


class Phase(NamedTuple):
    """A part of a training: small pictures first, then some larger ones."""

    size: int  # of the pictures
    how: TrainConfig


class Recipe(NamedTuple):
    """What ships for one regime."""

    regime: Regime
    suite: str
    generator: tuple[Phase, ...]
    shared: tuple[Phase, ...]


BASE = (  # small and larger pictures in turn, so that neither is forgotten
    Phase(32, TrainConfig(steps=3000, batch=16, learning_rate=1e-3, warmup=100, ema=0.995)),
    Phase(64, TrainConfig(steps=300, batch=8, learning_rate=3e-4, warmup=30, ema=0.98)),
    Phase(32, TrainConfig(steps=1000, batch=16, learning_rate=7e-4, warmup=50, ema=0.99)),
    Phase(64, TrainConfig(steps=100, batch=8, learning_rate=1e-4, warmup=10, ema=0.95)),
)


def phases(rate: float, *steps: int) -> tuple[Phase, ...]:
    """Small and larger pictures in turn, each time more gently; the same for both kinds of adapter, but for the rate."""
    found = []
    for index, count in enumerate(steps):
        size, batch, gentler = ((32, 16, 1), (64, 8, 3))[index % 2]
        part = rate / gentler / (1 + index // 2)
        how = TrainConfig(steps=count, batch=batch, learning_rate=part, warmup=count // 10, ema=0.99)
        found.append(Phase(size, how))
    return tuple(found)


RECIPES = {
    "": Recipe("blind", "eight", phases(2e-3, 500, 100, 2000, 200), phases(1e-2, 500, 100)),
    "-told": Recipe("told", "all", phases(2e-3, 1500, 200), phases(1e-2, 1500, 200)),
}


def write_text_encoder(seed: int) -> None:
    """Seeded random features: a fixed, well separated code for every word, which is all that the editor needs."""
    config = pocket.TextConfig(words=pocket.default_words())
    provenance = {"weights": f"fixed random features, seed {seed}"}
    pocket.save_text_encoder(text.initial_state(config, seed), config, pocket.pocket_files().text, provenance)


def train_base(work: Path, seed: int) -> None:
    """The editing model: copy, swap, mirror and flip, told in words. It never sees the edits of the suites."""
    config = pocket.EditorConfig()
    objective = DiffusionObjective(
        editor.editor_from_state(editor.initial_state(config, seed), config), train_base=True
    )
    parameters = dict(objective.base.diffusion_model.named_parameters())
    run_phases("base", work, FullFineTuning(parameters), objective, BASE, BASE_EDITS, "told", seed)
    provenance = {
        "trained_on": PICTURES,
        "edits": ", ".join(edit.name for edit in BASE_EDITS),
        "steps": str([phase.how.steps for phase in BASE]),
        "seed": str(seed),
    }
    print(pocket.save_editor(parameters, config, pocket.pocket_files().editor, provenance))


def train_adapters(work: Path, seed: int) -> None:
    """For each recipe a generator, and the shared LoRA that it is shown against."""
    for suffix, recipe in RECIPES.items():
        provenance = {
            "trained_on": PICTURES,
            "edits": [edit.name for edit in SUITES[recipe.suite]],
            "regime": recipe.regime,
            "steps": [phase.how.steps for phase in recipe.generator],
            "seed": seed,
        }
        config = methods.generator_config(training=provenance)
        objective = DiffusionObjective(editor.load_editor(pocket.pocket_files().editor))

        generator = Generator(config, dtype=torch.float32).initialize(seed)
        generated = GeneratorTrainable(generator)
        edits = SUITES[recipe.suite]
        run_phases(f"generator{suffix}", work, generated, objective, recipe.generator, edits, recipe.regime, seed)
        print(
            save_generator(generator, ROOT / "models" / f"pocket-generator{suffix}.safetensors", dtype=torch.bfloat16)
        )

        shared = SharedLora(config, config.rank, config.alpha, seed)
        run_phases(f"shared{suffix}", work, shared, objective, recipe.shared, edits, recipe.regime, seed)
        lora = leaves(shared.lora()).with_metadata(base="pocket editor", training=provenance)
        print(save_lora(lora, pocket.WEIGHTS / f"shared{suffix}.safetensors", dtype=torch.bfloat16))


def run_phases(
    name: str,
    work: Path,
    trainable,
    objective: DiffusionObjective,
    parts: Sequence[Phase],
    edits: Sequence,
    regime: Regime,
    seed: int,
) -> None:
    """Train phase after phase, each resumed if it was begun. The trainable ends with the averaged weights."""
    objective.prepare()
    clip = pocket.load_text_encoder(pocket.pocket_files().text)
    for index, (size, how) in enumerate(parts):
        composed, names = pictures.compose("train", size, VARIANTS, seed)
        config = None if isinstance(trainable, FullFineTuning) else methods.generator_config()
        task = EditingTask(clip, composed, names, edits, config, regime)
        trainer = Trainer(trainable, objective, task, replace(how, seed=seed))
        state = work / f"{name}-{index}.safetensors"
        if state.exists():
            trainer.resume(state)
        if trainer.done < how.steps:
            trainer.run(show(state.stem, how.steps), state, SAVE_EVERY)
        trainer.use_averaged()


def show(name: str, steps: int):
    """Print a line every 50 steps."""
    start, losses = time.monotonic(), []

    def on_step(report: StepReport) -> None:
        losses.append(report.loss)
        if (report.step + 1) % 50 == 0:
            mean = sum(losses) / len(losses)
            losses.clear()
            print(f"{name} {report.step + 1}/{steps} loss {mean:.4f} {time.monotonic() - start:.0f} s", flush=True)

    return on_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("base", "adapters"), help="one stage of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "pocket", help="where unfinished runs are kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    hurry(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.only != "adapters":
        write_text_encoder(arguments.seed)
        train_base(arguments.work, arguments.seed)
    if arguments.only != "base":
        train_adapters(arguments.work, arguments.seed)


if __name__ == "__main__":
    main()
