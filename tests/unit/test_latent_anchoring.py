"""Latent Anchoring on a toy network, against the paper's equations and the published layout, naively in float64."""

import math

import numpy as np
import pytest
import torch
from membrane.core.erasers.objectives import spm_losses as losses
from membrane.core.erasers.paths import NoiseSchedule, alphas_cumprod, ddim_step, rollout_timesteps, told_timestep
from membrane.core.erasers.spm import (
    Settings,
    Texts,
    anchor_rows,
    learning_rate,
    noise_anchors,
    rollout,
    text_anchors,
    train,
)
from membrane.core.errors import ErasureError

T, D = 5, 6


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Toy:
    """eps = tanh(x * a(t) + w(text)) with a rank-1 change of w, in float64."""

    def __init__(self, seed=0):
        self.weight = numbers(seed, 4, T * D) * 0.2
        self.down, self.up = numbers(seed + 1, 1, T * D), numbers(seed + 2, 4, 1) * 0.1
        self.calls = []
        for parameter in self.parameters():
            parameter.requires_grad_()

    def parameters(self):
        return [self.down, self.up]

    def predict(self, x, t, text, on):
        self.calls.append((len(x), t.tolist(), on, torch.is_grad_enabled()))
        weight = self.weight + self.up @ self.down if on else self.weight
        shift = text.double().flatten(1) @ weight.T
        return torch.tanh(x.double() * (1 + t.double().view(-1, 1, 1, 1) / 1000) + shift[:, :, None, None])


TEXTS = Texts(
    numbers(11, T, D).float(), numbers(12, T, D).float(), numbers(13, T, D).float(), numbers(14, 6, T, D).float()
)


def test_schedule():
    alphas = alphas_cumprod()
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    assert np.allclose(alphas.numpy(), np.cumprod(1 - betas))
    assert rollout_timesteps(30)[:3] == [957, 924, 891] and rollout_timesteps(30)[-1] == 0
    published, matching = Settings(), Settings(timestep="matching")
    assert [told_timestep(k, published) for k in (1, 2, 29)] == [966, 933, 33]
    assert [told_timestep(k, matching) for k in (1, 2, 29)] == [924, 891, 0]


def test_learning_rate():
    settings = Settings(lr=2.0)
    assert (
        learning_rate(0, settings) == 0 and learning_rate(250, settings) == 1.0 and learning_rate(500, settings) == 2.0
    )
    for step in (501, 1000, 1333, 1334, 2999):
        q = (step - 500) / 2500
        assert learning_rate(step, settings) == pytest.approx(0.5 * (1 + math.cos(math.pi * (3 * q % 1))) * 2.0)
    assert learning_rate(0, Settings(warmup=0, lr=2.0)) == 2.0


def test_ddim_step_is_the_formula():
    alphas, x, noise = alphas_cumprod(), numbers(1, 1, 4, 3, 3), numbers(2, 1, 4, 3, 3)
    a, b = alphas[924].item(), alphas[891].item()
    clean = (x - math.sqrt(1 - a) * noise) / math.sqrt(a)
    assert torch.allclose(ddim_step(x, noise, 924, 891, alphas), math.sqrt(b) * clean + math.sqrt(1 - b) * noise)


def test_rollout_goes_with_guidance_and_the_adapter():
    toy, settings, x = Toy(), Settings(), numbers(3, 1, 4, 2, 2)
    found = rollout(toy, x, 2, TEXTS, settings, NoiseSchedule(settings))
    assert [call[1:] for call in toy.calls] == [([957, 957], True, False), ([924, 924], True, False)]
    expected = x
    for t, before in ((957, 924), (924, 891)):
        with torch.no_grad():
            empty, concept = (
                toy.predict(expected, torch.tensor([t]), text[None], on=True) for text in (TEXTS.empty, TEXTS.concept)
            )
        expected = ddim_step(expected, empty + 3.0 * (concept - empty), t, before, alphas_cumprod())
    assert torch.allclose(found, expected)


def published_losses(toy, x, t, samples, eta):
    """The published layout: 8 rows of empty, 1st, empty, 2nd ..., whose second half is compared."""

    def eps(text, on):
        return toy.predict(x, torch.tensor([t]), text[None], on=on)[0]

    with torch.no_grad():
        goal = eps(TEXTS.surrogate, False) - eta * (eps(TEXTS.concept, False) - eps(TEXTS.surrogate, False))
    erase = ((eps(TEXTS.concept, True) - goal) ** 2).mean()
    rows = [row for sample in samples for row in (TEXTS.empty, sample)][len(samples) :]
    on = torch.stack([eps(row, True) for row in rows])
    with torch.no_grad():
        off = torch.stack([eps(row, False) for row in rows])
    return erase, ((on - off) ** 2).mean()


@pytest.mark.parametrize("eta", [1.0, 3.0])
def test_losses_and_gradients_are_the_published_ones(eta):
    settings, x, t = Settings(eta=eta), numbers(3, 1, 4, 2, 2), 666
    generator = torch.Generator().manual_seed(5)
    samples = noise_anchors(4, TEXTS.concept, generator)
    anchors, weights = anchor_rows(TEXTS, settings, torch.Generator().manual_seed(5))
    assert torch.equal(anchors, torch.cat([TEXTS.empty[None], samples[2:]])) and weights.tolist() == [0.5, 0.25, 0.25]
    gradients = []
    for compute in (losses, published_losses):
        toy = Toy()
        if compute is losses:
            erase, anchor = losses(toy, x, t, TEXTS, anchors, weights, settings)
            assert sum(rows for rows, *_ in toy.calls) == 9  # 5 without, 4 with the adapter
        else:
            erase, anchor = published_losses(toy, x, t, samples, eta)
        (erase + 1000 * anchor).backward()
        gradients.append((erase.item(), anchor.item(), toy.down.grad, toy.up.grad))
    for found, expected in zip(*gradients):
        assert np.allclose(found, expected, rtol=1e-6, atol=1e-12)


def test_noise_anchors_have_the_norm_and_no_direction():
    found = noise_anchors(200, TEXTS.concept, torch.Generator().manual_seed(1))
    ratio = found.flatten(1).norm(dim=1) / TEXTS.concept.norm()
    assert 0.8 <= ratio.min() < 0.85 and 1.15 < ratio.max() <= 1.2
    cosine = torch.nn.functional.cosine_similarity(found.flatten(1), TEXTS.concept.flatten()[None])
    assert abs(cosine.mean()) < 0.1


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_text_anchors_are_drawn_by_equation_6(alpha):
    count = 20_000
    found = text_anchors(count, TEXTS, alpha, torch.Generator().manual_seed(1))
    flat = TEXTS.preserved.flatten(1).double()
    cosine = (flat @ TEXTS.concept.flatten().double()) / flat.norm(dim=1) / TEXTS.concept.double().norm()
    share = (1 - cosine.abs()) ** alpha
    share = share / share.sum()
    drawn = torch.stack([(found == p).flatten(1).all(dim=1).sum() for p in TEXTS.preserved]) / count
    assert torch.allclose(drawn.double(), share, atol=0.015)


def test_only_the_concept_cannot_be_preserved():
    with pytest.raises(ErasureError, match="equal the concept"):
        text_anchors(2, Texts(*[TEXTS.concept] * 3, TEXTS.concept[None]), 1.0, torch.Generator())


def run(steps, start=0, toy=None, until=None, **settings):
    toy, reports = toy or Toy(), []
    settings = Settings(steps=steps, warmup=2, lr=0.02, lam=1.0, rollout_steps=5, size=(2, 2), seed=3, **settings)

    def on_step(report):
        reports.append(report)
        if report.step == until:
            raise KeyboardInterrupt

    train(toy, toy.parameters(), [TEXTS], settings, on_step, start)
    return toy, reports


def test_training_erases_and_is_deterministic():
    toy, reports = run(150)
    again, _ = run(150)
    assert [r.step for r in reports] == list(range(1, 151))
    assert torch.equal(toy.up, again.up) and torch.equal(toy.down, again.down)
    assert sum(r.erase for r in reports[-20:]) < 0.5 * sum(r.erase for r in reports[:20])
    assert toy.weight.grad is None


def test_a_resumed_run_draws_what_it_would_have_drawn():
    whole, _ = run(12)
    toy = Toy()
    optimizer_steps = []
    with pytest.raises(KeyboardInterrupt):
        run(12, toy=toy, until=5)
    _, rest = run(12, start=5, toy=toy)
    optimizer_steps.extend(r.step for r in rest)
    assert optimizer_steps == list(range(6, 13))
    # the optimiser's memory is gone, so the factors are near, not equal
    assert (toy.up - whole.up).norm() < 0.2 * whole.up.norm()


def test_several_concepts_share_the_steps():
    other = Texts(numbers(31, T, D).float(), TEXTS.surrogate, TEXTS.empty)
    seen = set()

    class Spy(Toy):
        def predict(self, x, t, text, on):
            seen.update(i for i, texts in enumerate((TEXTS, other)) if torch.equal(text[0], texts.concept))
            return super().predict(x, t, text, on)

    toy = Spy()
    train(toy, toy.parameters(), [TEXTS, other], Settings(steps=12, warmup=0, rollout_steps=3, size=(2, 2)))
    assert seen == {0, 1}


def test_a_loss_that_is_not_finite_stops_before_the_step():
    toy = Toy()
    with torch.no_grad():
        toy.weight[0, 0] = math.nan
    before = [p.detach().clone() for p in toy.parameters()]
    with pytest.raises(ErasureError, match="not finite in step 1 .* lower the learning rate"):
        run(3, toy=toy)
    assert all(torch.equal(p, q) for p, q in zip(before, toy.parameters()))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": 0}, "steps 0; expected at least 1"),
        ({"rollout_steps": 1}, "at least 2"),
        ({"lr": 0.0}, "positive number"),
        ({"lr": math.nan}, "positive number"),
        ({"anchor_kind": "pictures"}, "expected noise or texts"),
        ({"timestep": "right"}, "expected published or matching"),
    ],
)
def test_impossible_settings(settings, sentence):
    with pytest.raises(ErasureError, match=sentence):
        Settings(**settings)
