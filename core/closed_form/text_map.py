"""The shared solver of the closed-form methods."""

import torch

from ..adapter import TextMap
from ..errors import ErasureError

RANK_TOLERANCE = 1e-7  # of the largest singular value; float32 storage cannot hold less


def ridge_rows(targets, preserve_gram, erase_scale, anchor):
    """Rows V = C (anchor I + erase_scale C^T C + preserve_gram)^-1, (E, d), for targets C (E, d); float64.

    The inverse is that of UCE (Gandikota et al. 2024, eq. 7), the same for every layer; solved by
    Cholesky, never inverted. Raises when the matrix is numerically singular.
    """
    d = targets.shape[1]
    gram = anchor * torch.eye(d, dtype=targets.dtype) + erase_scale * targets.T @ targets + preserve_gram
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed or not torch.isfinite(factor).all():
        raise ErasureError(
            f"The closed-form system has no stable solution with an anchor weight of {anchor:g}; "
            "raise the anchor weight (0.1 to 0.5 is usual) or the preserve scale."
        )
    return torch.cholesky_solve(targets.T, factor).T


def gram(rows, scale=1.0):
    """scale * R^T R, (d, d), of rows R (F, d)."""
    return scale * rows.T @ rows


def compress(a, b, concept, count):
    """TextMap of sum_k A_k B_k with as few terms as float32 needs, one group of terms per concept.

    a: (d, n), b: (n, d), float64; concept: (n,) long, owner of each term; count: number of concepts.
    """
    parts, largest = [], 0.0
    for k in range(count):
        mine = concept == k
        qa, ra = torch.linalg.qr(a[:, mine])
        qb, rb = torch.linalg.qr(b[mine].T)
        u, s, vh = torch.linalg.svd(ra @ rb.T)
        parts.append((qa @ u[:, : len(s)] * s.sqrt(), s.sqrt()[:, None] * (vh[: len(s)] @ qb.T), s))
        largest = max(largest, s[0].item() if len(s) else 0.0)
    keep = [s > largest * RANK_TOLERANCE for _, _, s in parts]
    owners = [k for k, kept in enumerate(keep) for _ in range(int(kept.sum()))]
    return TextMap(
        torch.cat([p[0][:, m] for p, m in zip(parts, keep)], dim=1).float(),
        torch.cat([p[1][m] for p, m in zip(parts, keep)]).float(),
        tuple(owners),
    )
