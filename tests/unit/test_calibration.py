"""Gates of T5 and language models: words, late interaction and its calibration, against numpy in float64."""

import numpy as np
import pytest
import torch
from membrane.core.text.encoded import END, WORD, Encoded, EncodedPrompt, Heard
from membrane.core.text.similarity import (
    CAPTION,
    MEASURED_ON,
    ROWS_FROM,
    Bank,
    Similarity,
    WordConcepts,
    concepts_of,
    examples_of,
    neutral_captions,
    word_rows,
)
from membrane.core.text.words import plain_words

D, END_ROW = 12, 1
NAMES = ("star", "van gogh")
CAPTIONS = (
    "a house by the sea", "two men on a bench in the park", "a cup of coffee", "a dog and a cat asleep",
    "an old bridge over a slow river", "children play on a dusty field", "fresh bread in a basket",
)  # fmt: skip


def vector(word, shift=0.0):
    """A fixed row for a word, all of them leaning the same way, as those of language models do."""
    generator = torch.Generator().manual_seed(sum(map(ord, word)))
    return torch.randn(D, generator=generator) + 3.0 + shift


def encode(text, scale=1.0):
    """A toy encoder: a row a word, which leans towards the one before it, and an end row."""
    words = text.split()
    rows = [vector(word) + (0.2 * vector(words[i - 1]) if i else 0.0) for i, word in enumerate(words)]
    rows = torch.stack([*rows, torch.full((D,), 7.0)]) * scale
    roles = torch.tensor([WORD] * len(words) + [END])
    ids = tuple(sum(map(ord, word)) for word in words)
    heard = Heard(ids, plain_words(text), tuple(range(len(words))))
    return EncodedPrompt(text, rows, (*ids, END_ROW), roles, ids, heard, (frozenset(ids),))


BANK = Bank.of([encode(caption) for caption in CAPTIONS])
CONCEPTS = WordConcepts.calibrated(NAMES, Encoded([encode(text) for text in examples_of(NAMES)]), BANK)


# ---------------------------------------------------------------- as the formulas say


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rows(text):
    return unit(encode(text).rows[:-1].double().numpy())


MEAN = np.concatenate([rows(caption) for caption in CAPTIONS]).mean(axis=0)
ALL = unit(np.concatenate([rows(caption) for caption in CAPTIONS]) - MEAN)


def concept(name):
    count = len(name.split())
    texts = [template.replace("{}", name) for template in ROWS_FROM]
    return unit(np.mean([unit(rows(text)[-count:] - MEAN) for text in texts], axis=0))


def late(own, text):
    return np.mean([max(float(c @ p) for p in text) for c in own])


def naive(name, text, words_known=True):
    own, found = concept(name), unit(rows(text) - MEAN)
    s = late(own, found)
    hi = np.median([late(own, unit(rows(t.replace("{}", name)) - MEAN)) for t in MEASURED_ON])
    length = min(max(10, len(found)), len(ALL))
    starts = range(0, len(ALL) - length + 1, max(1, length // 4))
    lo = np.quantile([late(own, ALL[start : start + length]) for start in starts], 0.95)
    share = np.mean([word in text.split() for word in name.split()]) if words_known else 0.0
    return s, lo, hi, max(share, min(1.0, max(0.0, (s - lo) / (hi - lo))))


TEXTS = ("a star", "a star over the sea by van gogh", "gogh", "a big red house", "one two three four five six seven")


@pytest.mark.parametrize("text", TEXTS)
def test_match_is_what_the_formulas_give(text):
    prompt = encode(text)
    found = CONCEPTS.match(prompt.rows[None], [prompt.heard])[0]
    for i, name in enumerate(NAMES):
        s, lo, hi, expected = naive(name, text)
        similarity = CONCEPTS.similarities(prompt.rows, prompt.heard)[i]
        assert (similarity.cosine, similarity.lo, similarity.hi) == pytest.approx((s, lo, hi), abs=1e-3)
        assert found[i].item() == pytest.approx(expected, abs=0.01)  # the bank is kept in half precision


def test_a_concept_in_a_text_opens_and_neutral_texts_do_not():
    for text in CAPTIONS:
        prompt = encode(text)
        assert CONCEPTS.match(prompt.rows[None], [prompt.heard]).max() < 0.35
    assert CONCEPTS.match(encode("a star").rows[None], [encode("a star").heard])[0].tolist()[0] == 1.0


def test_a_near_meaning_opens_without_the_word():
    """A row near the concept's, of another word."""
    rows_ = torch.stack([vector("a"), vector("star") + 0.1 * vector("q"), vector("sea")])
    heard = Heard((), ("a", "sun", "sea"), (0, 1, 2))
    value = CONCEPTS.match(rows_[None], [heard])[0]
    assert value[0] > 0.8 and value[1] < 0.5


def test_scale_and_the_length_of_single_rows_do_not_matter():
    plain, loud = encode("a star by the sea"), encode("a star by the sea", 1000.0)
    known = [plain.heard]
    assert torch.allclose(CONCEPTS.match(plain.rows[None], known), CONCEPTS.match(loud.rows[None], known), atol=1e-5)
    first = [encode(caption) for caption in CAPTIONS]
    for prompt in first:
        prompt.rows[0] *= 1000.0  # as the first token of language models
    assert torch.allclose(Bank.of(first).mean, BANK.mean, atol=1e-5)


def test_a_text_of_unknown_words_goes_by_all_its_rows():
    text = encode("a star by the sea").rows
    similarity = CONCEPTS.similarities(text, None)[0]
    assert similarity.words is None and similarity.lo == pytest.approx(CONCEPTS.each[0].lo(CAPTION))
    assert similarity.value > 0.9
    assert CONCEPTS.match(text[None])[0].tolist() == CONCEPTS.match(text[None], [None])[0].tolist()
    assert torch.equal(CONCEPTS.match(text[None].half())[0] > 0.9, CONCEPTS.match(text[None])[0] > 0.9)
    scaled = CONCEPTS.match(1.3 * text[None])[0]  # as by another node
    assert torch.allclose(scaled, CONCEPTS.match(text[None])[0], atol=1e-5)


def test_rows_of_zeros_say_nothing():
    assert CONCEPTS.match(torch.zeros(1, 5, D), [None]).tolist() == [[0.0, 0.0]]
    padded = torch.cat([encode("a star").rows, torch.zeros(9, D)])
    assert CONCEPTS.match(padded[None])[0].tolist() == CONCEPTS.match(encode("a star").rows[None])[0].tolist()


def test_a_text_without_words_does_not_match():
    empty = encode("")
    assert CONCEPTS.match(empty.rows[None], [empty.heard]).tolist() == [[0.0, 0.0]]


def test_the_words_of_any_encoder_count():
    text = torch.randn(1, 6, D, generator=torch.Generator().manual_seed(3))
    known = Heard({5}, ("a", "house", "", "by", "van", "gogh"), (0,))
    assert CONCEPTS.match(text, [known])[0, 1] == 1.0


def test_chance_grows_with_the_length_of_the_text():
    found = [CONCEPTS.each[0].lo(length) for length in (1, 4, 12, 10000)]
    assert found == sorted(found) and found[0] < found[-1]


def test_where_the_cosine_cannot_tell():
    """hi is no larger than lo: known words alone count, and unknown ones open as texts with the concept do."""
    assert Similarity(0.5, 0.9, 0.8, 0.7, True).value == 0.5
    assert Similarity(None, 0.9, 0.8, 0.7, True).value == 1.0
    assert Similarity(None, 0.6, 0.8, 0.7, True).value == 0.0


def test_without_a_calibration_known_words_alone_count():
    concepts = concepts_of(Encoded([encode("star"), encode("")]))
    text = encode("a stars")
    assert concepts.match(text.rows[None], [text.heard]).tolist() == [[1.0]]
    text = encode("a moon")
    assert concepts.match(text.rows[None], [text.heard]).tolist() == [[0.0]]


def test_a_concept_is_looked_for_in_each_templates_own_place():
    alone = encode("van gogh")
    assert examples_of(("van gogh",)) == (
        "",
        "van gogh",
        *(t.replace("{}", "van gogh") for t in (*ROWS_FROM, *MEASURED_ON)),
    )
    assert CONCEPTS.each[1].rows.shape == (2, D) and torch.equal(word_rows(alone.rows, alone.heard), alone.rows[:2])
    assert CONCEPTS.names == NAMES and CONCEPTS.shape == ("any", D) and (CONCEPTS + CONCEPTS).names == NAMES * 2


def test_neutral_captions_name_everyday_things():
    captions = neutral_captions()
    assert 64 <= sum(caption.count(".") for caption in captions) <= 128
    assert all(caption.endswith(".") and caption.isascii() for caption in captions)
    assert not {"nude", "naked", "star", "gogh", "person"} & {w for c in captions for w in plain_words(c)}
