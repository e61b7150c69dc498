"""The same prompts and noise on two models: what both draw, and what both see along the way of the first."""

from dataclasses import dataclass

import torch

from .sampling import conditioning, denoised, drawn, probe, probe_point, sample

PROBED, DIGITS = 16, 5  # numbers of each answer by which the models are known again


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
        point, found = probe_point(self.models[0], self.settings), []
        for text in texts:
            positive = conditioning(self.clip, text)
            found += [probe(model, positive, point, PROBED, DIGITS) for model in self.models]
        return found

    def pictures(self, latents):
        """Pictures of latents, or None."""
        return drawn(self.models[0], self.vae, latents)

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
