"""Train everything that the pocket editor ships: the base, its generators and shared LoRAs.

    .venv/bin/python scripts/train_pocket.py [--only STAGE ...] [--seed N] [--work out/pocket] [--threads N]

The stages: base, words and words-told (the generators learn to read, on the first editor), generator, generator-told, shared
and shared-told. Words need no base, so they can be trained beside it by a second call. Resumable: run it again after an
interruption and it goes on where it stopped. What it starts from and the pictures that it trains on are in the repository
(scripts/make_pocket_pictures.py and scripts/make_pocket_words.py made them); nothing is downloaded. The time of every
stage is printed, and kept in --work.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from in_host import ROOT, enter_host, hurry

enter_host()
import torch  # noqa: E402

from hywu_core import Generator, knowledge, load_generator, save_generator  # noqa: E402
from hywu_core.bases import pocket  # noqa: E402
from hywu_core.bases.pocket import editor  # noqa: E402
from hywu_core.errors import CheckpointError  # noqa: E402
from hywu_core.files.lora_files import save_lora  # noqa: E402
from hywu_core.files.safetensors import open_safetensors, write_safetensors  # noqa: E402
from hywu_core.host.training.objective import DiffusionObjective  # noqa: E402
from hywu_core.lineage import instructions  # noqa: E402
from hywu_core.training import FullFineTuning, GeneratorTrainable, SharedLora, StepReport, TrainConfig, Trainer  # noqa: E402
from hywu_core.training.trainable import leaves  # noqa: E402
from study import bases, methods, pictures  # noqa: E402
from study.edits import BASE_EDITS, SUITES, Edit  # noqa: E402
from study.foreign import leaving  # noqa: E402
from study.task import EditingTask, MixedSizes, Regime, Words, encode_words  # noqa: E402
from study.wordings import worded  # noqa: E402

SAVE_EVERY = 50
PICTURES = "tiles/train.webp: Noto Emoji (Apache-2.0), public-domain photographs"
SMALL = {(32, 32): 1.0}  # (height, width) of pictures: how often
ALL_SIZES = {
    (32, 32): 0.35, (48, 64): 0.1, (64, 48): 0.1, (64, 64): 0.22, (40, 96): 0.04, (96, 96): 0.08,
    (128, 96): 0.03, (128, 128): 0.05, (192, 64): 0.02, (64, 192): 0.01,
}  # fmt: skip
MOST_LARGE = {
    (32, 32): 0.18, (48, 64): 0.08, (64, 48): 0.08, (64, 64): 0.24, (96, 96): 0.12, (128, 96): 0.06,
    (128, 128): 0.12, (192, 64): 0.04, (64, 192): 0.04, (192, 192): 0.04,
}  # fmt: skip
SOME_LARGER = {(32, 32): 0.6, (48, 64): 0.1, (64, 48): 0.08, (64, 64): 0.16, (96, 96): 0.04, (128, 128): 0.02}
MORE_LARGER = {
    (32, 32): 0.3, (48, 64): 0.06, (64, 48): 0.06, (64, 64): 0.28, (96, 96): 0.14, (128, 128): 0.12, (192, 64): 0.02,
    (64, 192): 0.02,
}  # fmt: skip
VARIANTS = 6  # of every training tile, at the smallest size
LARGE, FEW = 64 * 64, 200  # pixels from which fewer pictures are made, so that they fit into memory, and how many


class Phase(NamedTuple):
    """A part of a training."""

    sizes: dict[tuple[int, int], float]  # of the pictures, and how often each is drawn
    how: TrainConfig


class Recipe(NamedTuple):
    """What ships for one regime."""

    regime: Regime
    suite: str
    words: tuple[Phase, ...]  # of the generator on the first editor
    generator: tuple[Phase, ...]  # of the generator on the editor that ships
    shared: tuple[Phase, ...]


def phase(sizes: dict[tuple[int, int], float], steps: int, batch: int, rate: float, ema: float = 0.98) -> Phase:
    return Phase(sizes, TrainConfig(steps=steps, batch=batch, learning_rate=rate, warmup=max(10, steps // 10), ema=ema))


BASE = (phase(SMALL, 300, 16, 6e-4), phase(ALL_SIZES, 300, 8, 4e-4), phase(MOST_LARGE, 500, 8, 3e-4, 0.99))
RECIPES = {
    "": Recipe(
        "blind",
        "eight",
        (phase(SMALL, 900, 16, 1e-3),),
        (phase(SMALL, 300, 16, 7e-4), phase(SOME_LARGER, 200, 8, 5e-4), phase(MORE_LARGER, 150, 8, 5e-4)),
        (phase(SOME_LARGER, 100, 8, 2e-3),),
    ),
    "-told": Recipe(
        "told",
        "all",
        (),
        (
            *(phase(SMALL, 900, 16, 1e-3), phase(SOME_LARGER, 200, 8, 5e-4)),
            *(phase(SMALL, 1500, 16, 1e-3), phase(SOME_LARGER, 200, 8, 5e-4)),
        ),
        (phase(SOME_LARGER, 150, 8, 2e-3),),
    ),
}
SILENCE = Edit("silence", lambda x: x, ("",))
WHOLE_BASE = (*worded(BASE_EDITS), *leaving(), SILENCE, SILENCE)  # in pairs, as every suite is


def taught(recipe: Recipe) -> tuple[Edit, ...]:
    """The suite in all its wordings, and what leaves the picture alone."""
    return (*worded(SUITES[recipe.suite]), *leaving())


def train_base(work: Path, seed: int) -> None:
    """The editing model: copy, swap, mirror and flip, told in words, at all sizes. It never sees the edits of the suites.
    It begins with the weights of the first editor.
    """
    model = bases.load_model(bases.FIRST)
    config = pocket.EditorConfig()
    state = {name: tensor.float() for name, tensor in model.model.diffusion_model.state_dict().items()}
    objective = DiffusionObjective(editor.editor_from_state(state, config), train_base=True)
    parameters = dict(objective.base.diffusion_model.named_parameters())
    run_phases("base", work, FullFineTuning(parameters), objective, BASE, WHOLE_BASE, "told", seed)
    provenance = {
        "trained_on": PICTURES,
        "edits": ", ".join(edit.name for edit in BASE_EDITS),
        "steps": str([phase.how.steps for phase in BASE]),
        "sizes": str([list(phase.sizes) for phase in BASE]),
        "begun_with": "the first editor",
        "seed": str(seed),
    }
    print(pocket.save_editor(parameters, config, pocket.pocket_files().editor, provenance))


def generator_config(recipe: Recipe, seed: int):
    """With all that its file says of its past. What leaves the picture alone is no instruction that it knows."""
    texts = [wording for edit in worded(SUITES[recipe.suite]) for wording in edit.wordings]
    clip = pocket.load_text_encoder(pocket.pocket_files().text)
    phases = (*recipe.words, *recipe.generator)
    sizes = sorted({size for phase in phases for size in phase.sizes})
    past = {
        "trained_on": PICTURES,
        "edits": [edit.name for edit in taught(recipe)],
        "regime": recipe.regime,
        "steps": [phase.how.steps for phase in phases],
        "seed": seed,
    }
    met = [encode_words(clip, text).tokens[0] for text in texts]
    known = knowledge.gathered({}, met, [(width, height) for height, width in sizes])
    return methods.generator_config(instructions=list(instructions(texts)), training=past, **known)


def train_words(suffix: str, work: Path, seed: int) -> None:
    """The first editor's generator learns to read, on that editor. Kept in `work`; a recipe may do without."""
    recipe = RECIPES[suffix]
    generator = Generator(generator_config(recipe, seed), dtype=torch.float32)
    generator.load_state_dict(load_generator(bases.first_generator(suffix)).state_dict())
    if recipe.words:
        first = bases.load(bases.FIRST)
        objective, silence = DiffusionObjective(first.model), encode_words(first.clip, "")
        run_phases(
            f"words{suffix}", work, GeneratorTrainable(generator), objective, recipe.words, taught(recipe),
            recipe.regime, seed, silence,
        )  # fmt: skip
    state = {name: tensor.detach().clone() for name, tensor in generator.state_dict().items()}
    write_safetensors(_learned(work, suffix), state, {"format": "pt"})


def train_generator(suffix: str, work: Path, seed: int) -> None:
    """A generator for the editor that ships, from what `train_words` left."""
    recipe = RECIPES[suffix]
    generator = Generator(generator_config(recipe, seed), dtype=torch.float32)
    if not _learned(work, suffix).exists():
        train_words(suffix, work, seed)
    with open_safetensors(_learned(work, suffix), CheckpointError) as handle:
        generator.load_state_dict({name: handle.get_tensor(name) for name in handle.keys()})
    objective = DiffusionObjective(editor.load_editor(pocket.pocket_files().editor))
    run_phases(
        f"generator{suffix}", work, GeneratorTrainable(generator), objective, recipe.generator, taught(recipe),
        recipe.regime, seed,
    )  # fmt: skip
    print(save_generator(generator, ROOT / "models" / f"pocket-generator{suffix}.safetensors", dtype=torch.bfloat16))


def train_shared(suffix: str, work: Path, seed: int) -> None:
    """The LoRA that a generator is shown against: one for all edits, of the same rank, with the same words told."""
    recipe = RECIPES[suffix]
    config = methods.generator_config()
    shared = SharedLora(config, config.rank, config.alpha, seed)
    objective = DiffusionObjective(editor.load_editor(pocket.pocket_files().editor))
    suite = worded(SUITES[recipe.suite])
    run_phases(f"shared{suffix}", work, shared, objective, recipe.shared, suite, recipe.regime, seed)
    provenance = generator_config(recipe, seed).hywu["training"]
    provenance |= {"edits": [edit.name for edit in suite], "steps": [phase.how.steps for phase in recipe.shared]}
    lora = leaves(shared.lora()).with_metadata(base="pocket editor", training=provenance)
    print(save_lora(lora, pocket.WEIGHTS / f"shared{suffix}.safetensors", dtype=torch.bfloat16))


def _learned(work: Path, suffix: str) -> Path:
    return work / f"read{suffix}.safetensors"


def run_phases(
    name: str,
    work: Path,
    trainable,
    objective: DiffusionObjective,
    parts: Sequence[Phase],
    edits: Sequence[Edit],
    regime: Regime,
    seed: int,
    silence: Words | None = None,
) -> None:
    """Train phase after phase, each resumed if it was begun. The trainable ends with the averaged weights."""
    objective.prepare()
    clip = pocket.load_text_encoder(pocket.pocket_files().text)
    config = methods.generator_config() if isinstance(trainable, GeneratorTrainable) else None
    for index, (sizes, how) in enumerate(parts):
        state = work / f"{name}-{index}.safetensors"
        tasks = []
        for size in sizes:
            large = size[0] * size[1] > LARGE
            found, names = pictures.compose("train", size, 1 if large else VARIANTS, seed, FEW if large else None)
            tasks.append(EditingTask(clip, found, names, edits, config, regime, silence))
        data = MixedSizes(tasks, list(sizes.values()))
        trainer = Trainer(trainable, objective, data, replace(how, seed=seed))
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


STAGES = {
    "base": train_base,
    **{f"words{suffix}": partial(train_words, suffix) for suffix in RECIPES},
    **{f"generator{suffix}": partial(train_generator, suffix) for suffix in RECIPES},
    **{f"shared{suffix}": partial(train_shared, suffix) for suffix in RECIPES},
}


def keep_time(work: Path, stage: str, seconds: float) -> None:
    """Add to the seconds that a stage took so far."""
    path = work / f"{stage}.seconds"
    so_far = float(path.read_text(encoding="utf-8")) if path.exists() else 0.0
    path.write_text(f"{so_far + seconds:.1f}", encoding="utf-8")
    print(f"{stage}: {so_far + seconds:.0f} s in all", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(STAGES), default=tuple(STAGES), help="some of the stages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "pocket", help="where unfinished runs are kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    hurry(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for stage in arguments.only:
        start = time.monotonic()
        try:
            STAGES[stage](arguments.work, arguments.seed)
        finally:
            keep_time(arguments.work, stage, time.monotonic() - start)


if __name__ == "__main__":
    main()
