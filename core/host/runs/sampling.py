"""Runs the host's own sampler inside a node: the same noise on several models, and their answers along one trajectory.

Everything that acts on a MODEL acts here as in KSampler, because it is the host's sampler that runs.
"""

from dataclasses import dataclass

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch

SAMPLERS, SCHEDULERS = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS
SPATIAL = 8  # pixels a latent stands for, where the host does not say


@dataclass(frozen=True)
class Sampling:
    """How to sample: as KSampler's widgets, and the size in pixels."""

    steps: int = 20
    cfg: float = 7.0
    sampler: str = "euler"
    scheduler: str = "normal"
    width: int = 512
    height: int = 512


def conditioning(clip, text):
    """A CONDITIONING of a text, as CLIPTextEncode makes it."""
    tokens = clip.tokenize(text)
    if hasattr(clip, "encode_from_tokens_scheduled"):
        return clip.encode_from_tokens_scheduled(tokens)
    vectors, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    return [[vectors, {"pooled_output": pooled}]]


def seeded_noise(model, seeds, settings):
    """(empty latents, noise), each (seeds, C, h, w) on the CPU; every picture's noise comes from its own seed alone."""
    latent_format = model.model.latent_format
    size = [x // getattr(latent_format, "spacial_downscale_ratio", SPATIAL) for x in (settings.height, settings.width)]
    empty = torch.zeros(len(seeds), getattr(latent_format, "latent_channels", 4), *size)
    if hasattr(comfy.sample, "fix_empty_latent_channels"):
        empty = comfy.sample.fix_empty_latent_channels(model, empty)
    return empty, torch.cat([comfy.sample.prepare_noise(empty[:1], seed) for seed in seeds])


def sample(model, positive, negative, seeds, settings, on_step=None):
    """Latents (seeds, C, h, w) on the CPU, as a LATENT holds them.

    on_step(x, sigma): called with the noisy latents that the network sees, each time it is asked. Stops between steps
    when the user presses Cancel.
    """
    latents, noise = seeded_noise(model, seeds, settings)
    if on_step:
        model = model.clone()

        def tell(args):
            on_step(args["input"], args["sigma"])
            return args["denoised"]

        model.set_model_sampler_post_cfg_function(tell)
    found = comfy.sample.sample(
        model, noise, settings.steps, settings.cfg, settings.sampler, settings.scheduler, positive, negative, latents,
        disable_pbar=True, seed=seeds[0],
    )  # fmt: skip
    return found.float().cpu()


def denoised(model, positive, points, seed=0):
    """What a MODEL takes for the clean latents, [(B, C, h, w) on the CPU], at points [(noisy latents x, sigma (B,))].

    Through the host's whole sampling path up to `apply_model` without guidance, so that patches act as in sampling.
    """
    found = []

    def ask(network, x, sigmas, extra_args=None, callback=None, disable=None):
        for point, sigma in points:
            comfy.model_management.throw_exception_if_processing_interrupted()
            found.append(network(point.to(x), sigma.to(x), **(extra_args or {})).float().cpu())
        return x

    first = points[0][0]
    sigmas = torch.stack([sigma[0] for _, sigma in points] + [torch.zeros(())]).float()
    comfy.sample.sample_custom(
        model, torch.zeros_like(first), 1.0, comfy.samplers.KSAMPLER(ask), sigmas, positive, positive,
        torch.zeros_like(first), disable_pbar=True, seed=seed,
    )  # fmt: skip
    return found


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
    rgb = latent_format.process_in(latents).movedim(1, -1) @ torch.tensor(factors, dtype=torch.float32)
    bias = getattr(latent_format, "latent_rgb_factors_bias", None)
    if bias is not None:
        rgb = rgb + torch.tensor(bias)
    return ((rgb + 1) / 2).clamp(0, 1)


@dataclass
class Pair:
    """Pictures of one prompt by both models, in the order of the seeds: latents (n, C, h, w), pictures (n, H, W, 3) or
    None; drift: [(sigma, [what both models and the empty prompt see there])]."""

    original: torch.Tensor
    erased: torch.Tensor
    original_pictures: torch.Tensor | None
    erased_pictures: torch.Tensor | None
    drift: list


class PairSampler:
    """Samples the same prompts and noise on two MODELs, `batch` pictures at a time, in the same batches on both.

    levels: how many noise levels of the original's trajectory both are compared at. shift: added to the erased
    model's seeds, 0 to compare the same noise. vae: None takes the host's preview colours.
    """

    def __init__(
        self, original, erased, clip, vae, settings, batch=4, levels=5, shift=0, on_pictures=lambda done: None
    ):
        self.models, self.clip, self.vae, self.settings = (original, erased), clip, vae, settings
        self.batch, self.levels, self.shift, self.on_pictures = batch, levels, shift, on_pictures
        self.empty, self.done = conditioning(clip, ""), 0

    def pair(self, text, seeds):
        """Pair of a prompt."""
        positive = conditioning(self.clip, text)
        chunks = [seeds[i : i + self.batch] for i in range(0, len(seeds), self.batch)]
        before, after, points = [], [], []
        for chunk in chunks:
            seen = []
            before.append(self._sample(0, positive, chunk, lambda x, s, seen=seen: seen.append((x.cpu(), s.cpu()))))
            points.append([seen[i] for i in _spread(len(seen), self.levels)])
        for chunk in chunks:
            after.append(self._sample(1, positive, [(seed + self.shift) % 2**64 for seed in chunk]))
        drift = self._drift(positive, points, chunks)
        pictures = [[self.pictures(x) for x in side] for side in (before, after)]
        joined = [torch.cat(side) if side[0] is not None else None for side in pictures]
        return Pair(torch.cat(before), torch.cat(after), *joined, drift)

    def again(self, text, seeds):
        """(latents, pictures) of the original's first picture once more, computed in a batch of another size."""
        more = [*seeds[:1], (seeds[0] + 1) % 2**64] if min(self.batch, len(seeds)) == 1 else seeds[:1]
        latents = self._sample(0, conditioning(self.clip, text), more)[:1]
        return latents, self.pictures(latents)

    def probe(self, texts):
        """Some numbers of what both models see in one noise for texts; the same two models give the same numbers."""
        _, noise = seeded_noise(self.models[0], [0], self.settings)
        sigma = torch.tensor([float(self.models[0].model.model_sampling.percent_to_sigma(0.4))])
        found = []
        for text in texts:
            for model in self.models:
                seen = denoised(model, conditioning(self.clip, text), [(noise * sigma, sigma)])[0].flatten()
                found.append([round(float(v), 5) for v in seen[:: max(1, len(seen) // 16)][:16]])
        return found

    def pictures(self, latents):
        """Pictures of latents, or None."""
        return preview_pictures(self.models[0], latents) if self.vae is None else decode(self.vae, latents)

    def _sample(self, which, positive, seeds, on_step=None):
        found = sample(self.models[which], positive, self.empty, seeds, self.settings, on_step)
        self.done += len(seeds)
        self.on_pictures(self.done)
        return found

    def _drift(self, positive, points, chunks):
        if not self.levels:
            return []
        levels = {}
        for seen, chunk in zip(points, chunks):
            sides = [
                denoised(model, text, seen, chunk[0])
                for model, text in (
                    (self.models[1], positive), (self.models[0], positive), (self.models[0], self.empty),
                )
            ]  # fmt: skip
            for i, (_, sigma) in enumerate(seen):
                levels.setdefault(i, (float(sigma[0]), []))[1].append([side[i] for side in sides])
        return [(sigma, [torch.cat(part) for part in zip(*parts)]) for sigma, parts in levels.values()]


def _spread(count, wanted):
    """`wanted` of the indices below count, evenly spread, first and last included."""
    if wanted <= 1:
        return [0] * wanted
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)})
