"""The studies of what is forgotten, what is learned from few pairs, and how LoRAs collected before compare: what they count,
and that what was trained once is not trained again.
"""

import json

import pytest
import torch

from hywu_core.training import Sample
from study import arrivals, continual, paradigms, personal
from study.arrivals import ALL, MEMORY, PLAIN, RECALL, REPLAY, Arrivals, How, Mixed, known
from study.edits import EIGHT, SIXTEEN
from study.task import EditingTask


def test_the_three_ways_cost_the_same():
    cost = paradigms.Cost(collecting=0.2, reconstructing=0.25, both=0.5, end_to_end=0.4)
    steps = paradigms.shared_out(cost, 400, 8)
    collecting = 8 * steps.collecting * cost.collecting
    assert collecting == pytest.approx(0.5 * 160)
    assert collecting + steps.reconstructing * cost.reconstructing == pytest.approx(160)
    assert collecting + steps.both * cost.both == pytest.approx(160)


class Numbered:
    """Pairs that say who they are."""

    def __init__(self, name, count):
        self.name, self.count = name, count

    def __len__(self):
        return self.count

    def sample(self, index, source):
        return Sample(torch.empty(0), None, torch.empty(0), f"{self.name} {index}")


def test_a_replay_is_half_new_and_goes_through_all():
    mixed = Mixed(Numbered("new", 2), Numbered("old", 6))
    keys = [mixed.sample(index, torch.Generator()).key for index in range(len(mixed))]
    assert sum(key.startswith("new") for key in keys) == len(keys) / 2 == 6
    assert len(set(keys)) == 8


def test_what_is_kept_and_what_is_learned_are_told_apart():
    scores = {edit.name: [float(place), float(place)] for place, edit in enumerate(SIXTEEN)}
    assert known(scores, SIXTEEN, 2) == {"kept": 1.5, "learned": 4.5, "all": 2.5}


def test_shares_of_what_is_kept_are_of_what_plain_training_loses():
    found = {
        "first": {"old": [26.0], "new": [15.0]},
        "plain": {"old": [14.0], "new": [20.0]},
        "memory 2": {"old": [23.0], "new": [19.5]},
    }
    assert continual.gates(found, "memory 2") == {
        "kept_share": 0.75,
        "new_against_plain": -0.5,
        "old_against_first": -3.0,
    }


def counted(monkeypatch, module):
    """The lengths of the trainings that a study does."""
    done, run = [], module.Trainer.run
    monkeypatch.setattr(module.Trainer, "run", lambda self: (done.append(self.config.steps), run(self))[1])
    return done


def test_arrivals_are_trained_once_and_one_after_the_other(tmp_path, monkeypatch):
    done = counted(monkeypatch, arrivals)
    monkeypatch.setattr(arrivals, "CASES_OF_AN_EDIT", 1)
    how = How(EIGHT[:4], steps=1, asked=2)
    found = {m: Arrivals(tmp_path, how, 16).score(m, 1) for m in (PLAIN, MEMORY, RECALL, REPLAY, arrivals.SHARED)}
    assert done == [1] * 10 and all(set(scores) == {edit.name for edit in EIGHT[:4]} for scores in found.values())
    assert Arrivals(tmp_path, how, 16).score(MEMORY, 1) == found[MEMORY] and len(done) == 10
    assert found[PLAIN] != found[REPLAY]
    everything = Arrivals(tmp_path, how, 16).score(ALL, 0)
    assert done[10:] == [2], "all at once takes as many steps as all arrivals together"
    assert everything != found[PLAIN]


def test_old_instructions_are_recalled_on_sources_alone():
    task = EditingTask.__new__(EditingTask)
    task.sample = lambda index, source: Sample(
        torch.ones(3), [None, {"reference_latents": [torch.zeros(1, 3)]}], torch.empty(0)
    )
    found = arrivals.Unedited(task).sample(0, torch.Generator())
    assert not found.latent.any() and found.latent.shape == (3,), "nobody has the edited picture"


def test_fine_tuning_leaves_the_base_of_others_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(arrivals, "CASES_OF_AN_EDIT", 1)
    study = Arrivals(tmp_path, How(EIGHT[:2], steps=1), 16)
    before = study.score_base()
    assert study.score(arrivals.FULL, 0) != before
    assert study.score_base() == before


def test_paradigms_learn_from_the_edit_that_is_asked_for(tmp_path, monkeypatch):
    done = counted(monkeypatch, paradigms)
    monkeypatch.setattr(paradigms, "CASES", 4)
    study = paradigms.Paradigms(tmp_path, EIGHT[:2], 16)
    loras = study.collected(0, 2)
    asked = continual.Asked(study._task("test"))
    teacher = paradigms.OfEdits(loras, EIGHT[:2])
    wanted = teacher.lora([asked[0], asked[len(EIGHT[0].wordings)]])
    for place in range(2):
        for pair, other in zip(wanted.select(place).pairs, loras[place].pairs, strict=True):
            assert torch.equal(pair.up, other.up)
    scores = [study.score(study.trained(way, 0, 1, loras)) for way in paradigms.WAYS]
    assert done == [2, 2, 1, 1, 1] and len({tuple(found) for found in scores}) == 3
    assert study.score(study.trained(paradigms.BOTH, 0, 1, loras)) == scores[1] and len(done) == 5


def test_pairs_of_a_personal_edit_are_the_first_of_its_anchors(tmp_path):
    study = personal.Personal.__new__(personal.Personal)
    few, more = study._pictures(1, personal.PAIRS), study._pictures(1, personal.PAIRS + 8)
    assert torch.equal(more[: personal.PAIRS], few) and not torch.equal(few, study._pictures(2, personal.PAIRS))


def test_results_are_made_once(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(personal.Path(__file__).resolve().parents[2] / "scripts"))
    import kept_results

    path, made = tmp_path / "results" / "some.json", []
    for _ in range(2):
        assert kept_results.once(path, "group", "name", lambda: made.append(1) or [1.5]) == [1.5]
    assert made == [1] and json.loads(path.read_text(encoding="utf-8")) == {"group": {"name": [1.5]}}
