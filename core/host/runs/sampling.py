"""Runs the host's own sampler inside a node, and asks models at points of a trajectory.

Everything that acts on a MODEL acts here as in KSampler, because it is the host's sampler that runs: every sampling of
the pack goes through run(), every question at given noise levels through ask_at().
"""

from dataclasses import dataclass
from functools import partial

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch

from ...errors import ErasureError
from ..compat import channels_and_ratio, fitted_latents, scheduled
from ..model.layers import family

SAMPLERS, SCHEDULERS = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS
PROBED_AT = 0.4  # part of the schedule at which models are asked for the numbers they are known again by


@dataclass(frozen=True)
class Sampling:
    """How to sample: as KSampler's widgets, and the size in pixels."""

    steps: int = 20
    cfg: float = 7.0
    sampler: str = "euler"
    scheduler: str = "normal"
    width: int = 512
    height: int = 512


@dataclass(frozen=True)
class Listeners:
    """What run() calls on the way.

    prediction(args): the host's arguments of a post-CFG function, each time that the network was asked: "input" (B, C,
    h, w), "sigma" (B,), "denoised", "cond_denoised", "uncond_denoised". both: the last two are made whatever the
    guidance is; otherwise a guidance of 1 leaves the negative side out. step(number, denoised, x, total): the host's
    callback after each step.
    """

    prediction: object = None
    both: bool = False
    step: object = None


def conditioning(clip, text):
    """A CONDITIONING of a text, as CLIPTextEncode makes it."""
    return scheduled(clip, clip.tokenize(text))


def seeded_noise(model, seeds, settings):
    """(empty latents, noise), each (seeds, C, h, w) on the CPU; every picture's noise comes from its own seed alone."""
    channels, ratio = channels_and_ratio(model.model.latent_format)
    size = [x // ratio for x in (settings.height, settings.width)]
    empty = fitted_latents(model, torch.zeros(len(seeds), channels, *size))
    if getattr(empty, "is_nested", False):
        raise ErasureError(
            f"{family(model).title} makes its pictures together with their sound, which nodes that paint for "
            "themselves do not; apply the erasure (Apply Erasure) and compare what the host's own sampler gives."
        )
    return empty, torch.cat([comfy.sample.prepare_noise(empty[:1], seed) for seed in seeds])


def run(model, positive, negative, settings, seeds, listeners=Listeners(), steps=None):
    """Latents (seeds, C, h, w) that the host's sampler gives, a picture for each seed.

    positive, negative: CONDITIONINGs of as many rows as there are seeds, or of one for all; settings: Sampling; steps:
    only the first of them are run. Stops between steps when the user presses Cancel.
    """
    latents, noise = seeded_noise(model, seeds, settings)
    return comfy.sample.sample(
        _listening(model, listeners), noise, settings.steps, settings.cfg, settings.sampler, settings.scheduler,
        positive, negative, latents, last_step=steps, callback=listeners.step, disable_pbar=True, seed=seeds[0],
    )  # fmt: skip


def sample_latent(model, positive, negative, settings, latent, seed, denoise=1.0, step=None):
    """Latents (B, C, h, w) on the CPU that KSampler gives from a LATENT and one seed, bit by bit.

    settings: Sampling, whose size does not count; latent: the host's LATENT, with its mask and the numbers of its
    pictures where it has such; denoise: in (0, 1], how much of the schedule is run; step: as that of Listeners.
    """
    latents = fitted_latents(model, latent["samples"])
    noise = comfy.sample.prepare_noise(latents, seed, latent.get("batch_index"))
    return comfy.sample.sample(
        model, noise, settings.steps, settings.cfg, settings.sampler, settings.scheduler, positive, negative, latents,
        denoise=denoise, noise_mask=latent.get("noise_mask"), callback=step, disable_pbar=True, seed=seed,
    )  # fmt: skip


def _listening(model, listeners):
    """The MODEL, or a clone of it whose predictions are listened to."""
    if listeners.prediction is None:
        return model
    model = model.clone()

    def tell(args):
        listeners.prediction(args)
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(tell, disable_cfg1_optimization=listeners.both)
    return model


def ask_at(model, positive, negative, points, answer, cfg=1.0, seed=0):
    """[answer(predict)] at points [(noisy latents x (B, C, h, w), sigma (B,))] of a MODEL.

    predict() gives what the model takes for the clean latents there, through the host's whole sampling path up to
    `apply_model`, so that patches act as in sampling. Stops between points when the user presses Cancel.
    """
    found = []

    def visit(network, x, sigmas, extra_args=None, callback=None, disable=None):
        for point, sigma in points:
            comfy.model_management.throw_exception_if_processing_interrupted()
            found.append(answer(partial(network, point.to(x), sigma.to(x), **(extra_args or {}))))
        return x

    nothing = torch.zeros_like(points[0][0])
    sigmas = torch.stack([sigma[0] for _, sigma in points] + [torch.zeros(())]).float()
    comfy.sample.sample_custom(
        model, nothing, cfg, comfy.samplers.KSAMPLER(visit), sigmas, positive, negative, nothing.clone(),
        disable_pbar=True, seed=seed,
    )  # fmt: skip
    return found


def noised(model, clean, noise, sigmas):
    """Latents (B, C, h, w) of a MODEL's network at noise levels (B,): clean ones, on its own scale, with noise."""
    parts = zip(sigmas.split(1), noise.split(1), clean.split(1))
    return torch.cat([model.model.model_sampling.noise_scaling(*part) for part in parts])


def sample(model, positive, negative, seeds, settings, on_step=None):
    """Latents (seeds, C, h, w) on the CPU, as a LATENT holds them.

    on_step(x, sigma): called with the noisy latents that the network sees, each time it is asked.
    """
    listeners = Listeners(on_step and (lambda args: on_step(args["input"], args["sigma"])))
    return run(model, positive, negative, settings, seeds, listeners).float().cpu()


def denoised(model, positive, points, seed=0):
    """What a MODEL takes for the clean latents, [(B, C, h, w) on the CPU], at points [(noisy latents x, sigma (B,))],
    without guidance."""
    return ask_at(model, positive, positive, points, lambda predict: predict().float().cpu(), seed=seed)


def probe_point(model, settings):
    """(noisy latents (1, C, h, w), sigma (1,)) of one noise at a part of the schedule, where probe() asks."""
    sigma = torch.tensor([float(model.model.model_sampling.percent_to_sigma(PROBED_AT))])
    return seeded_noise(model, [0], settings)[1] * sigma, sigma


def probe(model, positive, point, numbers, digits):
    """At most so many numbers, rounded to so many digits, of what a MODEL makes of a point for a text: weights, LoRAs,
    erasures, text encoder and clip skip all show in them."""
    seen = denoised(model, positive, [point])[0].flatten()
    return [round(float(v), digits) for v in seen[:: max(1, len(seen) // numbers)][:numbers]]


def decode(vae, latents):
    """Pictures (B, H, W, 3) on the CPU, in [0, 1]."""
    pictures = vae.decode(latents).float().cpu()
    return pictures.reshape(-1, *pictures.shape[-3:])[..., :3].clamp(0, 1)


def preview_pictures(model, latents):
    """Small pictures (B, h, w, 3) in [0, 1] by the linear colours of the host's live previews, or None without such."""
    latent_format = model.model.latent_format
    factors = getattr(latent_format, "latent_rgb_factors", None)
    if factors is None or latents.dim() != 4:
        return None
    latents = latent_format.process_in(latents)
    unpacked = getattr(latent_format, "latent_rgb_factors_reshape", None)  # of latents that hold four points in one
    latents = latents if unpacked is None else unpacked(latents)
    if latents.shape[1] != len(factors):
        return None
    rgb = latents.movedim(1, -1) @ torch.tensor(factors, dtype=torch.float32)
    bias = getattr(latent_format, "latent_rgb_factors_bias", None)
    if bias is not None:
        rgb = rgb + torch.tensor(bias)
    return ((rgb + 1) / 2).clamp(0, 1)


def drawn(model, vae, latents):
    """Pictures of latents by a VAE; without one, preview_pictures()."""
    return preview_pictures(model, latents) if vae is None else decode(vae, latents)
