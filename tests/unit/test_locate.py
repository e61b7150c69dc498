"""Locating: column gates against the full comparison of scores, written naively in float64."""

import pytest
import torch
from membrane.core.adapters.deltas.mask import Mask
from membrane.core.erasers.pruning import Activity, locate, marks, overlap, report, squares, union
from membrane.core.errors import ErasureError

LEVELS = (14.6, 9.1, 5.0)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_norms(rows):
    """Running column norms of rows scaled to length 1."""
    total = [0.0] * rows.shape[-1]
    for row in rows.reshape(-1, rows.shape[-1]).double():
        length = row.norm()
        for j, value in enumerate(row / length if length else row):
            total[j] += float(value) ** 2
    return torch.tensor(total, dtype=torch.float64).sqrt()


def naive_marks(weight, target, base, count):
    """The published rule: full score matrices, sorted row by row, then compared element by element."""
    found = torch.zeros(weight.shape, dtype=torch.bool)
    scores, other = weight.double().abs() * target, weight.double().abs() * base
    for i, row in enumerate(scores):
        for j in sorted(range(len(row)), key=lambda j: -row[j])[:count]:
            found[i, j] = scores[i, j] > other[i, j]
    return found


def activity(seed, shape=(4, 5, 24), levels=LEVELS, layers=("a", "b")):
    found, hidden = Activity(), {}
    for i, layer in enumerate(layers):
        for k, sigma in enumerate(levels):
            hidden[layer, sigma] = random(*shape, seed=seed + 10 * i + k)
            found.add(layer, sigma, hidden[layer, sigma])
    return found, hidden


def test_squares_are_those_of_rows_of_length_one():
    rows = random(3, 7, 24)
    rows[1, 2] = 0
    assert torch.allclose(squares(rows).sqrt(), naive_norms(rows), rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_column_gate_is_the_full_comparison(seed):
    weight, target, base = random(20, 64, seed=seed), random(64, seed=50 + seed).abs(), random(64, seed=90).abs()
    weight[3, :60] = 0
    found = marks(weight, target.double(), base.double(), 9)
    assert torch.equal(found, naive_marks(weight, target.double(), base.double(), 9))
    assert found.sum(dim=1).max() <= 9 and found.any()


def test_masks_are_the_naive_union_of_the_first_levels():
    (target, seen), (base, other) = activity(0), activity(500)
    weights = {"a": random(12, 24, seed=1), "b": random(9, 24, seed=2)}
    found = locate(weights.items(), target, base, 0.2, 2)
    for layer, weight in weights.items():
        expected = torch.zeros(weight.shape, dtype=torch.bool)
        for sigma in LEVELS[:2]:
            norms = naive_norms(seen[layer, sigma]), naive_norms(other[layer, sigma])
            expected |= naive_marks(weight, *norms, int(0.2 * 24))
        assert torch.equal(found[layer].marks(), expected)


def test_select_asks_for_more_than_a_share_of_the_levels():
    (target, _), (base, _) = activity(0), activity(500)
    weights = {"a": random(12, 24, seed=1), "b": random(9, 24, seed=2)}
    each = [
        marks(weights["a"], target.norms("a")[s], base.norms("a")[s], 4).int() for s in sorted(LEVELS, reverse=True)
    ]
    found = locate(weights.items(), target, base, 0.2, 3, select=0.5)["a"].marks()
    assert torch.equal(found, sum(each) > 1.5)


def test_equal_prompts_count_as_often_as_they_occur():
    hidden, once, thrice = random(2, 5, 24), Activity(), Activity()
    for _ in range(3):
        once.add("a", 1.0, hidden)
    thrice.add("a", 1.0, hidden, times=3)
    assert torch.allclose(once.sums["a"][1.0], thrice.sums["a"][1.0]) and once.rows == thrice.rows


def test_target_against_itself_marks_nothing():
    target, _ = activity(0)
    found = locate({"a": random(12, 24)}.items(), target, target, 0.2, 3)
    assert found["a"].marked == 0


@pytest.mark.parametrize(
    "base, sparsity, first, says",
    [
        (activity(500, levels=(14.6, 9.1, 4.9))[0], 0.2, 3, "noise levels"),
        (activity(500, shape=(3, 5, 24))[0], 0.2, 3, "noise levels"),
        (activity(500)[0], 0.2, 4, "expected 4 or more levels"),
        (activity(500)[0], 0.01, 3, "raise it to at least 0.042"),
    ],
)
def test_what_cannot_be_compared_is_refused(base, sparsity, first, says):
    with pytest.raises(ErasureError, match=says):
        locate({"a": random(12, 24)}.items(), activity(0)[0], base, sparsity, first)


def test_overlap_union_and_report():
    one, other = torch.zeros(4, 8, dtype=torch.bool), torch.zeros(4, 8, dtype=torch.bool)
    one[0, :4], other[0, 2:6] = True, True
    a, b = {"x": Mask.of(one)}, {"x": Mask.of(other)}
    assert overlap(a, b) == pytest.approx(2 / 6) and overlap(a, a) == 1.0
    assert torch.equal(union([a, b])["x"].marks(), one | other)
    assert "12.50%" in report(a, 3200) and "0.125% of the denoiser" in report(a, 3200)
