"""Mitigations while sampling, against samplers and attention written naively in the test."""

import logging

import comfy.conds
import comfy.sample
import comfy.samplers
import pytest
import torch
from membrane.core.erasers.mitigation import LEAVE, PADDING, START
from membrane.core.errors import ErasureError
from membrane.core.host.patches.guard import watched
from membrane.core.host.patches.mitigation import GuidanceSwitch
from membrane.core.host.runs.gradients import searched_text
from membrane.core.host.runs.sampling import Sampling, conditioning, denoised, sample, seeded_noise
from membrane.core.measures.attack import Descent

pytestmark = pytest.mark.usefixtures("inference")
MEMORISED, PLAIN = "portrait of captain bolt", "a red star on snow"
SEEDS, CFG = [3, 4, 5], 2.0


@pytest.fixture
def mitigated(node, demo):
    return lambda **inputs: node("MembraneMitigateMemorization", **{"model": demo[0], **inputs})[0]


def settings(sampler="euler", steps=8, cfg=CFG):
    return Sampling(steps, cfg, sampler, "normal", 128, 128)


def prompts(demo, text=MEMORISED):
    return conditioning(demo[1], text), conditioning(demo[1], "")


def naive(demo, texts, chosen, sampler, scale, until):
    """Latents of Euler's or Heun's method on the plain model, each picture guided for itself."""
    model = demo[0]
    empty, noise = seeded_noise(model, SEEDS, chosen)
    sampling = model.model.model_sampling
    sigmas = comfy.samplers.KSampler(
        model if hasattr(comfy.samplers, "calc_cond_batch") else model.model, chosen.steps, "cpu", sampler, "normal",
        model_options=model.model_options,
    ).sigmas.double()  # fmt: skip
    pictures, opened = [], []
    for row in range(len(SEEDS)):
        x = noise[row : row + 1].double() * (1 + sigmas[0] ** 2).sqrt()
        seen, is_open = [], False

        def guided(x, sigma, seen=seen):
            nonlocal is_open
            on, off = (denoised(model, text, [(x.float(), sigma.float()[None])])[0].double() for text in texts)
            if until is None:
                length = float((on - off).norm() / sigma)
                if seen and abs(seen[-1][0] - sigma) < 1e-6:
                    seen[-1] = (float(sigma), length)
                else:
                    seen.append((float(sigma), length))
                is_open = is_open or (len(seen) > 1 and seen[-1][1] > seen[-2][1])
                waits = not is_open
            else:
                waits = sigma > sampling.percent_to_sigma(until)
            return off + (scale if waits else chosen.cfg) * (on - off)

        for i in range(chosen.steps):
            s, after = sigmas[i], sigmas[i + 1]
            d = (x - guided(x, s)) / s
            other = x + d * (after - s)
            if sampler == "heun" and after > 0:
                d = (d + (other - guided(other, after)) / after) / 2
                other = x + d * (after - s)
            x = other
        pictures.append(model.model.process_latent_out(x).float())
        opened.append(is_open)
    return torch.cat(pictures), opened


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, sampler, scale, until, inputs",
    [
        ("delayed guidance", "euler", 0.0, 0.5, {}),
        ("delayed guidance", "heun", -1.0, 0.3, {"scale_before": -1.0, "until": 0.3}),
        ("opposite guidance", "euler", -2.0, 0.35, {}),
        ("dynamic guidance", "euler", 1.0, None, {}),
        ("dynamic guidance", "heun", 1.0, None, {}),
    ],
)
def test_guidance_is_that_of_a_naive_sampler(demo, mitigated, method, sampler, scale, until, inputs):
    texts, chosen = prompts(demo), settings(sampler, 6 if sampler == "heun" else 8)
    expected, opened = naive(demo, texts, chosen, sampler, scale, until)
    model = mitigated(method=method, **inputs)
    for _ in range(2):  # a second run starts anew
        found = sample(model, *texts, SEEDS, chosen)
        assert torch.allclose(found, expected, atol=2e-3), (found - expected).abs().max()
    plain = sample(demo[0], *texts, SEEDS, chosen)
    assert not torch.allclose(plain, expected, atol=0.05)
    alone = torch.cat([sample(model, *texts, [seed], chosen) for seed in SEEDS])
    assert torch.allclose(alone, expected, atol=2e-3)  # each picture for itself
    if until is None:
        assert any(opened)


@pytest.mark.parametrize("name", ["c_crossattn", "clip_text"])  # the second is Stable Cascade's
def test_guidance_finds_its_transition_whatever_a_model_calls_its_text(name):
    """The first length of the pull waits, a larger one ends that, and another sampling waits again."""

    def step(size, sigma, text):
        sides = {"cond_denoised": torch.full((1, 4, 2, 2), size), "uncond_denoised": torch.zeros(1, 4, 2, 2)}
        usual = 3 * sides["cond_denoised"]
        return switch({
            **sides, "denoised": usual, "uncond": [{}], "cond": [{"model_conds": {name: text}}], "model": None,
            "sigma": torch.tensor([sigma]),
        }), usual  # fmt: skip

    switch = GuidanceSwitch(0.0, None, 1.0)
    first, second = (comfy.conds.CONDRegular(torch.zeros(1)) for _ in range(2))
    steps = [step(1.0, 4.0, first), step(4.0, 2.0, first), step(4.0, 1.0, first), step(1.0, 4.0, second)]
    assert [torch.equal(found, usual) for found, usual in steps] == [False, True, True, False]


def test_neutral_settings_are_no_node(demo, mitigated):
    for method in ("dynamic guidance", "delayed guidance", "opposite guidance", "token re-weighting"):
        assert mitigated(method=method, strength=0.0) is demo[0]
    assert mitigated(method="delayed guidance", until=0.0) is demo[0]
    with pytest.raises(ErasureError, match='no method "magic"'):
        mitigated(method="magic")


def test_the_model_that_came_in_stays_and_others_functions_run(demo, mitigated):
    texts, chosen = prompts(demo), settings(steps=4)
    before = sample(demo[0], *texts, SEEDS, chosen)
    seen, other = [], demo[0].clone()
    other.set_model_sampler_post_cfg_function(lambda args: seen.append("before") or args["denoised"])
    model = mitigated(model=other, method="delayed guidance")
    model.set_model_sampler_post_cfg_function(lambda args: seen.append("after") or args["denoised"] * 0)
    assert sample(model, *texts, SEEDS, chosen).abs().max() < 1e-3 and seen == ["before", "after"] * 4
    for method in ("delayed guidance", "token re-weighting"):
        sample(mitigated(method=method), *texts, SEEDS, chosen)
        assert torch.equal(sample(demo[0], *texts, SEEDS, chosen), before)
    half = sample(mitigated(method="delayed guidance", strength=0.5), *texts, SEEDS, settings(steps=1))
    whole, none = (sample(m, *texts, SEEDS, settings(steps=1)) for m in (mitigated(method="delayed guidance"), demo[0]))
    assert torch.allclose(half, (whole + none) / 2, atol=1e-4)


# ---------------------------------------------------------------- token re-weighting


@pytest.fixture
def reference(demo):
    """The plain model with naive attention on every row, for a text whose first end token is known."""

    def make(end, factor):
        model = demo[0].clone()

        def replaced(q, k, v, options):
            code = [START] + [LEAVE] * end + [PADDING] * (76 - end)
            k = k.clone()
            k[:, 0] *= factor
            heads = options["n_heads"]
            q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2).double() for y in (q, k, v))
            logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            logits[..., torch.tensor(code) == PADDING] = -torch.inf
            return (logits.softmax(dim=-1) @ v).float().transpose(1, 2).flatten(2)

        for name, count in (("input", 12), ("middle", 1), ("output", 12)):
            for number in range(count):
                model.set_model_attn2_replace(replaced, name, number)
        return model

    return make


def test_tokens_are_reweighted_for_the_positive_prompt_only(demo, mitigated, reference):
    chosen = settings(steps=1, cfg=3.0)
    model = mitigated(method="token re-weighting", start_token=1.5)
    noise = seeded_noise(demo[0], SEEDS, chosen)[1]
    sigma = torch.full((len(SEEDS),), 5.0)
    positive, negative = prompts(demo)
    found = denoised(model, positive, [(noise * 5, sigma)])[0]
    expected = denoised(reference(5, 1.5), positive, [(noise * 5, sigma)])[0]  # start, 4 words, end
    assert torch.allclose(found, expected, atol=1e-4)
    plain = denoised(demo[0], positive, [(noise * 5, sigma)])[0]
    assert not torch.allclose(found, plain, atol=1e-2)

    sides = {}

    def listen(args):
        sides.update(on=args["cond_denoised"], off=args["uncond_denoised"])
        return args["denoised"]

    for name, which in (("ours", model), ("plain", demo[0]), ("reference", reference(5, 1.5))):
        listening = which.clone()
        listening.set_model_sampler_post_cfg_function(listen)
        sample(listening, positive, negative, SEEDS, chosen)
        sides[name] = dict(sides)
    assert torch.allclose(sides["ours"]["on"], sides["reference"]["on"], atol=1e-4)
    assert torch.allclose(sides["ours"]["off"], sides["plain"]["off"], atol=1e-4)


def test_long_prompts_and_unknown_texts(demo, mitigated, caplog):
    model = mitigated(method="token re-weighting")
    chosen = settings(steps=2)
    long = conditioning(demo[1], "a red star on snow, " * 20)
    assert long[0][0].shape[1] > 77
    sample(model, long, conditioning(demo[1], ""), SEEDS, chosen)
    assert not caplog.records or "tokens are not known" not in caplog.text
    vectors, options = prompts(demo)[0][0]
    averaged = [[vectors * 0.5 + prompts(demo, PLAIN)[0][0][0] * 0.5, options]]
    with caplog.at_level(logging.WARNING):
        found = sample(model, averaged, prompts(demo)[1], SEEDS, chosen)
    assert "tokens are not known" in caplog.text
    assert torch.allclose(found, sample(demo[0], averaged, prompts(demo)[1], SEEDS, chosen), atol=1e-3)


@pytest.mark.parametrize("gated", [False, True])
def test_it_works_with_an_erasure_before_and_after(node, demo, mitigated, gated):
    adapter = node("MembraneErase", model=demo[0], clip=demo[1], concepts="star -> circle", preserve="heart\nmoon")[1]
    permeability = "facilitated transport" if gated else "fixed"
    stack = node("MembraneStack", adapter=adapter, permeability=permeability, end_percent=0.9 if gated else 1.0)[0]

    def erase(model):
        return node("MembraneApply", model=model, clip=demo[1], stack=stack)[0]

    texts, chosen = prompts(demo, PLAIN), settings(steps=3)
    first = sample(mitigated(model=erase(demo[0]), method="token re-weighting"), *texts, SEEDS, chosen)
    second = sample(erase(mitigated(method="token re-weighting")), *texts, SEEDS, chosen)
    assert torch.allclose(first, second, atol=1e-4)
    for other in (erase(demo[0]), mitigated(method="token re-weighting"), demo[0]):
        assert not torch.allclose(first, sample(other, *texts, SEEDS, chosen), atol=1e-2)


def test_a_taken_place_is_refused(demo, mitigated):
    other = demo[0].clone()
    other.set_model_attn2_replace(lambda q, k, v, options: q, "input", 3)
    with pytest.raises(ErasureError, match="Another node already replaces the model's cross-attention"):
        mitigated(model=other, method="token re-weighting")
    again = mitigated(method="token re-weighting")
    with pytest.raises(ErasureError, match="Reweighted in"):
        mitigated(model=again, method="token re-weighting")


@pytest.mark.parametrize("method", ["token re-weighting", "opposite guidance"])
def test_searches_by_gradient_go_through_a_mitigation(demo, mitigated, method):
    """And not past it: the search ends elsewhere than on the model without it."""
    start, empty = prompts(demo)
    clean = sample(demo[0], start, empty, SEEDS[:1], settings(steps=2))
    changed = mitigated(method=method)
    plain, found, below = (
        searched_text(model, start, clean, Descent(1, 0.1, 2), 0.1, seed=0)[0][0]
        for model in (demo[0], changed, watched(changed)[0])
    )
    assert all(vectors.isfinite().all() and not torch.equal(vectors, start[0][0]) for vectors in (plain, found))
    assert method != "token re-weighting" or not torch.equal(plain, found)
    assert torch.equal(found, below)  # another patch stands above its own
