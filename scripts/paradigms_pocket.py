"""Three ways to train a generator at the same cost (paper Fig. 2), on the pocket editor.

    .venv/bin/python scripts/paradigms_pocket.py [--seeds 0 1 2] [--steps 240] [--work out/paradigms]

Resumable: what was trained is in --work, every score in --out; neither is made again. The last lines are the table of
docs/evidence.md, over the seeds that are there.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from in_host import ROOT, enter_host, hurry
from kept_results import mean, once, read

RESULTS = ROOT / "results" / "paradigms.json"


def measure(arguments: argparse.Namespace) -> dict:
    """Train and score what is missing; the results file grows with each."""
    from study.paradigms import BOTH, COLLECTED, END_TO_END, RATE, RECONSTRUCTED, Cost, Paradigms, shared_out

    out, study = arguments.out, Paradigms(arguments.work)
    cost = Cost(**once(out, "settings", "cost", lambda: study.cost()._asdict()))
    steps = shared_out(cost, arguments.steps, len(study.edits))
    settings = {**steps._asdict(), "rate": RATE}
    if once(out, "settings", "steps", lambda: settings) != settings:
        sys.exit(f"{out} holds results of other steps. Give another --out.")
    print(cost, steps, flush=True)
    counts = {RECONSTRUCTED: steps.reconstructing, BOTH: steps.both, END_TO_END: steps.end_to_end}
    for seed in arguments.seeds:
        once(out, str(seed), "base", partial(study.score, None))
        loras = study.collected(seed, steps.collecting)
        found = once(out, str(seed), COLLECTED, partial(study.score_collected, loras))
        print(seed, COLLECTED, f"{mean(found):.2f}", flush=True)
        for way, count in counts.items():
            generator = study.trained(way, seed, count, loras)
            found = once(out, str(seed), way, partial(study.score, generator))
            like = once(out, f"likeness {seed}", way, partial(study.likeness, generator, loras))
            print(seed, way, f"{mean(found):.2f}", like, flush=True)
    return read(out)


def table(results: dict) -> str:
    """PSNR with intervals, resampled by case and seed, and each against end to end, case by case."""
    import torch

    from hywu_core.analysis.statistics import bootstrap
    from study.paradigms import COLLECTED, END_TO_END, WAYS

    def of(way: str) -> torch.Tensor:
        return torch.tensor([scores[way] for scores in whole])

    whole = [scores for scores in results.values() if set(WAYS) <= scores.keys() and "base" in scores]
    lines = [f"| {len(whole)} seed(s) | PSNR in dB | against end to end |", "|---|---|---|"]
    for way in ("base", COLLECTED, *WAYS) if whole else ():
        against = "" if way == END_TO_END else bootstrap(of(way) - of(END_TO_END))
        lines.append(f"| {way} | {bootstrap(of(way))} | {against} |")
    return "\n".join(lines)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=240, help="end to end; the others get what costs as much")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "paradigms", help="where parameters are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    enter_host()
    hurry(threads=1)
    print(table(measure(arguments)))


if __name__ == "__main__":
    main()
