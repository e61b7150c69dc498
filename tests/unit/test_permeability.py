"""Facilitated Transport against the paper's equations written naively in float64."""

import numpy as np
import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.adapters.gates import Gate, gate_values
from membrane.core.adapters.permeability import MODES, Permeability
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.errors import ErasureError
from membrane.core.text.encoded import Encoded
from membrane.core.text.similarity import Concepts

T, D = 7, 6
START, END = 90, 91


def vectors(seed, count=1, length=T):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, length, D, generator=g)


def row(*words):
    return [START, *words, *[END] * (T - 1 - len(words))]


def encoded(*words):
    """Encoded concepts, given by their token ids, and the empty prompt."""
    prompts = tuple(" ".join(map(str, w)) for w in words) + ("",)
    return Encoded.of_contexts(prompts, tuple(row(*w) for w in words) + (row(),), vectors(1, len(words) + 1), END)


CONCEPTS = Concepts.of(encoded((1, 2), (3,), (4, 4, 5), ()))


def naive(text, tokens, concepts=CONCEPTS):
    """eq. 10 and 11: the better of cosine and token overlap, one text and one concept at a time."""
    found = np.zeros((len(text), len(concepts.names)))
    for i, t in enumerate(text.double().numpy()):
        for j, c in enumerate(concepts.vectors.double().numpy()):
            cosine = (t.ravel() * c.ravel()).sum() / np.sqrt((t**2).sum() * (c**2).sum())
            own = {n for n in concepts.tokens[j]}
            overlap = len(own & tokens[i]) / len(own) if own else 0.0
            found[i, j] = max(cosine, overlap)
    return found


def test_concepts_know_their_tokens_without_the_special_ones():
    assert CONCEPTS.names == ("1 2", "3", "4 4 5", "")
    assert CONCEPTS.tokens == ({1, 2}, {3}, {4, 5}, set())


def test_match_is_the_papers():
    text = torch.cat([vectors(5, 2), CONCEPTS.vectors[:1] + 0.1 * vectors(6)])
    tokens = [frozenset({1, 8, 9}), frozenset({4, 5, 3, START, END}), frozenset()]
    assert np.allclose(CONCEPTS.match(text, tokens).numpy(), naive(text, tokens), atol=1e-6)


def test_a_concept_matches_itself_fully():
    score = CONCEPTS.match(CONCEPTS.vectors[:3], list(CONCEPTS.tokens[:3]))
    assert torch.allclose(score.diagonal(), torch.ones(3), atol=1e-6)


def test_unknown_tokens_leave_the_cosine():
    text = vectors(5, 2)
    known = CONCEPTS.match(text, [None, frozenset({1, 2})])
    assert torch.equal(known[0], CONCEPTS.match(text)[0])
    assert known[1, 0] == 1.0


def test_the_best_context_of_a_long_prompt_counts():
    text = vectors(7, 1, 3 * T)
    each = torch.stack([CONCEPTS.match(chunk) for chunk in text.split(T, dim=1)])
    assert torch.allclose(CONCEPTS.match(text), each.amax(dim=0), atol=1e-6)


def test_a_text_shorter_than_the_context_is_compared_as_far_as_it_goes():
    text = CONCEPTS.vectors[:1, :4]
    assert CONCEPTS.match(text)[0, 0] == pytest.approx(1.0)


def test_an_empty_text_of_zeros_stays_finite():
    assert torch.equal(CONCEPTS.match(torch.zeros(1, T, D)), torch.zeros(1, 4))


def gate(concepts, mode="facilitated transport", strength=1.0, **settings):
    return Gate(concepts, strength, mode, Permeability(mode, **settings))


SCORE = torch.tensor([[0.2, 0.9, 0.5], [0.7, 0.1, 0.6]])


def test_linear_rule_with_factor_and_strength():
    found = gate_values([gate((0,), strength=0.5, factor=2.0), gate((0, 2), strength=-1.0)], SCORE)
    assert torch.allclose(found, torch.tensor([[0.2, -0.5], [0.7, -0.7]]))


def test_fixed_ignores_the_text():
    assert gate_values([gate((), "fixed", 0.5, factor=3.0)], None).tolist() == [[1.5]]
    assert gate_values([gate((), "fixed", 0.5), gate((1,))], SCORE)[:, 0].tolist() == [0.5, 0.5]


def test_threshold_closes():
    found = gate_values([gate((0,), threshold=0.5)], SCORE)
    assert found.flatten().tolist() == pytest.approx([0.0, 0.7])


def test_route_opens_the_best_only():
    gates = [gate((i,), "route") for i in range(3)]
    assert gate_values(gates, SCORE).tolist() == [pytest.approx([0, 0.9, 0]), pytest.approx([0.7, 0, 0])]
    two = [gate((i,), "route", top_k=2) for i in range(3)]
    assert gate_values(two, SCORE).tolist() == [pytest.approx([0, 0.9, 0.5]), pytest.approx([0.7, 0, 0.6])]
    mixed = [gate((0,)), *gates]  # what is not routed does not compete
    assert gate_values(mixed, SCORE)[0].tolist() == pytest.approx([0.2, 0, 0.9, 0])


def test_equal_matches_open_in_order_and_not_all():
    found = gate_values([gate((0,), "route"), gate((0,), "route")], SCORE)
    assert found.count_nonzero(dim=1).tolist() == [1, 1]


def lora(method, concepts=("star",)):
    change = LowRank(torch.zeros(4, 1), torch.zeros(1, 4), 1.0)
    return ErasureAdapter(Card(method, concepts), {"low_rank": {"mid": change}})


def test_automatic_is_what_was_published():
    assert Entry(lora("SPM")).mode == "facilitated transport"
    assert Entry(lora("LECO")).mode == "fixed"
    assert Entry(lora("SPM", ())).mode == "fixed"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mode": "open"}, 'mode "open"; expected one of automatic'),
        ({"negative": "both"}, 'negative "both"'),
        ({"factor": float("nan")}, "finite"),
        ({"threshold": float("inf")}, "finite"),
        ({"factor": "1"}, "finite"),
        ({"top_k": 0}, "at least 1"),
        ({"top_k": 1.5}, "at least 1"),
    ],
)
def test_impossible_settings(settings, sentence):
    with pytest.raises(ErasureError, match=sentence):
        Permeability(**settings)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("automatic", "fixed")])
def test_without_concepts_the_text_cannot_be_followed(mode):
    with pytest.raises(ErasureError, match="does not say which concepts"):
        Entry(lora("LoRA", ()), permeability=Permeability(mode))


def test_a_stack_changes_how_all_open():
    stack = ErasureStack((Entry(lora("SPM")), Entry(lora("LECO"), 0.5)))
    found = stack.with_permeability(Permeability("route", top_k=2))
    assert [(e.mode, e.permeability.top_k, e.strength) for e in found.entries] == [("route", 2, 1.0), ("route", 2, 0.5)]
