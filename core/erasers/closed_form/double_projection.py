"""Double Projections (CVPR 2026): the concept is projected on what is safe, the update on what is not preserved."""

from dataclasses import dataclass

import torch

from .groups import SUBJECT, carrying, preserved_rows, safe_surrogates, spreads, token_groups
from .method import Method
from .row_space import outside, row_basis
from .solver import (
    RANK_TOLERANCE,
    WIDE_TEXT,
    group_sizes,
    protected_basis,
    require_outside,
    stacked,
    text_map,
)


def span(rows, tau, fixed=None):
    """Orthonormal basis (d, r) of the span of rows (F, d), cut at the mean square tau when they fill the space; and of
    fixed rows (h, d), uncut."""
    return protected_basis(rows, tau if len(rows) >= rows.shape[1] else 0.0, fixed)


def safe_span(safe, tau, retained, basis, fixed=None):
    """span() of safe rows (G, d) and of the fixed ones; basis: that of the retained rows (F, d), from which it goes on
    where the text is wide and the safe rows begin with the retained ones."""
    count, width = len(retained), safe.shape[1]
    if width >= WIDE_TEXT and len(safe) < width and torch.equal(safe[:count], retained):
        return row_basis(safe[count:], basis)
    return span(safe, tau, fixed)


def safe_anchors(targets, basis):
    """c* = S (S^T S)^+ S^T c, (N, d): the part of targets (N, d) that safe rows can express, by a basis (d, r)."""
    return (targets @ basis) @ basis.T


def pseudo_inverse_rows(editable):
    """(X^+) (N, d) of X = editable^T (d, N), cut where singular values are rounding noise."""
    q, r = torch.linalg.qr(editable.T)
    u, s, vh = torch.linalg.svd(r, full_matrices=False)
    keep = s > 10 * RANK_TOLERANCE * s.max()
    return (vh[keep].T / s[keep]) @ (q @ u[:, keep]).T


def double_projection_terms(groups, retained, *, safe=None, tau=0.1, names=None, fixed=None, every=True):
    """For each concept factors A (d, n), B (n, d), float64, with W_new = W (I + sum A B); see below."""
    targets, replacements, sizes = stacked(groups)
    basis = span(retained, tau, fixed)
    anchors = replacements
    if safe is not None:
        anchors = safe_anchors(targets, safe_span(safe, tau, retained, basis, fixed))
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    editable = outside(targets, basis)
    require_outside(targets, editable, owner, names or range(1, len(sizes) + 1), every)
    return zip((anchors - targets).T.split(sizes, 1), pseudo_inverse_rows(editable).split(sizes))


def double_projection_of(groups, retained, **settings):
    """TextMap of Double Projections: E = (C* - C1)(U2^T C1)^+ U2^T.

    U2 spans the orthogonal complement of the retained rows, so that (U2^T C1)^+ U2^T = ((I - Q Q^T) C1)^+ with an
    orthonormal basis Q of their span: exact on the targets, nothing on the retained. groups: by concept, pairs
    (targets (r, d), anchors (r, d)); retained: (F, d), possibly none. settings: safe, rows (G, d) on whose span, with
    that of the fixed ones, the targets are projected to get their anchors (the published anchor; those in groups
    without it); tau: with d or more retained rows, directions in which their mean square is below it are given up
    (the published truncation for large sets); names, of the concepts, for messages; fixed, rows (h, d) on
    which the map must vanish whatever tau is; every, see require_outside().
    """
    width = groups[0][0][0].shape[1]
    return text_map(double_projection_terms(groups, retained, **settings), group_sizes(groups), width)


@dataclass(frozen=True)
class Settings:
    """tau: for preserve lists with as many vectors as the text is wide; safe_anchor: replace by what the preserved
    vectors and the surrogates can express of the concept (published) instead of by the surrogate; tokens: as for
    SPEED."""

    tau: float = 0.1
    safe_anchor: bool = True
    tokens: str = SUBJECT


def solve(job, encoded, weight_gram=None, on_round=None):
    """TextMap of a job, see Method."""
    settings = {"tau": job.settings.tau, "names": [concept.text for concept in job.concepts]}
    if spreads(job, encoded):
        found = carrying(job, encoded)
        groups, retained = found.groups, torch.cat([*found.preserved.values(), *found.replacing])
        settings |= {"fixed": found.fixed, "every": False}
    else:
        tokens = job.settings.tokens
        groups, retained = token_groups(job, encoded, tokens), preserved_rows(job, encoded, job.captions(), tokens)
    safe = torch.cat([retained, *safe_surrogates(job, groups)]) if job.settings.safe_anchor else None
    return double_projection_of(groups, retained, safe=safe, **settings)


PRESET = {"tau": 0.1, "tokens": SUBJECT}  # no kinds are published
PRESETS = dict.fromkeys(("object", "style", "person", "nudity"), PRESET)
DOUBLE_PROJECTIONS = Method("Double Projections", Settings, solve, presets=PRESETS, finds_surrogate=True)
