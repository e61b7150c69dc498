"""Fits a guard on a MODEL: pictures that the model itself draws, or that a user has, as its network sees them."""

from dataclasses import dataclass

import torch

from ...erasers.guard import SHARES, fit
from ..patches.guard import watched
from ..patches.places import without_stack
from .batching import BATCHED, fitting, join
from .sampling import ask_at, conditioning, sample

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
        size, found = BATCH if self.settings.sampler in BATCHED else 1, {}
        for group in fitting(texts):
            for rows in (group[i : i + size] for i in range(0, len(group), size)):
                seeds = [(first + i) % 2**64 for i in rows]
                latents = sample(model, join([texts[i] for i in rows]), empty, seeds, self.settings)
                found |= dict(zip(rows, latents))
                self._tell(len(rows))
        return torch.stack([found[i] for i in range(len(prompts))])

    def seen(self, latents):
        """{share of the schedule: features (n, F)} of latents (n, C, h, w), noised and read with the empty text."""
        watching, seen = watched(self.model)
        sampling, empty = self.model.model.model_sampling, conditioning(self.clip, "")
        own, generator = self.model.model.process_latent_in(latents), torch.Generator().manual_seed(SEED)
        points, shares = [], []
        for share in SHARES:
            sigma = torch.tensor([float(sampling.percent_to_sigma(share))])
            noise = torch.randn(own.shape, generator=generator)
            for clean, drawn in zip(own.split(BATCH), noise.split(BATCH)):
                parts = zip(drawn.split(1), clean.split(1))
                x = torch.cat([sampling.noise_scaling(sigma, *part) for part in parts])
                points.append((x, sigma.expand(len(x))))
                shares.append(share)

        def read(predict):
            predict()
            return seen.last().cpu()

        found = {}
        for share, rows in zip(shares, ask_at(watching, empty, empty, points, read)):
            found.setdefault(share, []).append(rows)
        self._tell(len(latents))
        return {share: torch.cat(rows) for share, rows in found.items()}

    def _tell(self, pictures):
        self.done += pictures
        self.on_pictures(self.done)


def fitted_guard(examples, concept, named, neutral, threshold):
    """Fitted of pictures, latents (n, C, h, w): of the concept, of others that were named, and of neutral captions."""
    others = torch.cat([named, neutral])
    free = torch.arange(len(others)) >= len(named)
    return fit(examples.seen(concept), examples.seen(others), free, threshold)
