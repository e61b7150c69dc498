"""A concept kept out of what is sampled by looking at the pictures, on the demo model's U-Net."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from membrane.core.demo.world import latent_to_rgb, rgb_to_latent
from membrane.core.errors import ErasureError
from membrane.core.host.compat import guidance_of
from membrane.core.host.patches.guard import guard
from membrane.core.host.runs import guarding
from membrane.core.host.runs.gradients import searched_text
from membrane.core.host.runs.guarding import Examples, fitted_guard
from membrane.core.host.runs.sampling import Sampling, conditioning, sample, sample_latent
from membrane.core.measures.attack import Descent
from membrane.tools.pixel_world import classifier, world
from membrane.tools.tiny import networks

pytestmark = pytest.mark.usefixtures("inference")
SETTINGS = Sampling(6, 1.5, "euler", "normal", 128, 128)
STAR, CIRCLE = (world.SHAPES.index(name) for name in ("star", "circle"))
STARS, HEARTS = "a red star on snow", "a red heart on snow"
SEEDS = [100, 101]
LOOKED = (0.4, 0.6, 0.8)  # fewer noise levels than users get, to save time
GIVEN = {
    "concept": "star", "instead": "circle", "keep": "", "sensitivity": "strict", "drawn_from": "the first noise",
    "examples": 8, "seed": 0, "steps": 3, "cfg": 1.5, "sampler_name": "euler", "scheduler_name": "normal",
    "width": 128, "height": 128,
}  # fmt: skip


def rendered(demo, shapes, n, seed):
    """Pictures of some shapes as samples of a LATENT, (n, 4, 16, 16)."""
    rng = np.random.default_rng(seed)
    sprites = dataclasses.replace(world.sample_sprites(n, rng), shape=np.resize(shapes, n))
    pictures = torch.from_numpy(world.render(sprites, rng)).float().permute(0, 3, 1, 2)
    return demo[0].model.process_latent_out(rgb_to_latent(pictures))


@pytest.fixture(scope="module", autouse=True)
def few_levels():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guarding, "SHARES", LOOKED)
        yield


@pytest.fixture(scope="module")
def fitted(demo, few_levels):
    """A guard that knows stars, fitted on rendered pictures."""
    others = [i for i in range(len(world.SHAPES)) if i != STAR]
    with torch.inference_mode():
        examples = Examples(demo[0], demo[1], SETTINGS, 0)
        concept, rest = rendered(demo, [STAR], 24, 0), rendered(demo, others, 28, 1)
        return fitted_guard(examples, concept, rest, len(rest), 4.0)


@pytest.fixture(scope="module")
def guarded(demo, fitted):
    """guarded(instead, ...) -> the demo model with the guard."""

    def make(instead="circle", back=0.0, model=None, **changed):
        empty, other = conditioning(demo[1], ""), conditioning(demo[1], instead) if instead else None
        return guard(model or demo[0], dataclasses.replace(fitted, **changed), empty, other, back)

    return make


def guards(model):
    return model.model_options["sampler_post_cfg_function"]


def draw(model, demo, prompt, seeds=SEEDS, negative="", **changed):
    settings = dataclasses.replace(SETTINGS, **changed)
    return sample(model, conditioning(demo[1], prompt), conditioning(demo[1], negative), seeds, settings)


def shapes(demo, latents):
    pictures = latent_to_rgb(demo[0].model.process_latent_in(latents)).permute(0, 2, 3, 1).numpy()
    return classifier.read(classifier.load(), pictures)["shape"].tolist()


def test_a_picture_that_shows_the_concept_is_that_of_the_other_text_and_others_stay_bit_by_bit(demo, guarded):
    plain, model = draw(demo[0], demo, STARS), guarded()
    assert shapes(demo, plain) == [STAR] * 2
    found = draw(model, demo, STARS)
    assert torch.allclose(found, draw(demo[0], demo, "circle"), atol=1e-3)  # drawn from the same noise
    assert shapes(demo, found) == [CIRCLE] * 2
    assert torch.equal(draw(model, demo, HEARTS), draw(demo[0], demo, HEARTS))
    assert torch.equal(draw(demo[0], demo, STARS), plain)  # the model that came in


def test_each_picture_of_a_batch_is_looked_at_for_itself(demo, guarded):
    both = [conditioning(demo[1], prompt)[0] for prompt in (STARS, HEARTS)]
    options = {k: torch.cat([one[1][k] for one in both]) for k in both[0][1] if torch.is_tensor(both[0][1][k])}
    prompts = [[torch.cat([one[0] for one in both]), both[0][1] | options]]
    plain, found = (
        sample(model, prompts, conditioning(demo[1], ""), SEEDS, SETTINGS) for model in (demo[0], guarded())
    )
    assert shapes(demo, plain)[0] == STAR and shapes(demo, found)[0] == CIRCLE
    assert torch.equal(found[1], plain[1])


@pytest.mark.parametrize(
    "changed",
    [{"cfg": 1.0}, {"negative": "a heart"}, {"sampler": "euler_ancestral"}],
    ids=["no negative side", "a negative prompt", "ancestral"],
)  # fmt: skip
def test_it_holds_however_it_is_sampled(demo, guarded, changed):
    model = guarded()
    assert STAR in shapes(demo, draw(demo[0], demo, STARS, **changed))
    assert STAR not in shapes(demo, draw(model, demo, STARS, **changed))
    assert torch.equal(*(draw(one, demo, HEARTS, **changed) for one in (model, demo[0])))


def test_without_another_text_the_negative_side_is_drawn(demo, guarded):
    found = draw(guarded(instead=""), demo, STARS, negative="a heart")
    expected = sample(demo[0], conditioning(demo[1], "a heart"), conditioning(demo[1], ""), SEEDS,
                      dataclasses.replace(SETTINGS, cfg=1.0))  # fmt: skip
    assert torch.allclose(found, expected, atol=1e-3)


def test_a_fifth_of_the_way_keeps_what_was_drawn_by_then(demo, guarded):
    plain, whole, part = (draw(m, demo, STARS, steps=8) for m in (demo[0], guarded(), guarded(back=0.2)))
    assert STAR not in shapes(demo, part)
    assert ((part - plain).flatten(1).norm(dim=1) < (whole - plain).flatten(1).norm(dim=1)).all()


def test_behind_and_below_an_erasure(node, demo, guarded):
    """The erasure takes hearts away, the guard stars; and nothing of a guard outlives its sampling."""
    inputs = {"concepts": "heart -> square", "preserve": "star", "templates": "{}\na red {} on snow", "method": "UCE"}
    square = world.SHAPES.index("square")
    erased, adapter = node("MembraneErase", model=demo[0], clip=demo[1], **inputs)
    stack = node("MembraneStack", adapter=adapter)[0]
    below = node("MembraneApply", model=guarded(), clip=demo[1], stack=stack)[0]
    erased_and_guarded = guarded(model=erased)
    for model in (erased_and_guarded, below):
        assert shapes(demo, draw(model, demo, STARS)) == [CIRCLE] * 2
        assert shapes(demo, draw(model, demo, HEARTS)) == [square] * 2
        assert torch.equal(*(draw(one, demo, HEARTS) for one in (model, erased)))
    assert guards(erased_and_guarded)[0].sampling is None
    assert not any(len(module._forward_pre_hooks) for module in demo[0].model.diffusion_model.modules())


def test_a_picture_that_shows_it_from_the_start(demo, guarded):
    """Picture to picture: what is drawn anew begins where the sampling began, with the star in it."""
    latent = {"samples": rendered(demo, [STAR], 2, 5)}
    texts = [conditioning(demo[1], prompt) for prompt in (STARS, "")]
    plain, found = (sample_latent(m, *texts, SETTINGS, latent, 7, denoise=0.9) for m in (demo[0], guarded()))
    assert shapes(demo, plain) == [STAR] * 2 and not torch.equal(plain, found)


def test_the_guidance_is_told_from_the_predictions_where_the_host_does_not_say_it():
    cond, uncond = (torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for scale in (1.0, 1.5, 7.0):
        args = {"cond_denoised": cond, "uncond_denoised": uncond, "denoised": uncond + scale * (cond - uncond)}
        assert guidance_of(args) == pytest.approx(scale, rel=1e-4)
        assert guidance_of({**args, "cond_scale": 3}) == 3
        assert guidance_of({**args, "denoised": torch.cat([cond[:1] * 0.5, args["denoised"][1:]])}) is None
    assert guidance_of({"cond_denoised": cond, "uncond_denoised": uncond * 0, "denoised": cond}) == 1


def test_two_in_a_row(demo, guarded):
    """And what the second is fitted on is not what the first made of it."""
    both, latents = guarded(model=guarded()), rendered(demo, [STAR], 2, 3)
    assert len(guards(both)) == 2 and shapes(demo, draw(both, demo, STARS)) == [CIRCLE] * 2
    seen = [Examples(model, demo[1], SETTINGS, 0).seen(latents) for model in (both, demo[0])]
    assert all(torch.equal(seen[0][share], seen[1][share]) for share in LOOKED)


def test_a_network_whose_middle_does_not_run(demo, guarded):
    """As packs that keep its answer from step to step do it."""
    model = guarded()
    model.set_model_unet_function_wrapper(lambda apply_model, args: args["input"] * 0)
    with pytest.raises(ErasureError, match="The guard sees nothing, because another node passes the middle"):
        draw(model, demo, STARS)


def test_searches_by_gradient_go_through_it(demo, guarded):
    """Where the guard sees the concept, the text moves nothing; at noisier levels it does."""
    start, clean = conditioning(demo[1], "a heart"), rendered(demo, [STAR], 2, 0)
    found = searched_text(guarded(), start, clean, Descent(steps=1, batch=4), 0.1, seed=0)
    assert found[0][0].isfinite().all() and not torch.equal(found[0][0], start[0][0])


def test_the_node_on_a_few_examples(node, demo):
    given = {**GIVEN, "keep": "heart\nmoon", "latents": {"samples": rendered(demo, [STAR], 24, 0)}}
    model, report = node("MembraneGuard", model=demo[0], clip=demo[1], **given)
    assert re.match(r"Fitted on 24 pictures of star and 1[4-6] others; used at [123] of 3 noise levels\.\n", report)
    assert "It is kept in memory with this model" in report
    assert STAR not in shapes(demo, draw(model, demo, STARS))
    assert not torch.equal(draw(model, demo, STARS), draw(demo[0], demo, STARS))


def test_users_mistakes(node, demo):
    def fit(**changed):
        return node("MembraneGuard", **{"model": demo[0], "clip": demo[1], **GIVEN, **changed})

    few, blurs = rendered(demo, [STAR], 7, 0), draw(demo[0], demo, "a ring", list(range(12)), steps=1)
    for changed, message in (
        ({"concept": " "}, "No concept was given"),
        ({"instead": "Star"}, '"star" would be drawn in place of itself'),
        ({"keep": "heart\nstar"}, '"star" is both what must not be drawn and what must not fire'),
        ({"clip": None}, "CLIP input is empty"),
        ({"pictures": torch.zeros(8, 64, 64, 3)}, "without a VAE"),
        ({"latents": {"samples": torch.zeros(8, 16, 16, 16)}}, r"shape \(8, 16, 16, 16\), but .* 4 channels"),
        ({"latents": {"samples": torch.zeros(8, 4, 8, 8)}}, r"\(4, 8, 8\), but pictures of 128 x 128 have \(4, 16, 16"),
        ({"latents": {"samples": few}, "steps": 1}, "8 others at least, and there are 7 and 16"),
        ({"latents": {"samples": blurs}, "sensitivity": "careful", "steps": 1},
         r'cannot tell pictures of "star" from others: at no noise level more than \d+ of 12 stand out by 5'),
    ):  # fmt: skip
        with pytest.raises(ErasureError, match=message):
            fit(**changed)


def test_other_families_are_refused(node):
    try:
        model = networks.build("flux_dev")
    except networks.NotInThisHost as error:
        pytest.skip(str(error))
    with pytest.raises(ErasureError, match="A guard works on Stable Diffusion 1, 2 and XL type U-Nets only"):
        node("MembraneGuard", model=model, clip=networks.text_encoder("flux_dev"), **GIVEN)
