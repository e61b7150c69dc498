"""Reliable and Efficient Concept Erasure (Gong et al., ECCV 2024) on one d x d map.

The published loop edits every cross-attention matrix; with W_l -> W_l P for all of them it only
needs P and the Gram matrix S of the original weights.
"""

import torch

from ..errors import ErasureError
from .text_map import (
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
from .uce import uce_factor, uce_terms

PENALTIES = ("length", "outputs", "distance", "both", "replacement")  # what the penalty is on, see derivation()


def derivation(weight_gram, p, penalty, penalty_on="length"):
    """(K, L), each (d, d), L may be None: c' = K c + L n makes the edited layers W P answer like the original to c.

    argmin sum_l ||W_l P c' - W_l c||^2 + penalty times one of these (RECE eq. 4; the published code's names), with
    S = sum_l W_l^T W_l, A = P^T S P, B = P^T S. All float64.

        length       ||c'||^2 (regzero): K = (penalty I + A)^-1 B
        distance     ||c' - c||^2 (surrogate, 2nd): K = (penalty I + A)^-1 (B + penalty I)
        outputs      sum_l ||W_l P (c' - c)||^2 (surrogate, 1st): K = ((1 + penalty) A)^-1 (B + penalty A)
        both         the sum of the two before: K = (penalty I + (1 + penalty) A)^-1 (B + penalty (I + A))
        replacement  ||c' - n||^2 (standard), n the replacement: K = (penalty I + A)^-1 B, L = (...)^-1 penalty I
    """
    if penalty_on == "outputs":
        return _unpenalised_size(p, penalty), None
    right = p.T @ weight_gram
    system = right @ p  # symmetric up to rounding; the factorisation reads one triangle
    if penalty_on == "both":
        right.add_(system, alpha=penalty)
        system.mul_(1 + penalty)
    system.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(system)
    del system
    pivots = factor.diagonal().square()
    if failed or pivots.min() < 1e-8 * pivots.max():
        raise ErasureError(
            f"RECE cannot derive its embeddings with a penalty of {penalty:g}: the edited layers are nearly singular; "
            "raise the penalty (0.1 for easy concepts, 0.001 for hard ones) or take fewer epochs."
        )
    if penalty_on in ("distance", "both"):
        right.diagonal().add_(penalty)
    anchored = penalty * torch.cholesky_inverse(factor) if penalty_on == "replacement" else None
    return torch.cholesky_solve(right, factor, out=right), anchored


def _unpenalised_size(p, penalty):
    """K of the penalty on outputs, (P^-1 + penalty I) / (1 + penalty): A^-1 B = P^-1, whatever the weights are."""
    factor, pivots, failed = torch.linalg.lu_factor_ex(p)
    size = factor.diagonal().abs()
    if failed or size.min() < 1e-12 * size.max():
        raise ErasureError(
            'RECE cannot derive its embeddings with a penalty on "outputs", because the edited layers have no '
            'inverse; put the penalty on "length" or take fewer epochs.'
        )
    k = torch.linalg.lu_solve(factor, pivots, torch.eye(len(p), dtype=p.dtype))
    k.diagonal().add_(penalty)
    return k / (1 + penalty)


def derived_embeddings(concepts, weight_gram, p, penalty, penalty_on="length", replacements=None):
    """Vectors c' (E, d) of concepts c (E, d); replacements n (E, d) where the penalty is on them; see derivation()."""
    return _derived(concepts, replacements, *derivation(weight_gram, p, penalty, penalty_on))


def _derived(targets, replacements, k, anchored):
    derived = targets @ k.T
    return derived if anchored is None else derived.addmm_(replacements, anchored.T)


def rece_terms(
    groups,
    full_groups,
    preserve_gram,
    weight_gram,
    *,
    epochs=1,
    penalty=0.1,
    penalty_on="length",
    edit_anchor=0.1,
    edit_preserve_scale=0.1,
    on_epoch=None,
    erase_scale=1.0,
    **uce_scales,
):
    """For each concept factors A (d, n), B (n, d), float64, of UCE followed by RECE; see rece_of().

    Only d x d matrices are kept over the epochs: the map P, the derivation and the Cholesky factor of each.
    The rows are made anew for a few concepts at a time.
    """
    start = uce_factor(groups, preserve_gram, erase_scale=erase_scale, **uce_scales)
    p, steps = solve_rows(start, change_product(groups).mul_(erase_scale)), []
    p.diagonal().add_(1.0)
    for epoch in range(epochs):
        maps = derivation(weight_gram, p, penalty, penalty_on)
        derived_gram = gram_of(derived_rows(full_groups, maps), len(p))
        factor = ridge_factor(derived_gram, preserve_gram, 1.0, edit_preserve_scale, edit_anchor)
        steps.append((p, maps, factor))
        if epoch + 1 < epochs:
            p = p + p @ solve_rows(factor, change_product(full_groups, maps))
        if on_epoch:
            on_epoch(epoch + 1)
    del preserve_gram, derived_gram
    for run in runs(full_groups):
        targets, replacements, sizes = stacked(full_groups[run])
        parts = []
        for p, maps, factor in steps:
            derived = _derived(targets, replacements, *maps)
            rows = solve_rows(factor, derived)
            changes = p @ torch.sub(replacements, derived, out=derived).T
            parts.append(zip(changes.split(sizes, 1), rows.split(sizes)))
        del targets, replacements, derived  # not needed while the terms are used up
        for mine in zip(uce_terms(groups[run], start, erase_scale), *parts):
            yield torch.cat([a for a, _ in mine], 1), torch.cat([b for _, b in mine])


def derived_rows(groups, maps):
    """The derived embeddings c' = K c + L n of all target rows, a few concepts at a time."""
    for run in runs(groups):
        targets, replacements, _ = stacked(groups[run])
        yield _derived(targets, replacements, *maps)


def change_product(groups, maps=None):
    """sum over the rows of (n - c')^T c', (d, d), with c' = K c + L n, or c itself without maps."""
    width = groups[0][0][0].shape[1]
    total = torch.zeros(width, width, dtype=torch.float64)
    for run in runs(groups):
        targets, replacements, _ = stacked(groups[run])
        derived = targets if maps is None else _derived(targets, replacements, *maps)
        total.addmm_((replacements - derived).T, derived)
    return total


def rece_of(groups, full_groups, preserve, weight_gram, *, epochs=1, **settings):
    """TextMap of UCE followed by `epochs` rounds of RECE.

    groups, preserve: as for uce_of(). full_groups: every row of the concepts' embeddings and of their
    replacements at the same places (no slicing at the last subject token here, as published). weight_gram:
    S (d, d) of the unedited key and value matrices. settings: penalty, penalty_on (one of PENALTIES), edit_anchor,
    edit_preserve_scale, those of UCE, and on_epoch, which is called with the number of finished epochs.
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
