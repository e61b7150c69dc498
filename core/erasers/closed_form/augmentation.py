"""Directed prior augmentation of SPEED (Li et al., ICLR 2026).

Preserved vectors are moved to and fro along the direction that the layers hear least, and what comes out is preserved
too.

The published script does this for each layer by itself. One map serves every layer here, so that the layers W_1, W_2,
... that read the text count as one layer with all of their outputs, and the direction and the scores are its. For a
model with one such layer that is the published method.
"""

import torch

from .layers import LayerGram

DRAWS = 10  # for each preserved vector, as published
CHUNK = 128  # vectors whose draws are compared with each other, as published
SEED = 0
ROUNDING = 1e-14  # of the largest square, times the width: below it a direction of S is heard by no layer


def quietest(weight_gram):
    """The direction (d,) of length 1 that layers hear least of those that they hear at all.

    weight_gram: S = sum of W^T W, (d, d), or LayerGram. The right singular vector of the smallest singular value of the
    layers as one, without those that a reduced decomposition does not have, as in the published script. Its largest
    entry is above 0, so that the same numbers drawn move the same way on every machine.
    """
    rows = isinstance(weight_gram, LayerGram)
    squares, vectors = torch.linalg.eigh(weight_gram.square() if rows else weight_gram.double())
    place = int((squares > ROUNDING * len(squares) * squares[-1]).to(torch.int8).argmax())
    found = vectors[:, place]
    found = torch.nn.functional.normalize(weight_gram.back(found[None])[0] if rows else found, dim=0)
    return found if found[found.abs().argmax()] > 0 else -found


def heard_lengths(rows, weight_gram):
    """(F,) lengths ||W x|| of what the layers make of rows x (F, d)."""
    if isinstance(weight_gram, LayerGram):
        return weight_gram.loudness(rows).sqrt()
    return ((rows @ weight_gram.double()) * rows).sum(1).clamp_min(0.0).sqrt()


def drawn(retained, direction, scores_of, draws=DRAWS):
    """Rows (K, d): retained rows c0 (F, d) in an order drawn anew, each moved `draws` times by a normal number along
    the direction (d,), without those with a score not above the mean of their chunk.

    scores_of: function of rows (n, d), float64, gives their influence (n,), as the prior filter has it.
    """
    chance = torch.Generator().manual_seed(SEED)
    found = []
    for chunk in retained[torch.randperm(len(retained), generator=chance)].split(CHUNK):
        steps = torch.randn(len(chunk), draws, 1, generator=chance, dtype=torch.float64)
        moved = (chunk[:, None].double() + steps * direction).flatten(0, 1)
        scores = scores_of(moved)
        found.append(moved[scores > scores.mean()].to(retained.dtype))
    return torch.cat([retained[:0], *found])
