"""What is forgotten and kept when a generator is taught more edits, on the pocket editor.

    .venv/bin/python scripts/continual_pocket.py [--seeds 0 1 2] [--ways plain "memory 1"] [--work out/continual]

Resumable: every trained generator is a file in --work, and every score in --out; neither is made again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from in_host import ROOT, enter_host, hurry

from hywu_core.files.atomic import atomic_write

RESULTS = ROOT / "results" / "continual.json"
WAYS = ("plain", "memory 0.05", "memory 0.5", "memory 1", "memory 2")


def step_of(way: str, seed: int, steps: int, rate: float):
    """A way of teaching by its name: "plain", "replay", "memory 0.5", or "memory 0.5 x16" with 16 old instructions a step."""
    from study.continual import Step

    kind, *rest = way.split()
    weight = float(rest[0]) if rest else 0.0
    asked = int(rest[1].removeprefix("x")) if len(rest) > 1 else 8
    return Step(kind, seed, weight, asked, steps, rate)


def measure(arguments: argparse.Namespace) -> None:
    """Train and score what is missing, seed by seed; the results file grows with each."""
    from study.continual import FIRST, PLAIN, Continual, gates

    study = Continual(arguments.work)
    for seed in arguments.seeds:
        for way in ("base", FIRST, *arguments.ways):
            results = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
            scores = results.setdefault("scores", {}).setdefault(str(seed), {})
            if way not in scores:
                start = time.process_time()
                step = None if way == "base" else step_of(way, seed, arguments.steps, arguments.rate)
                scores[way] = study.score(None if step is None else study.train(step))
                scores[way]["processor_seconds"] = round(time.process_time() - start)
            means = {lot: sum(scores[way][lot]) / len(scores[way][lot]) for lot in ("old", "new")}
            kept = gates(scores, way) if {FIRST, PLAIN} <= scores.keys() and way not in ("base", FIRST, PLAIN) else {}
            print(seed, way, *(f"{k} {v:.2f}" for k, v in (means | kept).items()), flush=True)
            results["settings"] = {"steps": arguments.steps, "rate": arguments.rate, "pixels": 32, "regime": "blind"}
            arguments.out.parent.mkdir(exist_ok=True)
            with atomic_write(arguments.out) as temporary:
                temporary.write_text(json.dumps(results), encoding="utf-8")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), help="of teaching the second lot of edits")
    parser.add_argument("--steps", type=int, default=240, help="of each lot of edits")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "continual", help="where generators are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    enter_host()
    hurry(threads=1)
    measure(arguments)


if __name__ == "__main__":
    main()
