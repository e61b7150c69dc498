"""Attacks against the formulas written naively, and the search on texts whose answer is known."""

import pytest
import torch
from membrane.core.erasers.closed_form.rece import derived_embeddings
from membrane.core.errors import ErasureError
from membrane.core.measures.attack import Search, derived_vectors, search_prompts, search_target


def weights(layers=5, out=9, width=7, seed=0):
    return torch.randn(layers, out, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_derived_vectors_minimise_eq_4():
    """Against least squares over all layers stacked, with the penalty as further rows."""
    plain, edited = weights(), weights(seed=1)
    c = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    square = sum(w.T @ w for w in edited)
    cross = sum(w.T @ v for w, v in zip(edited, plain))
    found = derived_vectors(c, square, cross, 0.3)
    system = torch.cat([*edited, 0.3**0.5 * torch.eye(7, dtype=torch.float64)])
    for row, vector in zip(found, c):
        goal = torch.cat([*(v @ vector for v in plain), torch.zeros(7, dtype=torch.float64)])
        expected = torch.linalg.lstsq(system, goal[:, None]).solution[:, 0]
        assert torch.allclose(row.double(), expected, atol=1e-5)


def test_derived_vectors_of_a_text_map_are_those_of_rece():
    plain = weights()
    p = torch.eye(7, dtype=torch.float64) + 0.3 * weights(1, 7, 7, 3)[0]
    gram = sum(w.T @ w for w in plain)
    c = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = derived_embeddings(c, gram, p, 0.1)
    assert torch.allclose(derived_vectors(c, p.T @ gram @ p, p.T @ gram, 0.1).double(), expected, atol=1e-6)


def test_search_target():
    g = torch.Generator().manual_seed(0)
    prompt, on, off = (torch.randn(*shape, generator=g) for shape in ((5, 3), (4, 5, 3), (4, 5, 3)))
    expected = prompt.clone()
    for i in range(4):
        expected += 2.0 * (on[i] - off[i]) / 4
    assert torch.allclose(search_target(prompt, on, off, 2.0), expected, atol=1e-6)


WORDS = [a + b for a in "bcdfghklmn" for b in "aeiou"]


def encode(prompts):
    """Every word has a fixed random vector, at the place it stands."""
    rows = []
    for prompt in prompts:
        rows.append([])
        for word in prompt.split():
            g = torch.Generator().manual_seed(WORDS.index(word))
            rows[-1].append(torch.randn(6, generator=g))
    return torch.stack([torch.stack(row) for row in rows])


def test_the_search_finds_the_words():
    target = encode(["ba ce di"])[0]
    search = Search(length=3, population=40, generations=60, seed=1)
    calls = []
    found = search_prompts(target, WORDS, lambda p: calls.extend(p) or encode(p), search)
    assert found[0].prompt == "ba ce di" and found[0].distance == pytest.approx(0, abs=1e-10)
    assert [f.distance for f in found] == sorted(f.distance for f in found)
    assert len(calls) == len(set(calls)) <= search.evaluations < len(WORDS) ** 3 / 40
    assert found == search_prompts(target, WORDS, encode, search)


def test_no_words():
    with pytest.raises(ErasureError, match="no words to search among"):
        search_prompts(torch.zeros(2, 3), [], encode, Search())
