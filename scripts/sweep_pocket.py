"""The fair comparison on the pocket editor: every method, the same data, steps and learning rates; the rate chosen on the
validation split, the result reported on the test split over several seeds.

    .venv/bin/python scripts/sweep_pocket.py [--workers 2] [--settings blind-eight ...] [--work out/sweep]

Takes hours. Resumable: every finished run is a file in --work, and what is there is not run again. The results go into
results/pocket.json, from which scripts/evaluate_pocket.py makes the table of docs/evidence.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from in_host import ROOT, enter_host, hurry

RESULTS = ROOT / "results" / "pocket.json"
SETTINGS = ("blind-eight", "told-eight", "told-instance", "told-sixteen")
RATES = (5e-4, 2e-3, 8e-3, 3e-2)
SEEDS = (0, 1, 2)
MATCHED = ("shared_x4", "full")  # given as much time as the generator took, too


class Lengths(NamedTuple):
    """Steps of the runs that choose a learning rate, and of those that are reported; the same for every method."""

    grid: int
    final: int


def start_worker() -> None:
    """One process, one thread: two of them do more than one with two."""
    enter_host()
    hurry(threads=1)


def do(work: Path, testing: bool, run) -> dict:
    """Train a run and validate it, or test it as well; what is there already is not done again."""
    from study import comparison

    weights, record = work / f"{run.name}.safetensors", work / f"{run.name}.json"
    found = json.loads(record.read_text()) if record.exists() else {}
    if "validation" not in found:
        found = comparison.train(run, weights)
        found["validation"] = None if found["failure"] else comparison.validate(run, comparison.restore(run, weights))
        _write(record, found)
    if testing and "test" not in found:
        found["test"] = comparison.test(run, comparison.restore(run, weights))
        _write(record, found)
    print(run.name, found["validation"], f"{found['seconds_per_step']:.2f} s/step", flush=True)
    return found


def base_of(work: Path, run) -> list[float]:
    """The base's scores in a setting."""
    from study import comparison

    record = work / f"base-{run.regime}-{run.suite}.json"
    if not record.exists():
        _write(record, comparison.base_scores(run))
    return json.loads(record.read_text())


def compare(name: str, lengths: Lengths, work: Path, pool) -> dict:
    """One setting: a grid of learning rates in short runs, and long runs of all seeds with the rates chosen."""
    from study.methods import METHODS, Run

    regime, suite = name.split("-")
    grid = [Run(regime, suite, method, rate, 0, lengths.grid) for rate in RATES for method in METHODS]
    validated = pool.map(partial(do, work, False), grid, chunksize=1)
    scores = {run: found["validation"] for run, found in zip(grid, validated, strict=True)}
    best = {
        method: max((run for run in grid if run.method == method and scores[run] is not None), key=scores.get)
        for method in METHODS
    }
    chosen = [best[method]._replace(seed=seed, steps=lengths.final) for seed in SEEDS for method in METHODS]
    tested = dict(zip(chosen, pool.map(partial(do, work, True), chosen, chunksize=1), strict=True))
    return {
        "base": pool.apply(base_of, (work, grid[0])),
        "steps": lengths._asdict(),
        "grid": {method: {f"{run.rate:g}": scores[run] for run in grid if run.method == method} for method in METHODS},
        "rate": {method: run.rate for method, run in best.items()},
        "seconds_per_step": {
            method: sum(found["seconds_per_step"] for run, found in tested.items() if run.method == method) / len(SEEDS)
            for method in METHODS
        },
        "methods": _by_method(tested),
    }


def match_compute(name: str, setting: dict, work: Path, pool) -> dict:
    """The same setting with rows of rivals that were given as much processor time as the generator took."""
    from study.methods import Run

    regime, suite = name.split("-")
    seconds = setting["seconds_per_step"]
    steps = {m: round(setting["steps"]["final"] * max(1.0, seconds["generator"] / seconds[m])) for m in MATCHED}
    longer = [Run(regime, suite, m, setting["rate"][m], seed, steps[m]) for seed in SEEDS for m in MATCHED]
    tested = dict(zip(longer, pool.map(partial(do, work, True), longer, chunksize=1), strict=True))
    rows = {f"{method}_compute_matched": runs for method, runs in _by_method(tested).items()}
    return setting | {"methods": setting["methods"] | rows, "compute_matched_steps": steps}


def _by_method(tested: dict) -> dict[str, list[dict]]:
    """{method: [what was tested, seed by seed]}."""
    found: dict[str, list[dict]] = {}
    for run, result in tested.items():
        found.setdefault(run.method, []).append({"seed": run.seed, **result["test"]})
    return found


def _write(path: Path, value) -> None:
    path.with_suffix(".tmp").write_text(json.dumps(value), encoding="utf-8")
    path.with_suffix(".tmp").replace(path)


def sweep(names: Sequence[str], lengths: Lengths, work: Path, workers: int) -> None:
    """Setting by setting, then the compute-matched rows; the results file grows with each."""
    with multiprocessing.get_context("spawn").Pool(workers, initializer=start_worker) as pool:
        for name in names:
            _keep(name, compare(name, lengths, work, pool))
        for name in names:
            if name.startswith("told"):  # who is told nothing does not learn more in more time
                _keep(name, match_compute(name, json.loads(RESULTS.read_text())[name], work, pool))


def _keep(name: str, setting: dict) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.parent.mkdir(exist_ok=True)
    _write(RESULTS, results | {name: setting})
    print(f"sweep: {name} is in {RESULTS}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--grid-steps", type=int, default=300, help="of the runs that choose a learning rate")
    parser.add_argument("--steps", type=int, default=600, help="of the runs that are reported")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, choices=SETTINGS)
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "sweep", help="where finished runs are kept")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    enter_host()
    lengths = Lengths(arguments.grid_steps, arguments.steps)
    sweep(arguments.settings, lengths, arguments.work, arguments.workers)


if __name__ == "__main__":
    main()
