"""What each row of a stack editor is told, by the words of a prompt and while a model samples."""

import json

import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.adapters.gates import by_entry, gate_values, gates_of, of_negative, openings_by_words, shared_words
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.adapters.stack_json import Row, from_json
from membrane.core.errors import ErasureError
from membrane.core.formats import native
from membrane.core.formats.labels import UNOPENED, label

CONCEPTS = {"star": ("star",), "gogh": ("van gogh",), "both": ("red star", "heart"), "spm": ("moon",), "lora": ()}


def card_only(name):
    return ErasureAdapter(Card("SPM" if name == "spm" else "UCE", CONCEPTS[name]), name=name)


def stack(*entries, node="1"):
    text = json.dumps({"membrane_stack": 1, "entries": list(entries)})
    return from_json(text, card_only, node)


def follows(name, strength=1.0, **settings):
    return {"adapter": name, "strength": strength, "permeability": {"mode": "facilitated transport", **settings}}


def by_words(whole, text):
    return {whole.entries[n].index: pytest.approx(value) for n, value in openings_by_words(whole, text).items()}


def test_words_are_shares_of_the_concepts_words():
    names = ("star", "van gogh", "a red star", "")
    found = shared_words(names, "Painting of a (STAR:1.2), by Vincent van  Gogh's pupil")
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0, 2 / 3, 0.0]]))


def test_the_rule_is_that_of_the_permeability():
    whole = stack(
        follows("star", 0.5, factor=3.0),
        follows("gogh", threshold=0.6),
        follows("both"),
        {"adapter": "star", "strength": 0.25},
        {"adapter": "spm"},
        {**follows("star"), "enabled": False},
    )
    # the best of an adapter's concepts counts; automatic follows the prompt for SPM only; what is off is not listed
    assert by_words(whole, "a star by van dyck") == {0: 1.5, 1: 0.0, 2: 0.5, 3: 0.25, 4: 0.0}
    assert by_words(whole, "the moon over a heart") == {0: 0.0, 1: 0.0, 2: 1.0, 3: 0.25, 4: 1.0}


def test_route_opens_the_best_only():
    route = [{"adapter": name, "permeability": {"mode": "route", "top_k": 1}} for name in ("gogh", "star")]
    assert by_words(stack(*route), "a star, van eyck") == {0: 0.0, 1: 1.0}


def test_without_anything_to_follow_no_text_is_needed():
    assert by_words(stack({"adapter": "lora", "strength": 0.3}), "") == {0: 0.3}


def test_chained_editors_keep_their_rows_apart():
    whole = stack(follows("star"), node="1") + stack(follows("gogh"), follows("star"), node="2:5")
    whole += ErasureStack((Entry(card_only("star")),))  # of another node: no row of an editor
    found = [(whole.entries[n], value) for n, value in openings_by_words(whole, "star").items()]
    rows = [(row.node, row.index, value) for row, value in found if isinstance(row, Row)]
    assert rows == [("1", 0, 1.0), ("2:5", 0, 0.0), ("2:5", 1, 1.0)]


def test_the_negative_prompt_gets_what_its_rows_say():
    same, own, off = (follows("star", negative=n) for n in ("same as positive", "own", "off"))
    gates = gates_of(stack(same, own, off), ("star",))
    positive, alone = (gate_values(gates, torch.tensor(score)) for score in ([[0.2], [0.75]], [[0.125]]))
    assert list(by_entry(gates, positive).values()) == [0.75, 0.75, 0.75]
    assert list(by_entry(gates, of_negative(gates, alone, positive)).values()) == [0.75, 0.125, 0.0]
    assert list(by_entry(gates, of_negative(gates, alone, None)).values()) == [0.125, 0.125, 0.0]


def test_a_negative_strength_is_an_opening_too():
    assert by_words(stack(follows("star", -2.0)), "star") == {0: -2.0}


# ---------------------------------------------------------------- what a file says without being loaded


def test_the_label_of_a_file_is_that_of_the_loaded_adapter(tmp_path):
    path = str(tmp_path / "a.safetensors")
    card = Card("UCE", ("star",), ("circle",), "SD15", "abc", {}, "CC0")
    native.save(ErasureAdapter(card, {"map": {"text": TextMap(torch.ones(4, 1), torch.ones(1, 4), (0,))}}), path)
    found = label(path)
    assert (found.card, found.family, found.licence) == (native.load(path).card, "SD15", "CC0")
    assert found.size == (tmp_path / "a.safetensors").stat().st_size


def test_no_numbers_are_read_for_a_label(tmp_path, monkeypatch):
    path = str(tmp_path / "a.safetensors")
    changes = {"down_blocks_0": LowRank(torch.ones(8, 1), torch.ones(1, 8), 1.0)}
    native.save(ErasureAdapter(Card("SPM", ("star",)), {"low_rank": changes}), path)
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[: len(whole) - 32] + b"\xff" * 32)
    assert label(path).card.concepts == ("star",)


def test_a_label_of_what_is_no_adapter(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04 and more")
    assert label(str(tmp_path / "a.pt")).card == Card(UNOPENED, ())
    (tmp_path / "b.safetensors").write_bytes(b"no such file")
    with pytest.raises(ErasureError, match="b.safetensors.*cannot be read"):
        label(str(tmp_path / "b.safetensors"))
