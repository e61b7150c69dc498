"""The stack as text, both ways."""

import json

import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.adapters.permeability import Permeability
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.adapters.stack_json import Row, from_json, names, to_json
from membrane.core.errors import ErasureError


def adapter(name):
    return ErasureAdapter(
        Card("UCE", (name,)), {"map": {"text": TextMap(torch.zeros(4, 1), torch.zeros(1, 4), (0,))}}, name
    )


FILES = {name: adapter(name) for name in ("star.safetensors", "objects/heart.safetensors")}


def load(text):
    return from_json(text, FILES.__getitem__)


def test_there_and_back():
    settings = Permeability("route", 2.0, 0.25, "own", 3)
    stack = ErasureStack(
        (
            Entry(FILES["star.safetensors"], -0.5, 0.1, 0.9, settings, enabled=False),
            Entry(FILES["objects/heart.safetensors"]),
        )
    )
    text = to_json(stack)
    assert load(text) == stack
    assert names(text) == ["star.safetensors", "objects/heart.safetensors"]
    assert json.loads(text)["membrane_stack"] == 1


@pytest.mark.parametrize("text", ["", "  \n", '{"membrane_stack": 1}', to_json(ErasureStack())])
def test_empty(text):
    assert load(text) == ErasureStack()


def test_defaults_are_those_of_an_entry():
    assert load('{"membrane_stack": 1, "entries": [{"adapter": "star.safetensors"}]}').entries == (
        Entry(FILES["star.safetensors"]),
    )


def entry(**fields):
    return json.dumps({"membrane_stack": 1, "entries": [{"adapter": "star.safetensors", **fields}]})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[1, 2", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", 'lacks "membrane_stack"'),
        ("{}", 'lacks "membrane_stack"'),
        ('{"membrane_stack": true}', 'lacks "membrane_stack"'),
        ('{"membrane_stack": 2, "entries": []}', "version 2, and this pack reads up to 1; update"),
        ('{"membrane_stack": 1, "entries": {}}', "no list"),
        ('{"membrane_stack": 1, "entries": ["star"]}', "Entry 1 of the stack names no adapter"),
        ('{"membrane_stack": 1, "entries": [{"strength": 1}]}', "Entry 1 of the stack names no adapter"),
        (entry(strenght=1), 'the field "strenght"; expected only adapter, enabled, strength'),
        (entry(strength="1"), "\"strength\": '1'; expected a number"),
        (entry(strength=True), "expected a number"),
        (entry(enabled=1), "expected true or false"),
        (entry(start_percent=0.8, end_percent=0.2), "start <= end"),
        (entry(permeability="route"), "expected {"),
        (entry(permeability={"top": 1}), "permeability of entry 1 of the stack"),
        (entry(permeability={"mode": "open"}), 'mode "open"'),
        (entry(strength=float("nan")), "finite"),
    ],
)
def test_what_is_no_stack(text, sentence):
    with pytest.raises(ErasureError, match=sentence.replace("(", r"\(").replace("{", r"\{")):
        load(text)


def test_adapters_without_a_file_cannot_be_written():
    with pytest.raises(ErasureError, match="save it with Save Erasure Adapter"):
        to_json(ErasureStack((Entry(adapter("")),)))


def test_entries_know_the_row_they_came_from_and_keep_it():
    text = json.dumps({"membrane_stack": 1, "entries": [{"adapter": name} for name in FILES]})
    stack = from_json(text, FILES.__getitem__, "7:3")
    assert [(type(e), e.node, e.index) for e in stack.entries] == [(Row, "7:3", 0), (Row, "7:3", 1)]
    chained = (ErasureStack((Entry(FILES["star.safetensors"]),)) + stack).with_permeability(Permeability("route"))
    assert [getattr(e, "index", None) for e in chained.entries] == [None, 0, 1]
    assert {e.permeability.mode for e in chained.entries} == {"route"}
    assert json.loads(to_json(stack)) == json.loads(to_json(load(text)))
    again = from_json(text, FILES.__getitem__, "8")
    assert again == stack
