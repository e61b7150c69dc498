"""Telling from what a network sees whether a concept is in a picture that is being sampled, without a word of text.

The features are those of one block in the network's middle, read with the empty text. One linear discriminant (Fisher
1936) stands for each range of noise levels, with a covariance that is shrunk towards its diagonal (Friedman 1989,
"Regularized Discriminant Analysis"), as there are more features than pictures. It is fitted on noised pictures of the
concept and of others. A score is told in standard deviations of the others, as pictures score that it was not fitted
on: the parts of the pictures take turns at being left out.
"""

import math
from dataclasses import dataclass

import torch

from ..errors import ErasureError

CAREFUL, BALANCED, STRICT = "careful", "balanced", "strict"
DEVIATIONS = {CAREFUL: 5.0, BALANCED: 4.0, STRICT: 3.2}  # of the others, from which on a picture shows the concept
SHRINKAGE = 0.5
START, FIFTH = "the first noise", "a fifth of the way"
BACK = {START: 0.0, FIFTH: 0.2}  # share of the schedule from which on a picture is drawn anew
PARTS = 4  # that the pictures are cut into, of which one is left out at a time
SHARES = tuple(round(0.1 * i, 1) for i in range(2, 10))  # of the schedule, at which pictures are looked at
TOLD = 0.5  # share of the concept's pictures that a range of noise levels must tell to be used
HALFWAY = 0.5  # between the others (0) and the concept (1): what looks more like the concept is none of the others
FEWEST = 8  # pictures of either side


def features(hidden):
    """Mean and maximum over the places of a block's output (n, C, h, w), (n, 2 C) float32."""
    places = hidden.float().flatten(2)
    return torch.cat([places.mean(dim=2), places.amax(dim=2)], dim=1)


def direction(concept, others, shrinkage=SHRINKAGE):
    """S^-1 (mean of the concept - mean of the others), (F,) float64, of features (k, F) and (m, F).

    S: the covariance within both, of which `shrinkage` is replaced by as much of its diagonal. The system is solved in
    the space of the pictures (Woodbury), which are fewer than the features.
    """
    concept, others = concept.double(), others.double()
    means = concept.mean(dim=0), others.mean(dim=0)
    rows = torch.cat([concept - means[0], others - means[1]]) / math.sqrt(len(concept) + len(others) - 2)
    scale = rows.norm(dim=0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    rows, wanted = rows / scale, (means[0] - means[1]) / scale
    inner = shrinkage / (1 - shrinkage) * torch.eye(len(rows), dtype=rows.dtype) + rows @ rows.T
    return (wanted - rows.T @ torch.linalg.solve(inner, rows @ wanted)) / shrinkage / scale


@dataclass(frozen=True)
class Scale:
    """A direction (F,) float64 and the score of the others' mean along it, on a scale on which that is 0 and the
    concept's mean is 1."""

    direction: torch.Tensor
    origin: float

    @classmethod
    def of(cls, concept, others):
        """From features (k, F) and (m, F)."""
        found = direction(concept, others)
        low, high = (float(rows.double().mean(dim=0) @ found) for rows in (others, concept))
        length = high - low if high > low else 1.0
        return cls(found / length, low / length)

    def __call__(self, rows):
        return rows.double() @ self.direction - self.origin


def left_out_scores(concept, others):
    """Scores (k,) and (m,) of features (k, F) and (m, F), of each part by a Scale of the other parts."""
    found = [torch.zeros(len(rows), dtype=torch.float64) for rows in (concept, others)]
    for part in range(PARTS):
        out = [torch.arange(len(rows)) % PARTS == part for rows in (concept, others)]
        scale = Scale.of(concept[~out[0]], others[~out[1]])
        for scores, rows, own in zip(found, (concept, others), out):
            scores[own] = scale(rows[own])
    return found


@dataclass(frozen=True)
class Level:
    """The discriminant of one range of noise levels.

    share: of the schedule, in its middle; direction (F,) float32, origin: a score is features @ direction - origin, in
    standard deviations of the others; concept (k,), others (m,): scores of the pictures, each left out of the fit.
    """

    share: float
    direction: torch.Tensor
    origin: float
    concept: torch.Tensor
    others: torch.Tensor

    @classmethod
    def of(cls, share, concept, others):
        """From features (k, F) and (m, F)."""
        held, scale = left_out_scores(concept, others), Scale.of(concept, others)
        middle, deviation = held[1].mean(), held[1].std().clamp(min=1e-12)
        return cls(
            share, (scale.direction / deviation).float(), float((scale.origin + middle) / deviation),
            *(((scores - middle) / deviation).float() for scores in held),
        )  # fmt: skip

    def score(self, rows):
        """Scores (n,) of features (n, F)."""
        return rows @ self.direction.to(rows.device) - self.origin

    def tells(self, threshold):
        """Whether enough of the concept's pictures pass a threshold."""
        return bool((self.concept > threshold).float().mean() >= TOLD)


@dataclass(frozen=True)
class Fitted:
    """Levels, of the noisiest first, the threshold in standard deviations, and how many neutral pictures looked like
    the concept and were left out."""

    levels: tuple[Level, ...]
    threshold: float
    left_out: int

    @property
    def used(self):
        """Those of the levels that tell the concept."""
        return [level for level in self.levels if level.tells(self.threshold)]

    def fired(self):
        """((of the concept, how many), (of the others, how many)): pictures that pass the threshold in a used level."""
        sides = ([level.concept for level in self.used], [level.others for level in self.used])
        return tuple((int((torch.stack(rows) > self.threshold).any(dim=0).sum()), len(rows[0])) for rows in sides)


def fit(concept, others, neutral, threshold):
    """Fitted, from {share: features (k, F)} of the concept and {share: (m, F)} of others.

    neutral (m,): which of the others were drawn without saying what they show; those that look more like the concept
    are left out. Raises ErasureError for too few pictures.
    """
    shares = sorted(concept)
    counts = len(concept[shares[0]]), len(neutral)
    if min(counts) < FEWEST:
        raise ErasureError(
            f"A guard is fitted on {FEWEST} pictures of the concept and {FEWEST} others at least, and there are "
            f"{counts[0]} and {counts[1]}; ask for more example pictures, or give more."
        )
    kept = ~_like_the_concept(concept, others, neutral)
    levels = tuple(Level.of(share, concept[share], others[share][kept]) for share in shares)
    return Fitted(levels, threshold, int((~kept).sum()))


def _like_the_concept(concept, others, neutral):
    """Which of the others (m,) are neutral and score more like the concept, the mean over the cleaner half of the noise
    levels; none where too few would be left."""
    shares = sorted(concept)
    cleaner = shares[len(shares) // 2 :]
    scores = sum(left_out_scores(concept[share], others[share])[1] for share in cleaner) / len(cleaner)
    found = neutral & (scores > HALFWAY)
    return found if len(found) - int(found.sum()) >= FEWEST else torch.zeros_like(found)


class Redrawn:
    """A picture that is drawn anew from a sampling's own first noise, up to the noise level at which that stands.

    Any sampler ends at the prediction of its last step: with predictions of the new picture in place of its own, it
    ends at the new picture, wherever it began to follow. The steps are Euler's. start: x (B, C, h, w) at sigmas (B,).
    """

    def __init__(self, start):
        self.x, self.sigma, self.denoised = start, None, None

    def at(self, sigma, predict):
        """The prediction of the new pictures at noise levels sigma (B,); predict(x, sigma) asks the network."""
        if self.sigma is not None:
            if torch.equal(sigma, self.sigma):
                return self.denoised
            rows = [-1] + [1] * (self.x.dim() - 1)
            slope = (self.x - self.denoised) / self.sigma.view(rows)
            self.x = self.x + slope * (sigma - self.sigma).view(rows)
        self.sigma, self.denoised = sigma, predict(self.x, sigma)
        return self.denoised
