"""Adversarial training without a host: the bank's rules, the loss against its formula in float64, a whole run."""

import dataclasses

import pytest
import torch
from membrane.core.erasers.adversarial import (
    ATTACKED,
    ERASED,
    KEPT,
    PICTURES,
    REPLAYED,
    STARTS,
    USES,
    Attack,
    Bank,
    Game,
    Row,
    errors_of,
    pictures_of,
)
from membrane.core.erasers.conditions import rows_of
from membrane.core.erasers.paths import Flow, NoiseSchedule
from membrane.core.erasers.spm import Settings, train
from membrane.core.errors import ErasureError

from .test_objectives import SIGMA, SIGMAS, TEXTS, Toy, X, numbers, one, text

WORD = dataclasses.replace(TEXTS, alone=True)
SETTINGS = Settings(
    steps=60, warmup=0, lr=0.02, lam=1.0, rollout_steps=4, size=(2, 2), seed=3, anchor_kind="texts", eta=0.0,
    objective="adversarial",
)  # fmt: skip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def attack(found, seed=0):
    return Attack(found, torch.ones(len(rows_of(found)), 1, dtype=torch.float64), 0.1, 5)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_errors_and_gradients_are_the_formulas(eta):
    """Rows of each kind, with every mean square written out."""
    ours, theirs = Toy(), Toy()
    searched, own = attack(text(30, 4)), attack(text(30, 4))
    level = torch.tensor([SIGMA], dtype=torch.float64)
    rows = [
        Row(X, level, TEXTS.concept, TEXTS.concept, TEXTS.surrogate),
        Row(X, level, searched.text, TEXTS.concept, TEXTS.surrogate, attack=searched),
        Row(X, level, TEXTS.preserved[0]),
    ]
    errors, towards = errors_of(ours, rows, eta)
    concept, surrogate = (one(theirs, which, False).detach() for which in (TEXTS.concept, TEXTS.surrogate))
    goal = (1 + eta) * surrogate - eta * concept
    kept = one(theirs, TEXTS.preserved[0], False).detach()
    asked = [one(theirs, which, True) for which in (TEXTS.concept, own.text, TEXTS.preserved[0])]
    wanted = [((found - aim) ** 2).sum() / X.numel() for found, aim in zip(asked, (goal, goal, kept))]
    assert errors.tolist() == pytest.approx([w.item() for w in wanted], rel=1e-12)
    expected = ((asked[1] - concept) ** 2).sum() / X.numel()
    assert towards.item() == pytest.approx(expected.item(), rel=1e-12)
    (found,) = torch.autograd.grad(towards, [searched.vectors], retain_graph=True)
    (naive,) = torch.autograd.grad(expected, [own.vectors], retain_graph=True)
    assert torch.allclose(found, naive, rtol=1e-10) and naive.abs().max() > 0
    errors.sum().backward(inputs=ours.parameters())
    sum(wanted).backward(inputs=theirs.parameters())
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-10, atol=1e-14)


def test_an_attack_goes_towards_the_concept_in_its_free_rows_alone():
    free = torch.zeros(4, 1, dtype=torch.float64)
    free[2] = 1
    searched = Attack(text(30, 4), free, 0.05, 40)
    before = searched.vectors.detach().clone()
    toy, distances = Toy(), []
    while searched.uses:
        row = Row(
            X, torch.tensor([SIGMA], dtype=torch.float64), searched.text, TEXTS.concept, TEXTS.surrogate,
            attack=searched,
        )  # fmt: skip
        towards = errors_of(toy, [row], 1.0)[1]
        distances.append(towards.item())
        searched.step(torch.autograd.grad(towards, searched.vectors)[0])
    assert len(distances) == 40 and distances[-1] < 0.5 * distances[0]
    moved = (searched.vectors - before).abs().amax(dim=1)
    assert (moved > 0).tolist() == [False, False, True, False]
    first = Attack(text(30, 4), torch.ones(4, 1, dtype=torch.float64), 0.05, 40)
    first.step(torch.ones(4, 6, dtype=torch.float64))
    assert torch.allclose(
        first.vectors, rows_of(text(30, 4)) - 0.05, atol=1e-6
    )  # a step of Adam is as long as its rate


def test_attacks_end_after_their_uses_and_are_remembered():
    bank, g = Bank([WORD, TEXTS]), generator()
    first = list(bank.filled(g))
    assert len(first) == ATTACKED == 18 and bank.filled(g) == first and bank.replayed(REPLAYED, g) == []
    assert all(USES[0] <= found.uses <= USES[1] for found in first) and sum(USES) == 110
    for _ in range(first[0].uses):
        first[0].step(torch.ones_like(first[0].vectors))
    last = first[0].vectors.detach().clone()
    after = bank.filled(g)
    assert after[:17] == first[1:] and after[17] is not first[0]
    (remembered,) = bank.replayed(REPLAYED, g)
    assert torch.equal(rows_of(remembered), last) and not rows_of(remembered).requires_grad
    for found in after[:6]:
        found.uses = 0
    bank.filled(g)
    drawn = bank.replayed(REPLAYED, g)
    assert len(bank.remembered) == 7 and len({id(found) for found in drawn}) == 3


def test_attacks_start_in_five_ways_and_free_one_row_or_all():
    bank, g, count = Bank([WORD, TEXTS], size=2000), generator(1), {}
    plain = {id(rows.given["c_crossattn"]): kind for kind, rows in (("concept", TEXTS.concept), ("empty", TEXTS.empty))}
    plain |= {id(found.given["c_crossattn"]): "kept" for found in TEXTS.preserved}
    whole, squares = 0, []
    for found in bank.filled(g):
        kind = plain.get(id(found.start.given["c_crossattn"]), "noise")
        count[kind] = count.get(kind, 0) + 1
        if kind == "noise":
            squares.append((rows_of(found.start).square().mean() / rows_of(TEXTS.concept).square().mean()).item())
        whole += int(found.free.sum() == len(found.free))
        assert int(found.free.sum()) in (1, len(found.free)) and (len(found.free) == 1 or not found.free[1:].sum() == 0)
    assert sum(squares) / len(squares) == pytest.approx(1, abs=0.08)
    shares = {"concept": 0.6, "kept": 0.15, "empty": 0.12, "noise": 0.13}  # the concept's text is both word and caption
    assert sum(STARTS.values()) == pytest.approx(1) and STARTS["concept"] == 0.4
    for kind, share in shares.items():
        assert count[kind] / 2000 == pytest.approx(share, abs=0.04)
    assert 0.55 < whole / 2000 < 0.65


def test_a_step_has_rows_of_all_kinds_and_one_of_them_keeps_the_empty_prompt():
    toy = Toy()
    game = Game(toy, toy.parameters(), [WORD, TEXTS], SETTINGS, Flow(SIGMAS))
    assert len(game.concept) == len(game.surrogate) == len(game.kept) == PICTURES
    rows = game.rows(generator())
    erased = [row for row in rows if row.concept is not None]
    assert len(rows) == ERASED + ATTACKED + KEPT and len(erased) == ERASED + ATTACKED
    assert sum(row.weight for row in erased) == pytest.approx(2)  # captions and attacks count alike
    kept = [row for row in rows if row.concept is None]
    assert sum(row.weight for row in kept) == pytest.approx(1) and kept[0].text is TEXTS.empty
    assert all(any(row.text is found for found in TEXTS.preserved) for row in kept[1:])
    for row in rows:
        if row.attack is not None:  # above the lowest three tenths of 1.0, 0.8, 0.5, 0.2
            assert row.level.item() > 0.47


def test_pictures_are_those_of_the_unerased_model():
    toy, path = Toy(), Flow(SIGMAS)
    settings = dataclasses.replace(SETTINGS, rollout_cfg=3.0)
    found = pictures_of(toy, [TEXTS.concept, TEXTS.surrogate], TEXTS.empty, settings, path, generator(5))
    x = torch.randn(2, 4, 2, 2, generator=generator(5))
    for row, which in enumerate((TEXTS.concept, TEXTS.surrogate)):
        latents = x[row].double()
        for now, after in zip(SIGMAS, (*SIGMAS[1:], 0.0)):
            text_, empty = (
                toy.velocity(latents, now, w.given["c_crossattn"][0], False).detach() for w in (which, TEXTS.empty)
            )
            latents = latents + (after - now) * (empty + 3.0 * (text_ - empty))
        assert torch.allclose(found[row].double(), latents, rtol=1e-5, atol=1e-6)


def test_levels_and_noise_are_those_of_the_path():
    schedule, flow, g = NoiseSchedule(SETTINGS), Flow((1.0, 0.6, 0.4, 0.2)), generator(2)
    drawn = [int(schedule.drawn(0.3, g)) for _ in range(400)]
    assert 300 <= min(drawn) < 320 and 980 < max(drawn) <= 999
    drawn = [schedule.drawn(0.0, g).item() for _ in range(400)]
    assert min(drawn) < 20
    clean, noise = numbers(1, 1, 4, 2, 2), numbers(2, 1, 4, 2, 2)
    a = schedule.alphas[700].item()
    found = schedule.noised(clean, noise, torch.tensor([700]))
    assert torch.allclose(found, a**0.5 * clean + (1 - a) ** 0.5 * noise)
    levels = [flow.drawn(0.3, g).item() for _ in range(400)]
    assert 0.38 - 1e-6 <= min(levels) < 0.4 and 0.97 < max(levels) <= 1  # seven tenths of the way along the steps
    assert torch.allclose(flow.noised(clean, noise, torch.tensor([0.25])), 0.75 * clean + 0.25 * noise)


def run_of(seed=3, **changes):
    toy, reports = Toy(scale=0.0), []
    settings = dataclasses.replace(SETTINGS, seed=seed, **changes)
    train(toy, toy.parameters(), [WORD, TEXTS], settings, reports.append, path=Flow(SIGMAS))
    return toy, reports


def test_a_run_erases_and_is_the_same_for_a_seed():
    toy, reports = run_of()
    again, other = run_of()[0], run_of(seed=4)[0]
    assert torch.equal(toy.up, again.up) and torch.equal(toy.down, again.down)
    assert not torch.equal(toy.up, other.up)
    assert sum(r.erase for r in reports[-10:]) < 0.7 * sum(r.erase for r in reports[:10])
    before = (one(toy, TEXTS.concept, False) - one(toy, TEXTS.surrogate, False)).norm()
    after = (one(toy, TEXTS.concept, True) - one(toy, TEXTS.surrogate, False)).norm()
    assert after < 0.7 * before
    moved = (one(toy, TEXTS.empty, True) - one(toy, TEXTS.empty, False)).norm()
    assert moved < 0.5 * before


def test_it_needs_something_to_keep():
    toy = Toy()
    bare = dataclasses.replace(TEXTS, preserved=None)
    with pytest.raises(ErasureError, match="needs prompts to preserve"):
        train(toy, toy.parameters(), [bare], SETTINGS, path=Flow(SIGMAS))


def test_a_loss_that_is_not_finite_stops_before_the_step():
    toy = Toy(scale=0.0)
    own = toy.predict
    toy.predict = lambda x, t, found, on: own(x, t, found, on) * (float("nan") if on else 1.0)
    before = [p.detach().clone() for p in toy.parameters()]
    with pytest.raises(ErasureError, match="not finite in step 1 .* lower the learning rate"):
        train(toy, toy.parameters(), [TEXTS], SETTINGS, path=Flow(SIGMAS))
    assert all(torch.equal(p, q) for p, q in zip(toy.parameters(), before))
