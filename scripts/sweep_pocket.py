"""The fair comparison on the pocket editor: every method, the same data, steps and learning rates; the rate chosen on the
validation split, the result reported on the test split over several seeds.

    .venv/bin/python scripts/sweep_pocket.py [--workers 2] [--settings blind-eight ...] [--work out/sweep]

Takes hours. Resumable: every finished run is a file in --work, and what is there is not run again. Results are added to
results/pocket.json, from which scripts/evaluate_pocket.py makes the table of docs/evidence.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from in_host import ROOT, enter_host, hurry

RESULTS = ROOT / "results" / "pocket.json"
SETTINGS = ("blind-eight", "told-eight", "told-instance", "told-sixteen")
RATES = (1.25e-4, 5e-4, 2e-3, 8e-3, 3e-2)
SEEDS = (0, 1, 2)
MATCHED = ("shared_x4", "full")  # given as much time as the generator took, too


class Lengths(NamedTuple):
    """Steps of the runs that choose a learning rate, and of those that are reported; the same for every method."""

    grid: int
    final: int


class Wanted(NamedTuple):
    """What a call of this script is to find out about a setting."""

    base: str
    methods: Sequence[str]
    rates: Sequence[float]
    lengths: Lengths
    seeds: Sequence[int]
    out: Path

    def name(self, setting: str) -> str:
        """A setting's name in the results: those of the first editor are named by nothing else."""
        from study.bases import FIRST

        return setting if self.base == FIRST else f"{self.base}-{setting}"


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

    record = work / f"base-{run.base}-{run.regime}-{run.suite}.json"
    if not record.exists():
        _write(record, comparison.base_scores(run))
    return json.loads(record.read_text())


def compare(setting: str, wanted: Wanted, before: dict, work: Path, pool) -> dict:
    """One setting: a grid of learning rates in short runs, and long runs of all seeds with the rates chosen. What was found
    before is kept, and long runs are made where a method is new or another rate has turned out best.
    """
    from study.methods import Run

    regime, suite = setting.split("-")
    lengths = before.get("steps", wanted.lengths._asdict())
    if lengths != wanted.lengths._asdict():
        sys.exit(f"{wanted.out} holds results of {lengths} for {setting}, not of {wanted.lengths._asdict()}.")
    grid = [
        Run(regime, suite, method, rate, 0, wanted.lengths.grid, base=wanted.base)
        for rate in wanted.rates
        for method in wanted.methods
    ]
    validated = dict(zip(grid, pool.map(partial(do, work, False), grid, chunksize=1), strict=True))
    found = {key: dict(before.get(key, {})) for key in ("grid", "rate", "seconds_per_step", "methods")}
    chosen = []
    for method in wanted.methods:
        new = {f"{run.rate:g}": kept["validation"] for run, kept in validated.items() if run.method == method}
        scores = found["grid"].get(method, {}) | new
        found["grid"][method] = dict(sorted(scores.items(), key=lambda item: float(item[0])))
        rate = float(max((rate for rate, score in scores.items() if score is not None), key=scores.get))
        if rate != found["rate"].get(method) or method not in found["methods"]:
            found["rate"][method] = rate
            run = Run(regime, suite, method, rate, 0, wanted.lengths.final, base=wanted.base)
            chosen += [run._replace(seed=seed) for seed in wanted.seeds]
    tested = dict(zip(chosen, pool.map(partial(do, work, True), chosen, chunksize=1), strict=True))
    found["methods"] |= _by_method(tested)
    for method in {run.method for run in chosen}:
        taken = [kept["seconds_per_step"] for run, kept in tested.items() if run.method == method]
        found["seconds_per_step"][method] = sum(taken) / len(taken)
    base = before.get("base") or pool.apply(base_of, (work, grid[0]))
    return {**before, "base": base, "steps": lengths, **found}


def match_compute(setting: str, wanted: Wanted, found: dict, work: Path, pool) -> dict:
    """The same setting with rows of rivals that were given as much processor time as the generator took."""
    from study.methods import Run

    regime, suite = setting.split("-")
    seconds = found["seconds_per_step"]
    steps = {m: round(found["steps"]["final"] * max(1.0, seconds["generator"] / seconds[m])) for m in MATCHED}
    longer = [
        Run(regime, suite, m, found["rate"][m], seed, steps[m], base=wanted.base)
        for seed in wanted.seeds
        for m in MATCHED
    ]
    tested = dict(zip(longer, pool.map(partial(do, work, True), longer, chunksize=1), strict=True))
    rows = {f"{method}_compute_matched": runs for method, runs in _by_method(tested).items()}
    return found | {"methods": found["methods"] | rows, "compute_matched_steps": steps}


def lengthen(setting: str, wanted: Wanted, found: dict, times: int, work: Path, pool) -> dict:
    """The same setting with rows of the methods that are wanted, trained so many times as long."""
    from study.methods import Run

    missing = [method for method in wanted.methods if method not in found.get("rate", {})]
    if missing:
        sys.exit(f"{wanted.out} has no rate for {', '.join(missing)} in {setting}. Run without --longer first.")
    regime, suite = setting.split("-")
    steps = times * found["steps"]["final"]
    longer = [
        Run(regime, suite, m, found["rate"][m], seed, steps, base=wanted.base)
        for m in wanted.methods
        for seed in wanted.seeds
    ]
    tested = dict(zip(longer, pool.map(partial(do, work, True), longer, chunksize=1), strict=True))
    rows = {f"{method}_steps_x{times}": runs for method, runs in _by_method(tested).items()}
    return found | {"methods": found["methods"] | rows}


def _by_method(tested: dict) -> dict[str, list[dict]]:
    """{method: [what was tested, seed by seed]}."""
    found: dict[str, list[dict]] = {}
    for run, result in tested.items():
        found.setdefault(run.method, []).append({"seed": run.seed, **result["test"]})
    return found


def _write(path: Path, value) -> None:
    path.with_suffix(".tmp").write_text(json.dumps(value), encoding="utf-8")
    path.with_suffix(".tmp").replace(path)


def sweep(settings: Sequence[str], wanted: Wanted, longer: int, work: Path, workers: int) -> None:
    """Setting by setting, then the rows of as much time; or the rows of longer runs alone. The results grow with each."""
    with multiprocessing.get_context("spawn").Pool(workers, initializer=start_worker) as pool:
        for setting in settings:
            if longer > 1:
                _renew(setting, wanted, lambda *given: lengthen(*given, longer, work, pool))
            else:
                _renew(setting, wanted, lambda *given: compare(*given, work, pool))
        for setting in settings:
            # who is told nothing does not learn more in more time
            if longer == 1 and setting.startswith("told") and set(MATCHED) & set(wanted.methods):
                _renew(setting, wanted, lambda *given: match_compute(*given, work, pool))


def _renew(setting: str, wanted: Wanted, find: Callable[[str, Wanted, dict], dict]) -> None:
    """Put what is found of a setting in the place of what is there."""
    name = wanted.name(setting)
    found = find(setting, wanted, _read(wanted.out).get(name, {}))
    wanted.out.parent.mkdir(exist_ok=True)
    # another process may have added a setting meanwhile
    _write(wanted.out, _read(wanted.out) | {name: found})
    print(f"sweep: {name} is in {wanted.out}", flush=True)


def _read(out: Path) -> dict:
    return json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}


def main() -> None:
    enter_host()
    from study.bases import BASES, FIRST
    from study.methods import GENERATORS, METHODS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--grid-steps", type=int, default=300, help="of the runs that choose a learning rate")
    parser.add_argument("--steps", type=int, default=600, help="of the runs that are reported")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, choices=SETTINGS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=(*METHODS, *list(GENERATORS)[1:]))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument(
        "--longer", type=int, default=1, help="add rows of the methods trained so many times as long instead"
    )
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="added to those that are in the results")
    parser.add_argument("--base", default=FIRST, choices=BASES, help="the first editor or the one that ships")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "sweep", help="where finished runs are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    lengths = Lengths(arguments.grid_steps, arguments.steps)
    wanted = Wanted(arguments.base, arguments.methods, arguments.rates, lengths, arguments.seeds, arguments.out)
    sweep(arguments.settings, wanted, arguments.longer, arguments.work, arguments.workers)


if __name__ == "__main__":
    main()
