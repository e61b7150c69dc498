"""Selective Synaptic Dampening against its rule written element by element."""

import pytest
import torch
from membrane.core.erasers.dampening import dampen, importance, threshold
from membrane.core.errors import ErasureError

SHAPES = {"a": (12, 40), "b": (7, 33)}


def importances(seed):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.rand(*shape, generator=g).pow(3) for name, shape in SHAPES.items()}


class Toy:
    """A linear denoiser: eps = W (x + text), with two weights in a row."""

    def __init__(self):
        g = torch.Generator().manual_seed(1)
        self.weights = {
            "a": torch.randn(5, 4, generator=g).double().requires_grad_(),
            "b": torch.randn(4, 5, generator=g).double().requires_grad_(),
        }

    def predict(self, x, t, text, on):
        hidden = (x.flatten(1) + text.mean(dim=1)) @ self.weights["a"].T
        return torch.tanh(hidden * t.view(-1, 1)) @ self.weights["b"].T


def samples(count=3):
    g = torch.Generator().manual_seed(2)
    for i in range(count):
        yield (
            torch.randn(1, 4, generator=g).double(),
            torch.tensor([0.3 + i]),
            *(torch.randn(2, 1, 6, 4, generator=g).double()),
        )


def test_importance_is_the_mean_of_squared_gradients_by_finite_differences():
    toy, h = Toy(), 1e-6
    found = importance(toy, toy.weights, samples())

    def loss(sample, empty):
        x, t, text, _ = sample
        return (toy.predict(x, t, text, False) - empty).square().sum().item()

    for name, weight in toy.weights.items():
        expected = torch.zeros_like(weight)
        for sample in samples():
            empty = toy.predict(sample[0], sample[1], sample[3], False).detach()
            for i in range(weight.numel()):
                flat = weight.data.view(-1)
                flat[i] += h
                up = loss(sample, empty)
                flat[i] -= 2 * h
                down = loss(sample, empty)
                flat[i] += h
                expected.data.view(-1)[i] += ((up - down) / (2 * h)) ** 2 / 3
        assert torch.allclose(found[name].double(), expected.detach(), rtol=1e-4)


@pytest.mark.parametrize("alpha, lam", [(5.0, 1.0), (30.0, 0.5)])
def test_rule_is_the_published_one(alpha, lam):
    forget, retain = importances(0), importances(1)
    masks = dampen(forget, retain, alpha, lam)
    for name, mask in masks.items():
        chosen = mask.marks()
        assert chosen.sum() <= 0.05 * chosen.numel()
        left = torch.ones(mask.shape)
        left[chosen] = mask.kept.float()
        for i in range(mask.shape[0]):
            for j in range(mask.shape[1]):
                f, r = float(forget[name][i, j]), float(retain[name][i, j])
                if chosen[i, j]:
                    assert f > alpha * r
                    assert float(left[i, j]) == pytest.approx(min(lam * r / f, 1.0), rel=1e-3, abs=1e-6)
        weight = torch.randn(*mask.shape)
        assert torch.equal((weight + mask.difference(weight))[~chosen], weight[~chosen])


def test_all_that_pass_are_selected_below_the_limit_of_a_layer():
    forget, retain = importances(0), importances(1)
    alpha = threshold(forget, retain, 0.02)
    masks = dampen(forget, retain, alpha)
    for name in SHAPES:
        passing = forget[name].double() > alpha * retain[name].double()
        assert torch.equal(masks[name].marks(), passing)
    assert sum(m.marked for m in masks.values()) == int(0.02 * sum(a * b for a, b in SHAPES.values()))


def test_nothing_passes_an_endless_alpha():
    with pytest.raises(ErasureError, match="No weight matters"):
        dampen(importances(0), importances(1), float("inf"))


def test_retained_prompts_must_say_something():
    nothing = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    with pytest.raises(ErasureError, match="base prompts change nothing"):
        dampen(importances(0), nothing, 1.0)
