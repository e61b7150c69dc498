"""What a stack turns into, without a host."""

import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.delta import OPEN
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.adapters.gates import wanted_concepts
from membrane.core.adapters.permeability import Permeability
from membrane.core.adapters.plan import first_gated, make_plan
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.errors import ErasureError
from membrane.core.families.unet import TEXT
from membrane.core.text.similarity import Concepts

D = 12
TRANSPORT = Permeability("facilitated transport")
REFERENCE = Permeability("reference")


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter(seed, terms=3, width=D):
    a, b = numbers(seed, width, terms), numbers(seed + 100, terms, width)
    return ErasureAdapter(
        Card("UCE", (f"concept {seed}",), family="SD15"), {"map": {"text": TextMap(a, b, (0,) * terms)}}
    )


def spm(seed, rank=1, alpha=1.0, sites=("q", "k"), out=5, bias=False):
    change = {
        name: LowRank(
            numbers(seed + i, out, rank),
            numbers(seed + i + 50, rank, D),
            alpha,
            numbers(seed + i + 70, out) if bias else None,
        )
        for i, name in enumerate(sites)
    }
    return ErasureAdapter(Card("SPM", (f"concept {seed}",)), {"low_rank": change})


KEYS = {"q": "Q", "k": "K", "k2": "K"}


def stack(*entries):
    return ErasureStack(entries)


def text(seed=9):
    return numbers(seed, 2, 5, D)


def concepts(found):
    names = wanted_concepts(found)
    return Concepts(names, numbers(3, len(names), 5, D), tuple(frozenset({i}) for i in range(len(names))))


def planned(found):
    return make_plan(found, {TEXT: D}, concepts(found), KEYS)


def expected(*weighted):
    c = text().double()
    return sum(s * c @ (x.maps["text"].a.double() @ x.maps["text"].b.double()).T for x, s in weighted)


def test_constant_maps_become_one_part_without_gates():
    x, y = adapter(1), adapter(2, terms=5)
    plan = make_plan(stack(Entry(x, 0.5), Entry(y, -2.0)), {TEXT: D})
    assert plan.gates == () and not plan.timed("text") and plan.maps["text"].a.shape == (D, 8)
    assert torch.allclose(plan.maps["text"].delta(text()).double(), expected((x, 0.5), (y, -2.0)), atol=1e-4)


def test_the_fixed_factor_scales():
    x = adapter(1)
    plan = make_plan(stack(Entry(x, 0.5, permeability=Permeability("fixed", 3.0))), {TEXT: D})
    assert torch.allclose(plan.maps["text"].delta(text()).double(), expected((x, 1.5)), atol=1e-4)


def test_entries_that_do_nothing_are_dropped():
    x = adapter(1)
    nothing = [
        Entry(x, 0.0), Entry(x, 1.0, 1.0, 1.0), Entry(x, 1.0, 0.0, 0.0), Entry(x, enabled=False),
        Entry(x, permeability=Permeability("fixed", 0.0)), Entry(spm(1), 0.0), Entry(spm(1), enabled=False),
    ]  # fmt: skip
    for entry in nothing:
        assert not planned(stack(entry)) and not planned(stack(entry)).static
    assert not make_plan(ErasureStack(), {TEXT: D})


def test_timed_maps_act_in_the_steps_and_all_see_the_unedited_text():
    x, y = adapter(1), adapter(2)
    plan = make_plan(stack(Entry(x), Entry(y, 2.0, 0.2, 0.7)), {TEXT: D})
    assert plan.timed("text")
    always, timed = plan.gates
    assert (timed.start_percent, timed.end_percent, timed.strength) == (0.2, 0.7, 2.0)
    assert always.always and plan.maps["text"].gate.tolist() == [OPEN] * 3 + [1] * 3
    for gate in (0.0, 2.0):
        found = plan.maps["text"].delta(text(), torch.tensor([[9.0, gate]]))
        assert torch.allclose(found.double(), expected((x, 1.0), (y, gate)), atol=1e-4)


def test_each_concept_of_a_map_has_its_own_gate():
    a, b = numbers(1, D, 3), numbers(2, 3, D)
    both = ErasureAdapter(Card("UCE", ("star", "heart")), {"map": {"text": TextMap(a, b, (0, 1, 0))}})
    found = stack(Entry(both, permeability=TRANSPORT))
    assert wanted_concepts(found) == ("star", "heart")
    plan = planned(found)
    assert [gate.concepts for gate in plan.gates] == [(0,), (1,)]
    gates = torch.tensor([[0.5, 0.0], [0.25, 2.0]])
    delta = plan.maps["text"].delta(text(), gates).double()
    for row, (g0, g1) in enumerate(gates.tolist()):
        matrix = a.double() @ torch.diag(torch.tensor([g0, g1, g0]).double()) @ b.double()
        assert torch.allclose(delta[row], text()[row].double() @ matrix.T, atol=1e-4)


def test_half_precision_text_is_mapped_in_float32():
    x = adapter(1)
    delta = make_plan(stack(Entry(x)), {TEXT: D}).maps["text"].delta(text().half())
    assert delta.dtype == torch.float32


def test_ungated_layers_are_joined_into_one_change_each():
    x, y = spm(1, rank=2, alpha=3.0, bias=True), spm(5)
    found = make_plan(
        stack(Entry(x, 0.5, permeability=Permeability("fixed")), Entry(y, -1.0, permeability=Permeability("fixed"))),
        keys=KEYS,
    ).static
    assert set(found) == {"Q", "K"} and found["Q"].up.shape == (5, 3)
    for site, key in (("q", "Q"), ("k", "K")):
        p, r = x.low_rank[site], y.low_rank[site]
        whole = 0.5 * 1.5 * p.up.double() @ p.down.double() - r.up.double() @ r.down.double()
        assert torch.allclose((found[key].up @ found[key].down).double(), whole, atol=1e-5)
        assert torch.allclose(found[key].bias, 0.5 * p.bias)


def test_gated_layers_are_concatenated_and_leave_the_host_alone():
    x, y = spm(1, rank=2, alpha=3.0), spm(5, sites=("q",))
    found = stack(Entry(x, 0.5), Entry(y))
    plan = planned(found)
    assert plan.static == {} and plan.follows
    layer = plan.layers["Q"].beside
    assert layer.gate.tolist() == [0, 0, 1] and plan.layers["K"].beside.gate.tolist() == [0, 0]
    p, r = x.low_rank["q"], y.low_rank["q"]
    assert torch.allclose(layer.up[:2].T @ layer.down[:2], 1.5 * p.up @ p.down)
    assert torch.allclose(layer.up[2:].T @ layer.down[2:], r.up @ r.down)
    assert [gate.strength for gate in plan.gates] == [0.5, 1.0]  # the strength is in the gate


def test_columns_of_closed_gates_are_left_out():
    plan = planned(
        stack(Entry(spm(1, rank=2)), Entry(spm(5), permeability=REFERENCE), Entry(spm(8), permeability=REFERENCE))
    )
    layer = plan.layers["Q"].beside
    assert (layer.gate.tolist(), layer.paired, layer.rank) == ([0, 0, 1, 2], 2, 1)
    part = layer.rows((0, 2))
    assert (part.gate.tolist(), part.paired, part.up.shape) == ([0, 0, 1], 1, (3, 5))
    assert torch.equal(part.down, layer.down[[0, 1, 3]])
    assert layer.rows(()) is None


def test_two_spellings_of_one_layer_meet():
    x = spm(1, sites=("k",))
    y = spm(4, sites=("k2",))
    plan = planned(stack(Entry(x), Entry(y)))
    assert plan.layers["K"].beside.gate.tolist() == [0, 1]


def test_the_reference_needs_equal_ranks():
    with pytest.raises(ErasureError, match="ranks 1, 2"):
        plan = planned(stack(Entry(spm(1), permeability=REFERENCE), Entry(spm(2, rank=2), permeability=REFERENCE)))
        [layer.beside for layer in plan.layers.values()]


def test_what_makes_an_entry_gated():
    off = Permeability("fixed", negative="off")
    assert first_gated(stack(Entry(adapter(1)))) is None
    assert first_gated(stack(Entry(spm(1), enabled=False))) is None
    for entry in (Entry(spm(1)), Entry(adapter(1), 1.0, 0.1), Entry(adapter(1), permeability=off)):
        assert first_gated(stack(Entry(adapter(2)), entry)) is entry


def test_stacks_are_plain_values():
    x = adapter(1)
    one = stack(Entry(x))
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
        make_plan(stack(Entry(adapter(1, width=8))), {TEXT: D})


def test_a_map_of_mismatched_factors():
    with pytest.raises(ErasureError, match="factors of shapes"):
        TextMap(torch.zeros(4, 2), torch.zeros(3, 4), (0, 0))


@pytest.mark.parametrize(
    ("up", "down", "bias"),
    [
        ((4, 2), (3, 4), None),
        ((4,), (1, 4), None),
        ((4, 1), (1, 4, 1), None),
        ((4, 0), (0, 4), None),
        ((4, 1), (1, 4), (3,)),
    ],
)
def test_a_change_of_mismatched_factors(up, down, bias):
    with pytest.raises(ErasureError, match="factors of shapes"):
        LowRank(torch.zeros(up), torch.zeros(down), 1.0, None if bias is None else torch.zeros(bias))
