"""Messages: English as a text, and what another language needs to say them."""

import copy
import json
import pickle

from hywu_core.messages import Message, as_json, listed


def test_a_message_is_its_english():
    said = Message("{count} of {names}", count=2, names=Message("the pairs"))
    assert said == "2 of the pairs" and f"{said}." == "2 of the pairs." and json.dumps(said) == '"2 of the pairs"'
    names = {"message": "the pairs", "values": {}}
    assert said.as_json() == {"message": "{count} of {names}", "values": {"count": "2", "names": names}}


def test_what_an_artist_wrote_is_no_template():
    said = Message("It knows: {instructions}.", instructions="{count} {cats}")
    assert said == "It knows: {count} {cats}." and as_json("{count}") == "{count}"


def test_several_texts_are_one():
    assert (
        listed([]) == "" and listed(["a"]) == "a" and listed(["a", "b", "c"], "{first} and {second}") == "a and b and c"
    )
    assert as_json(listed(["a", "b"])) == {"message": "{first}, {second}", "values": {"first": "a", "second": "b"}}


def test_a_copy_can_be_translated_as_well():
    said = Message("{text}!", text="{braces}")
    for again in (copy.deepcopy(said), pickle.loads(pickle.dumps(said))):
        assert again == said and again.as_json() == said.as_json()
