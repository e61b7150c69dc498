"""Retention: how much of the original model's pictures an erased model keeps, and how sure that is.

"Integrity" compares pictures of both models from the same noise, as Schioppa et al. 2024 ("Model Integrity when
Unlearning with T2I Diffusion Models", arXiv 2411.02068) propose; the scale between a floor and a ceiling is ours.
"""

from dataclasses import dataclass

import numpy as np

DRAWS, LEVEL, SEED = 1000, 0.95, 0  # of the bootstrap
AT_ONCE = 2_000_000  # numbers resampled at a time, 16 MB


@dataclass(frozen=True)
class Estimate:
    """A number with its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """Distances of one group of pictures; p95 shows the few prompts whose composition flipped."""

    count: int
    mean: Estimate
    median: float
    p95: float


def resamples(data, draws=DRAWS, seed=SEED):
    """Bootstrap resamples of data (prompts, seeds, ...), in parts (some draws, prompts * seeds, ...).

    Prompts are drawn with replacement and within each its seeds, because pictures of one prompt resemble each other
    (cluster bootstrap in two stages, Davison & Hinkley 1997, section 3.8).
    """
    data = np.asarray(data, np.float64)
    prompts, seeds = data.shape[:2]
    rng, most = np.random.default_rng(seed), max(1, AT_ONCE // data.size)
    for start in range(0, draws, most):
        some = min(most, draws - start)
        drawn = rng.integers(prompts, size=(some, prompts))
        within = rng.integers(seeds, size=(some, prompts, seeds))
        yield data[drawn[..., None], within].reshape(some, prompts * seeds, *data.shape[2:])


def mean(rows):
    """Mean over the pictures of each resample (draws, pictures, ...)."""
    return rows.mean(axis=1)


def estimate(data, statistic=mean, draws=DRAWS, seed=SEED):
    """Estimate over data (prompts, seeds, ...) with the 95 % percentile interval.

    statistic: resamples (draws, pictures, ...) -> (draws,).
    """
    data = np.asarray(data, np.float64)
    found = np.concatenate([statistic(rows) for rows in resamples(data, draws, seed)])
    low, high = np.percentile(found, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    value = statistic(data.reshape(1, -1, *data.shape[2:]))[0]
    return Estimate(float(value), float(low), float(high))


def summary(distances):
    """Summary of distances (prompts, seeds)."""
    flat = np.asarray(distances, np.float64).ravel()
    return Summary(flat.size, estimate(distances), float(np.median(flat)), float(np.percentile(flat, 95)))


def integrity(distances, ceilings, floor=0.0):
    """Estimate of 1 - (mean D - floor) / (ceiling - floor), or None where floor and ceiling are the same.

    1: untouched, 0: as different as another seed. distances: D (prompts, seeds), between both models from the same
    noise; ceilings: (prompts, seeds), of the original to itself from other noise; floor: of the original to itself
    from the same noise, computed in another batch.
    """
    both = np.stack([distances, ceilings], axis=-1)
    if both[..., 1].mean() <= floor:
        return None

    def of(rows):
        moved, other = np.moveaxis(mean(rows), -1, 0) - floor
        return 1 - moved / np.where(other > 0, other, np.nan)

    return estimate(both, of)


def relative_drift(edited, original, unprompted):
    """||D_edit(x, p) - D(x, p)|| / ||D(x, p) - D(x, "")|| of each picture, from denoised latents (B, ...) as arrays.

    Both models see the same noisy latents, so nothing adds up over the steps. 1: the edit moves the prediction as far
    as the prompt does. nan where the prompt does nothing (the empty prompt).
    """
    moved, prompted = (
        np.linalg.norm(np.asarray(a, np.float64).reshape(len(a), -1) - np.asarray(b, np.float64).reshape(len(b), -1),
                       axis=1)
        for a, b in ((edited, original), (original, unprompted))
    )  # fmt: skip
    scale = np.linalg.norm(np.asarray(original, np.float64).reshape(len(original), -1), axis=1)
    return np.where(prompted > 1e-6 * scale, moved / np.maximum(prompted, 1e-300), np.nan)
