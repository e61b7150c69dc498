"""The stack as text, both ways."""

import json

import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.adapters.permeability import Permeability
from membrane.core.adapters.plan import make_plan
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.adapters.stack_json import Row, count, from_json, names, to_json
from membrane.core.adapters.written import Written
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


def words(**fields):
    return json.dumps({"membrane_stack": 1, "entries": [{"words": "star => circle", **fields}]})


def test_words_are_a_row_and_come_back_as_they_were_written():
    spec = {"words": "star => circle\n- moon", "keep": "heart", "kind": "style", "strength": 0.5}
    text = json.dumps({"membrane_stack": 1, "entries": [{"adapter": "star.safetensors"}, spec]})
    stack = from_json(text, FILES.__getitem__, "5")
    file, row = stack.entries
    assert (file.adapter.name, row.index, row.strength, row.mode) == ("star.safetensors", 1, 0.5, "fixed")
    assert isinstance(row.adapter, Written) and row.adapter.pending
    assert row.adapter.card.concepts == ("star", "moon") and row.adapter.card.surrogates == ("circle", "art")
    assert row.adapter.describe() == "star => circle, - moon"
    assert (names(text), count(text)) == (["star.safetensors"], 2)
    written = json.loads(to_json(stack))["entries"][1]
    assert spec.items() <= written.items() and "adapter" not in written
    assert json.loads(to_json(load(words())))["entries"][0].keys() >= {"words", "strength"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (words(adapter="star.safetensors"), 'Entry 1 of the stack has both "adapter" and "words"'),
        (words(words=1), "Entry 1 of the stack names no adapter"),
        (words(words=" \n"), "Entry 1 of the stack (words): No concept to erase was given"),
        (words(words="-> circle"), 'names no concept before "->"'),
        (words(words="star -> Star"), "is to be replaced by itself"),
        (words(words="\ud800"), "half of a character"),
        (words(keep=["heart"]), "\"keep\": ['heart']; expected a text."),
        (words(keep="\ud800"), "half of a character"),
        (words(kind="animal"), 'no kind of concept "animal"; choose one of: anything, object'),
        (words(templates="a {}"), 'the field "templates"; expected only words, keep, kind, enabled, strength'),
        (words(strength="1"), "Entry 1 of the stack (words) has \"strength\": '1'; expected a number"),
    ],
)
def test_what_are_no_words(text, sentence):
    with pytest.raises(ErasureError) as caught:
        load(text)
    assert sentence in str(caught.value) and "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_words_that_were_not_computed_are_refused_where_they_would_act():
    with pytest.raises(ErasureError, match='^The row "star => circle" of the stack is words, .* Apply Erasure'):
        make_plan(load(words()))
    assert not make_plan(load(words(enabled=False)))
