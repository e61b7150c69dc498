"""Reliable and Efficient Concept Erasure (Gong et al., ECCV 2024) on one d x d map.

The published loop edits every cross-attention matrix; with W_l -> W_l P for all of them it only
needs P and the Gram matrix S of the original weights.
"""

import torch

from ..errors import ErasureError
from .text_map import compress, gram, ridge_rows
from .uce import uce_terms


def derived_embeddings(concepts, weight_gram, p, penalty):
    """Vectors c' (E, d) that make the edited layers W P answer like the original ones answered c.

    argmin sum_l ||W_l P c' - W_l c||^2 + penalty ||c'||^2 (RECE eq. 4 with the published "regzero" term):
    c' = (penalty I + P^T S P)^-1 P^T S c, with S = sum_l W_l^T W_l. All float64.
    """
    system = p.T @ weight_gram @ p
    system = (system + system.T) / 2 + penalty * torch.eye(len(p), dtype=p.dtype)
    factor, failed = torch.linalg.cholesky_ex(system)
    pivots = factor.diagonal().square()
    if failed or pivots.min() < 1e-8 * pivots.max():
        raise ErasureError(
            f"RECE cannot derive its embeddings with a penalty of {penalty:g}: the edited layers are nearly singular; "
            "raise the penalty (0.1 for easy concepts, 0.001 for hard ones) or take fewer epochs."
        )
    return torch.cholesky_solve(p.T @ weight_gram @ concepts.T, factor).T


def rece(
    targets,
    replacements,
    preserve,
    concept,
    full_targets,
    full_replacements,
    full_concept,
    weight_gram,
    count,
    *,
    epochs=1,
    penalty=0.1,
    edit_anchor=0.1,
    edit_preserve_scale=0.1,
    on_epoch=None,
    **uce_scales,
):
    """TextMap of UCE followed by `epochs` rounds of RECE.

    targets, replacements, preserve, concept: as for uce(). full_targets, full_replacements (M, d) and
    full_concept (M,): every row of the concepts' embeddings and of their replacements at the same
    places (no slicing at the last subject token here, as published). weight_gram: S (d, d) of the
    unedited key and value matrices. on_epoch is called with the number of finished epochs.
    """
    targets, replacements, preserve, full_targets, full_replacements, weight_gram = (
        t.to(torch.float64) for t in (targets, replacements, preserve, full_targets, full_replacements, weight_gram)
    )
    u, v = uce_terms(targets, replacements, preserve, **uce_scales)
    eye = torch.eye(len(u), dtype=u.dtype)
    p = eye + u @ v
    a, b, owner = [u], [v], [concept]
    preserve_gram = gram(preserve, edit_preserve_scale)
    for epoch in range(epochs):
        derived = derived_embeddings(full_targets, weight_gram, p, penalty)
        rows = ridge_rows(derived, preserve_gram, 1.0, edit_anchor)
        step = p @ (full_replacements - derived).T
        p = p + step @ rows
        a.append(step)
        b.append(rows)
        owner.append(full_concept)
        if on_epoch:
            on_epoch(epoch + 1)
    return compress(torch.cat(a, 1), torch.cat(b), torch.cat(owner), count)
