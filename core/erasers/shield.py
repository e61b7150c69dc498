"""Keeping what is sampled away from known pictures, without a word of text: a prediction that resembles one too closely
is not followed.

The likeness of two pictures is the correlation of their latents, each channel's mean left out: 1 for a copy, whatever
its contrast and colour cast, about 0 for unrelated pictures, and the same number on every model. The method is a
relative of SPELL (Kirchhof et al., "Shielded Diffusion: Generating Novel and Diverse Images using Sparse Repellency",
ICML 2025), which pushes predictions out of a ball around each picture; a copy leaves such a ball by its contrast alone.
"""

import torch

NEAR, CLOSE, WIDE = "near copies", "close", "wide"
LIKENESS = {NEAR: 0.8, CLOSE: 0.6, WIDE: 0.4}  # from which on a prediction is not followed


def frames(latents):
    """Latents (B, C, h, w), or (B, C, T, h, w) of videos, as pictures (n, C, h, w): every frame is one."""
    return latents.movedim(2, 1).flatten(0, 1) if latents.dim() == 5 else latents


def fitted(pictures, size):
    """Pictures (K, C, h, w) at another size (height, width): scaled until they cover it, and cut at the middle."""
    found = tuple(pictures.shape[-2:])
    if found == tuple(size):
        return pictures
    scale = max(to / of for to, of in zip(size, found))
    covering = [max(to, round(of * scale)) for to, of in zip(size, found)]
    larger = torch.nn.functional.interpolate(pictures, covering, mode="bilinear", antialias=True)
    top, left = ((of - to) // 2 for of, to in zip(covering, size))
    return larger[..., top : top + size[0], left : left + size[1]]


def patterns(pictures):
    """Rows (n, C h w) of length 1 of pictures (n, C, h, w): each channel's mean left out; zeros for a blank one."""
    pictures = pictures.float()
    return torch.nn.functional.normalize((pictures - pictures.mean(dim=(2, 3), keepdim=True)).flatten(1), dim=1)


def likeness(pictures, known):
    """Correlations (n, K) of pictures (n, C, h, w) with the patterns (K, C h w) of known ones."""
    return patterns(pictures) @ known.T


def without(pictures, pattern):
    """Pictures (n, C, h, w) without their part along a pattern (n, C h w) each, float32."""
    rows = pictures.float().flatten(1)
    return (rows - (rows * pattern).sum(dim=1, keepdim=True) * pattern).view_as(pictures)


def held_back(usual, negative, pattern, strength):
    """What is followed instead of predictions (n, C, h, w) that resemble a pattern (n, C h w) each: the negative side
    alone, or the usual prediction without the pattern where there is no negative side, which is all zero then or None.

    strength: 1 follows it, 0 the usual prediction, between them what is between.
    """
    other = without(usual, pattern)
    if negative is not None:
        there = negative.flatten(1).any(dim=1).view(-1, 1, 1, 1)
        other = torch.where(there, negative.to(other), other)
    return usual + strength * (other.to(usual.dtype) - usual)
