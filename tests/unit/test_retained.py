"""Training towards a distribution to forget and one to retain: losses and gradients against naive float64."""

import dataclasses

import pytest
import torch
from membrane.core.erasers.paths import Flow
from membrane.core.erasers.retained import (
    PROJECTED,
    RETAINED,
    WEIGHTED,
    backward,
    drawn_texts,
    forget_loss,
    projected,
    retain_loss,
    walked,
)
from membrane.core.erasers.spm import train
from membrane.tests.unit.test_objectives import SETTINGS, SIGMA, SIGMAS, TEXTS, Toy, X, numbers, text

LATENTS = numbers(30, 3, 4, 2, 2)
KEPT = [text(40, 4), text(41, 3), text(42, 4)]


def rows(which):
    return which.given["c_crossattn"][0]


def naive_forget(toy, eta):
    concept, surrogate = (toy.velocity(X[0], SIGMA, rows(t), False) for t in (TEXTS.concept, TEXTS.surrogate))
    goal = (surrogate - eta * (concept - surrogate)).detach()
    return ((toy.velocity(X[0], SIGMA, rows(TEXTS.concept), True) - goal) ** 2).sum() / X.numel()


def naive_retain(toy):
    total = 0.0
    for x, kept in zip(LATENTS, KEPT):
        still = toy.velocity(x, SIGMA, rows(kept), False).detach()
        total = total + ((toy.velocity(x, SIGMA, rows(kept), True) - still) ** 2).sum()
    return total / LATENTS.numel()


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def naive_gradients(eta=1.0):
    toy = Toy()
    each = [torch.autograd.grad(loss, toy.parameters()) for loss in (naive_forget(toy, eta), naive_retain(toy))]
    return [flat(found) for found in each]


@pytest.mark.parametrize("eta", [0.0, 1.0, 3.0])
def test_the_losses_are_the_formulas(eta):
    toy = Toy()
    settings = dataclasses.replace(SETTINGS, eta=eta)
    found = forget_loss(toy, X, SIGMA, TEXTS, settings)
    assert found.item() == pytest.approx(naive_forget(Toy(), eta).item(), rel=1e-12)
    held = retain_loss(toy, LATENTS, SIGMA, KEPT)
    assert held.item() == pytest.approx(naive_retain(Toy()).item(), rel=1e-12) and held > 0


@pytest.mark.parametrize("objective", RETAINED)
@pytest.mark.parametrize("eta", [0.0, 1.0, 3.0])
def test_the_gradient_is_the_sum_or_the_projection(objective, eta):
    forget, retain = naive_gradients(eta)
    if objective == PROJECTED and forget @ retain < 0:
        forget = forget - (forget @ retain) / (retain @ retain) * retain
    toy, weight = Toy(), 2.5
    settings = dataclasses.replace(SETTINGS, eta=eta)
    backward(
        toy.parameters(), forget_loss(toy, X, SIGMA, TEXTS, settings), retain_loss(toy, LATENTS, SIGMA, KEPT),
        objective, weight,
    )  # fmt: skip
    found = flat([p.grad for p in toy.parameters()])
    assert torch.allclose(found, forget + weight * retain, rtol=1e-10, atol=1e-14)


def test_a_projected_gradient_never_raises_the_retain_loss():
    opposed = 0
    for seed in range(50):
        forget, retain = ([numbers(2 * seed + s, 3, 4), numbers(100 + 2 * seed + s, 5)] for s in (0, 1))
        before, after = flat(forget) @ flat(retain), flat(projected(forget, retain)) @ flat(retain)
        opposed += bool(before < 0)
        assert after >= -1e-12
        if before >= 0:
            assert torch.equal(flat(projected(forget, retain)), flat(forget))
        else:
            assert after.abs() < 1e-12  # nothing more is taken away than what opposes
    assert 10 < opposed < 40


def test_a_closed_adapter_has_no_retain_gradient_and_is_pulled_all_the_same():
    toy = Toy(scale=0.0)
    backward(
        toy.parameters(), forget_loss(toy, X, SIGMA, TEXTS, SETTINGS), retain_loss(toy, LATENTS, SIGMA, KEPT),
        PROJECTED, 10.0,
    )  # fmt: skip
    assert toy.up.grad.isfinite().all() and toy.up.grad.abs().max() > 0


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_retained_latents_are_the_frozen_models_own(cfg):
    toy, path = Toy(), Flow(SIGMAS, lambda noise: 2 * noise)
    found = walked(toy, LATENTS, 2, KEPT, TEXTS.empty, dataclasses.replace(SETTINGS, rollout_cfg=cfg), path)
    for x, kept, got in zip(LATENTS, KEPT, found):
        x = 2 * x
        for now, after in zip(SIGMAS[:2], SIGMAS[1:]):
            v, empty = (toy.velocity(x, now, rows(t), False) for t in (kept, TEXTS.empty))
            x = x + (after - now) * (empty + cfg * (v - empty))
        assert torch.allclose(got, x, rtol=1e-6)
    assert not found.requires_grad


def test_kept_prompts_are_drawn_equally_often():
    generator, counts = torch.Generator().manual_seed(0), [0] * len(TEXTS.preserved)
    for _ in range(1000):
        for drawn in drawn_texts(4, TEXTS, generator):
            counts[next(i for i, kept in enumerate(TEXTS.preserved) if kept is drawn)] += 1
    assert min(counts) > 0.85 * 4000 / len(counts) and max(counts) < 1.15 * 4000 / len(counts)


@pytest.mark.parametrize("objective", RETAINED)
def test_training_forgets_and_repeats_itself(objective):
    def trained():
        toy, reports = Toy(scale=0.0), []
        settings = dataclasses.replace(SETTINGS, objective=objective, eta=0.0, steps=100)
        train(toy, toy.parameters(), [TEXTS], settings, reports.append, path=Flow(SIGMAS))
        return toy, reports

    toy, reports = trained()
    assert torch.equal(toy.up, trained()[0].up)
    assert sum(r.erase for r in reports[-10:]) < 0.7 * sum(r.erase for r in reports[:10])
    assert reports[0].anchor == 0 and reports[-1].anchor > 0


def test_the_weight_holds_what_is_kept():
    def held(weight):
        toy, reports = Toy(scale=0.0), []
        settings = dataclasses.replace(SETTINGS, objective=WEIGHTED, eta=0.0, lam=weight, steps=100)
        train(toy, toy.parameters(), [TEXTS], settings, reports.append, path=Flow(SIGMAS))
        return sum(r.anchor for r in reports[-20:])

    assert held(100.0) < 0.5 * held(0.0)
