"""Neurons of value layers that answer to memorised prompts alone, against NeMo's steps written naively."""

import itertools

import pytest
import torch
from membrane.core.erasers.value_neurons import (
    activation,
    deviations,
    goal_of,
    masks_of,
    outside,
    refine,
    require_ordinary,
    select,
)
from membrane.core.errors import ErasureError


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_activation_is_the_mean_of_absolutes_over_the_tokens():
    values = numbers(0, 2, 5, 3)
    found = activation(values.float())
    for b, j in itertools.product(range(2), range(3)):
        assert found[b, j].item() == pytest.approx(sum(abs(values[b, t, j].item()) for t in range(5)) / 5, rel=1e-6)


def test_deviations_are_standard_scores_and_the_largest_counts():
    ordinary, targets = numbers(1, 30, 4).abs(), numbers(2, 3, 4).abs() * 3
    found = deviations(targets, ordinary)
    for j in range(4):
        column = [ordinary[i, j].item() for i in range(30)]
        mean = sum(column) / 30
        deviation = (sum((x - mean) ** 2 for x in column) / 29) ** 0.5
        assert found[j].item() == pytest.approx(max(abs(targets[i, j].item() - mean) / deviation for i in range(3)))


def test_a_neuron_that_never_varies_is_no_candidate_unless_it_moves():
    found = deviations(torch.tensor([[1.0, 1.5]], dtype=torch.float64), torch.ones(25, 2, dtype=torch.float64))
    assert found[0] == 0 and found[1] > 1e6


def test_outside_is_the_threshold_or_the_largest_of_a_layer():
    z = {"a": torch.tensor([0.5, 6.0, 2.0]), "b": torch.tensor([1.0, 0.1])}
    assert {k: v.tolist() for k, v in outside(z, 5.0, 0).items()} == {"a": [False, True, False], "b": [False, False]}
    assert {k: v.tolist() for k, v in outside(z, 5.0, 1).items()} == {"a": [False, True, False], "b": [True, False]}
    assert {k: v.tolist() for k, v in outside(z, 1.5, 2).items()} == {"a": [False, True, True], "b": [True, True]}


WEIGHTS = {"a": torch.tensor([0.0, 3.0, 0.0, 2.0]), "b": torch.tensor([0.0, 0.0, 0.0]), "c": torch.tensor([1.0, 0.0])}
Z = {"a": torch.tensor([4.0, 4.6, 4.9, 2.3]), "b": torch.tensor([6.0, 0.1, 0.2]), "c": torch.tensor([2.6, 2.7])}


def memorised(off):
    """10 less what each neuron that is switched off carries."""
    return 10 - sum(float(WEIGHTS[layer][chosen].sum()) for layer, chosen in off.items())


def naive_select(goal):
    """The first threshold and number of largest at which the score is at most the goal."""
    threshold, top = 5.0, 0
    while True:
        off = {}
        for layer, values in Z.items():
            ranked = sorted(range(len(values)), key=lambda j: -values[j].item())
            off[layer] = [values[j].item() > threshold or j in ranked[:top] for j in range(len(values))]
        if memorised({layer: torch.tensor(chosen) for layer, chosen in off.items()}) <= goal:
            return off
        threshold, top = threshold - 0.25, top + 1


@pytest.mark.parametrize("goal", [7.0, 5.0, 4.0])
def test_the_threshold_falls_until_the_memorisation_does(goal):
    off, score = select(Z, memorised, goal)
    assert score <= goal
    assert {layer: chosen.tolist() for layer, chosen in off.items()} == naive_select(goal)


def test_a_goal_out_of_reach_gives_the_best_there_is():
    off, score = select(Z, memorised, -1.0)
    assert score == 4.0 and off["a"][1] and off["a"][3] and off["c"][0]


def test_only_neurons_that_matter_are_left():
    everything = {layer: torch.ones(len(values), dtype=torch.bool) for layer, values in Z.items()}
    off = refine(Z, everything, memorised, 4.0)
    assert {k: v.tolist() for k, v in off.items()} == {
        "a": [False, True, False, True], "b": [False] * 3, "c": [True, False],
    }  # fmt: skip
    assert all(chosen.all() for chosen in everything.values())
    looser = refine(Z, everything, memorised, 7.0)  # the least deviating is let go first
    assert looser["a"].tolist() == [False, True, False, False] and not looser["c"].any()


@pytest.mark.parametrize("seed", range(5))
def test_no_neuron_that_is_left_can_be_spared(seed):
    """Where what neurons carry adds up, halves find what trying one after the other finds: nothing can go."""
    z = {layer: numbers(seed + i, 12).abs() for i, layer in enumerate("abc")}
    carried = {layer: numbers(seed + 10 + i, 12).clamp(min=0) for i, layer in enumerate("abc")}
    everything = {layer: torch.ones(12, dtype=torch.bool) for layer in "abc"}
    asked = []

    def score(off):
        asked.append(off)
        return -sum(float(carried[layer][chosen].sum()) for layer, chosen in off.items())

    limit = 0.5 * score(everything)
    off = refine(z, everything, score, limit)
    assert score(off) <= limit
    for layer in "abc":
        for j in off[layer].nonzero()[:, 0]:
            fewer = {**off, layer: off[layer].clone()}
            fewer[layer][j] = False
            assert score(fewer) > limit


def test_a_mask_takes_whole_rows_out():
    off = {"a": torch.tensor([False, True, False]), "b": torch.zeros(2, dtype=torch.bool)}
    masks = masks_of(off, {"a": 4, "b": 5})
    assert list(masks) == ["a"]
    assert masks["a"].marks().tolist() == [[False] * 4, [True] * 4, [False] * 4]


def test_what_counts_as_not_memorised():
    assert goal_of(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)) == pytest.approx(3.0)


def test_too_few_ordinary_prompts_are_refused():
    require_ordinary(20)
    with pytest.raises(ErasureError, match="at least 20 different base prompts, one per line, .* there are 19"):
        require_ordinary(19)
