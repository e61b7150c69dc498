"""A training run without a host: when it tells, shows and saves, and what stays after a stop."""

import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.erasers.spm import Settings, Texts, preview
from membrane.core.erasers.spm_presets import CUSTOM, PRESETS, settings_of
from membrane.core.erasers.spm_run import TrainingRun, steps_done
from membrane.core.errors import ErasureError

SETTINGS = Settings(steps=6, warmup=0, rollout_steps=3, size=(4, 4), anchors=2)
TEXTS = [Texts(*torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1)))]


class Toy:
    """eps = x + the adapter's mean times x, with one trained layer."""

    def __init__(self):
        self.up = torch.full((4, 1), 0.1, requires_grad=True)

    def parameters(self):
        return [self.up]

    def trained(self):
        return {"layer": LowRank(self.up.detach().clone(), torch.ones(1, 6), 1.0)}

    def predict(self, x, t, text, on):
        weight = self.up.mean() if on else 0.0
        return x * (1 + weight * text.mean(dim=(1, 2)).view(-1, 1, 1, 1))


def run(**changes):
    saved, shown, said = [], [], []
    wanted = {"save_every": 2, "preview_every": 3, "save": saved.append, "say": said.append}
    wanted["show"] = lambda step, latents: shown.append((step, None if latents is None else tuple(latents.shape)))
    return TrainingRun(Card("SPM", ("star",)), SETTINGS, "star_00001_", **{**wanted, **changes}), saved, shown, said


def test_it_tells_shows_and_saves():
    training, saved, shown, said = run()
    adapter, report = training(Toy(), TEXTS)
    assert [one.card.settings["trained_steps"] for one in saved] == [2, 4, 6]
    assert shown == [(1, None), (2, None), (3, (1, 4, 4, 4)), (4, None), (5, None), (6, (1, 4, 4, 4))]
    assert len(said) == 1 and said[0].startswith("step 6 of 6: erase loss") and said[0].endswith(" s left")
    assert report.startswith("Saved as star_00001_ after 6 steps.\nstep 6 of 6")
    assert adapter.name == "star_00001_" and torch.equal(adapter.low_rank["layer"].up, saved[-1].low_rank["layer"].up)


def test_pictures_stand_beside_what_they_were_without_the_adapter():
    shown = []
    training = run(show=lambda step, latents: shown.append((training.original, latents)))[0]
    assert training.original is None
    training(Toy(), TEXTS)
    (first, one), (second, two) = [pair for pair in shown if pair[1] is not None]
    untrained = Toy()
    untrained.up = torch.zeros(4, 1)
    expected = preview(untrained, TEXTS[0], SETTINGS)
    assert torch.equal(first, expected) and torch.equal(second, expected)
    assert not torch.equal(one, expected) and not torch.equal(one, two)


def test_what_is_trained_stays_after_a_stop():
    def stop(step, latents):
        if step == 3:
            raise KeyboardInterrupt

    training, saved, _, said = run(show=stop)
    with pytest.raises(KeyboardInterrupt):
        training(Toy(), TEXTS)
    assert said[-1].startswith("Stopped. Saved as star_00001_ after 3 steps. To go on, load it")
    assert [one.card.settings["trained_steps"] for one in saved] == [2, 3]


def test_a_full_disk_is_told_and_the_adapter_goes_on():
    def full(adapter):
        raise OSError("no space")

    adapter, report = run(save=full)[0](Toy(), TEXTS)
    assert "could not be saved as star_00001_ (no space)" in report and adapter.low_rank and adapter.name == ""


def test_going_on():
    training, saved, shown, _ = run(start=4)
    training(Toy(), TEXTS)
    assert [step for step, _ in shown] == [5, 6] and len(saved) == 1
    done = ErasureAdapter(Card("SPM", ("star",), settings={"trained_steps": 4}), {"low_rank": Toy().trained()})
    assert steps_done(done, SETTINGS) == 4
    with pytest.raises(ErasureError, match="trained for 4 steps already"):
        steps_done(done, Settings(steps=4))
    with pytest.raises(ErasureError, match="no trained layers"):
        steps_done(ErasureAdapter(Card("SPM", ("star",))), SETTINGS)


def test_presets():
    assert settings_of(CUSTOM, steps=100, warmup=500, eta=2.0) == Settings(steps=100, warmup=20, eta=2.0)
    found = settings_of("nudity", steps=100, warmup=500, eta=2.0)
    assert (found.steps, found.eta, found.lam, found.warmup) == (15000, 3.0, 100.0, 500)
    quick = settings_of("nudity", "quick", steps=100, seed=4)
    assert (quick.steps, quick.lr, quick.rollout_steps, quick.eta, quick.seed) == (200, 1e-2, 10, 3.0, 4)
    assert settings_of(CUSTOM, "thorough", size=(8, 8)) == Settings(size=(8, 8))  # the published numbers
    assert set(PRESETS) == {CUSTOM, "object", "style", "nudity"}
