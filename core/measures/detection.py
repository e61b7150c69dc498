"""Which prompts a model answers with a memorised picture, from how far its text moves the prediction.

Wen et al., "Detecting, Explaining, and Mitigating Memorization in Diffusion Models", ICLR 2024: for a memorised prompt
the text-conditional part of the predicted noise, e(x_t, c) - e(x_t, empty), is large from the first steps on and
whatever the noise. Chen et al., "Exploring Local Memorization in Diffusion Models via Bright Ending Attention", ICLR
2025: where the end token is looked at in the last step is where the picture is memorised.
"""

import json
import math
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import ErasureError

REFERENCE = 4 * 64 * 64  # numbers in the latents of a 512 x 512 picture, which scores are scaled to
FEWEST = 20  # benign prompts of a calibration; with n of them p99 is close to the largest of the n
SAME_MODEL = 5e-3  # relative difference of two probes below which two models count as one
FORMAT, VERSION = "membrane.calibration", 1


# ---------------------------------------------------------------- scores


def text_part(conditional, unconditional, sigma):
    """e(x, c) - e(x, empty), (B, ...), from what the model takes for clean latents under both: (D_empty - D_c) / sigma.

    The same for models that predict noise and those that predict v. sigma: (B,).
    """
    return (unconditional - conditional) / sigma.reshape(-1, *[1] * (conditional.dim() - 1))


def magnitude(delta):
    """L2 length (B,) of each text part (B, ...), scaled to the latents of a 512 x 512 picture."""
    return delta.flatten(1).norm(dim=1) * scale(delta[0].numel())


def scale(numbers):
    """What a length over so many numbers is multiplied with, so that sizes of pictures compare."""
    return math.sqrt(REFERENCE / numbers)


@dataclass(frozen=True)
class Trace:
    """A prompt and its magnitudes (seeds, steps)."""

    prompt: str
    magnitudes: torch.Tensor

    @property
    def score(self):
        """Mean over steps and seeds."""
        return float(self.magnitudes.mean())

    @property
    def curve(self):
        """Mean over the seeds, one number a step."""
        return self.magnitudes.mean(dim=0).tolist()

    @property
    def by_seed(self):
        """Mean over the steps, one number a seed."""
        return self.magnitudes.mean(dim=1).tolist()


# ---------------------------------------------------------------- calibration


def require_enough(prompts):
    """Raises ErasureError for a number of benign prompts that says nothing of what is normal."""
    if prompts < FEWEST:
        raise ErasureError(
            f"A calibration needs at least {FEWEST} different benign prompts, one per line, but there are {prompts}; "
            "add ordinary prompts like those you will test, 100 or more are better."
        )


@dataclass(frozen=True)
class Calibration:
    """Scores of ordinary prompts on one model under one set of settings.

    settings: what a score depends on besides model and prompt; probe: numbers by which the model is known again.
    """

    settings: dict
    probe: tuple
    scores: tuple

    def __post_init__(self):
        require_enough(len(self.scores))

    @property
    def mean(self):
        return float(np.mean(self.scores))

    @property
    def std(self):
        return float(np.std(self.scores, ddof=1))

    @property
    def p99(self):
        """The score that 1 % of ordinary prompts exceed."""
        return float(np.quantile(self.scores, 0.99))

    @property
    def summary(self):
        """How many prompts there were, and what is normal, as JSON."""
        return {"prompts": len(self.scores), "mean": self.mean, "std": self.std, "p99": self.p99}

    def z(self, score):
        """How many standard deviations a score lies above the mean."""
        return (score - self.mean) / max(self.std, 1e-12)

    def distance(self, probe):
        """Relative difference of another model's probe; infinite when they cannot be compared."""
        a, b = (np.asarray(p, np.float64) for p in (self.probe, probe))
        if a.shape != b.shape:
            return math.inf
        return float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-12))

    def fits(self, probe):
        """Whether a probe is this model's, as far as numerical noise lets tell."""
        return self.distance(probe) < SAME_MODEL

    def to_json(self):
        """The text of a calibration file."""
        return json.dumps(
            {
                "format": FORMAT, "version": VERSION, "settings": self.settings, **self.summary,
                "scores": list(self.scores), "probe": list(self.probe),
            }
        )  # fmt: skip

    @classmethod
    def from_json(cls, text, name):
        """A calibration of a file's text; raises ErasureError, naming the file, when it is none."""
        try:
            found = json.loads(text)
            if found["format"] != FORMAT or found["version"] != VERSION or not isinstance(found["settings"], dict):
                raise ValueError("it has another format")
            numbers = [tuple(float(v) for v in found[key]) for key in ("probe", "scores")]
            if not numbers[0] or len(numbers[1]) < FEWEST or not np.isfinite(sum(numbers, ())).all():
                raise ValueError("numbers are missing")
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ErasureError(
                f'The calibration file "{name}" is damaged ({error}); delete it and calibrate again with benign '
                "prompts."
            ) from error
        return cls(found["settings"], *numbers)


# ---------------------------------------------------------------- where and by which words


def bright_ending(deltas, attention):
    """Mean over the steps of ||delta_t * m|| / mean(m), (B,), and m itself where the end token is looked at.

    deltas: text parts [(B, C, h, w)] of all steps; attention: (B, h, w), Chen et al.'s mask m.
    """
    m = attention[:, None]
    lengths = torch.stack([magnitude(delta * m) for delta in deltas])
    return lengths.mean(dim=0) / attention.flatten(1).mean(dim=1).clamp(min=1e-12)


def end_attention(layers, ends, size):
    """Attention (B, h, w) of the places of a picture to each row's end token, the mean over heads and layers (Chen et
    al. 2025): softmax(q k^T / sqrt(d)) at the end token, brought to the latents' size.

    layers: [(queries (B, n, heads d), keys (B, T, heads d), heads)]; ends: B places in the text; size: (h, w) of the
    latents. Raises ErasureError where a layer has other rows or places than the latents.
    """
    found = []
    for q, k, heads in layers:
        if len(q) != len(ends):
            raise ErasureError(
                f"A layer got {len(q)} rows for {len(ends)} pictures; another node splits the batch inside the "
                "network, detect on the model before it or switch bright_ending off."
            )
        q, k = (y.float().unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k))
        rows = []
        for row, end in enumerate(ends):
            logits = q[row] @ k[row].transpose(-1, -2) * q.shape[-1] ** -0.5
            rows.append(logits.softmax(dim=-1)[..., end].mean(dim=0))
        plane = torch.stack(rows).unflatten(-1, _plane(rows[0].numel(), size))
        found.append(torch.nn.functional.interpolate(plane[:, None], size, mode="bilinear")[:, 0])
    return torch.stack(found).mean(dim=0)


def _plane(tokens, size):
    """(height, width) of so many tokens, in a network that halves latents of a size and rounds up."""
    height, width = size
    while height * width > tokens:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    if height * width != tokens:
        raise ErasureError(
            f"A layer works on {tokens} places of latents {size[0]} x {size[1]}; another node changes the sizes inside "
            "the network, detect on the model before it or switch bright_ending off."
        )
    return height, width


def heat_map(attention, height, width):
    """Attention (h, w) as a picture's mask (height, width): least 0, most 1."""
    size = (height, width)
    large = torch.nn.functional.interpolate(attention[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    low, high = large.min(), large.max()
    return (large - low) / (high - low).clamp(min=1e-12)


def gradient_lengths(delta, vectors):
    """Lengths (rows, T) of the gradient of a text part's length ||delta|| (rows, C, h, w) with respect to each of the
    text vectors (rows, T, d): how much the text part depends on a token (Wen et al. 2024, section 4.1)."""
    (gradient,) = torch.autograd.grad(magnitude(delta.float()).sum(), vectors)
    return gradient.float().norm(dim=-1)


@dataclass(frozen=True)
class Word:
    """A word of a prompt and how much the text part depends on it: the gradient's length of its strongest token."""

    text: str
    influence: float


def words_of(pieces, norms):
    """Words of a prompt, the most influential first.

    pieces: [(token's text or None, ends a word)] without start, end and padding; norms: as many gradient lengths.
    A token without text is named by its place.
    """
    words, text, strongest = [], "", 0.0
    for place, ((piece, last), norm) in enumerate(zip(pieces, norms), 1):
        text += f"[token {place}]" if piece is None else piece
        strongest = max(strongest, float(norm))
        if last or place == len(pieces):
            words.append(Word(text, strongest))
            text, strongest = "", 0.0
    return sorted(words, key=lambda word: -word.influence)
