"""What nodes show on themselves: as JSON that browsers read, with a notice where there is something to notice."""

import json
import logging
from pathlib import Path

import families
import pytest
import torch

from hywu_core import InstanceLora, LoraFactor
from hywu_core.host import cards, generator_cards, memory, told
from hywu_core.host.lora import apply, lora_cards
from hywu_core.messages import Message

SHIPPED = Path(__file__).resolve().parents[2] / "models"


def strict(value):
    return json.loads(json.dumps(value, allow_nan=False))


def test_a_card_is_json_without_what_browsers_cannot_read():
    chart = cards.Chart(cards.CURVE, "Loss", (float("nan"), *range(10000)))
    note = Message("{count} notes", count=2)
    found = cards.outputs(cards.Card("Title", (("a", "b"),), (note,), charts=(chart,)))
    (card,) = strict(found[cards.KEY])
    assert card["rows"] == [[{"message": "a", "values": {}}, "b"]] and card["level"] == cards.GOOD
    assert card["notes"] == [{"message": "{count} notes", "values": {"count": "2"}}]
    assert len(card["charts"][0]["values"]) <= cards.SHOWN and card["charts"][0]["values"][-1] > 9900
    assert found["text"] == ("Title\na: b\n2 notes",)


def test_a_picture_goes_along_as_a_picture_of_the_host(tmp_path, monkeypatch):
    monkeypatch.setattr("folder_paths.get_temp_directory", lambda: str(tmp_path))
    found = cards.outputs(cards.Card("Title"), torch.rand(1, 8, 8, 3))
    assert (tmp_path / found["images"][0]["filename"]).is_file()


def test_a_part_that_does_not_fit_is_a_warning():
    with torch.inference_mode():
        flux = families.flux()
        lora = families.random_lora(flux, 1)
        whole = lora_cards.applied(lora, apply.apply_lora(flux.model, lora)[1], 1.0, "auto")
        more = lora.changed(factors={**lora.factors, "not.there": LoraFactor(torch.ones(1, 4, 8), torch.ones(1, 8, 4))})
        part = lora_cards.applied(more, apply.apply_lora(flux.model, more)[1], 1.0, "auto")
        off = lora_cards.applied(lora, apply.apply_lora(flux.model, lora, 0.0)[1], 0.0, "auto")
    count = len(lora.names)
    assert whole.level == cards.GOOD and dict(whole.rows)["Targets"] == f"matched {count}/{count} targets (bypass)"
    assert part.level == cards.WARNING and f"matched {count}/{count + 1}" in str(part) and "not.there" in part.notes[0]
    assert off.level == cards.NOTICE


READ = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("regime", "positive", "noticed"),
    [
        ("blind", torch.zeros(1, 6, 16), ""),
        ("blind", READ, told.WORDS_AT_A_BLIND_ONE),
        ("told", READ, ""),
        ("told", READ.repeat(1, 2, 1), ""),  # as the host makes conditions of different lengths one batch
        ("told", torch.zeros(1, 6, 16), told.NONE_AT_A_TOLD_ONE),
    ],
)
def test_what_the_base_is_told_is_compared_with_training(regime, positive, noticed, caplog):
    lora = InstanceLora({}, metadata={told.READ: told._digest(READ)[0].tolist(), told.REGIME: regime})
    model, shown = families.flux().model.clone(), []
    told.watch(model, lora, shown.append, cards.Card("The LoRA is on the model"))
    (watch,) = model.get_wrappers(told.WrappersMP.APPLY_MODEL, told.KEY)
    sigmas, negative = torch.ones(3), torch.full_like(positive, 7.0)
    options = {"sample_sigmas": sigmas, "cond_or_uncond": [1, 0]}
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            context = torch.cat([negative, positive])
            assert watch(lambda *arguments, **_: arguments[3], None, None, None, context, None, options) is context
    assert [record.message for record in caplog.records] == ([f"HY-WU: {noticed}"] if noticed else [])
    assert [card.level for card in shown] == ([cards.NOTICE] if noticed else [])


def test_a_batch_that_another_wrapper_divided_is_not_looked_at():
    shown = []
    watch = told.Watch(told._digest(READ)[0], "blind", shown.append, cards.Card("The LoRA is on the model"))
    options = {"sample_sigmas": torch.ones(3), "cond_or_uncond": [1, 0]}
    assert watch(lambda *arguments, **_: "ran", None, None, None, READ, None, options) == "ran" and not shown


def test_a_lora_that_does_not_say_what_it_was_made_from_is_not_watched():
    model = families.flux().model.clone()
    told.watch(model, InstanceLora({}), None, cards.Card(""))
    assert not model.get_wrappers(told.WrappersMP.APPLY_MODEL, told.KEY)


@pytest.mark.parametrize("suffix", ["", "-told"])
def test_what_a_generator_knows_is_named_from_all_of_its_edits(suffix):
    """The files that ship list dozens of wordings of one edit before those of the next."""
    handle = memory.load(SHIPPED / f"pocket-generator{suffix}.safetensors")
    named = dict(generator_cards.loaded(handle).rows)["Knows"].rpartition(" and ")[0].split("; ")
    known = handle.config.hywu["instructions"]
    places = [known.index(text) for text in named]
    assert len(named) == generator_cards.NAMED and places == sorted(places) and places[-1] > len(known) * 3 / 4
