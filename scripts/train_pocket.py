"""Train everything that the pocket editor ships: the base, its generators and shared LoRAs. At most two hours on two cores.

    .venv/bin/python scripts/train_pocket.py [--only base|adapters] [--seed N] [--work out/pocket] [--threads N]

Resumable: run it again after an interruption and it goes on where it stopped. The pictures that it trains on ship with the
pack (scripts/make_pocket_pictures.py made them); nothing is downloaded.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from in_host import ROOT, enter_host

enter_host()
import torch  # noqa: E402

from hywu_core.bases import pocket  # noqa: E402
from hywu_core.bases.pocket import editor, pictures, text  # noqa: E402
from hywu_core.bases.pocket.edits import BASE_EDITS  # noqa: E402
from hywu_core.bases.pocket.task import EditingTask  # noqa: E402
from hywu_core.host.training import DiffusionObjective  # noqa: E402
from hywu_core.training import FullFineTuning, StepReport, TrainConfig, Trainer  # noqa: E402

VARIANTS = 6  # of every training tile
SAVE_EVERY = 100
BASE_PHASES = {  # name -> (picture size, how to train): small pictures first, then some larger ones
    "base32": (32, TrainConfig(steps=3000, batch=16, learning_rate=1e-3, warmup=100, ema=0.995)),
    "base64": (64, TrainConfig(steps=500, batch=8, learning_rate=3e-4, warmup=50, ema=0.99)),
}


def train_text_encoder(seed: int) -> None:
    """Seeded random features: a fixed, well separated code for every word, which is all that the editor needs."""
    config = pocket.TextConfig(words=pocket.default_words())
    provenance = {"weights": f"fixed random features, seed {seed}"}
    pocket.save_text_encoder(text.initial_state(config, seed), config, pocket.pocket_files().text, provenance)


def train_base(work: Path, seed: int) -> None:
    """The editing model: copy, swap, mirror and flip, told in words. It never sees the edits of the suites."""
    config = pocket.EditorConfig()
    state = editor.initial_state(config, seed)
    clip = pocket.load_text_encoder(pocket.pocket_files().text)
    for name, (size, how) in BASE_PHASES.items():
        state = run_base_phase(work / f"{name}.safetensors", state, clip, size, how, seed)
    provenance = {
        "trained_on": "tiles/train.webp: Noto Emoji (Apache-2.0), public-domain photographs",
        "edits": ", ".join(edit.name for edit in BASE_EDITS),
        "steps": str({name: how.steps for name, (_, how) in BASE_PHASES.items()}),
        "seed": str(seed),
    }
    print(pocket.save_editor(state, config, pocket.pocket_files().editor, provenance))


def run_base_phase(file: Path, state: dict, clip, size: int, how: TrainConfig, seed: int) -> dict[str, torch.Tensor]:
    """One phase, resumed if it was begun. Returns the averaged weights."""
    model = editor.editor_from_state(state, pocket.EditorConfig())
    objective = DiffusionObjective(model, train_base=True)
    composed, names = pictures.compose("train", size, VARIANTS, seed)
    parameters = dict(objective.base.diffusion_model.named_parameters())
    task = EditingTask(clip, composed, names, BASE_EDITS)
    trainer = Trainer(FullFineTuning(parameters), objective, task, how)
    if file.exists():
        trainer.resume(file)
    objective.prepare()
    trainer.run(show(file.stem, how.steps), file, SAVE_EVERY)
    return {name: average.clone() for name, average in trainer.averaged.items()}


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
    """All stages, in order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("base", "adapters"), help="one stage of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "pocket", help="where unfinished runs are kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.only != "adapters":
        train_text_encoder(arguments.seed)
        train_base(arguments.work, arguments.seed)


if __name__ == "__main__":
    main()
