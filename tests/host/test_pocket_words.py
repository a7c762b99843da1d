"""How people ask for edits, pictures of all sizes, and how what ships takes both."""

import random
from pathlib import Path

import pytest
import torch

from hywu_core import load_generator
from hywu_core.bases import pocket
from study import bases, edits, evaluation, foreign, methods, pictures, reading, wordings
from study.task import EditingTask, MixedSizes, encode_words

ROOT = Path(__file__).resolve().parents[2]
ALL = (*edits.SUITES["all"], *edits.BASE_EDITS)


@pytest.fixture(scope="module")
def loaded():
    return pocket.load_pocket_editor()


@pytest.mark.parametrize("edit", ALL, ids=[edit.name for edit in ALL])
def test_held_out_wordings_are_no_trained_ones_of_any_edit(edit):
    known = {text for other in ALL for text in wordings.trained(other)}
    found = wordings.held_out(edit)
    assert set(found) == set(reading.KINDS)
    assert len(found["typo"]) >= 3 and len(found["synonym"]) >= 2
    for texts in found.values():
        assert not known & set(texts)
    assert wordings.trained(edit)[: len(edit.wordings)] == edit.wordings


def test_no_two_edits_are_asked_for_in_the_same_words():
    texts = [text for edit in ALL for text in wordings.trained(edit)]
    assert len(texts) == len(set(texts))


def test_foreign_sentences_of_the_test_are_not_trained_on():
    known, new = foreign.foreign(), foreign.foreign(trained_on=False)
    assert "" in known and len(known) > 400 and len(new) > 200
    assert not set(known) & set(new)
    suite = foreign.leaving()
    assert {text for edit in suite for text in edit.wordings} == set(known)
    assert not set(known) & {text for edit in ALL if edit.name != "copy" for text in wordings.trained(edit)}


@pytest.mark.parametrize("kind", wordings.TYPOS)
def test_typing_errors(kind):
    typed = wordings.mistyped("darken the picture", kind)
    assert typed != "darken the picture" and typed.startswith("darken the p")
    assert len(typed) == len("darken the picture") - (kind == "missing")


def test_the_shipped_table_reads_typing_errors_of_its_instructions(loaded):
    words = loaded[1].tokenizer.pocket.tokenizer
    meant = [(text, kind) for text in wordings.trained(edits.EIGHT[0])[:12] for kind in wordings.TYPOS]
    right = [words(wordings.mistyped(text, kind)) == words(text) for text, kind in meant]
    assert sum(right) / len(right) > 0.8


@pytest.mark.parametrize("size", [(32, 32), (48, 96), (128, 128)])
def test_pictures_of_any_size(size):
    found, names = pictures.compose("validation", size, count=5, seed=2)
    assert found.shape == (5, 3, *size) and len(set(names)) == 5
    assert torch.equal(found, pictures.compose("validation", size, count=5, seed=2)[0])
    assert float(found.std()) > 0.05


def test_sizes_are_drawn_by_their_shares(loaded):
    tasks = [
        EditingTask(loaded[1], torch.rand(3, 3, side, side), ["a", "b", "c"], edits.EIGHT[:2], None, "blind")
        for side in (8, 16)
    ]
    mixed = MixedSizes(tasks, (3.0, 1.0))
    source = torch.Generator().manual_seed(0)
    sides = [mixed.sample(index, source).latent.shape[-1] for index in range(200)]
    assert 0.65 < sides.count(8) / 200 < 0.85 and set(sides) == {8, 16}


def test_a_grid_is_seen_and_no_grid_is_not():
    generator = torch.Generator().manual_seed(0)
    assert reading.grid(torch.randn((4, 3, 32, 32), generator=generator), 4) == pytest.approx(1, abs=0.05)
    blocks = torch.randn((4, 3, 8, 8), generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert reading.grid(blocks + 0.1 * torch.randn((4, 3, 32, 32), generator=generator), 4) > 2


def test_the_first_editor_is_still_there():
    first = bases.load(bases.FIRST)
    found, names = pictures.compose("test", 32)
    task = EditingTask(first.clip, found[:8], names[:8], edits.EIGHT, methods.generator_config(), "blind")
    generator = load_generator(bases.first_generator())
    cases = task.balanced_cases(8)
    matched = evaluation.score(first.model, task, cases, lambda part: evaluation.write(generator, task, part)).mean()
    assert float(matched) > float(evaluation.score(first.model, task, cases).mean()) + 4
    assert encode_words(first.clip, "a").pooled.shape == (1, 64)


def test_what_ships_leaves_alone_what_it_was_not_taught(loaded):
    model, clip, _ = loaded
    generator = load_generator(ROOT / "models" / "pocket-generator.safetensors")
    found = reading.unknown(generator, model, clip, "blind", count=24)
    assert found["instructions"] == 24 and found["left_alone"] >= 0.75


def test_what_ships_understands_wordings_that_it_never_saw(loaded):
    model, clip, _ = loaded
    generator = load_generator(ROOT / "models" / "pocket-generator.safetensors")
    found, names = pictures.compose("test", 32)
    some = [
        edit._replace(wordings=tuple(random.Random(0).sample(wordings.held_out(edit)["frame"], 2)))
        for edit in edits.EIGHT
    ]
    task = EditingTask(clip, found[:16], names[:16], some, generator.config, "blind")
    cases = task.balanced_cases(16)
    matched = evaluation.score(model, task, cases, lambda part: evaluation.write(generator, task, part)).mean()
    assert float(matched) > float(evaluation.score(model, task, cases).mean()) + 4
