"""Training on every family that a host knows: tiny networks of the host's own classes, random weights."""

import comfy.model_management
import pytest
import torch
from membrane.core.erasers.spm import Settings
from membrane.core.errors import ErasureError
from membrane.core.host.runs.training import (
    HostDenoiser,
    encoded_for,
    fitted,
    gradient_checked,
    trainable_sites,
)
from membrane.tools.tiny import networks

STAR, HEART = "a red star", "a blue heart in the night"
FAMILIES = (
    "sdxl", "flux_dev", "flux_schnell", "flux2", "chroma", "longcat", "ovis", "qwen_image", "z_image", "lumina2",
    "newbie", "sd3", "sd35_medium", "wan21", "wan22_5b", "cosmos_predict2", "anima", "hunyuan_video", "hunyuan_image",
)  # fmt: skip
PIXELS = 64


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
