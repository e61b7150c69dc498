"""Soften a Memorised Prompt on a real host, on both demo models."""

import numpy as np
import pytest
import torch
from membrane.benchmarks.memorization_detection import copies
from membrane.benchmarks.memorization_mitigation import recognisable
from membrane.core.erasers.mitigation import Softening
from membrane.core.errors import ErasureError
from membrane.core.host.runs.batching import join
from membrane.core.host.runs.gradients import softened_text
from membrane.core.host.runs.sampling import Sampling, conditioning, denoised, preview_pictures, sample, seeded_noise
from membrane.core.host.runs.softening import Softener
from membrane.tools.pixel_world import world

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("inference")]
COPIED, ORDINARY = 0, "a red star on snow"
OTHERS = "a striped blue heart on sand\na green moon on coal\na pink cross on snow"
SMALL = {"cfg": 1.5, "width": 128, "height": 128, "seeds": 1}
SEEDS = [100, 101, 102]


@pytest.fixture
def soften(node, either):
    demo, scheduler = either

    def run(caption, **inputs):
        texts = {"positive": conditioning(demo[1], caption), "negative": conditioning(demo[1], "")}
        given = {"model": demo[0], "scheduler": scheduler, **texts, **SMALL, **inputs}
        return node("MembraneSoftenPrompt", **given), texts["positive"]

    return run


def shows_it(demo, scheduler, text):
    """(copies, recognisable ones) of the memorised picture among the pictures of a text."""
    settings = Sampling(12, 1.5, "euler", scheduler, 128, 128)
    latents = sample(demo[0], text, conditioning(demo[1], ""), SEEDS, settings)
    pictures, own = preview_pictures(demo[0], latents).numpy(), np.full(len(SEEDS), COPIED)
    return int(copies(pictures, own).sum()), int(recognisable(pictures, own).sum())


def test_a_memorised_prompt_no_longer_draws_its_picture(either, soften):
    """And the network is as before: weights, forwards, gradients, options."""
    (demo, scheduler), before = either, state(either[0][0])
    (found, report), plain = soften(world.MEMORISED_CAPTIONS[COPIED], clip=demo[1], ordinary_prompts=OTHERS)
    assert shows_it(demo, scheduler, plain) == (len(SEEDS), len(SEEDS))
    assert shows_it(demo, scheduler, found) == (0, 0)
    assert "was wanted." in report and "not reached" not in report
    assert found[0][1] is plain[0][1] and found[0][0].shape == plain[0][0].shape
    after = state(demo[0])
    assert after[1:] == before[1:] and all(torch.equal(after[0][key], before[0][key]) for key in before[0])


def state(model):
    network = model.model.diffusion_model
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    forwards = {name: m.__dict__.get("forward") for name, m in network.named_modules()}
    gradients = [name for name, p in network.named_parameters() if p.grad is not None]
    return weights, forwards, gradients, dict(model.model_options), dict(model.object_patches)


def test_an_ordinary_prompt_is_left_bit_by_bit(either, soften):
    demo, _ = either
    (found, report), plain = soften(ORDINARY, clip=demo[1], ordinary_prompts=f"{OTHERS}\n{ORDINARY}")
    assert found is plain and report.startswith("Left exactly as it is")
    (found, _), plain = soften(ORDINARY, share=1.0)
    assert found is plain


def test_the_gradient_is_that_of_finite_differences(either):
    """The first step of Adam goes against the sign of each number's gradient; the steepest of some by differences."""
    demo, scheduler = either
    model, settings = demo[0], Sampling(10, 1.5, "euler", scheduler, 128, 128)
    text, empty = (conditioning(demo[1], caption) for caption in (world.MEMORISED_CAPTIONS[COPIED], ""))
    sigma = torch.tensor([float(model.model.model_sampling.percent_to_sigma(0.4))])
    points = [(seeded_noise(model, [0], settings)[1] * sigma, sigma)]
    plain = denoised(model, empty, points)
    found = softened_text(model, text, points, plain, Softening(target=0.0, steps=1, rate=1e-3))[0]
    (vectors, options), moved = text[0], found[0][0] - text[0][0]

    def slope(place):
        shift = torch.zeros_like(vectors)
        shift[place] = 0.05
        high, low = (
            denoised(model, [[vectors + sign * shift, options]], points)[0].double() - plain[0].double()
            for sign in (1, -1)
        )
        return float(high.norm() - low.norm())

    places = [(0, row, column) for row in (1, 2, 3) for column in range(0, vectors.shape[-1], vectors.shape[-1] // 8)]
    steepest = sorted(((slope(place), place) for place in places), key=lambda found: -abs(found[0]))[:8]
    assert all(value * float(moved[place]) < 0 for value, place in steepest)


def test_each_text_of_a_conditioning_is_softened_and_the_rest_stays(either):
    demo, scheduler = either
    settings = Sampling(10, 1.5, "euler", scheduler, 128, 128)
    softener = Softener(demo[0], conditioning(demo[1], ""), [0], settings, 2)
    one, two = (conditioning(demo[1], caption)[0] for caption in (world.MEMORISED_CAPTIONS[COPIED], ORDINARY))
    both = [[one[0], {**one[1], "start_percent": 0.5}], join([[two], [one]])[0]]
    done = []
    found, rows = softener.soften(both, Softening(share=0.9, steps=2), done.append)
    assert all(options.keys() == given.keys() for (_, options), (_, given) in zip(found, both))
    assert [len(vectors) for vectors, _ in found] == [1, 2] and len(rows) == 3
    assert found[0][1]["start_percent"] == 0.5 and all(row.after < row.before for row in rows)
    assert done == sorted(done) and done[-1] <= 6


def test_users_mistakes(soften):
    with pytest.raises(ErasureError, match="The positive conditioning is empty"):
        soften(ORDINARY, positive=[])
    with pytest.raises(ErasureError, match="without a CLIP; connect the text encoder"):
        soften(ORDINARY, ordinary_prompts=OTHERS)
