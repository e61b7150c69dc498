"""Which sampling a conditioning belongs to, where nodes prepare one in the middle of a step or use one noise twice."""

from functools import partial

import pytest
from membrane.core.adapters.permeability import Permeability
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.host.patches import conditioning
from membrane.core.host.patches.stack import applied, apply_stack

STAR, HEART, MOON = "a red star on snow", "a blue heart on sand", "a green moon on stone"


@pytest.fixture
def seen(monkeypatch):
    """[(side, values)] of the gates of every conditioning that is prepared."""
    found = []

    def listen(stack, gates, run, side):
        found.append((side, run[side].flatten().tolist()))

    monkeypatch.setattr(conditioning, "LISTENERS", [*conditioning.LISTENERS, listen])
    return found


@pytest.fixture(scope="module")
def gated(demo, random_adapter):
    """A MODEL with an adapter that follows the prompt, the negative opening as the positive does."""
    return apply_stack(
        demo[0],
        ErasureStack((Entry(random_adapter(1, "star"), permeability=Permeability("facilitated transport")),)),
        demo[1],
    )


def test_a_conditioning_that_a_step_prepares(gated, node, text, sample, seen):
    """Perp-Neg prepares the empty prompt in each step, with the latents of the step as its noise."""
    model = node("PerpNeg", model=gated, empty_conditioning=text(""), neg_scale=1.0)[0]
    partial(sample, scheduler="simple")(model, STAR, HEART, steps=3)
    negatives = [values for side, values in seen if side == "negative"]
    assert len(negatives) == 4 and seen[0] == ("positive", pytest.approx([1.0]))
    assert all(values == pytest.approx([1.0]) for values in negatives)


def test_one_noise_for_two_samplings(gated, text, seen):
    """As in a script that keeps its noise: the second sampling knows nothing of the first one's prompt."""
    import comfy.sample
    import torch

    noise, latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 4, 8, 8)
    for prompt in (STAR, MOON):
        comfy.sample.sample(
            gated, noise, 2, 3.0, "euler", "simple", text(prompt)[0:1], text(HEART)[0:1], latent, disable_pbar=True,
            seed=1,
        )  # fmt: skip
    moon = applied(gated).opening(text(MOON)[0][0]).flatten().tolist()
    assert moon[0] < 0.5
    assert [side for side, _ in seen] == ["positive", "negative"] * 2
    assert seen[1][1] == pytest.approx([1.0]) and seen[2][1] == seen[3][1] == pytest.approx(moon)
