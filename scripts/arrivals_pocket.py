"""Edits that arrive two at a time, on the pocket editor: a curve of what every method keeps and learns.

    .venv/bin/python scripts/arrivals_pocket.py [--edits 16] [--steps 120] [--seeds 0 1 2] [--methods memory ...] [--memory 2]

Resumable: what was trained is in --work, every score in --out; neither is made again. A seed takes half an hour of one core.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from in_host import ROOT, enter_host, hurry
from kept_results import once

RESULTS = ROOT / "results" / "arrivals.json"


def measure(arguments: argparse.Namespace) -> None:
    """Train and score what is missing, arrival by arrival; the results file grows with each."""
    from study.arrivals import ALL, METHODS, Arrivals, How, known
    from study.edits import SIXTEEN

    for seed in arguments.seeds:
        how = How(SIXTEEN[: arguments.edits], arguments.steps, seed, arguments.memory)
        study, group = Arrivals(arguments.work, how), f"{arguments.edits} edits, {arguments.steps} steps, seed {seed}"
        if how.weight != How().weight:
            group += f", memory {how.weight:g}"
        once(arguments.out, group, "base", study.score_base)
        for arrival in range(how.arrivals):
            for method in arguments.methods or METHODS:
                if method == ALL and arrival + 1 < how.arrivals:
                    continue
                scores = once(
                    arguments.out,
                    group,
                    f"{method} {arrival + 1}",
                    partial(study.score, method, arrival),
                )
                found = known(scores, how.edits, arrival)
                print(seed, arrival + 1, method, *(f"{name} {value:.2f}" for name, value in found.items()), flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=16, help="how many arrive in all; an even number up to 16")
    parser.add_argument("--steps", type=int, default=120, help="of an arrival")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="by default all")
    parser.add_argument("--memory", type=float, default=2.0, help="its weight")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "arrivals", help="where parameters are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    enter_host()
    hurry(threads=1)
    measure(arguments)


if __name__ == "__main__":
    main()
