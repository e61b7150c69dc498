"""SPEED (Li et al., ICLR 2026), null-space editing under equality constraints, in its weight-free form.

As published: the objective, the null space of the retained set with its threshold tau, the invariant equality
constraints and their Lagrange solution. Different: the prior filter scores ||D c0|| with D = (A - T)(I + T)^-1
instead of W D, so that one map serves every layer (the paper's ablation finds even a filter by text similarity
nearly as good). Directed prior augmentation, which needs W, is an edition of its own; it scores ||W D c0||, see
augmentation.py.
"""

from dataclasses import asdict, dataclass
from functools import partial

import torch

from ...errors import ErasureError
from .augmentation import drawn, heard_lengths, quietest
from .groups import ALL, AUGMENTED, FIRST, SUBJECT, carrying, preserved_rows, spreads, token_groups
from .method import Method
from .row_space import Rows, outside, row_ridge
from .solver import batches, gram, group_sizes, protected_basis, require_outside, stacked, text_map

CENTROIDS = 3  # of the empty prompt's rows after the start token, as published
KMEANS_ROUNDS = 25
STARTS = 20  # of k-means in the edition of 2025: its own start, and random ones
BATCH = 256  # retained rows to score at a time next to few targets


def prior_scores(retained, targets, changes, weight_gram=None):
    """Influence of the erasure on retained rows (F, d): ||(A - T)(I + T)^-1 c0||, (F,) float64.

    weight_gram: S (d, d) or LayerGram of the layers W, whose outputs' lengths ||W (A - T)(I + T)^-1 c0|| then count.
    targets C1, changes C* - C1: (N, d). T = C1^T C1 / N and A - T = (C* - C1)^T C1 / N, the means over concepts.
    Fewer targets than d: C1 (I + T)^-1 = (I + C1 C1^T / N)^-1 C1.
    """
    count, width = targets.shape
    if count < width:
        inner = Rows([targets]).square / count
        inner.diagonal().add_(1.0)
        rows = torch.cholesky_solve(targets, torch.linalg.cholesky(inner)).div_(count).T
        return torch.cat([_lengths(batch @ rows @ changes, weight_gram) for batch in batches(retained, BATCH)])
    inner = gram(targets, 1 / count)
    inner.diagonal().add_(1.0)
    rows = torch.cholesky_solve(targets.T, torch.linalg.cholesky(inner)) @ changes / count  # D^T
    return torch.cat([_lengths(batch @ rows, weight_gram) for batch in batches(retained)])


def _lengths(rows, weight_gram):
    return rows.norm(dim=1) if weight_gram is None else heard_lengths(rows, weight_gram)


def influential(retained, targets, changes, weight_gram=None):
    """The retained rows with a score above the mean (influence-based prior filtering); all where none is."""
    scores = prior_scores(retained, targets, changes, weight_gram)
    keep = scores > scores.mean()
    return retained[keep] if keep.any() else retained


def centroids(rows, count=CENTROIDS, starts=1):
    """K-means centroids (min(count, n), d) of rows (n, d).

    The first start is the mean's nearest row and the farthest ones, the others are rows drawn with a fixed seed; of all
    starts the one with the smallest sum of squared distances counts.
    """
    chosen = [int((rows - rows.mean(0)).norm(dim=1).argmin())]
    while len(chosen) < min(count, len(rows)):
        chosen.append(int(torch.cdist(rows, rows[chosen]).amin(1).argmax()))
    draw = torch.Generator().manual_seed(0)
    drawn = [torch.randperm(len(rows), generator=draw)[: len(chosen)].tolist() for _ in range(starts - 1)]
    found = [_lloyd(rows, rows[places]) for places in (chosen, *drawn)]
    return min(found, key=lambda means: torch.cdist(rows, means).amin(1).square().sum().item())


def _lloyd(rows, means):
    """Means of the rows that are nearest to each of some means, and again."""
    for _ in range(KMEANS_ROUNDS):
        nearest = torch.cdist(rows, means).argmin(1)
        means = torch.stack([rows[nearest == i].mean(0) if (nearest == i).any() else m for i, m in enumerate(means)])
    return means


def invariants(empty, starts=1):
    """The vectors (4, d) that SPEED never changes, of the empty prompt's rows (T, d): start token and centroids."""
    empty = empty.to(torch.float64)
    return torch.cat([empty[:1], centroids(empty[1:], starts=starts)]) if len(empty) > 1 else empty


def held_rows(fixed, basis, lam):
    """Rows (m, d) in the editable space that stand for the constraints dW C2 = 0 on fixed rows C2 (n, d).

    P C2, or for exact constraints (lam = 0) an orthonormal basis of its span, on which alone they depend: C2
    itself may be dependent or protected already.
    """
    held = outside(fixed, basis)
    if lam or not len(held):
        return held
    u, s, _ = torch.linalg.svd(held.T, full_matrices=False)
    return u[:, s > 1e-6 * fixed.norm(dim=1).max()].T


def constrained_rows(editable, held, rho, lam):
    """Rows c1^T P Q M, (N, d): the right side of SPEED's solution.

    editable: P C1 (N, d); held: P C2 (m, d) or a basis of it. With M = (T P + rho I)^-1 the matrix
    Z = P M = (P T P + rho I)^-1 P is symmetric, and P Q M = Z - Z C2 (C2^T Z C2 + lam I)^-1 C2^T Z.
    """
    count = len(editable)
    if count + len(held) < editable.shape[1]:
        return _rows_of_few(editable, held, rho, lam)
    system = gram(editable, 1 / count)
    system.diagonal().add_(rho)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed or rho <= 0:
        raise unstable(rho)
    rows = torch.cholesky_solve(editable.T, factor).T
    if not len(held):
        return rows
    z = torch.cholesky_solve(held.T, factor)  # Z C2
    inner = held @ z
    inner = (inner + inner.T) / 2
    inner.diagonal().add_(lam)
    return rows - (torch.cholesky_solve(z.T, torch.linalg.cholesky(inner)).T @ (held @ rows.T)).T


def _rows_of_few(editable, held, rho, lam):
    """The same in the space of the rows: constraints with slack are rows of weight 1 / lam, exact ones leave what is
    outside them."""
    slack = Rows([held]) if lam and len(held) else None
    targets = editable if lam else outside(editable, held.T)
    count = len(editable)
    try:
        rows = row_ridge(Rows([targets]), slack, 1 / count, 1 / lam if lam else 0.0, rho)
    except torch.linalg.LinAlgError:
        raise unstable(rho) from None
    return rows * count**0.5


def unstable(rho):
    """The error of a ridge that is numerically singular."""
    return ErasureError(
        f"SPEED has no stable solution with rho {rho:g}; use a rho above 0 (1 for objects and styles, 0.05 for "
        "many people, 0.7 for nudity)."
    )


def speed_terms(
    groups,
    retained,
    empty,
    *,
    tau=0.1,
    rho=1.0,
    lam=0.0,
    prior_filter=True,
    names=None,
    fixed=None,
    every=True,
    starts=1,
    weight_gram=None,
):
    """For each concept factors A (d, n), B (n, d), float64, with W_new = W (I + sum A B); see speed_of()."""
    targets, replacements, sizes = stacked(groups)
    changes = replacements - targets
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    if prior_filter and len(retained):
        retained = influential(retained, targets, changes, weight_gram)
    if weight_gram is not None and len(retained):
        scores_of = partial(prior_scores, targets=targets, changes=changes, weight_gram=weight_gram)
        retained = torch.cat([retained, drawn(retained, quietest(weight_gram), scores_of)])
    basis = protected_basis(retained, tau, fixed)
    editable = outside(targets, basis)
    held = held_rows(invariants(empty, starts), basis, lam)
    reachable = editable if lam else outside(editable, held.T)
    require_outside(targets, reachable, owner, names or range(1, len(sizes) + 1), every)
    rows = constrained_rows(editable, held, rho, lam)
    return zip((changes.T / len(targets)).split(sizes, 1), rows.split(sizes))


def speed_of(groups, retained, empty, **settings):
    """TextMap of SPEED: W -> W + W (A - T) P Q M as terms (c*_i - c_i)/N x (c_i^T P Q M).

    groups: by concept, pairs (targets (r, d), anchors (r, d)); retained: (F, d), the rows to leave as they are,
    possibly none; empty: (T, d), rows of the empty prompt. settings: tau, from which mean square on a direction
    of the retained set is protected; rho, the ridge; lam, slack of the constraints on the start token and the
    empty prompt (0: exact); prior_filter; names, of the concepts, for messages; fixed, rows (h, d) on which the map
    must vanish whatever tau and lam are; every, see require_outside(); starts, of k-means; weight_gram, S (d, d) or
    LayerGram of the layers, for directed prior augmentation, None without it. The defaults are those of objects and
    styles; people: tau 1e-4, rho 0.05, no filter; nudity: tau 0.1, rho 0.7, lam 0.5, all rows.
    """
    terms = speed_terms(groups, retained, empty, **settings)
    return text_map(terms, group_sizes(groups), retained.shape[1])


@dataclass(frozen=True)
class Settings:
    """tau: the mean square from which a direction of the preserved vectors is protected; rho: the ridge; lam: slack of
    what the start token and the empty prompt keep; prior_filter: protect only what the erasure would disturb; tokens:
    the vector of the last "subject" token of each prompt, or of "all" tokens but the start token."""

    tau: float = 0.1
    rho: float = 1.0
    lam: float = 0.0
    prior_filter: bool = True
    tokens: str = SUBJECT


def by_captions(carrying, settings):
    """{"rho"} for rows that share a caption's weight: rho is published for means over captions of one row each, and
    the solution takes its means over rows, which are so many times as many and so much shorter together."""
    pairs = [pair for group in carrying.groups for pair in group]
    return {"rho": settings["rho"] * len(pairs) / max(1, sum(len(targets) for targets, _ in pairs))}


def solve(job, encoded, weight_gram=None, on_round=None):
    """TextMap of a job, see Method.

    The published script sums T and A - T over all rows of a prompt and divides by the number of prompts, and its
    k-means ends in the best of several optima: the edition of 2025. The first edition divides by the number of rows.
    Directed prior augmentation acts where there is a weight_gram, which is at the entry that the layers read.
    """
    settings = {name: value for name, value in asdict(job.settings).items() if name != "tokens"}
    settings["names"] = [concept.text for concept in job.concepts]
    if spreads(job, encoded):
        found = carrying(job, encoded, job.retained_captions())
        retained = torch.cat([*found.preserved.values(), *found.replacing, found.empty[:0]])
        settings |= by_captions(found, settings)
        return speed_of(found.groups, retained, found.empty, fixed=found.fixed, every=False, **settings)
    tokens = job.settings.tokens
    groups, retained = token_groups(job, encoded, tokens), preserved_rows(job, encoded, job.retained_captions(), tokens)
    if job.edition != FIRST:
        groups = summed(groups) if tokens == ALL else groups
        settings |= {"starts": STARTS, "weight_gram": weight_gram if job.edition == AUGMENTED else None}
    return speed_of(groups, retained, encoded[""].rows, **settings)


def summed(groups):
    """Groups whose means over rows are the sums over the rows of a prompt, as means over the prompts."""
    factor = (sum(group_sizes(groups)) / sum(map(len, groups))) ** 0.5
    return [[(targets * factor, replacements * factor) for targets, replacements in pairs] for pairs in groups]


# of the published script
OBJECT = {"tau": 0.1, "rho": 1.0, "lam": 0.0, "prior_filter": True, "tokens": SUBJECT}
PRESETS = {
    "object": OBJECT,
    "style": OBJECT,
    "person": OBJECT | {"tau": 1e-4, "rho": 0.05, "prior_filter": False},
    "nudity": OBJECT | {"rho": 0.7, "lam": 0.5, "tokens": ALL},
}
SPEED = Method("SPEED", Settings, solve, lambda job: job.edition == AUGMENTED, PRESETS)
