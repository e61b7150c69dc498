"""Rows of encoded prompts: what they stand for, which count, and how texts of any length match concepts."""

import pytest
import torch
from membrane.core.errors import ErasureError
from membrane.core.text.encoded import (
    END,
    PADDING,
    START,
    TEMPLATE,
    UNKNOWN,
    WORD,
    Encoded,
    EncodedPrompt,
    Frame,
    context_roles,
)
from membrane.core.text.rows import after_start, aligned, counted, subject
from membrane.core.text.similarity import Concepts, WordConcepts, concepts_of, matches

HEAD, TAIL = [90, 91, 92], [93, 94]


@pytest.mark.parametrize(
    ("empty", "other", "ids", "roles"),
    [
        # CLIP: a start token, padding by the end token
        ([1, 2, 2, 2], [1, 7, 2, 2], [1, 7, 8, 2], [START, WORD, WORD, END]),
        ([1, 2, 2, 2], [1, 7, 2, 2], [1, 2, 2, 2], [START, END, PADDING, PADDING]),
        # CLIP of Stable Diffusion 2: padding by zeros
        ([1, 2, 0, 0], [1, 7, 2, 0], [1, 7, 2, 0], [START, WORD, END, PADDING]),
        # T5: no start token
        ([1, 0, 0, 0], [7, 1, 0, 0], [7, 8, 1, 0], [WORD, WORD, END, PADDING]),
        ([1], [7, 1], [7, 8, 9, 1], [WORD, WORD, WORD, END]),
        # a language model: words in a template
        (HEAD + TAIL, [*HEAD, 7, *TAIL], [*HEAD, 7, 8, *TAIL], [TEMPLATE] * 3 + [WORD] * 2 + [TEMPLATE] * 2),
        (HEAD + TAIL, [*HEAD, 7, *TAIL], HEAD + TAIL, [TEMPLATE] * 5),
        (HEAD + TAIL + [0, 0], [*HEAD, 7, *TAIL, 0], [*HEAD, 7, *TAIL, 0],
         [TEMPLATE] * 3 + [WORD] + [TEMPLATE] * 2 + [PADDING]),
        # Gemma 3: padding in front of a start token
        ([0, 0, 0, 2], [0, 0, 2, 7], [0, 2, 7, 8], [PADDING, START, WORD, WORD]),
        ([0, 0, 0, 2], [0, 0, 2, 7], [0, 0, 0, 2], [PADDING] * 3 + [START]),
        ([0, 0, 0, 2], [0, 0, 2, 7], [2, 7, 8, 7, 9], [START] + [WORD] * 4),
        # and in front of a template
        ([0, 0, *HEAD, *TAIL], [0, *HEAD, 7, *TAIL], [0, *HEAD, 7, *TAIL],
         [PADDING] + [TEMPLATE] * 3 + [WORD] + [TEMPLATE] * 2),
        # a template with a space before the words, which joins them
        ([*HEAD, 60, *TAIL], [*HEAD, 7, *TAIL], [*HEAD, 7, 8, *TAIL], [TEMPLATE] * 3 + [WORD] * 2 + [TEMPLATE] * 2),
        ([*HEAD, 60, *TAIL], [*HEAD, 7, *TAIL], [*HEAD, 60, *TAIL], [TEMPLATE] * 6),
        # a template that begins with the same token twice is no padding
        ([90, 90, 91], [90, 90, 7, 91], [90, 90, 7, 8, 91], [TEMPLATE] * 2 + [WORD] * 2 + [END]),
    ],
)  # fmt: skip
def test_what_stands_around_the_words(empty, other, ids, roles):
    assert Frame.of(empty, other).roles(ids).tolist() == roles


def test_padding_that_only_the_tokenizer_tells():
    """An encoder that does not pad by itself, told to by an option."""
    frame = Frame.of([1], [7, 1], pad=0)
    assert frame.roles([7, 8, 1, 0, 0]).tolist() == [WORD, WORD, END, PADDING, PADDING]
    assert frame.roles([7, 1]).tolist() == [WORD, END]


def test_padding_inside_a_template():
    """LongCat pads the words, not the whole."""
    frame = Frame.of([*HEAD, 60, 0, 0, 0, *TAIL], [*HEAD, 7, 0, 0, 0, *TAIL], pad=0)
    for ids, roles in (
        ([7, 8, 9, 0], [WORD] * 3 + [PADDING]),
        ([7, 8, 9, 9], [WORD] * 4),
        ([60, 0, 0, 0], [TEMPLATE] + [PADDING] * 3),
    ):
        whole = [*HEAD, *ids, *TAIL]
        assert frame.fits(whole) and frame.roles(whole).tolist() == [TEMPLATE] * 3 + roles + [TEMPLATE] * 2


def test_a_frame_fits_its_own_template_only():
    frame = Frame.of(HEAD + TAIL, [*HEAD, 7, *TAIL])
    assert frame.fits([*HEAD, 7, 8, *TAIL]) and frame.fits(HEAD + TAIL)
    assert not frame.fits([*HEAD, 7, 8]) and not frame.fits([90, 92, 7, *TAIL]) and not frame.fits(HEAD)
    left = Frame.of([0, 0, 0, 2], [0, 0, 2, 7])
    assert left.fits([0, 2, 7, 7]) and left.fits([2, 7, 7, 7]) and not left.fits([0, 7, 7, 7])
    assert left.head([0, 0, 2, 7]) == 3 and frame.head([*HEAD, 7, *TAIL]) == 3


def test_a_context_without_an_end_is_all_words():
    assert context_roles([1, 7, 8], 2).tolist() == [START, WORD, WORD]


def prompt(text, ids, roles, seed=0, **more):
    rows = torch.randn(len(ids), 4, generator=torch.Generator().manual_seed(seed))
    return EncodedPrompt(text, rows, tuple(ids), torch.tensor(roles), **more)


STAR = prompt("a red star", [*HEAD, 5, 6, 7, *TAIL], [TEMPLATE] * 3 + [WORD] * 3 + [TEMPLATE] * 2)


def test_rows_that_count():
    assert torch.equal(after_start(STAR), STAR.rows[3:]) and torch.equal(counted(STAR), STAR.rows[3:6])
    short = prompt("star", [7, 1, 0], [WORD, END, PADDING])
    assert torch.equal(counted(short), short.rows[:2]) and torch.equal(after_start(short), short.rows)


def test_nothing_of_the_template_before_an_empty_prompt_counts():
    empty = prompt("", [*HEAD, *TAIL], [TEMPLATE] * 5, head=3)
    assert torch.equal(after_start(empty), empty.rows[3:]) and torch.equal(counted(empty), empty.rows[3:])
    left = prompt("", [0, 0, 2], [PADDING, PADDING, START], head=3)
    assert torch.equal(after_start(left), left.rows[2:])
    words = prompt("star", [0, 2, 7], [PADDING, START, WORD], head=2)
    assert torch.equal(after_start(words), words.rows[2:])
    moved = empty.read_as(torch.cat([torch.zeros(2, 4), empty.rows]))
    assert moved.head == 5 and torch.equal(after_start(moved), empty.rows[3:])


def test_a_word_is_found_as_it_is_inside_a_sentence():
    word = prompt("red", [*HEAD, 16, *TAIL], [TEMPLATE] * 3 + [WORD] + [TEMPLATE] * 2, inside=(6,))
    assert subject(STAR, word) == 4
    assert subject(STAR, prompt("moon", [16], [WORD])) == 5  # the last word
    twice = prompt("red, a red star", [6, 5, 16, 7], [WORD] * 4)
    assert subject(twice, prompt("red", [6], [WORD], inside=(16,))) == 2  # the last one, however it is written
    assert subject(STAR, prompt("user", [91], [WORD])) == 5  # a word of the template is none of the prompt's


def test_a_concept_that_is_a_word_of_the_template_does_not_open_for_every_prompt():
    user = Encoded([spoken("user", [90], [90], 1), spoken("big user", [90, 6], [90, 16], 3), prompt(
        "", [90], [TEMPLATE], heard=frozenset({90}))])  # fmt: skip
    concepts, text = concepts_of(user), torch.randn(1, 9, 4)
    assert concepts.tokens == ((), (frozenset({6}), frozenset({16})))
    assert concepts.match(text, [frozenset({90, 5})])[0].tolist() == [concepts.match(text)[0, 0], 0.0]


def test_prompts_of_different_length_are_aligned_from_their_subjects_on():
    other = prompt("a star", [*HEAD, 5, 7, *TAIL], [TEMPLATE] * 3 + [WORD] * 2 + [TEMPLATE] * 2, 1)
    a, b = aligned(STAR, other, 5, 4)
    assert torch.equal(a, STAR.rows[5:]) and torch.equal(b, other.rows[4:])


def test_rows_that_a_model_adds_are_padding():
    zeros = torch.zeros(2, 4)
    left, right = (STAR.read_as(torch.cat(parts)) for parts in ((zeros, STAR.rows), (STAR.rows, zeros)))
    assert left.roles.tolist() == [PADDING] * 2 + STAR.roles.tolist() and left.ids[:2] == (UNKNOWN,) * 2
    assert right.roles.tolist() == STAR.roles.tolist() + [PADDING] * 2 and right.words == left.words == STAR.words
    assert STAR.read_as(torch.ones(20, 4)).words == (UNKNOWN,) * 20
    assert STAR.read_as(2 * STAR.rows).ids == STAR.ids


def test_prompts_of_different_length_are_no_tensor():
    ragged = Encoded([STAR, prompt("x", [1], [WORD])])
    with pytest.raises(ErasureError, match="1 to 8 vectors; expected the same number for each"):
        ragged.vectors  # noqa: B018  the property raises
    assert ragged.width == 4 and ragged.prompts == ("a red star", "x")


def spoken(text, alone, inside, seed):
    """A prompt of a tokenizer that writes a word in two ways."""
    sets = tuple(frozenset(ids) for ids in (alone, inside))
    return prompt(text, alone, [WORD] * len(alone), seed, heard=frozenset(alone) | {90}, spoken=sets)


CONCEPTS = Encoded(
    [spoken("star", [7], [17], 1), spoken("red moon", [6, 8], [16, 18], 2), prompt("", [90], [TEMPLATE])]
)


def test_texts_of_any_length_match_by_their_words():
    concepts = concepts_of(CONCEPTS)
    assert isinstance(concepts, WordConcepts) and concepts.names == ("star", "red moon")
    texts = torch.randn(4, 9, 4)
    known = [frozenset({90, 5, 17}), frozenset({90, 7}), frozenset({6, 90}), frozenset({90})]
    assert concepts.match(texts, known).tolist() == [[1, 0], [1, 0], [0, 0.5], [0, 0]]


def test_texts_whose_words_are_not_known_match_by_their_rows():
    """Each row of a concept finds the nearest row of the text."""
    concepts = concepts_of(CONCEPTS)
    text = CONCEPTS["star"].rows.expand(1, 5, 4)
    star, moon = text.double()[0, 0], CONCEPTS["red moon"].rows.double()
    expected = max(0.0, float((moon @ star / (moon.norm(dim=1) * star.norm())).mean()))
    assert concepts.match(text, [None])[0].tolist() == pytest.approx([1.0, expected], abs=1e-6)
    assert concepts.match(text)[0, 0] == pytest.approx(1.0)


def test_both_ways_to_compare_can_be_added_to():
    words = concepts_of(CONCEPTS)
    assert (words + words).names == words.names * 2 and words.shape == ("any", 4)
    contexts = Encoded.of_contexts(("a", ""), ([1, 7, 2], [1, 2, 2]), torch.randn(2, 3, 4), 2)
    found = concepts_of(contexts)
    assert isinstance(found, Concepts) and found.tokens == (frozenset({7}),) and found.shape == (3, 4)
    assert (found + found).vectors.shape == (2, 3, 4) and matches(None, contexts) is None
    assert matches(found, contexts)[0].tolist() == pytest.approx([1.0])
