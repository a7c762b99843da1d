"""The fair comparison: a LoRA for each edit, and a grid of learning rates that grows call by call."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hywu_core.training import Sample
from study import report
from study.edits import EIGHT, SUITES
from study.methods import RANK, LoraForEachEdit, generator_config
from study.task import Case, edit_named_by

NAMES = [edit.name for edit in EIGHT]


def asked_for(*names):
    return [Sample(torch.empty(0), None, torch.empty(0), f"emoji, red, {name}") for name in names]


def test_a_batch_trains_the_loras_of_its_edits_alone():
    each = LoraForEachEdit(generator_config(), NAMES, RANK, 8.0)
    lora = each.lora(asked_for(NAMES[5], NAMES[0], NAMES[5]))
    assert lora.batch == 3
    sum(pair.up.sum() for pair in lora.pairs).backward()
    moved = {int(name.split(".")[0]) for name, p in each.named_parameters().items() if p.grad is not None}
    assert moved == {0, 5}


def test_the_lora_of_a_case_is_that_of_its_edit():
    each = LoraForEachEdit(generator_config(), NAMES, RANK, 8.0)
    with torch.no_grad():
        for place, one in enumerate(each):
            for up in one.ups:
                up.fill_(place)
    ups = each.chosen([Case(0, 6), Case(3, 2)]).pairs[0].up
    assert ups[0].unique().tolist() == [6.0] and ups[1].unique().tolist() == [2.0] and not ups.requires_grad


def test_no_edit_has_a_name_that_a_key_cuts():
    for edit in {edit for suite in SUITES.values() for edit in suite}:
        assert edit_named_by(f"a cat, black and white, {edit.name}") == edit.name


class AtOnce:
    """A pool of no processes."""

    def map(self, function, items, chunksize=1):
        return [function(item) for item in items]

    def apply(self, function, arguments):
        return function(*arguments)


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """The script, whose runs are as good as their rate is near 0.002, and what it tested."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
    import sweep_pocket

    tested = []

    def do(_work, testing, run):
        if testing:
            tested.append((run.method, run.rate, run.seed))
        return {"validation": -abs(run.rate - 0.002), "seconds_per_step": 1.0, "test": {"psnr": {}}}

    monkeypatch.setattr(sweep_pocket, "do", do)
    monkeypatch.setattr(sweep_pocket, "base_of", lambda work, run: [1.0])

    def call(before, methods, rates, steps=6):
        wanted = sweep_pocket.Wanted(
            "pocket", methods, rates, sweep_pocket.Lengths(3, steps), (0, 1, 2), tmp_path / "r.json"
        )
        return sweep_pocket.compare("blind-eight", wanted, before, tmp_path, AtOnce())

    def lengthen(found, methods):
        wanted = sweep_pocket.Wanted("pocket", methods, [], sweep_pocket.Lengths(3, 6), (0,), tmp_path / "r.json")
        return sweep_pocket.lengthen("blind-eight", wanted, found, 3, tmp_path, AtOnce())

    return SimpleNamespace(call=call, lengthen=lengthen, tested=tested)


def test_a_grid_grows_and_only_a_better_rate_is_tested_anew(sweep):
    first = sweep.call({}, ["shared"], [0.01])
    assert sweep.tested == [("shared", 0.01, seed) for seed in (0, 1, 2)]
    worse = sweep.call(first, ["shared"], [0.1])
    assert len(sweep.tested) == 3 and worse["methods"] == first["methods"]
    assert list(worse["grid"]["shared"]) == ["0.01", "0.1"] and worse["rate"] == {"shared": 0.01}
    better = sweep.call(worse, ["shared", "each"], [0.003])
    assert sweep.tested[3:] == [(method, 0.003, seed) for method in ("shared", "each") for seed in (0, 1, 2)]
    assert better["rate"] == {"shared": 0.003, "each": 0.003} and len(better["methods"]["shared"]) == 3
    assert list(first["grid"]["shared"]) == ["0.01"], "what was found before is not changed"


def test_longer_runs_are_rows_of_their_own_at_the_rate_that_was_chosen(sweep):
    found = sweep.call({}, ["shared"], [0.01])
    longer = sweep.lengthen(found, ["shared"])
    assert sweep.tested[3:] == [("shared", 0.01, 0)]
    assert longer["methods"].keys() == {"shared", "shared_steps_x3"} and longer["rate"] == found["rate"]
    with pytest.raises(SystemExit, match="no rate for each"):
        sweep.lengthen(found, ["each"])


def test_what_helped_is_told_by_the_seeds_that_both_have():
    def run(seed, value):
        return {"seed": seed, "psnr": {"matched": [value, value + 1]}}

    methods = {"generator": [run(0, 1.0), run(1, 5.0)], "generator_text": [run(1, 7.0)]}
    assert report.helped({"methods": methods})["generator_text"].mean == 2.0


def test_results_of_other_steps_are_not_mixed(sweep):
    first = sweep.call({}, ["shared"], [0.01])
    with pytest.raises(SystemExit, match="holds results of"):
        sweep.call(first, ["each"], [0.01], steps=7)
