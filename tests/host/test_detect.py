"""Detect Memorization on a real host: scores against a naive sampler, batches, calibration, words, bright endings."""

import json
import os

import comfy.model_management
import comfy.samplers
import folder_paths
import pytest
import torch
from membrane.core.errors import ErasureError
from membrane.core.host.model.layers import modules
from membrane.core.host.runs.attention import EndAttention
from membrane.core.host.runs.gradients import token_influence
from membrane.core.host.runs.sampling import Sampling, conditioning, denoised, seeded_noise
from membrane.core.host.runs.steps import encoded, guided_steps, measure

pytestmark = pytest.mark.slow
MEMORISED, PLAIN = "portrait of captain bolt", "a red star on snow"
BENIGN = "\n".join(f"a {c} {s} on sand" for c in ("red", "blue", "green", "pink") for s in (
    "circle", "square", "heart", "moon", "ring"))  # fmt: skip
SMALL = {"steps": 10, "first_steps": 2, "seeds": 2, "cfg": 1.5, "width": 128, "height": 128, "attribution": False}


@pytest.fixture
def detect(node, demo):
    def run(prompts=f"{MEMORISED}\n{PLAIN}", **inputs):
        inputs = {"model": demo[0], "clip": demo[1], "prompts": prompts, **SMALL, **inputs}
        return node("MembraneDetectMemorization", **inputs)

    return run


@pytest.fixture
def folder():
    """The folder of the calibrations, empty before and after."""
    path = os.path.join(folder_paths.get_folder_paths("erasure_adapters")[0], "calibration")

    def clear():
        for name in os.listdir(path) if os.path.isdir(path) else ():
            os.remove(os.path.join(path, name))

    clear()
    yield path
    clear()


def scores(found):
    return [row["score"] for row in json.loads(found[4])["prompts"]]


def settings(steps=10, cfg=1.5, sampler="euler"):
    return Sampling(steps, cfg, sampler, "normal", 128, 128)


def test_scores_are_those_of_a_naive_sampler(demo, detect):
    """Euler's method by hand, the predicted noise from each denoised tensor by its definition."""
    rows = json.loads(detect()[4])["prompts"]
    with torch.inference_mode():
        model, chosen = demo[0], settings()
        sigmas = comfy.samplers.KSampler(
            model if hasattr(comfy.samplers, "calc_cond_batch") else model.model, 10, "cpu", "euler", "normal",
            model_options=model.model_options,
        ).sigmas.double()  # fmt: skip
        for row in rows:
            texts = [conditioning(demo[1], t) for t in (row["prompt"], "")]
            lengths = []
            for seed in (0, 1):
                x = seeded_noise(model, [seed], chosen)[1].double() * (1 + sigmas[0] ** 2).sqrt()
                for i in range(2):
                    point = [(x.float(), sigmas[i : i + 1].float())]
                    on, off = ((x - denoised(model, t, point)[0].double()) / sigmas[i] for t in texts)
                    lengths.append(float((on - off).norm()) * (16384 / (4 * 16 * 16)) ** 0.5)
                    x = x + (off + 1.5 * (on - off)) * (sigmas[i + 1] - sigmas[i])
            assert row["score"] == pytest.approx(sum(lengths) / 4, rel=1e-3)
            assert row["by_seed"] == pytest.approx([sum(lengths[:2]) / 2, sum(lengths[2:]) / 2], rel=1e-3)
            assert row["curve"] == pytest.approx(
                [(lengths[0] + lengths[2]) / 2, (lengths[1] + lengths[3]) / 2], rel=1e-3
            )


def test_the_first_step_does_not_depend_on_the_guidance_and_the_empty_prompt_scores_0(demo, detect):
    one = [scores(detect(first_steps=1, cfg=cfg)) for cfg in (1.0, 1.5, 7.0)]
    assert one[1] == pytest.approx(one[0], rel=1e-4) and one[2] == pytest.approx(one[0], rel=1e-4)
    two = [scores(detect(cfg=cfg)) for cfg in (1.0, 7.0)]
    assert two[0] != pytest.approx(two[1], rel=1e-3)
    with torch.inference_mode():
        texts = [encoded(demo[1], t) for t in ("", PLAIN)]
        found = measure(demo[0], texts, texts[0], [0, 1], settings(), 2)
    assert found.traces[0].score < 1e-4 < found.traces[1].score


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde"])
def test_a_score_depends_on_nothing_else_in_the_batch(detect, sampler):
    prompts = [MEMORISED, PLAIN, "a red star on snow, " * 20]
    inputs = {"sampler_name": sampler, "first_steps": 3}
    together = [json.loads(detect("\n".join(prompts), batch_size=n, **inputs)[4])["prompts"] for n in (1, 4, 64)]
    alone = [json.loads(detect(prompt, **inputs)[4])["prompts"][0] for prompt in prompts]
    for rows in together:
        for row, expected in zip(rows, alone):
            assert row["by_seed"] == pytest.approx(expected["by_seed"], rel=1e-4)
            assert len(row["curve"]) == 3
    shifted = json.loads(detect(seed=1, **inputs)[4])["prompts"][0]
    assert shifted["by_seed"][0] == pytest.approx(alone[0]["by_seed"][1], rel=1e-4)


def test_the_model_stays_as_it_is(demo, detect):
    before = dict(demo[0].model_options), dict(demo[0].object_patches)
    forwards = {k: m.__dict__.get("forward") for k, m in modules(demo[0]).items()}
    detect(bright_ending=True, attribution=True)
    assert (dict(demo[0].model_options), dict(demo[0].object_patches)) == before
    assert {k: m.__dict__.get("forward") for k, m in modules(demo[0]).items()} == forwards
    assert not any(m._forward_hooks for m in demo[0].model.diffusion_model.modules())


def test_calibration_is_kept_and_found_again(node, demo, detect, folder):
    without = detect()
    assert "No verdict, only a ranking" in without[0] and without[3] == ""
    assert detect("", benign_prompts=BENIGN)[0].startswith("Calibration: 20 prompts")
    (name,) = os.listdir(folder)
    with open(os.path.join(folder, name), encoding="utf-8") as file:
        kept = json.load(file)
    assert kept["scores"] == pytest.approx(scores(detect(BENIGN)), rel=1e-4)
    found = detect()
    assert f"calibration/{name}" in found[0]
    data = json.loads(found[4])
    for row in data["prompts"]:
        assert row["memorised"] == (row["score"] > kept["p99"])
        assert row["z"] == pytest.approx((row["score"] - kept["mean"]) / kept["std"], rel=1e-4)
    assert found[3].splitlines() == [row["prompt"] for row in data["prompts"] if row["memorised"]]
    assert "No verdict" in detect(cfg=2.0)[0] and "No verdict" in detect(seeds=1)[0]  # other settings
    detect("", benign_prompts=BENIGN + "\na plain pink cross on coal")
    assert os.listdir(folder) == [name] and "21 prompts" in detect()[0]


def test_other_weights_need_their_own_calibration(node, demo, detect, folder):
    detect("", benign_prompts=BENIGN)
    key = next(k for k in modules(demo[0]) if k.endswith("attn2.to_v.weight"))
    patched, weight = demo[0].clone(), modules(demo[0])[key].weight
    patched.add_patches(
        {key: ("diff", (0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)),))}, 1.0
    )
    assert "No verdict" in detect(model=patched)[0]
    erased = node("MembraneErase", model=demo[0], clip=demo[1], concepts="star -> circle\nbolt ->")[0]
    assert "No verdict" in detect(model=erased)[0]
    assert "No verdict" in detect(model=node("MembraneDemoModel", variant="night")[0])[0]
    assert "No verdict" not in detect(model=demo[0].clone())[0]
    assert "No verdict" not in detect(model=node("MembraneDemoModel", variant="day")[0])[0]


def test_a_damaged_calibration_is_a_sentence_until_there_is_another(detect, folder):
    detect("", benign_prompts=BENIGN)
    (name,) = os.listdir(folder)
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        file.write("{")
    with pytest.raises(ErasureError, match="is damaged .* calibrate again"):
        detect()
    assert "20 prompts" in detect(benign_prompts=BENIGN)[0] and "20 prompts" in detect()[0]


def test_bright_ending_is_the_attention_to_the_first_end_token(demo, detect):
    """Against attention probabilities computed from the layers' inputs at the last step."""
    found = detect(bright_ending=True, seeds=1, first_steps=1, steps=4)
    assert found[2].shape == (2, 128, 128) and found[2].min() == 0 and found[2].max() == 1
    assert all(row["bright_ending"] > 0 for row in json.loads(found[4])["prompts"])
    assert detect()[2].shape == (1, 128, 128) and not detect()[2].any()
    with torch.inference_mode():
        text, empty = encoded(demo[1], MEMORISED), encoded(demo[1], "")
        assert text.end == 5 and text.pieces == tuple((word, True) for word in MEMORISED.split())
        listening = EndAttention(demo[0])
        inputs, network = {}, demo[0].model.diffusion_model
        blocks = [n for n, m in network.named_modules() if n.startswith("input_blocks") and n.endswith("attn2")][:2]
        hooks = [
            network.get_submodule(n).register_forward_pre_hook(
                lambda m, a, k, n=n: inputs.update({n: (a[0], k["context"])}), with_kwargs=True
            )
            for n in blocks
        ]
        with listening:
            guided_steps(listening.model, text.conditioning, empty.conditioning, [3, 4], settings(4), 4, lambda s: None)
            maps = listening.maps([text.end] * 2, (16, 16))
        positive = listening.order.index(0)
        means = []
        for name in blocks:
            attention = network.get_submodule(name)
            x, context = (part.chunk(2)[positive].double() for part in inputs[name])
            for row in range(2):
                rows = []
                q, k = x[row] @ attention.to_q.weight.double().T, context[row] @ attention.to_k.weight.double().T
                width = q.shape[-1] // attention.heads
                for h in range(attention.heads):
                    part = slice(h * width, (h + 1) * width)
                    rows.append(torch.softmax(q[:, part] @ k[:, part].T / width**0.5, dim=-1)[:, 5])
                side = int(len(rows[0]) ** 0.5)
                plane = torch.stack(rows).mean(dim=0).view(1, 1, side, side)
                means.append(torch.nn.functional.interpolate(plane, (16, 16), mode="bilinear")[0, 0])
        for hook in hooks:
            hook.remove()
    for row in range(2):
        assert torch.allclose(maps[row].double(), (means[row] + means[2 + row]) / 2, atol=1e-5)


@pytest.mark.parametrize("erasure", ["none", "text", "gated layers"])
def test_influence_of_words_is_the_gradient(node, demo, erasure):
    """Against finite differences along random directions of single tokens, through the host's own path."""
    model = demo[0]
    if erasure != "none":
        adapter = node("MembraneErase", model=model, clip=demo[1], concepts="captain -> star", preserve="heart")[1]
        if erasure == "gated layers":
            adapter = low_rank(model)
        permeability = "fixed" if erasure == "text" else "facilitated transport"
        stack = node("MembraneStack", adapter=adapter, permeability=permeability)[0]
        model = node("MembraneApply", model=model, clip=demo[1], stack=stack)[0]
    with torch.inference_mode():
        text, empty = encoded(demo[1], MEMORISED), encoded(demo[1], "")
        norms = token_influence(model, text, empty, [0], settings(), 1)
        assert norms.shape == (4,)
        plain = token_influence(demo[0], text, empty, [0], settings(), 1)
        if erasure != "none":
            assert not torch.allclose(norms, plain, rtol=0.02)
        again = token_influence(demo[0], text, empty, [0], settings(), 1)
        assert torch.allclose(plain, again)
        if erasure == "none":
            assert norms.tolist() == pytest.approx(finite_differences(model, text, empty), rel=0.02)


def low_rank(model):
    from membrane.core.adapters.adapter import Card, ErasureAdapter
    from membrane.core.adapters.deltas.low_rank import LowRank
    from membrane.core.families.sites import site

    g = torch.Generator().manual_seed(0)
    changes = {}
    for key, module in modules(model).items():
        if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            up, down = (torch.randn(n, generator=g) / 6 for n in ((module.out_features, 1), (1, module.in_features)))
            changes[site(key)] = LowRank(up, down, 1.0)
    return ErasureAdapter(Card("SPM", ("captain",)), {"low_rank": changes})


def finite_differences(model, text, empty):
    """Gradient lengths of ||text part|| at the first step for the tokens 1 to 4, one coordinate at a time."""
    noise = seeded_noise(model, [0], settings())[1]
    sigma = torch.tensor([float(model.model.model_sampling.sigma_max)])
    point = [(noise * (1 + sigma**2).sqrt(), sigma)]
    off = denoised(model, empty.conditioning, point)[0].double()
    vectors, options = text.conditioning[0]
    width, step, found = vectors.shape[-1], 0.02, []
    for token in range(1, 5):
        rows = vectors.repeat(2 * width, 1, 1)
        moves = step * torch.eye(width)
        rows[:, token] += torch.cat([moves, -moves])
        lengths = []
        for chunk in rows.split(64):
            many = [(point[0][0].repeat(len(chunk), 1, 1, 1), sigma.repeat(len(chunk)))]
            on = denoised(model, [[chunk, {"pooled_output": None}]], many)[0].double()
            lengths.append(((off - on) / float(sigma)).flatten(1).norm(dim=1) * (16384 / 1024) ** 0.5)
        high, low = torch.cat(lengths).chunk(2)
        found.append(float(((high - low) / (2 * step)).norm()))
    return found


def test_words_stand_in_the_report(detect):
    found = detect(attribution=True, seeds=1)
    assert found[0].count("depends most on:") == 2
    words = json.loads(found[4])["prompts"][0]["words"]
    assert {w["word"] for w in words} == set(MEMORISED.split())
    assert [w["influence"] for w in words] == sorted((w["influence"] for w in words), reverse=True)


def test_it_works_on_erased_and_mitigated_models(node, demo, detect):
    plain = scores(detect(first_steps=4))
    erased = node("MembraneErase", model=demo[0], clip=demo[1], concepts="portrait ->\ncaptain ->\nbolt ->\nof ->")[0]
    gone = scores(detect(model=erased, first_steps=4))
    assert gone[0] < 0.5 * plain[0]
    for method in ("dynamic guidance", "token re-weighting"):
        mitigated = node("MembraneMitigateMemorization", model=demo[0], method=method)[0]
        assert scores(detect(model=mitigated, first_steps=4)) != pytest.approx(plain, rel=1e-3)


def test_mistakes_and_cancel(node, demo, detect, monkeypatch):
    with pytest.raises(ErasureError, match="No prompt to test was given"):
        detect(" \n")
    with pytest.raises(ErasureError, match="at least 20 different benign prompts.*there are 2"):
        detect(benign_prompts="a\nb")
    with pytest.raises(ErasureError, match="first_steps is 20, but the schedule has only 10"):
        detect(first_steps=20)
    with pytest.raises(ErasureError, match="CLIP input is empty"):
        detect(clip=None)
    monkeypatch.setattr(demo[1], "encode_from_tokens", lambda *a, **k: (torch.zeros(1, 77, 64), None))
    monkeypatch.delattr(type(demo[1]), "encode_from_tokens_scheduled", raising=False)
    with pytest.raises(ErasureError, match="vectors of width 64, but the model reads vectors of width 128"):
        detect()
    monkeypatch.undo()
    calls = []

    def stop():
        calls.append(None)
        if len(calls) > 6:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        detect(bright_ending=True)
    assert not any(m._forward_hooks for m in demo[0].model.diffusion_model.modules())
