"""What a generator's file keeps of its training, and when a condition is far from that."""

import base64
import json

import pytest
import torch

from hywu_core import ConfigError, knowledge


def texts(count: int, seed: int, centre: float = 0.0, width: int = 16) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(5, width, generator=source) + centre for _ in range(count)]


@pytest.mark.parametrize("width", [16, 4096], ids=["as it is", "projected"])
def test_known_is_never_noticed_far_always_and_alike_as_rarely_as_said(width):
    met = texts(200, 0, width=width)
    hywu = json.loads(json.dumps(knowledge.gathered({"base": "x"}, met)))
    knowledge.check(hywu)

    def alarms(those):
        return sum(knowledge.unknown(hywu, one.unsqueeze(0)) for one in those)

    assert hywu["base"] == "x" and alarms(met) == 0 and alarms(texts(50, 1, 30.0, width)) == 50
    assert alarms(texts(400, 2, width=width)) <= 400 * 2 * knowledge.FALSE_ALARMS


def test_a_later_training_adds_to_what_was_met():
    first = knowledge.gathered({}, texts(40, 0), [(64, 64)], 8)
    both = knowledge.gathered(first, texts(40, 1, 30.0), [(128, 64)], 8)
    for far in (texts(40, 0), texts(40, 1, 30.0)):
        assert not any(knowledge.unknown(both, one.unsqueeze(0)) for one in far)
    assert both["knows"]["sizes"] == [[64, 64], [128, 64]]
    # what reads otherwise takes the old one's place
    assert knowledge.points(knowledge.gathered(first, texts(40, 1, width=24))).values.shape == (40, 48)


def test_no_more_is_kept_than_may_be():
    hywu = knowledge.gathered({}, texts(700, 0), [(64 + i, 64) for i in range(100)])
    knowledge.check(hywu)
    assert len(knowledge.points(hywu).values) == knowledge.POINTS and len(hywu["knows"]["sizes"]) == knowledge.SIZES


@pytest.mark.parametrize(
    ("size", "strange"),
    [((64, 64), False), ((96, 96), False), ((128, 64), False), ((256, 256), True), ((16, 16), True), ((256, 64), True)],
)
def test_sizes_far_from_all(size, strange):
    hywu = knowledge.gathered({}, [], [(64, 64), (96, 64)])
    assert knowledge.strange_size(hywu, size) == strange
    assert not knowledge.strange_size({}, size)


def test_joined_instructions_are_longer():
    hywu = knowledge.gathered({}, texts(10, 0))
    assert knowledge.longer(hywu, torch.zeros(1, 20, 16)) and not knowledge.longer(hywu, torch.zeros(1, 5, 16))
    assert knowledge.picture_size(knowledge.gathered({}, [], [(8, 8)], 8), 2, 3) == (24, 16)


def test_a_file_that_says_nothing_notices_nothing():
    assert not knowledge.unknown({}, torch.randn(1, 5, 16)) and not knowledge.longer({}, torch.randn(1, 5, 16))
    assert not knowledge.unknown(knowledge.gathered({}, texts(2, 0)), torch.randn(1, 5, 16))  # too few to say
    assert not knowledge.unknown(knowledge.gathered({}, texts(20, 0)), torch.randn(1, 5, 24))  # of another width
    assert knowledge.reads({"training": {"regime": "blind"}}) == "blind" and knowledge.reads({"training": 3}) is None


@pytest.mark.parametrize(
    "change",
    [
        {"width": 0}, {"width": True}, {"width": 10**9}, {"points": "?"}, {"points": "AAAA"}, {"points": 3}, {"centre": ""},
        {"points": "A" * 10**6}, {"sizes": [[0, 1]]}, {"sizes": [[1]]}, {"sizes": 5}, {"cell": 0}, {"length": "long"},
        {"sizes": [[1, 1]] * 99}, {"points": None},
    ],
)  # fmt: skip
def test_damaged_entries_are_refused(change):
    hywu = knowledge.gathered({}, texts(20, 0), [(64, 64)])
    with pytest.raises(ConfigError, match="knows"):
        knowledge.check({"knows": {**hywu["knows"], **change}})


def test_numbers_that_are_not_finite_are_not_kept_and_not_read():
    assert "points" not in knowledge.gathered({}, [torch.full((5, 16), float("nan"))] * 5)["knows"]
    hywu = knowledge.gathered({}, texts(20, 0))
    nan = base64.b64encode(torch.full((32,), float("nan")).numpy().tobytes()).decode()
    with pytest.raises(ConfigError, match="finite"):
        knowledge.check({"knows": {**hywu["knows"], "centre": nan}})


def test_what_is_met_again_is_known_once():
    met = texts(40, 0)
    once = knowledge.gathered({}, met)
    # kept as rounded numbers the first time, and whole the second
    again = knowledge.gathered(once, [*texts(2, 1), *met])
    assert len(knowledge.points(again).values) == 42
    assert knowledge.points(again).threshold == pytest.approx(knowledge.points(once).threshold, rel=0.3)
    alike = texts(200, 2)
    assert sum(knowledge.unknown(again, one.unsqueeze(0)) for one in alike) <= len(alike) * 2 * knowledge.FALSE_ALARMS


def test_a_file_that_holds_conditions_twice_notices_no_more_than_others():
    values = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    twice = knowledge.Points(torch.cat([values, values * 1.001]))
    assert twice.threshold == pytest.approx(knowledge.Points(values).threshold, rel=0.3)
