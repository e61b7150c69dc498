"""Training on every family that a host knows: tiny networks of the host's own classes, random weights."""

import comfy.model_management
import pytest
import torch
from membrane.core.erasers.spm import Settings
from membrane.core.errors import ErasureError
from membrane.core.host.compat import scheduled
from membrane.core.host.runs.training import (
    HostDenoiser,
    encoded_for,
    fitted,
    gradient_checked,
    is_unet,
    trainable_sites,
)
from membrane.core.text.captions import AUTOMATIC, templates_of
from membrane.tools.tiny import networks, words

STAR, HEART = "a red star", "a blue heart in the night"
FAMILIES = (
    "sdxl", "flux_dev", "flux_schnell", "flux2", "chroma", "longcat", "ovis", "qwen_image", "z_image", "lumina2",
    "newbie", "sd3", "sd35_medium", "wan21", "wan22_5b", "cosmos_predict2", "anima", "hunyuan_video", "hunyuan_image",
)  # fmt: skip
PIXELS = 64
METHODS = {"spm": "SPM", "esd": "ESD", "gem": "GEM", "projected gradient": "Projected gradient"}


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request):
    """(name, MODEL, CLIP) of a family."""
    try:
        return request.param, networks.build(request.param), networks.text_encoder(request.param)
    except networks.NotInThisHost as error:
        pytest.skip(str(error))


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def begun(model, clip, rank=2):
    """(HostDenoiser that is not entered, Settings, {prompt: Conditions})."""
    found = fitted(model, PIXELS, PIXELS, preserves=True)
    texts = encoded_for(model, clip, [STAR, HEART, ""], PIXELS, PIXELS)
    return HostDenoiser(model, trainable_sites(model), rank), Settings(rollout_steps=4, **found), texts


def opened(denoiser):
    """Gives the adapter something to do."""
    with torch.no_grad():
        for i, layer in enumerate(denoiser.layers.values()):
            layer.up.copy_(0.2 * numbers(i, *layer.up.shape))


def without_gradient(name):
    """Whether this host computes a part of a family's network in a way that has no gradient."""
    fused = getattr(getattr(comfy, "quant_ops", None), "ck", None)
    return name in ("cosmos_predict2", "anima") and hasattr(fused, "rms_rope_split_half")


def test_gradients_are_those_of_a_small_change(tiny):
    """Against central differences in the direction of the gradient of all factors at once."""
    name, model, clip = tiny
    denoiser, settings, texts = begun(model, clip)
    flag = getattr(comfy.model_management, "in_training", None)
    with torch.inference_mode(False), torch.enable_grad(), denoiser:
        opened(denoiser)
        x, goal = (numbers(seed, 2, *settings.channels, *settings.size) for seed in (1, 2))
        path = denoiser.path(settings.rollout_steps)
        if without_gradient(name):
            with pytest.raises(ErasureError, match="This ComfyUI has no gradient for the network of"):
                gradient_checked(denoiser, settings, texts[STAR])
            return
        assert gradient_checked(denoiser, settings, texts[STAR]) is None or path is not None
        t = torch.full((2,), 500) if path is None else torch.full((2,), path.told(2))

        def loss():
            return (denoiser.predict(x, t, [texts[STAR], texts[HEART]], True).double() - goal).square().mean()

        loss().backward()
        parameters = denoiser.parameters()
        gradients = [p.grad.clone() for p in parameters]
        norm = sum(g.square().sum() for g in gradients).sqrt().item()
        assert norm > 0
        values, step = [], 0.01
        with torch.no_grad():
            for sign in (1, -2):
                for p, g in zip(parameters, gradients):
                    p += sign * step * g / norm
                values.append(loss().item())
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(norm, rel=2e-3)
    assert getattr(comfy.model_management, "in_training", None) == flag


THIRD = 1 / 3  # of the sampling, where a U-Net's timestep is whole


def test_predictions_are_those_of_the_hosts_sampling(tiny):
    """Velocity, or noise, against what the host's own sampler makes of the same prompt in the same latents."""
    name, model, clip = tiny
    shape, ratio = networks.NETWORKS[name].latent, getattr(model.model.latent_format, "spacial_downscale_ratio", 8)
    texts = encoded_for(model, clip, [STAR], shape[-1] * ratio, shape[-2] * ratio)
    conditioning = [[*found] for found in clip_encoded(clip, STAR)]
    with torch.inference_mode():
        clean, _ = networks.predict(model, conditioning, conditioning, name, at=THIRD)
    sampling = model.model.model_sampling
    sigma = float(sampling.percent_to_sigma(THIRD))
    x = sigma * torch.randn(1, *shape, generator=torch.Generator().manual_seed(100))
    expected = (x - clean) / sigma
    with torch.inference_mode(False), torch.enable_grad(), HostDenoiser(model, trainable_sites(model)) as denoiser:
        if is_unet(model):
            scaled, t = x / (1 + sigma**2) ** 0.5, torch.tensor([666])
        else:
            scaled, t = x, torch.tensor([sigma])
        for on in (False, True):  # an adapter starts closed
            found = denoiser.predict(scaled, t, [texts[STAR]], on).detach()
            assert (found - expected).norm() < 1e-4 * expected.norm()


def clip_encoded(clip, text):
    return scheduled(clip, clip.tokenize(text))


def state_of(model):
    return {key: value.clone() for key, value in model.model.state_dict().items()}


@pytest.mark.parametrize("objective", ["spm", "esd", "gem", "projected gradient"])
def test_an_adapter_is_trained_and_acts(tiny, node, objective):
    name, model, clip = tiny
    comfy.model_management.load_models_gpu([model])  # takes off what another test has patched onto the weights
    before, named = state_of(model), {"concepts": "star" if objective == "esd" else "star -> heart"}
    named |= {} if objective == "spm" else {"templates": "{}"}
    run = dict(
        model=model, clip=clip, steps=2, learning_rate=0.05, width=PIXELS, height=PIXELS, warmup=0, rollout_steps=3,
        rank=3, filename_prefix=f"tiny_{name}", objective=objective, preview_every=0, **named,
    )  # fmt: skip
    if without_gradient(name):
        with pytest.raises(ErasureError, match="This ComfyUI has no gradient for the network of"):
            node("MembraneTrain", **run)
        return
    adapter, report = node("MembraneTrain", **run)
    assert "step 2 of 2" in report
    (kind,) = adapter.deltas
    assert kind == ("text_rows" if name in ("z_image", "lumina2", "newbie") else "low_rank")
    changes = adapter.deltas[kind]
    assert changes.keys() == trainable_sites(model).keys()
    assert all(change.rank == 3 and change.alpha == (3 if objective == "gem" else 1) for change in changes.values())
    assert any(change.up.abs().max() > 0 for change in changes.values())
    after = model.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert adapter.card.method == METHODS[objective]
    bare = objective != "spm" or is_unet(model)
    assert adapter.card.settings["templates"] == (["{}"] if bare else templates_of(AUTOMATIC))
    stack = node("MembraneStack", adapter=adapter, permeability="fixed")[0]
    changed = node("MembraneApply", model=model, clip=clip, stack=stack)[0]
    conditioning = clip_encoded(clip, STAR)
    with torch.inference_mode():
        plain, found = (networks.predict(m, conditioning, conditioning, name)[0] for m in (model, changed))
    assert not torch.equal(plain, found) and found.isfinite().all()


def test_a_clip_of_another_model_is_refused(tiny):
    name, model, _ = tiny
    clip = words.clip(40, networks.NETWORKS[name].extra)
    found = (
        "could not prepare the text" if name == "anima" else "gives vectors of width 40, but the model reads vectors"
    )
    with pytest.raises(ErasureError, match=found):
        encoded_for(model, clip, [STAR], PIXELS, PIXELS)


def test_a_fault_that_is_not_of_the_gradient_is_told_as_it_is(monkeypatch):
    try:
        model, clip = networks.build("flux_dev"), networks.text_encoder("flux_dev")
    except networks.NotInThisHost as error:
        pytest.skip(str(error))
    denoiser, settings, texts = begun(model, clip)

    def broken(*_, **options):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(HostDenoiser, "predict", broken)
    with torch.inference_mode(False), torch.enable_grad(), denoiser:
        with pytest.raises(RuntimeError, match="^shapes cannot be multiplied$"):
            gradient_checked(denoiser, settings, texts[STAR])


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_training_on_a_model_for_inpainting(name):
    """What such a network reads beside the latents is a picture that is masked as a whole; hosts of March 2024, which
    do not tell how to fill it, get one sentence."""
    try:
        model, clip = networks.build(name, in_channels=9), networks.text_encoder(name)
    except networks.NotInThisHost as error:
        pytest.skip(str(error))
    if not hasattr(model.model, "blank_inpaint_image_like"):
        with pytest.raises(ErasureError, match="reads more channels than its latents have"):
            trainable_sites(model)
        return
    denoiser, settings, texts = begun(model, clip)
    with torch.inference_mode(False), torch.enable_grad(), denoiser:
        x, t = numbers(1, 1, *settings.channels, *settings.size), torch.tensor([500])
        text = texts[STAR] if name == "sdxl" else texts[STAR].rows
        given = [text] if name == "sdxl" else text[None]
        before = denoiser.predict(x, t, given, on=False)
        opened(denoiser)
        found = denoiser.predict(x, t, given, on=True)
        found.square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in denoiser.parameters())
        assert not torch.allclose(found, before)
    beside = torch.cat([torch.ones_like(x[:, :1]), model.model.blank_inpaint_image_like(x)], dim=1)
    more = {"y": text.given["y"]} if name == "sdxl" else {}
    rows = text.given["c_crossattn"] if name == "sdxl" else given
    with torch.inference_mode():
        right = model.model.diffusion_model(
            torch.cat([x, beside], dim=1), t, context=rows, transformer_options={}, **more
        )
    assert torch.allclose(before, right, atol=1e-5)


def test_the_node_trains_and_shows_a_model_for_inpainting(node):
    model, clip = networks.build("sd15", in_channels=9), networks.text_encoder("sd15")
    asked = {"concepts": STAR, "surrogate": "", "steps": 2, "rollout_steps": 3, "preview_every": 1, "width": PIXELS,
             "height": PIXELS, "rank": 1, "filename_prefix": "inpainting"}  # fmt: skip
    if not hasattr(model.model, "blank_inpaint_image_like"):
        with pytest.raises(ErasureError, match="reads more channels than its latents have"):
            node("MembraneTrain", model=model, clip=clip, **asked)
        return
    found = node("MembraneTrain", model=model, clip=clip, **asked)
    assert len(found[0].low_rank) == len(trainable_sites(model))
