"""Integrity, drift and their intervals against the formulas written naively."""

import math
import random
import statistics

import numpy as np
import pytest
from membrane.core.measures import retention
from membrane.core.measures.retention import estimate, integrity, relative_drift, resamples, summary


def nested(prompts, seeds, seed=0, spread=1.0):
    """Distances whose prompts differ more than their seeds."""
    rng = np.random.default_rng(seed)
    return np.abs(rng.normal(2, spread, (prompts, 1)) + rng.normal(0, 0.2, (prompts, seeds)))


def naive_interval(data, statistic, draws, seed):
    """The same bootstrap in plain Python, with draws from the same generator."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(len(data), size=(draws, len(data))).tolist()
    seeds = rng.integers(len(data[0]), size=(draws, len(data), len(data[0]))).tolist()
    found = []
    for chosen, within in zip(prompts, seeds):
        rows = []
        for place, prompt in enumerate(chosen):
            for column in range(len(data[0])):
                rows.append(data[prompt][int(within[place][column])])
        found.append(statistic(rows))
    found.sort()

    def percentile(q):
        at = q * (len(found) - 1)
        low = math.floor(at)
        return found[low] + (at - low) * (found[min(low + 1, len(found) - 1)] - found[low])

    return percentile(0.025), percentile(0.975)


def test_interval_against_plain_python():
    data = nested(7, 3)
    found = estimate(data, draws=200, seed=5)
    low, high = naive_interval(data.tolist(), statistics.fmean, 200, 5)
    assert found.value == pytest.approx(statistics.fmean(data.ravel()))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_seeds_are_nested_in_prompts():
    """Many seeds of few prompts do not make a narrow interval; independent pictures would."""
    data = nested(6, 50)
    found = estimate(data)
    flat = random.Random(0).choices(data.ravel().tolist(), k=data.size)
    independent = 2 * 1.96 * statistics.stdev(flat) / math.sqrt(data.size)
    clustered = 2 * 1.96 * statistics.stdev(data.mean(axis=1)) / math.sqrt(6)
    assert found.high - found.low > 2.5 * independent
    assert found.high - found.low == pytest.approx(clustered, rel=0.35)


def test_the_same_numbers_give_the_same_interval():
    data = nested(5, 2)
    assert estimate(data) == estimate(data)
    first, other = (next(iter(resamples(data, 3, seed))) for seed in (0, 1))
    assert first.shape == (3, 10) and not np.array_equal(first, other)


def test_large_data_is_resampled_in_parts(monkeypatch):
    data = nested(30, 4)
    whole = estimate(data)
    monkeypatch.setattr(retention, "AT_ONCE", 1000)
    parts = list(resamples(data, 20))
    assert [len(part) for part in parts] == [8, 8, 4]
    found = estimate(data)
    assert found.value == whole.value and found.low == pytest.approx(whole.low, rel=0.05)


def test_summary():
    data = nested(8, 4)
    found = summary(data)
    flat = sorted(data.ravel().tolist())
    assert found.count == 32
    assert found.mean.value == pytest.approx(statistics.fmean(flat))
    assert found.median == pytest.approx(statistics.median(flat))
    assert found.p95 == pytest.approx(flat[29] + 0.45 * (flat[30] - flat[29]))


def test_integrity_of_nothing_changed_and_of_other_seeds():
    ceilings = nested(10, 4, 1)
    floor = 0.01
    untouched = integrity(np.full((10, 4), floor), ceilings, floor)
    assert (untouched.value, untouched.low, untouched.high) == (1, 1, 1)
    other = integrity(nested(10, 4, 2), ceilings, floor)
    assert other.low < 0 < other.high
    assert integrity(ceilings, ceilings, floor).value == pytest.approx(0, abs=1e-12)


def test_integrity_is_the_formula_and_monotone():
    ceilings, floor = nested(10, 4, 1), 0.05
    found = [integrity(floor + share * ceilings, ceilings, floor) for share in (0, 0.2, 0.5, 0.9)]
    for share, estimate_ in zip((0, 0.2, 0.5, 0.9), found):
        mean = ceilings.mean()
        assert estimate_.value == pytest.approx(1 - share * mean / (mean - floor))
        assert estimate_.low <= estimate_.value <= estimate_.high
    assert [e.value for e in found] == sorted((e.value for e in found), reverse=True)


def test_no_ceiling_no_integrity():
    assert integrity(np.zeros((2, 2)), np.zeros((2, 2))) is None


def test_relative_drift():
    g = np.random.default_rng(3)
    edited, original, empty = g.normal(size=(3, 5, 4, 2, 2))
    found = relative_drift(edited, original, empty)
    for i in range(5):
        moved = math.sqrt(sum((a - b) ** 2 for a, b in zip(edited[i].ravel(), original[i].ravel())))
        prompted = math.sqrt(sum((a - b) ** 2 for a, b in zip(original[i].ravel(), empty[i].ravel())))
        assert found[i] == pytest.approx(moved / prompted)
    assert np.isnan(relative_drift(edited, original, original)).all()
    assert not relative_drift(original, original, empty).any()
