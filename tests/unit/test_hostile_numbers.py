"""Half precision, large strengths and many adapters: what is finite in float64 stays finite, and right."""

import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.beside import Bypass, Rows
from membrane.core.adapters.deltas.low_rank import Factors, LowRank, Part
from membrane.core.adapters.gates import Gate, gate_values
from membrane.core.adapters.permeability import Permeability
from membrane.core.adapters.stack import STRONGEST, Entry
from membrane.core.errors import ErasureError
from membrane.core.text.similarity import Concepts

HALF = [torch.float16, torch.bfloat16]
TRANSPORT, REFERENCE = Permeability("facilitated transport"), Permeability("reference")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(module, layer, gates, x):
    rows = Rows()
    rows.gates, rows.active = gates, tuple(range(gates.shape[1]))
    with torch.inference_mode():
        return Bypass(module, [Part(layer)], rows)(x)


def module(kind, dtype):
    made = torch.nn.Linear(8, 6) if kind == "linear" else torch.nn.Conv2d(8, 6, 3, padding=1)
    with torch.no_grad():
        made.weight.copy_(randn(*made.weight.shape) * 0.1)
        made.bias.zero_()
    return made.to(dtype)


def expected(kind, made, up, down, gates, x):
    """The formula, naively in float64: y + sum_k g_k up_k (down_k x)."""
    made, x = made.double(), x.double()
    with torch.inference_mode():
        y = made(x)
        for row in range(len(x)):
            for k in range(up.shape[1]):
                inner = (
                    x[row] @ down[k].double()
                    if kind == "linear"
                    else torch.nn.functional.conv2d(x[row : row + 1], down[k : k + 1].double(), padding=1)[0, 0]
                )
                change = gates[row, k].double() * torch.einsum("o,...->o...", up[:, k].double(), inner)
                y[row] += change.movedim(0, -1) if kind == "linear" else change
    return y


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("count", [1, 100])
@pytest.mark.parametrize("tilt", [1.0, 1e6, 1e-6])
def test_factors_of_very_different_size(dtype, kind, count, tilt):
    """Half precision ends at 65504 and near 1e-8: a file's factors may be beyond both while their product is small."""
    up, down = randn(6, count) * tilt, randn(count, 8, seed=1) / tilt
    if kind == "convolution":
        down = down[:, :, None, None] * randn(1, 1, 3, 3, seed=2)
    gates = randn(2, count, seed=3).abs() / count
    x = (randn(2, 5, 8, seed=4) if kind == "linear" else randn(2, 8, 4, 4, seed=4)).to(dtype)
    made = module(kind, dtype)
    found = run(made, Factors(up.T, down, torch.arange(count)), gates, x)
    wanted = expected(kind, made, up, down, gates, x)
    assert found.dtype == dtype and found.isfinite().all()
    assert (found.double() - wanted).norm() < 8 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("dtype", HALF)
def test_the_reference_combination_keeps_its_meaning(dtype):
    """Columns that are added over adapters before they are multiplied are scaled by one number."""
    up, down, gates = randn(6, 4) * 1e6, randn(4, 8, seed=1) * 1e-6, torch.tensor([[0.5, 0.25, 0.125, 1.0]])
    x, made = randn(1, 3, 8, seed=2).to(dtype), module("linear", dtype)
    layer = Factors(up.T, down, torch.arange(4), paired=4, rank=1)
    found = run(made, layer, gates, x)
    whole = (up.double() * gates.double()).sum(1)[:, None] @ (down.double() * gates.double().T).sum(0)[None]
    wanted = made.double()(x.double()).detach() + x.double() @ whole.T
    assert (found.double() - wanted).norm() < 8 * torch.finfo(dtype).eps * wanted.norm()


def test_one_factor_that_is_nothing():
    """A trained adapter starts with an up factor of zeros."""
    made, x = module("linear", torch.float16), randn(1, 2, 8).half()
    found = run(made, Factors(torch.zeros(1, 6), randn(1, 8), torch.tensor([0])), torch.ones(1, 1), x)
    assert torch.equal(found, made(x))


@pytest.mark.parametrize("strength", [1e4, -1e300, float("inf"), float("nan"), 1001])
def test_strengths_beyond_half_precision_are_refused(strength):
    adapter = ErasureAdapter(Card("SPM", ("star",)), {"low_rank": {"x": LowRank(randn(2, 1), randn(1, 2), 1.0)}})
    with pytest.raises(ErasureError, match="expected their product"):
        Entry(adapter, strength)
    with pytest.raises(ErasureError):
        Entry(adapter, 1.0, permeability=Permeability("fixed", factor=strength))
    assert Entry(adapter, float(STRONGEST)).acts


@pytest.mark.parametrize("dtype", HALF)
def test_the_largest_strength_of_a_hundred_adapters(dtype):
    """Gates are numbers of the network's type as well."""
    entries = [Gate((0,), float(STRONGEST), "facilitated transport", TRANSPORT) for _ in range(100)]
    gates = gate_values(entries, torch.ones(1, 1))
    assert gates.to(dtype).isfinite().all() and (gates == STRONGEST).all()
    up, down = randn(6, 100) * 1e-3, randn(100, 8, seed=1) * 1e-3
    found = run(module("linear", dtype), Factors(up.T, down, torch.arange(100)), gates, randn(1, 2, 8).to(dtype))
    assert found.isfinite().all()


@pytest.mark.parametrize("rows", [0.0, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("mode", ["facilitated transport", "route", "reference", "fixed"])
def test_gates_of_texts_of_any_size(rows, mode):
    """Zero vectors, as of a text encoder that is switched off, and vectors near the end of float32."""
    known = Concepts(("star", ""), torch.cat([randn(1, 4, 6), torch.zeros(1, 4, 6)]), (frozenset([1]), frozenset()))
    score = known.match(torch.full((2, 4, 6), rows), [frozenset(), None])
    channels = [Gate((0, 1), 2.0, mode, Permeability(mode))]
    assert score.isfinite().all() and gate_values(channels, score).isfinite().all()


@pytest.mark.parametrize("tokens", [1, 3, 77, 1000, 1001])
def test_gates_of_texts_of_any_length(tokens):
    known = Concepts(("star",), randn(1, 77, 6), (frozenset([1, 2]),))
    score = known.match(randn(2, tokens, 6, seed=1), [frozenset(range(tokens)), frozenset()])
    assert score.shape == (2, 1) and score.isfinite().all() and (score.abs() <= 1 + 1e-5).all()
