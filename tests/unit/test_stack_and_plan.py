"""What a stack turns into, without a host."""

import pytest
import torch
from membrane.core.adapter import Card, ErasureAdapter, TextMap
from membrane.core.errors import ErasureError
from membrane.core.plan import make_plan
from membrane.core.stack import Entry, ErasureStack

D = 12


def adapter(seed, terms=3, width=D):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(width, terms, generator=g), torch.randn(terms, width, generator=g)
    return ErasureAdapter(Card("UCE", (f"concept {seed}",), family="SD15"), TextMap(a, b, (0,) * terms))


def text(seed=9):
    return torch.randn(2, 5, D, generator=torch.Generator().manual_seed(seed))


def expected(*weighted):
    c = text().double()
    return sum(s * c @ (x.text_map.a.double() @ x.text_map.b.double()).T for x, s in weighted)


def test_constant_entries_become_one_part():
    x, y = adapter(1), adapter(2, terms=5)
    plan = make_plan(ErasureStack((Entry(x, 0.5), Entry(y, -2.0))), D)
    assert plan.timed == () and plan.constant.a.shape == (D, 8)
    assert torch.allclose(plan.constant.delta(text()).double(), expected((x, 0.5), (y, -2.0)), atol=1e-4)


def test_entries_that_do_nothing_are_dropped():
    x = adapter(1)
    for entry in (Entry(x, 0.0), Entry(x, 1.0, 1.0, 1.0), Entry(x, 1.0, 0.0, 0.0)):
        assert not make_plan(ErasureStack((entry,)), D)
    assert not make_plan(ErasureStack(), D)


def test_ranges_are_joined_and_all_see_the_unedited_text():
    x, y, z = adapter(1), adapter(2), adapter(3)
    plan = make_plan(ErasureStack((Entry(x), Entry(y, 1.0, 0.2, 0.7), Entry(z, 1.0, 0.2, 0.7))), D)
    assert plan.constant is None
    assert [(p.start_percent, p.end_percent, p.a.shape[1]) for p in plan.timed] == [(0.0, 1.0, 3), (0.2, 0.7, 6)]
    assert torch.allclose(plan.timed[1].delta(text()).double(), expected((y, 1.0), (z, 1.0)), atol=1e-4)


def test_half_precision_text_is_mapped_in_float32():
    x = adapter(1)
    delta = make_plan(ErasureStack((Entry(x),)), D).constant.delta(text().half())
    assert delta.dtype == torch.float32


def test_stacks_are_plain_values():
    x = adapter(1)
    one = ErasureStack((Entry(x),))
    two = one.with_entry(Entry(x, 0.5))
    assert len(one.entries) == 1 and len(two.entries) == 2
    assert (one + two).entries == (*one.entries, *two.entries)


@pytest.mark.parametrize(("start", "end"), [(0.6, 0.5), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_impossible_ranges(start, end):
    with pytest.raises(ErasureError, match="start <= end"):
        Entry(adapter(1), 1.0, start, end)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), float("-inf")])
def test_strength_must_be_finite(strength):
    with pytest.raises(ErasureError, match="finite"):
        Entry(adapter(1), strength)


def test_a_wrong_width_names_both():
    with pytest.raises(
        ErasureError, match="concept 1 maps text vectors of width 8 .SD15., but this model reads vectors of width 12"
    ):
        make_plan(ErasureStack((Entry(adapter(1, width=8)),)), D)


def test_a_map_of_mismatched_factors():
    with pytest.raises(ErasureError, match="factors of shapes"):
        TextMap(torch.zeros(4, 2), torch.zeros(3, 4), (0, 0))
