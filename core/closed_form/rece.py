"""Reliable and Efficient Concept Erasure (Gong et al., ECCV 2024) on one d x d map.

The published loop edits every cross-attention matrix; with W_l -> W_l P for all of them it only
needs P and the Gram matrix S of the original weights.
"""

import torch

from ..errors import ErasureError
from .text_map import (
    batches,
    by_concept,
    gram,
    gram_of,
    group_sizes,
    ridge_factor,
    runs,
    solve_rows,
    stacked,
    text_map,
)
from .uce import target_rows, uce_factor, uce_terms


def derivation(weight_gram, p, penalty):
    """K (d, d) with c' = K c: the vectors that make the edited layers W P answer like the original ones to c.

    argmin sum_l ||W_l P c' - W_l c||^2 + penalty ||c'||^2 (RECE eq. 4 with the published "regzero" term):
    K = (penalty I + P^T S P)^-1 P^T S, with S = sum_l W_l^T W_l. All float64.
    """
    right = p.T @ weight_gram
    system = right @ p  # symmetric up to rounding; the factorisation reads one triangle
    system.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(system)
    del system
    pivots = factor.diagonal().square()
    if failed or pivots.min() < 1e-8 * pivots.max():
        raise ErasureError(
            f"RECE cannot derive its embeddings with a penalty of {penalty:g}: the edited layers are nearly singular; "
            "raise the penalty (0.1 for easy concepts, 0.001 for hard ones) or take fewer epochs."
        )
    return torch.cholesky_solve(right, factor)


def derived_embeddings(concepts, weight_gram, p, penalty):
    """Vectors c' (E, d) of concepts c (E, d), see derivation()."""
    return concepts @ derivation(weight_gram, p, penalty).T


def rece_terms(
    groups,
    full_groups,
    preserve_gram,
    weight_gram,
    *,
    epochs=1,
    penalty=0.1,
    edit_anchor=0.1,
    edit_preserve_scale=0.1,
    on_epoch=None,
    erase_scale=1.0,
    **uce_scales,
):
    """For each concept factors A (d, n), B (n, d), float64, of UCE followed by RECE; see rece_of().

    Only d x d matrices are kept over the epochs: the map P, the derivation K and the Cholesky factor of each.
    The rows are made anew for a few concepts at a time.
    """
    start = uce_factor(groups, preserve_gram, erase_scale=erase_scale, **uce_scales)
    preserve_gram = edit_preserve_scale * preserve_gram
    p, steps = solve_rows(start, erase_scale * change_product(groups)), []
    p.diagonal().add_(1.0)
    for epoch in range(epochs):
        k = derivation(weight_gram, p, penalty)
        factor = ridge_factor(gram_of(derived_rows(full_groups, k), len(k)), preserve_gram, 1.0, edit_anchor)
        steps.append((p, k, factor))
        if epoch + 1 < epochs:
            p = p + p @ solve_rows(factor, change_product(full_groups, k))
        if on_epoch:
            on_epoch(epoch + 1)
    del preserve_gram
    for run in runs(full_groups):
        parts = [uce_terms(groups[run], start, erase_scale)]
        targets, replacements, sizes = stacked(full_groups[run])
        for p, k, factor in steps:
            derived = targets @ k.T
            changes = p @ (replacements - derived).T
            parts.append(zip(changes.split(sizes, 1), solve_rows(factor, derived).split(sizes)))
        for mine in zip(*parts):
            yield torch.cat([a for a, _ in mine], 1), torch.cat([b for _, b in mine])


def derived_rows(groups, k):
    """The derived embeddings c' = K c of all target rows, a batch at a time."""
    for batch in batches(target_rows(groups)):
        yield batch @ k.T


def change_product(groups, k=None):
    """sum over the rows of (n - c')^T c', (d, d), with c' = K c, or c itself without K."""
    width = groups[0][0][0].shape[1]
    total = torch.zeros(width, width, dtype=torch.float64)
    for run in runs(groups):
        targets, replacements, _ = stacked(groups[run])
        derived = targets if k is None else targets @ k.T
        total.addmm_((replacements - derived).T, derived)
    return total


def rece_of(groups, full_groups, preserve, weight_gram, *, epochs=1, **settings):
    """TextMap of UCE followed by `epochs` rounds of RECE.

    groups, preserve: as for uce_of(). full_groups: every row of the concepts' embeddings and of their
    replacements at the same places (no slicing at the last subject token here, as published). weight_gram:
    S (d, d) of the unedited key and value matrices. settings: penalty, edit_anchor, edit_preserve_scale, those
    of UCE, and on_epoch, which is called with the number of finished epochs.
    """
    weight_gram = weight_gram.to(torch.float64)
    sizes = [n + epochs * m for n, m in zip(group_sizes(groups), group_sizes(full_groups))]
    terms = rece_terms(groups, full_groups, gram(preserve), weight_gram, epochs=epochs, **settings)
    return text_map(terms, sizes, len(weight_gram))


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
    **settings,
):
    """TextMap of stacked rows: targets, replacements (E, d), full_targets, full_replacements (M, d).

    concept (E,) and full_concept (M,): long, owner of each row; count: number of concepts; see rece_of().
    """
    groups = by_concept(targets, replacements, concept, count)
    full_groups = by_concept(full_targets, full_replacements, full_concept, count)
    return rece_of(groups, full_groups, preserve, weight_gram, **settings)
