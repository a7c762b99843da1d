"""The fair comparison on the pocket editor: every method, the same data, steps and learning rates; the rate chosen on the
validation split, the result reported on the test split over several seeds.

    .venv/bin/python scripts/sweep_pocket.py [--workers 2] [--settings blind-eight ...] [--work out/sweep]

Takes hours. Resumable: every finished run is a file in --work, and what is there is not run again. The results go into
results/pocket.json, which the README's table is made from (scripts/evaluate_pocket.py --results).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from in_host import ROOT, enter_host, hurry

RESULTS = ROOT / "results" / "pocket.json"
SETTINGS = ("blind-eight", "told-eight", "told-instance", "told-sixteen")
RATES = (5e-4, 2e-3, 8e-3, 3e-2)
SEEDS = (0, 1, 2)
MATCHED = ("shared_x4", "full")  # given as much time as the generator took, too


def start_worker() -> None:
    """One process, one thread: two of them do more than one with two."""
    enter_host()
    hurry(threads=1)


def do(work: Path, testing: bool, run) -> dict:
    """Train a run and validate it, or test it as well; what is there already is not done again."""
    from hywu_core.bases.pocket import comparison

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
    from hywu_core.bases.pocket import comparison

    record = work / f"base-{run.regime}-{run.suite}.json"
    if not record.exists():
        _write(record, comparison.base_scores(run))
    return json.loads(record.read_text())


def setting(name: str, steps: int, work: Path, pool) -> dict:
    """All runs of one setting: the grid, the choice, the seeds, the compute-matched rows."""
    from hywu_core.bases.pocket.methods import METHODS, Run

    regime, suite = name.split("-")
    grid = [Run(regime, suite, method, rate, 0, steps) for rate in RATES for method in METHODS]
    validated = pool.map(partial(do, work, False), grid, chunksize=1)
    scores = {run: found["validation"] for run, found in zip(grid, validated, strict=True)}
    best = {
        method: max((run for run in grid if run.method == method and scores[run] is not None), key=scores.get)
        for method in METHODS
    }
    chosen = [best[method]._replace(seed=seed) for seed in SEEDS for method in METHODS]
    tested = dict(zip(chosen, pool.map(partial(do, work, True), chosen, chunksize=1), strict=True))
    took = {m: sum(tested[best[m]._replace(seed=s)]["seconds_per_step"] for s in SEEDS) for m in METHODS}
    longer = [
        best[method]._replace(seed=seed, steps=round(steps * max(1.0, took["generator"] / took[method])))
        for seed in SEEDS
        for method in (MATCHED if regime == "told" else ())  # who is told nothing does not learn more in more time
    ]
    matched = dict(zip(longer, pool.map(partial(do, work, True), longer, chunksize=1), strict=True))
    return {
        "base": pool.apply(base_of, (work, grid[0])),
        "steps": steps,
        "grid": {method: {f"{run.rate:g}": scores[run] for run in grid if run.method == method} for method in METHODS},
        "rate": {method: run.rate for method, run in best.items()},
        "seconds_per_step": {method: took[method] / len(SEEDS) for method in METHODS},
        "methods": _by_method(tested) | {f"{m}_compute_matched": v for m, v in _by_method(matched).items()},
        "compute_matched_steps": {run.method: run.steps for run in longer},
    }


def _by_method(tested: dict) -> dict[str, list[dict]]:
    """{method: [what was tested, seed by seed]}."""
    found: dict[str, list[dict]] = {}
    for run, result in tested.items():
        found.setdefault(run.method, []).append({"seed": run.seed, **result["test"]})
    return found


def _write(path: Path, value) -> None:
    path.with_suffix(".tmp").write_text(json.dumps(value), encoding="utf-8")
    path.with_suffix(".tmp").replace(path)


def sweep(names: Sequence[str], steps: int, work: Path, workers: int) -> None:
    """Setting by setting; the results file grows with each."""
    with multiprocessing.get_context("spawn").Pool(workers, initializer=start_worker) as pool:
        for name in names:
            found = setting(name, steps, work, pool)
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            RESULTS.parent.mkdir(exist_ok=True)
            _write(RESULTS, results | {name: found})
            print(f"sweep: {name} is in {RESULTS}", flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--steps", type=int, default=300, help="of every run")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, choices=SETTINGS)
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "sweep", help="where finished runs are kept")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    enter_host()
    sweep(arguments.settings, arguments.steps, arguments.work, arguments.workers)


if __name__ == "__main__":
    main()
