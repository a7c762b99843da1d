"""One new edit from eight pairs, taught to the generator that ships: what it learns, what it keeps, and a LoRA of its own.

    .venv/bin/python scripts/personal_pocket.py [--edits sepia] [--seeds 0 1 2] [--memory 2] [--prediction 20] [--steps 240]

Resumable: every score is in --out and is not made again, and a run that was ended goes on from --work.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from in_host import ROOT, enter_host, hurry
from kept_results import mean, once

RESULTS = ROOT / "results" / "personal.json"


def measure(arguments: argparse.Namespace) -> None:
    """Teach and score what is missing; the results file grows with each."""
    from hywu_core.host.training.teach import TEACH, with_steps
    from study.personal import Personal, Way

    study = Personal(ROOT / "models" / "pocket-generator.safetensors", arguments.work)
    given = {
        "steps": arguments.steps,
        "learning_rate": arguments.rate,
        "memory": arguments.memory,
        "prediction": arguments.prediction,
        "memory_batch": arguments.asked,
    }
    config = with_steps(TEACH, **{name: value for name, value in given.items() if value is not None})
    for seed in arguments.seeds:
        for edit in arguments.edits:
            before = once(arguments.out, "before", edit, partial(study.before, edit))
            way = Way(edit, seed, replace(config, seed=seed), arguments.anchors)
            taught = once(arguments.out, "taught", way.name, partial(study.taught, way))
            gained = mean(taught["new"]) - mean(before["base_new"])
            kept = mean(taught["old"]) - mean(before["old"])
            print(
                f"{way.name}: new {mean(taught['new']):.2f} ({gained:+.2f} over the base), "
                f"old {mean(taught['old']):.2f} ({kept:+.2f}), {taught['processor_seconds']} s",
                flush=True,
            )
            if arguments.own:
                seconds = taught["processor_seconds"]
                make = partial(study.own_lora, way, seconds)
                own = once(arguments.out, "own_lora", way.name, make)
                print(f"  a LoRA of its own, {own['steps']} steps: new {mean(own['new']):.2f}", flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", nargs="+", default=["sepia"], help="new ones: sepia, invert")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the pairs' pictures and of the run")
    parser.add_argument("--steps", type=int, help="by default those of Teach, like the rest")
    parser.add_argument("--rate", type=float)
    parser.add_argument("--memory", type=float, help="its weight")
    parser.add_argument("--prediction", type=float, help="its weight; 0 for weight space alone")
    parser.add_argument("--asked", type=int, help="old instructions of a step")
    parser.add_argument("--anchors", type=int, default=0, help="more pictures to ask old instructions about")
    parser.add_argument("--own", action="store_true", help="train a LoRA of its own on the same pairs as well")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "personal", help="where runs are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    enter_host()
    hurry(threads=1)
    measure(arguments)


if __name__ == "__main__":
    main()
