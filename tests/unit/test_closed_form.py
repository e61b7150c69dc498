"""UCE and RECE against the papers' formulas, written naively per layer in float64."""

import pytest
import torch
from membrane.core.erasers.closed_form import rece as rece_module
from membrane.core.erasers.closed_form.job import Job, erase
from membrane.core.erasers.closed_form.rece import PENALTIES, rece_of
from membrane.core.erasers.closed_form.solver import by_concept
from membrane.core.erasers.closed_form.uce import uce_of
from membrane.core.errors import ErasureError
from membrane.core.text.concepts import Concept, mentions, parse_concepts, parse_templates, up_to
from membrane.core.text.encoded import Encoded
from membrane.core.text.rows import aligned, subject

D, LAYERS = 24, (16, 16, 40)


def uce_of_rows(targets, replacements, preserve, concept, count, **scales):
    return uce_of(by_concept(targets, replacements, concept, count), preserve, **scales)


def rece_of_rows(targets, replacements, preserve, concept, full, full_replacements, full_concept, gram, count, **more):
    groups = by_concept(targets, replacements, concept, count)
    return rece_of(groups, by_concept(full, full_replacements, full_concept, count), preserve, gram, **more)


def embeddings(count, seed, tokens=7):
    """CLIP-like vectors (count, tokens, D): a common part, one shared first row, long norms."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(D, generator=torch.Generator().manual_seed(99), dtype=torch.float64) * 2
    rows = torch.randn(count, tokens, D, generator=g, dtype=torch.float64) * 3 + common
    rows[:, 0] = common * 4
    return rows


def weights(seed=5):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, D, generator=g, dtype=torch.float64) for rows in LAYERS]


def naive_uce(w, c, n, r, s, p, lam):
    """UCE eq. 7, one matrix: sums of outer products, a plain inverse."""
    numerator, denominator = lam * w, lam * torch.eye(D, dtype=torch.float64)
    for ci, ni in zip(c, n):
        numerator = numerator + s * torch.outer(w @ ni, ci)
        denominator = denominator + s * torch.outer(ci, ci)
    for ri in r:
        numerator = numerator + p * torch.outer(w @ ri, ri)
        denominator = denominator + p * torch.outer(ri, ri)
    return numerator @ torch.linalg.inv(denominator)


def relative(found, expected, base):
    return ((found - expected).norm() / (expected - base).norm()).item()


@pytest.mark.parametrize(("s", "p", "lam"), [(1.0, 1.0, 0.5), (2.0, 0.1, 0.1), (0.5, 3.0, 5.0)])
def test_uce_equals_the_per_layer_formula(s, p, lam):
    c, n, r = (embeddings(2, seed).flatten(0, 1) for seed in (1, 2, 3))
    owner = torch.tensor([0] * 7 + [1] * 7)
    text_map = uce_of_rows(c, n, r, owner, 2, erase_scale=s, preserve_scale=p, anchor=lam)
    for w in weights():
        expected = naive_uce(w, c, n, r, s, p, lam)
        found = w + w @ text_map.matrix().double()
        assert relative(found, expected, w) < 1e-6  # the factors are stored in float32


def test_terms_of_a_concept_are_that_concepts_share():
    c, n, r = (embeddings(2, seed).flatten(0, 1) for seed in (1, 2, 3))
    owner = torch.tensor([0] * 7 + [1] * 7)
    text_map = uce_of_rows(c, n, r, owner, 2)
    gram = 0.5 * torch.eye(D, dtype=torch.float64) + c.T @ c + r.T @ r
    for k in range(2):
        mine = owner == k
        expected = (n[mine] - c[mine]).T @ c[mine] @ torch.linalg.inv(gram)
        found = text_map.matrix([float(k == 0), float(k == 1)]).double()
        assert (found - expected).norm() / expected.norm() < 1e-6


def naive_derivation(current, start, c, n, penalty, penalty_on):
    """RECE's derived embeddings (rows) with each of the published penalties, by plain inverses."""
    eye = torch.eye(D, dtype=torch.float64)
    a = sum(w.T @ w for w in current)
    right = sum(w.T @ v for w, v in zip(current, start)) @ c.T
    if penalty_on == "length":
        return (torch.linalg.inv(penalty * eye + a) @ right).T
    if penalty_on == "distance":
        return (torch.linalg.inv(penalty * eye + a) @ (right + penalty * c.T)).T
    if penalty_on == "outputs":
        return (torch.linalg.inv((1 + penalty) * a) @ (right + penalty * a @ c.T)).T
    if penalty_on == "both":
        return (torch.linalg.inv(penalty * eye + (1 + penalty) * a) @ (right + penalty * (a + eye) @ c.T)).T
    return (torch.linalg.inv(penalty * eye + a) @ (right + penalty * n.T)).T


def naive_rece(start, c_full, n_full, c, n, r, epochs, penalty, lam, p, penalty_on="length"):
    """The published loop on every matrix: UCE, then derived embeddings and an edit per epoch."""
    current = [naive_uce(w, c, n, r, 1.0, 1.0, 0.5) for w in start]
    for _ in range(epochs):
        derived = naive_derivation(current, start, c_full, n_full, penalty, penalty_on)
        current = [naive_uce(w, derived, n_full, r, 1.0, p, lam) for w in current]
    return current


@pytest.mark.parametrize("penalty_on", PENALTIES)
@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("concepts, surrogates", [(1, 1), (2, 2), (4, 4), (4, 1), (4, 2)])
def test_rece_with_every_penalty(penalty_on, epochs, concepts, surrogates):
    """Fewer and more rows than the width, with replacements of their own and shared ones."""
    full_c, own_n = embeddings(concepts, 1), embeddings(surrogates, 2)
    full_n = [own_n[k % surrogates] for k in range(concepts)]
    r = embeddings(2, 3).flatten(0, 1)
    groups = [[(c[3:], n[3:])] for c, n in zip(full_c, full_n)]
    whole = [[(c, n)] for c, n in zip(full_c, full_n)]
    start = weights()
    base, weight_gram = r.T @ r, sum(w.T @ w for w in start)
    settings = {"epochs": epochs, "penalty": 0.3, "penalty_on": penalty_on}
    if penalty_on == "outputs" and epochs == 2 and surrogates < concepts:  # nothing keeps the second round's size
        with pytest.raises(ErasureError, match="has no stable solution"):
            list(rece_module.rece_terms(groups, whole, base, weight_gram, **settings))
        return
    found = sum(a @ b for a, b in rece_module.rece_terms(groups, whole, base, weight_gram, **settings))
    full_n = torch.stack(full_n)
    rows = [t.flatten(0, 1) for t in (full_c, full_n, full_c[:, 3:], full_n[:, 3:])]
    expected = naive_rece(start, *rows, r, epochs, 0.3, 0.1, 0.1, penalty_on)
    for w, want in zip(start, expected):
        assert relative(w + w @ found, want, w) < 1e-6


def test_rece_says_when_the_edit_has_no_inverse():
    flat = torch.eye(D, dtype=torch.float64)
    flat[0, 0] = 0.0
    with pytest.raises(ErasureError, match='put the penalty on "length"'):
        rece_module.Derivation(torch.eye(D, dtype=torch.float64), flat, 0.1, "outputs")


@pytest.mark.parametrize("concepts", [1, 3])
@pytest.mark.parametrize("epochs", [1, 3])
def test_rece_equals_the_published_loop(concepts, epochs):
    full_c, full_n = embeddings(concepts, 1), embeddings(concepts, 2)
    r = embeddings(2, 3).flatten(0, 1)
    c, n = full_c[:, 3:].flatten(0, 1), full_n[:, 3:].flatten(0, 1)
    owner = torch.arange(concepts).repeat_interleave(4)
    full_owner = torch.arange(concepts).repeat_interleave(7)
    start = weights()
    gram = sum(w.T @ w for w in start)
    text_map = rece_of_rows(
        c,
        n,
        r,
        owner,
        full_c.flatten(0, 1),
        full_n.flatten(0, 1),
        full_owner,
        gram,
        concepts,
        epochs=epochs,
        penalty=0.1,
    )
    expected = naive_rece(start, full_c.flatten(0, 1), full_n.flatten(0, 1), c, n, r, epochs, 0.1, 0.1, 0.1)
    for w, want in zip(start, expected):
        assert relative(w + w @ text_map.matrix().double(), want, w) < 1e-5


def test_rece_says_when_the_system_is_singular():
    flat = torch.zeros(D, D, dtype=torch.float64)
    flat[0, 0] = 1.0
    with pytest.raises(ErasureError, match="raise the penalty"):
        rece_module.derived_embeddings(
            torch.ones(3, D, dtype=torch.float64), flat, torch.eye(D, dtype=torch.float64), 1e-12
        )


def test_preserved_rows_stay_and_targets_move():
    c, n, r = embeddings(1, 1)[0, 3:], embeddings(1, 2)[0, 3:], embeddings(1, 3)[0]
    e = uce_of_rows(c, n, r, torch.zeros(4, dtype=torch.long), 1, preserve_scale=1000.0, anchor=1e-3).matrix().double()
    moved = c + c @ e.T
    assert (moved - n).norm() < 0.05 * (c - n).norm()
    assert (r @ e.T).norm() < 0.01 * r.norm()


def context(ids, end, rows=None):
    """EncodedPrompt of a context."""
    rows = torch.zeros(len(ids), 1) if rows is None else rows
    return next(iter(Encoded.of_contexts(("",), (ids,), rows[None], end)))


def test_last_subject_token():
    bos, end = 90, 91

    def place(ids, words):
        return subject(context(ids, end), context([bos, *words, end], end))

    prompt = [bos, 1, 2, 3, 4, end, end, end]
    assert place(prompt, [2, 3]) == 3
    assert place(prompt, [4]) == 4
    assert place(prompt, []) == 4
    assert place(prompt, [7]) == 4
    assert place([bos, end, end], []) == 0  # the blank prompt: its start token, as published
    assert place([bos, 1, end, 0, 0], []) == 1  # padding that is not the end token


def test_alignment_is_the_published_one():
    ids = [90, 1, 2, 3, 4, 91, 91, 91]
    old = context(ids, 91, torch.arange(8.0)[:, None])
    new = context(ids, 91, torch.arange(10.0, 18.0)[:, None])
    a, b = aligned(old, new, 4, 2)
    # old rows a .. T-(f-a)-1 and new rows b .. T-(f-b)-1 with f = max(a, b)
    assert a.flatten().tolist() == [4, 5, 6, 7] and b.flatten().tolist() == [12, 13, 14, 15]
    a, b = aligned(old, new, 1, 3)
    assert a.flatten().tolist() == [1, 2, 3, 4, 5] and b.flatten().tolist() == [13, 14, 15, 16, 17]


def test_concept_lines():
    assert parse_concepts("star -> circle\n\n  heart  ", "cross") == [
        Concept("star", "circle"),
        Concept("heart", "cross"),
    ]
    assert parse_concepts("star ->", "cross") == [Concept("star", "")]


@pytest.mark.parametrize(
    ("text", "surrogate", "message"),
    [
        ("  \n ", "", "No concept to erase was given"),
        ("star -> Star", "", "replaced by itself"),
        ("star", "star", "replaced by itself"),
        ("-> circle", "", "names no concept"),
        ("star\nSTAR -> heart", "", "listed twice"),
    ],
)
def test_bad_concept_lines(text, surrogate, message):
    with pytest.raises(ErasureError, match=message):
        parse_concepts(text, surrogate)


@pytest.mark.parametrize("arrow", ["->", "=>", "\u2192", "\u21d2", "\u2013>", "\u2014>", " \u2192\u200b "])
def test_other_arrows(arrow):
    assert parse_concepts(f"star{arrow}circle") == [Concept("star", "circle")]


def test_one_spelling_of_a_concept():
    assert parse_concepts("\ufeffVan  Gogh\t->\u200b a   painting") == [Concept("Van Gogh", "a painting")]
    with pytest.raises(ErasureError, match='"Van Gogh" is listed twice'):
        parse_concepts("van gogh\nVan  Gogh")
    with pytest.raises(ErasureError, match="replaced by itself"):
        parse_concepts("van gogh -> Van  Gogh")


def test_a_line_with_two_arrows():
    with pytest.raises(ErasureError, match='"cat -> dog -> bird" has 2 arrows; write "concept -> replacement"'):
        parse_concepts("cat -> dog -> bird")


@pytest.mark.parametrize(
    ("text", "word", "found"),
    [
        ("a Cat sat", "cat", True),
        ("a cathedral", "cat", False),
        ("Mozart, Bart", "art", False),
        ("art-house", "Art", True),
        ("Spider-Man (2002), a poster", "spider-man (2002)", True),
        ("van  gogh", "Van Gogh", True),
        ("anything", "", False),
    ],
)
def test_words_and_not_letters_are_looked_for(text, word, found):
    assert mentions(text, word) is found


@pytest.mark.parametrize(
    ("template", "word", "head"),
    [
        ("a red {} here", "star", None),
        ("a red {}, here", "star", None),
        ("a red {}", "(2002)", None),
        ("a red {}, here", "Man (2002)", "a red Man (2002)"),
        ("a '{}' here", "star", "a 'star"),
        ("two {}s here", "star", "two star"),
        ("art of {} in art style", "art", "art of art"),
        ("a {} in the parts", "art", None),
        ("a {} here", "", None),
    ],
)
def test_where_a_template_has_to_be_encoded_up_to_its_word(template, word, head):
    assert up_to(template, word) == head


@pytest.mark.parametrize("template", ["no place", "{} and {}"])
def test_bad_templates(template):
    with pytest.raises(ErasureError, match="exactly once"):
        parse_templates(template)
    assert parse_templates("  ") == ["{}"]


def encoder(prompts, tokens=7):
    """A stand-in text encoder: one id per word, vectors from the ids and all ids before."""
    vocabulary = {"": 0}
    ids, vectors = [], []
    for prompt in prompts:
        words = [vocabulary.setdefault(w, len(vocabulary)) for w in prompt.split()]
        row = [100, *words] + [101] * (tokens - 1 - len(words))
        ids.append(row)
        states, state = [], torch.zeros(D, dtype=torch.float64)
        for token in row:
            state = 0.7 * state + torch.randn(D, generator=torch.Generator().manual_seed(token), dtype=torch.float64)
            states.append(state)
        vectors.append(torch.stack(states))
    return Encoded.of_contexts(tuple(prompts), tuple(ids), torch.stack(vectors), 101)


def test_a_job_with_templates_is_the_formula_on_their_rows():
    job = Job.of((Concept("star", "disc"),), preserve=("heart",), templates=("{}", "a red {} here"))
    encoded = encoder(job.prompts())
    adapter = erase(job, {"text": encoded}, "family", "fingerprint")
    targets, replacements = [], []
    for old, new, first in (("star", "disc", 1), ("a red star here", "a red disc here", 3)):
        targets.append(encoded[old].rows[first:])
        replacements.append(encoded[new].rows[first:])
    preserve = torch.cat([encoded[p].rows for p in ("", "heart", "a red heart here")])
    w = weights()[0]
    expected = naive_uce(w, torch.cat(targets), torch.cat(replacements), preserve, 1.0, 1.0, 0.5)
    assert relative(w + w @ adapter.maps["text"].matrix().double(), expected, w) < 1e-6
    assert adapter.card.concepts == ("star",) and adapter.card.surrogates == ("disc",)
    assert adapter.card.settings["templates"] == ["{}", "a red {} here"]
