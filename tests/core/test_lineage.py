"""What a generator's file keeps of its life."""

from hywu_core.lineage import INSTRUCTIONS, continued, instructions


def test_a_full_list_makes_room_for_what_was_taught_last():
    old = [f"old edit {number}" for number in range(INSTRUCTIONS)]
    kept = continued({"instructions": old}, {"kind": "taught"}, ["make it new", "newer"], old)["instructions"]
    assert len(kept) == INSTRUCTIONS and kept[-2:] == ["make it new", "newer"]
    assert kept[:-2] == [text for text in old if text in kept] and old[0] in kept and old[-2] in kept


def test_what_is_named_twice_is_kept_once_where_it_is_newest():
    kept = continued({"instructions": ["a", "b"]}, {"kind": "taught"}, ["b", " c "], ["a", "d"])["instructions"]
    assert kept == ["a", "d", "b", "c"]


def test_what_was_held_on_request_stays_in_a_full_list():
    old = [f"old edit {number}" for number in range(INSTRUCTIONS)]
    kept = continued({"instructions": old}, {"kind": "taught"}, ["new"], ["said by hand"])["instructions"]
    assert len(kept) == INSTRUCTIONS and kept[-2:] == ["said by hand", "new"]


def test_a_list_that_is_too_long_is_thinned_evenly():
    kept = instructions(str(number) for number in range(2 * INSTRUCTIONS))
    assert kept == tuple(str(number) for number in range(0, 2 * INSTRUCTIONS, 2))


def test_a_step_names_instructions_of_all_its_edits():
    texts = [f"edit {number // 20}, wording {number % 20}" for number in range(160)]
    (step,) = continued({}, {"kind": "trained"}, texts)["lineage"]
    assert step["instructions"] == 160 and {text.partition(",")[0] for text in step["named"]} == {
        f"edit {n}" for n in range(8)
    }
