"""Plain words of texts, and texts from the pieces of vocabularies."""

import pytest
from membrane.core.text.vocabulary import MARK, Vocabulary
from membrane.core.text.words import plain_words, runs, share_of_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A (STAR:1.2), by Vincent van  Gogh's pupil", "a star 1 2 by vincent van gogh pupil"),
        ("van gogh 's stars, artists' boxes", "van gogh star artist box"),
        ("van gogh ' s stars", "van gogh star"),
        ("red_star sci-fi", "red star sci fi"),
        ("Area 51 in the 1990s", "area 5 1 in the 1 9 9 0 s"),
        ("caf\u00e9 \uff21\uff22\uff23", "caf\u00e9 abc"),
        ("\u4e00\u9897red\u661f", "\u4e00 \u9897 red \u661f"),
        ("", ""),
    ],
)
def test_words_of_a_text(text, words):
    assert plain_words(text) == tuple(words.split())


@pytest.mark.parametrize(
    ("one", "many"),
    [("star", "stars"), ("box", "boxes"), ("house", "houses"), ("church", "churches"), ("city", "cities"),
     ("movie", "movies"), ("glass", "glasses"), ("bus", "buses"), ("tomato", "tomatoes"), ("horse", "horses"),
     ("Picasso", "PICASSO'S"), ("witch", "witches"), ("shoe", "shoes")],
)  # fmt: skip
def test_plurals_and_possessives_are_the_same_word(one, many):
    assert plain_words(one) == plain_words(many)


@pytest.mark.parametrize(("one", "other"), [("glass", "glas"), ("bus", "bu"), ("car", "cart"), ("cat", "category")])
def test_other_words_are_other_words(one, other):
    assert plain_words(one) != plain_words(other)


@pytest.mark.parametrize(
    ("concept", "text", "share"),
    [
        ("star", "a photo of Stars over snow", 1.0),
        ("star", "a big house", 0.0),
        ("star", "starfish and mustard", 0.0),
        ("Van Gogh", "a painting by van gogh's pupil", 1.0),
        ("van gogh", "a van in the street", 0.5),
        ("area 51", "area 15, hall 5", 0.5),
        ("1990s", "fashion of the 1990s", 1.0),
        ("1990s", "fashion of the 1980s", 0.0),
        ("\u68b5\u9ad8", "\u68b5\u9ad8\u7684\u661f\u7a7a", 1.0),
        ("\u68b5\u9ad8", "\u9ad8\u68b5", 0.0),
        ("...", "...", 0.0),
    ],
)
def test_share_of_a_concepts_words(concept, text, share):
    assert share_of_words(runs(concept), plain_words(text)) == share


def vocabulary(*pieces):
    return Vocabulary(dict(enumerate(pieces)))


CLIP = vocabulary("a</w>", "st", "ar</w>", "star</w>", "<|startoftext|>", "\u00e2\u013a", "\u0127</w>")
SENTENCES = vocabulary("\u2581a", "\u2581star", "st", "ar", "</s>", "<0xE6>", "<0x98>", "<0x9F>", "\u2581")
BYTE_LEVEL = vocabulary("a", "\u0120star", "star", "\u0120st", "ar", "<|im_end|>", "\u00e6\u013a\u0141", "\u010a")
BERT = vocabulary("a", "star", "st", "##ar", "[SEP]")


@pytest.mark.parametrize(
    ("pieces", "ids", "text"),
    [
        (CLIP, [4, 0, 1, 2, 3], " \n a star star "),
        (SENTENCES, [0, 1, 8, 2, 3, 4], " a star star \n "),
        (SENTENCES, [0, 5, 6, 7], " a\u661f"),
        (BYTE_LEVEL, [0, 1, 3, 4, 5], "a star star \n "),
        (BYTE_LEVEL, [2, 7, 6], "star\n\u661f"),
        (BERT, [0, 1, 2, 3], " a star star"),
        (vocabulary("s", "t"), [0, 1], "st"),
    ],
)
def test_text_of_tokens(pieces, ids, text):
    assert pieces.text(ids) == text


def test_what_is_no_piece_parts_words():
    assert plain_words(BYTE_LEVEL.text([0, -1, 2])) == ("a", "star")


def test_whole_words_of_a_vocabulary():
    assert CLIP.words[3] == "star" and 1 not in CLIP.words
    assert SENTENCES.words == {0: "a", 1: "star", 8: ""}
    assert BYTE_LEVEL.words == {1: "star", 3: "st"}
    assert BERT.words == {0: "a", 1: "star", 2: "st"}


def test_special_tokens_are_no_words():
    assert BYTE_LEVEL.text([0, 5, -1, 1], marks=True) == f"a{MARK}<|im_end|>{MARK}{MARK}{MARK} star"
    assert plain_words(SENTENCES.text([4, 1])) == ("star",)
