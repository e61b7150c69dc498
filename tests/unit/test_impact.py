"""The impact preview against the definition, layer by layer."""

import numpy as np
import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.adapters.permeability import Permeability
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.measures.chart import bar_chart
from membrane.core.measures.impact import impacts, relative_change, report
from membrane.core.text.encoded import WORD, Encoded, EncodedPrompt, Heard
from membrane.core.text.similarity import WordConcepts

D, END = 10, 50


def weights():
    g = torch.Generator().manual_seed(1)
    return [torch.randn(rows, D, generator=g, dtype=torch.float64) for rows in (6, 20)]


def gram():
    return sum(w.T @ w for w in weights())


def adapter(seed):
    g = torch.Generator().manual_seed(seed)
    return ErasureAdapter(
        Card("UCE", ("x",)),
        {"map": {"text": TextMap(torch.randn(D, 2, generator=g), torch.randn(2, D, generator=g) * 0.1, (0, 0))}},
    )


def encoded():
    vectors = torch.randn(2, 6, D, generator=torch.Generator().manual_seed(2))
    return Encoded.of_contexts(
        ("one word", "three words here"), ([49, 1, END, END, END, END], [49, 1, 2, 3, END, END]), vectors, END
    )


def test_relative_change_is_the_norm_over_all_layers():
    g = torch.Generator().manual_seed(3)
    delta, c = torch.randn(4, D, generator=g), torch.randn(4, D, generator=g)
    changed = sum((w @ delta.double().T).square().sum() for w in weights())
    whole = sum((w @ c.double().T).square().sum() for w in weights())
    assert relative_change(delta, c, gram()) == pytest.approx((changed / whole).sqrt().item(), rel=1e-12)


def test_impacts_count_words_and_the_end_token_and_are_sorted():
    stack = ErasureStack((Entry(adapter(5), 0.5), Entry(adapter(6), 2.0)))
    e = 0.5 * adapter(5).maps["text"].matrix() + 2.0 * adapter(6).maps["text"].matrix()
    expected = {}
    for prompt, rows in (("one word", slice(1, 3)), ("three words here", slice(1, 5))):
        c = encoded()[prompt].rows[rows]
        expected[prompt] = relative_change(c @ e.T, c, gram())
    found = impacts(stack, encoded(), gram())
    assert [i.prompt for i in found] == sorted(expected, key=expected.get, reverse=True)
    for impact in found:
        assert impact.change == pytest.approx(expected[impact.prompt], rel=1e-5)


def test_time_ranges_do_not_count():
    whole = impacts(ErasureStack((Entry(adapter(5)),)), encoded(), gram())
    timed = impacts(ErasureStack((Entry(adapter(5), 1.0, 0.2, 0.5),)), encoded(), gram())
    assert [i.change for i in timed] == pytest.approx([i.change for i in whole])


def test_gates_compare_what_the_text_encoder_gives():
    """Where a model reads other rows than the encoder gives, gates go by the encoder's, as while sampling."""
    of_encoder = Encoded(
        EncodedPrompt(p.prompt, torch.ones(3, 4), (1, 2, 3), torch.tensor([WORD] * 3), heard=Heard((), words))
        for p, words in zip(encoded(), (("x",), ("y",)))
    )
    concepts = WordConcepts.of(Encoded([EncodedPrompt("x", torch.ones(1, 4), (1,), torch.tensor([WORD]))] * 2))
    stack = ErasureStack((Entry(adapter(5), permeability=Permeability("facilitated transport")),))
    always = {i.prompt: i.change for i in impacts(ErasureStack((Entry(adapter(5)),)), encoded(), gram())}
    found = {i.prompt: i.change for i in impacts(stack, encoded(), gram(), concepts, heard=of_encoder)}
    assert found == {"one word": pytest.approx(always["one word"]), "three words here": 0.0}


def test_an_empty_stack_hurts_nobody():
    found = impacts(ErasureStack(), encoded(), gram())
    assert [i.change for i in found] == [0.0, 0.0]
    assert report(found).splitlines()[0].split()[-1] == "0.0%"


def test_the_chart_is_a_picture():
    bars = [("a star " * 60, 1.5), ("line\nbreak", 0.0), ("", 0.2)]
    chart = bar_chart("title", bars)
    assert chart.shape[2] == 3 and chart.dtype == np.float32 and 0 <= chart.min() and chart.max() <= 1
    assert bar_chart("title", [("all zero", 0.0)]).shape[1] == 900
