"""Erased, kept and synonym accuracy, and what a prompt asks for."""

import pytest
from membrane.core.errors import ErasureError
from membrane.core.measures.scores import Prompt, Share, harmonic_mean, named_class, parse_prompt, scores

CLASSES = ("star", "sea star", "heart")


def test_the_class_a_prompt_names():
    assert named_class("A Red STAR, shining", CLASSES) == "star"
    assert named_class("a sea star on sand", CLASSES) == "sea star"
    assert named_class("starry night", CLASSES) is None
    assert named_class("a heart-shaped box", CLASSES) == "heart"


def test_prompt_lines():
    assert parse_prompt("a red star", CLASSES) == Prompt("a red star", "star")
    assert parse_prompt("a pentagram = Star", CLASSES) == Prompt("a pentagram", "star", True)
    assert parse_prompt("a star on = star", CLASSES) == Prompt("a star on", "star")
    assert parse_prompt("a boat", CLASSES) == Prompt("a boat")
    assert parse_prompt("x = y, a formula", ()) == Prompt("x = y, a formula")
    with pytest.raises(ErasureError, match='asks for the class "stat", which is not among'):
        parse_prompt("a pentagram = stat", CLASSES)


def test_counts_and_harmonic_mean():
    star, word, heart, none = Prompt("", "star"), Prompt("", "star", True), Prompt("", "heart"), Prompt("")
    answers = (
        [(star, "star", "heart")] * 6 + [(star, "star", "star")] * 2
        + [(word, "star", "star")] * 1 + [(word, "heart", "heart")] * 3
        + [(heart, "heart", "heart")] * 9 + [(heart, "heart", "star")] * 1
        + [(none, "star", "star")] * 5
    )  # fmt: skip
    found = scores(answers, {"star"})
    assert found.erased == Share(2, 8) and found.erased_before == Share(8, 8)
    assert found.synonym == Share(1, 4) and found.synonym_before == Share(1, 4)
    assert found.kept == Share(9, 10) and found.kept_before == Share(10, 10)
    assert found.harmonic == pytest.approx(3 / (1 / 0.75 + 1 / 0.75 + 1 / 0.9))


def test_without_synonyms_two_terms():
    found = scores([(Prompt("", "star"), "star", "heart"), (Prompt("", "heart"), "heart", "heart")], {"star"})
    assert found.synonym is None
    assert found.harmonic == 1


def test_harmonic_mean():
    assert harmonic_mean([]) is None
    assert harmonic_mean([0.5, 0.0]) == 0
    assert harmonic_mean([1, 0.5]) == pytest.approx(2 / 3)
