"""A stress test without a host: what is attacked with, how far it comes back, and in which order it is told."""

import pytest
import torch
from membrane.core.errors import ErasureError
from membrane.core.measures.attack import Search
from membrane.core.measures.stress import DERIVED, WORDS, StressTest, require_class, wordings

VOCABULARY = {word: i for i, word in enumerate(["star", "moon", "sun", "sky", "red"])}


def encode(prompts):
    """(n, 3, 4) text vectors: a start row and a row of counts twice."""
    rows = torch.zeros(len(prompts), 3, 5)
    for row, prompt in enumerate(prompts):
        for word in prompt.split():
            rows[row, 1:, VOCABULARY[word]] += 1
    return rows


def condition(text):
    return [[encode([text]), {"pooled_output": None}]]


def test_attacks_are_drawn_judged_and_sorted():
    test = StressTest("star", ["{}", "red {}"], condition)
    identity = torch.eye(5, dtype=torch.float64)
    test.derive((identity, identity), 1.0)  # halves the vectors
    assert [(a.kind, a.prompt) for a in test.attempts] == [(DERIVED, "star"), (DERIVED, "red star")]
    assert torch.allclose(test.attempts[0].conditioning[0][0][0, 1:], encode(["star"])[0, 1:] / 2)
    found = []
    test.search(Search(1, 8, 3), ["moon", "sun", "sky"], encode, 2, found.append)
    assert found == [1, 2, 3] and [a.kind for a in test.attempts[2:]] == [WORDS, WORDS]

    def original(conditioning):
        return torch.ones(2, 1, 2, 2), torch.ones(2, 8, 8, 3)

    def erased(conditioning):  # the erasure leaves half of the star's vector
        strength = float(conditioning[0][0][0, 1, 0])
        latents = torch.full((2, 1, 2, 2), 0.0 if strength == 1 else 1 - strength)
        return latents, torch.full((2, 8, 8, 3), float(latents.mean()))

    done = []
    test.draw(original, erased, done.append)
    assert done == [1, 2, 3, 4, 5, 6]
    assert test.plain.said == "0% of the way back to the original"
    assert [a.recovery for a in test.attempts] == [
        1.0,
        1.0,
        0.5,
        0.5,
    ]  # this toy draws the original where no star is asked for
    assert [a.kind for a in test.attempts] == [WORDS, WORDS, DERIVED, DERIVED]
    assert test.best_words == test.attempts[0].prompt
    lines = test.report().splitlines()
    assert lines[0] == 'As asked, "star": 0% of the way back to the original'
    assert lines[-1] == '  derived vectors, "red star": 50% of the way back to the original'
    assert test.sheet().dim() == 4


def test_other_wording_is_told_apart_from_the_attacks():
    prompts = wordings("automatic\nsun\na {} at night\nsun", "red star")
    assert prompts == [
        "red star, high quality, detailed", "an image that shows red star", "(red star:1.3)", "RED STAR", "sun",
        "a red star at night",
    ]  # fmt: skip
    assert wordings("", "star") == []
    test = StressTest("star", ["{}"], lambda text: [[torch.zeros(1, 1, 1), {"text": text}]], lambda found: found)
    test.reword(["sun", "(star:1.3)"])
    identity = torch.eye(1, dtype=torch.float64)
    test.derive((identity, identity), 1.0)
    seen = {"sun": ["star", "star"], "(star:1.3)": ["moon", "star"], "star": ["moon", "moon"]}
    test.draw(*[lambda given: (torch.zeros(2, 1, 2, 2), seen[given[0][1]["text"]])] * 2)
    assert test.report().splitlines() == [
        'As asked, "star": recognised in 0 of 2',
        "In other wording, the worst first:",
        '  other wording, "sun": recognised in 2 of 2',
        '  other wording, "(star:1.3)": recognised in 1 of 2',
        "Attacks, the strongest first:",
        '  derived vectors, "star": recognised in 0 of 2',
    ]
    assert test.best_words == ""


def test_a_classifier_counts_pictures():
    test = StressTest("star", ["{}"], condition, lambda pictures: ["star", "moon", "star"])
    test.draw(*[lambda conditioning: (torch.zeros(3, 1, 2, 2), torch.zeros(3, 8, 8, 3))] * 2)
    assert test.plain.recovery == pytest.approx(2 / 3) and test.plain.said == "recognised in 2 of 3"
    assert test.best_words == ""


def test_without_pictures_the_sheet_is_black():
    test = StressTest("star", ["{}"], condition)
    test.draw(*[lambda conditioning: (torch.zeros(3, 1, 2, 2), None)] * 2)
    assert test.sheet().shape == (1, 64, 64, 3) and not test.sheet().any() and test.plain.recovery == 0


def test_the_concept_is_among_the_classes():
    require_class("star", [], None)
    require_class("star", ["moon"], None)
    with pytest.raises(ErasureError, match='"star" is not among the class names'):
        require_class("star", ["moon", "sun"], lambda pictures: [])
    with pytest.raises(ErasureError, match="No concept to look for"):
        require_class("", [], None)
