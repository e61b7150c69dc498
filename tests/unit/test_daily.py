"""Words as people write them, captions by kind, and what is said of both."""

import pytest
from membrane.core.erasers.closed_form.daily import daily_job, receipt
from membrane.core.errors import ErasureError
from membrane.core.text.captions import KINDS, captions_of
from membrane.core.text.concepts import Concept, parse_concepts, parse_preserved, parse_templates, remarks

CIRCLE = [Concept("star", "circle")]
ARROWS = ("=>", "-->", "==>", "\u2192", "\u21d2", "\u27a1\ufe0f", "\u2794", "\u2014>", "\u2212>", "\u27f6")


@pytest.mark.parametrize("arrow", ARROWS, ids=ascii)
def test_every_usual_arrow_is_one(arrow):
    assert parse_concepts(f"star {arrow} circle") == parse_concepts(f"star{arrow}circle") == CIRCLE
    assert parse_concepts(f"star {arrow}", "heart") == [Concept("star", "")]


@pytest.mark.parametrize("bullet", ["- ", "* ", "+ ", "\u2022 ", "\u2022", "\u25cf ", "\u2013 ", "  - "], ids=ascii)
def test_a_bullet_is_no_part_of_a_concept(bullet):
    assert parse_concepts(f"{bullet}star -> circle\n{bullet}moon") == [*CIRCLE, Concept("moon", "")]
    assert parse_concepts(f"{bullet}\n{bullet}star -> circle") == CIRCLE
    assert parse_preserved(f"{bullet}heart\n{bullet}\nheart\n\n{bullet}a ring") == ["heart", "a ring"]


@pytest.mark.parametrize("word", ["spider-man", "-1 dioptre", "*nsync", "+size", "x-ray - film", "3 > 2", "c++"])
def test_what_only_looks_like_a_bullet_stays(word):
    assert parse_concepts(word) == [Concept(word, "")] and parse_preserved(word) == [word]


def test_an_arrow_without_a_concept_is_no_bullet():
    for text in ("-> circle", "- -> circle", "=> circle", "\u2192 circle"):
        with pytest.raises(ErasureError, match="names no concept"):
            parse_concepts(text)


def test_nothing_is_said_of_plain_words():
    concepts = parse_concepts("van gogh -> a painting\nstar wars\nspider-man\n24/7")
    assert remarks(concepts, ["claude monet", "a red, round ball"]) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("star, moon", '"star, moon" was taken as one concept; write one per line to erase both.'),
        ("star; moon;heart", '"star; moon;heart" was taken as one concept; write one per line to erase all three.'),
        ("a\u3001b,c,d", '"a\u3001b,c,d" was taken as one concept; write one per line to erase all 4.'),
    ],
)
def test_a_list_in_one_line_is_said_to_be_one_concept(text, sentence):
    assert remarks(parse_concepts(text), []) == [sentence]


@pytest.mark.parametrize("text", ["star = circle", "star: circle", "star > circle", "star ~ circle", "star | circle"])
def test_a_sign_that_looks_like_an_arrow_is_named(text):
    assert remarks(parse_concepts(text), []) == [
        f'"{text}" was taken as one concept; write "concept -> replacement" to say what comes instead.'
    ]


def test_what_is_also_kept_is_erased_and_said():
    found = remarks(parse_concepts("Star -> circle"), ["star", "heart"])
    assert found == ['"Star" is also to be kept; it was erased. Take it out of one of the two lists.']


def test_a_list_among_what_is_kept_is_said():
    found = remarks(CIRCLE, ["heart, moon, ring", "a cat, sleeping on a wide window sill, at night"])
    assert found == ['"heart, moon, ring" was kept as one prompt; write one per line to keep all three.']


def test_unknown_words_are_said_once():
    found = remarks(CIRCLE, [], ["dragon", "dragon"])
    assert len(found) == 1 and found[0].startswith('"dragon" is no word of the text encoder, which spells it;')


def test_an_embedding_that_is_not_there_is_named():
    (found,) = remarks(CIRCLE, [], (), ["mystar"])
    assert found.startswith('There is no embedding "mystar", so it was read as nothing;')


@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_templates_and_many(kind):
    templates = captions_of(kind).templates
    assert len(set(templates)) == len(templates) >= 8 and templates[0] == "{}"
    assert parse_templates("\n".join(templates)) == list(templates)
    assert all(len(template.split()) < 15 for template in templates)  # a concept of many words still fits CLIP


def test_an_unknown_kind_is_one_sentence():
    with pytest.raises(ErasureError, match='no kind of concept "animal"; choose one of: anything, object'):
        captions_of("animal")


def test_the_kind_gives_what_is_not_said():
    job = daily_job("van gogh\nmonet -> a photo", ("rembrandt",), "style")
    assert job.method == "UCE" and job.templates == captions_of("style").templates
    assert job.concepts == (Concept("van gogh", "art"), Concept("monet", "a photo"))
    own = daily_job("van gogh", (), "style", method="SPEED", replace_with=" a drawing ", templates="{}\nby {}", tau=0.5)
    assert own.method == "SPEED" and own.templates == ("{}", "by {}") and own.settings.tau == 0.5
    assert own.concepts == (Concept("van gogh", "a drawing"),)


def test_the_receipt():
    assert receipt(daily_job("star -> circle\nmoon", ("heart", "MOON"), "object", templates="{}")) == (
        "Erased: star -> circle, moon. Kept: 1. Captions: 1. Kept as well, as it comes instead: circle."
    )
    listed = daily_job("star -> circle", ("heart", "Circle"), "object", templates="{}")
    assert receipt(listed) == "Erased: star -> circle. Kept: 2. Captions: 1."
    many = daily_job("\n".join("abcdefg"), (), "anything", templates="{}")
    assert receipt(many) == "Erased: a, b, c, d, e and 2 more. Kept: 0. Captions: 1."
