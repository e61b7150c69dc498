"""Fits a guard on a MODEL: pictures that the model itself draws, or that a user has, as its network sees them."""

from dataclasses import dataclass

import torch

from ...erasers.guard import SHARES, fit
from ...erasers.shield import fitted as cut_to
from ...errors import ErasureError
from ..patches.guard import watched
from ..patches.places import without_stack
from ..patches.shield import encoded, require_latents
from .batching import batches, join
from .sampling import ask_at, conditioning, noised, sample, seeded_noise

EXAMPLES = "Example pictures"  # as messages call them
BATCH = 8  # pictures at a time
SEED = 1  # of the noise that pictures are looked at in


@dataclass
class Examples:
    """Draws pictures with a MODEL without its erasure, and reads the features of pictures on the MODEL with it.

    settings: Sampling; seed: of the first picture; on_pictures(done): may raise to stop.
    """

    model: object
    clip: object
    settings: object
    seed: int
    on_pictures: object = lambda done: None
    done: int = 0

    def drawn(self, prompts):
        """Latents (n, C, h, w) on the CPU of prompts, each from a noise of its own."""
        model, empty = without_stack(self.model), conditioning(self.clip, "")
        texts, first = [conditioning(self.clip, prompt) for prompt in prompts], self.seed + self.done
        found = {}
        for rows in batches(texts, [first], BATCH, self.settings.sampler):
            seeds = [(seed + i) % 2**64 for i, seed in rows]
            latents = sample(model, join([texts[i] for i, _ in rows]), empty, seeds, self.settings)
            found |= zip((i for i, _ in rows), latents)
            self._tell(len(rows))
        return torch.stack([found[i] for i in range(len(prompts))])

    def seen(self, latents):
        """{share of the schedule: features (n, F)} of latents (n, C, h, w), noised and read with the empty text."""
        watching, seen = watched(self.model)
        sampling, empty = self.model.model.model_sampling, conditioning(self.clip, "")
        own, generator = self.model.model.process_latent_in(latents), torch.Generator().manual_seed(SEED)
        points, shares = [], []
        for share in SHARES:
            level = torch.tensor([float(sampling.percent_to_sigma(share))])
            noise = torch.randn(own.shape, generator=generator)
            for clean, drawn in zip(own.split(BATCH), noise.split(BATCH)):
                sigma = level.expand(len(clean))
                points.append((noised(self.model, clean, drawn, sigma), sigma))
                shares.append(share)

        def read(predict):
            predict()
            return seen.first().cpu()

        found = {}
        for share, rows in zip(shares, ask_at(watching, empty, empty, points, read)):
            found.setdefault(share, []).append(rows)
        self._tell(len(latents))
        return {share: torch.cat(rows) for share, rows in found.items()}

    def _tell(self, pictures):
        self.done += pictures
        self.on_pictures(self.done)


def fitted_guard(examples, concept, others, named, threshold):
    """Fitted of pictures, latents (n, C, h, w): of the concept, and of others, the first of which were named."""
    neutral = torch.arange(len(others)) >= named
    return fit(examples.seen(concept), examples.seen(others), neutral, threshold)


def example_latents(model, vae, pictures, latents, settings):
    """Latents (n, C, h, w) of the examples that a user gives, pictures (K, H, W, 3) and a LATENT, or None without any.

    Raises ErasureError for latents of another model's kind or of another size than is sampled, and pictures without a
    VAE: a guard would tell the size instead of the concept.
    """
    found = []
    if pictures is not None:
        sized = cut_to(pictures.movedim(-1, 1)[:, :3], (settings.height, settings.width))
        found.append(torch.cat(encoded(vae, sized.movedim(1, -1), EXAMPLES)))
    if latents is not None:
        found.append(latents["samples"])
    size = seeded_noise(model, [0], settings)[0].shape[1:]
    for samples in found:
        require_latents(model, samples, EXAMPLES)
        if samples.shape[1:] != size:
            raise ErasureError(
                f"{EXAMPLES} are latents of the shape {tuple(samples.shape[1:])}, but pictures of "
                f"{settings.width} x {settings.height} have {tuple(size)}; give latents of the size you sample."
            )
    return torch.cat([samples.float().cpu() for samples in found]) if found else None
