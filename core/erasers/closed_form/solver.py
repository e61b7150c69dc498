"""The shared solver of the closed-form methods: Gram matrices, symmetric solves, protected spaces, minimal factors.

Everything is float64. Rows that come in may be float32 and are widened a batch at a time, so that the memory
needed does not grow with the number of preserved prompts.
"""

from hashlib import sha256

import numpy as np
import torch

from ...adapters.deltas.text_map import TextMap
from ...errors import ErasureError
from .row_space import outside, row_basis, strong_basis

RANK_TOLERANCE = 1e-7  # of the largest singular value; float32 storage cannot hold less
WIDE = 1024  # columns
WIDE_TEXT = 4096  # columns from which a QR of as many rows takes too long
SPAN_TOLERANCE = 1e-4  # part of a vector that must lie outside a space to count as outside; encoders repeat to 1e-6


def batch_size(width):
    """Rows to work on at a time: few next to a (width, width) matrix, enough for the full speed of products."""
    return max(256, width // 4)


def blocks_of(rows, size):
    """The rows, (F, d) or a sequence of (F_i, d), in lists of blocks of about `size` rows together."""
    waiting, count = [], 0
    for block in rows.split(size) if isinstance(rows, torch.Tensor) else rows:
        waiting.append(block)
        count += len(block)
        if count >= size:
            yield waiting
            waiting, count = [], 0
    if count:
        yield waiting


def batches(rows, size=None):
    """Float64 copies of the rows (F, d), a batch of `size` at a time, or of what fits (d, d) matrices."""
    for block in rows.split(size or batch_size(rows.shape[1])):
        yield block.to(torch.float64)


def gram(rows, scale=1.0):
    """scale * R^T R, (d, d) float64, of rows R (F, d) or a sequence of such, float32 or float64."""
    width = rows.shape[1] if isinstance(rows, torch.Tensor) else rows[0].shape[1]
    return (_wide_gram if width >= WIDE else _gram)(rows, width).mul_(scale)


def _gram(rows, width):
    total = torch.zeros(width, width, dtype=torch.float64)
    # a quarter: 5/8 of the products instead of all, and strips still wide enough for the full speed of products
    strip = max(128, width // 4)
    for blocks in blocks_of(rows, batch_size(width)):
        part = torch.cat(blocks).to(torch.float64)
        for i in range(0, width, strip):
            total[i:, i : i + strip].addmm_(part[:, i:].T, part[:, i : i + strip])
    for i in range(0, width, strip):  # the upper triangle is the lower one, a strip at a time
        block, end = total[i : i + strip, i : i + strip], i + strip
        block.tril_().add_(block.tril(-1).T)
        total[i:end, end:] = total[end:, i:end].T
    return total


def _wide_gram(rows, width):
    """By NumPy, which computes a matrix times its own transpose by half; torch has no such product. The threads of the
    two get in each other's way for a moment, so that it pays for wide rows only, and nothing here is left to torch."""
    total, product = np.zeros((width, width)), np.empty((width, width))
    for blocks in blocks_of(rows, width):
        part = np.concatenate([block.numpy() for block in blocks], dtype=np.float64)
        total += np.matmul(part.T, part, out=product)
    return torch.from_numpy(total)


class Ridge:
    """R -> R G^-1 for rows R (E, d) and a symmetric positive definite G, given by its Cholesky factor.

    count: how many rows will come. For many more than d an inverse, made once, takes half the work of solving.
    basis: orthonormal, (d, h), or None; only the part of the rows outside its span counts.
    """

    def __init__(self, factor, count, basis=None):
        self.factor = None if count > 2 * len(factor) else factor
        self.inverse = torch.cholesky_inverse(factor) if self.factor is None else None
        self.basis = basis

    def __call__(self, rows):
        rows = rows if self.basis is None else outside(rows, self.basis)
        return solve_rows(self.factor, rows) if self.inverse is None else rows @ self.inverse


def ridge(target_gram, preserve_gram, erase_scale, preserve_scale, anchor, count, basis=None):
    """Ridge of G = anchor I + erase_scale C^T C + preserve_scale R^T R, (d, d), for `count` rows; uses target_gram up.

    The matrix that UCE inverts (Gandikota et al. 2024, eq. 7), the same for every layer. basis: orthonormal, (d, h), of
    what the map must not touch, or None: the rows C and R then count outside its span. Raises when G is numerically
    singular.
    """
    system = target_gram.mul_(erase_scale).add_(preserve_gram, alpha=preserve_scale)
    if basis is not None:
        system = outside(outside(system, basis).T, basis)
    system.diagonal().add_(anchor)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed or not torch.isfinite(factor).all():
        raise unstable(anchor)
    return Ridge(factor, count, basis)


def unstable(anchor):
    """The error of a ridge that is numerically singular."""
    return ErasureError(
        f"The closed-form system has no stable solution with an anchor weight of {anchor:g}; "
        "raise the anchor weight (0.1 to 0.5 is usual) or the preserve scale."
    )


def solve_rows(factor, rows):
    """R G^-1, (E, d), of rows R (E, d) and the Cholesky factor of a symmetric G."""
    return torch.cholesky_solve(rows.T, factor).T


# ---------------------------------------------------------------- rows, grouped by concept


def by_concept(targets, replacements, concept, count):
    """Groups, the form the solvers take: for each concept a list of pairs (targets (r, d), replacements (r, d)).

    targets, replacements: (E, d); concept: (E,) long, owner of each row.
    """
    return [[(targets[concept == k], replacements[concept == k])] for k in range(count)]


def runs(groups):
    """Slices of consecutive concepts with about a batch of rows each."""
    start, rows = 0, 0
    for k, pairs in enumerate(groups):
        rows += sum(len(t) for t, _ in pairs)
        if rows >= batch_size(pairs[0][0].shape[1]):
            yield slice(start, k + 1)
            start, rows = k + 1, 0
    if start < len(groups):
        yield slice(start, len(groups))


def stacked(groups):
    """(targets (E, d), replacements (E, d), rows of each concept) of groups; float64."""
    targets = torch.cat([t for pairs in groups for t, _ in pairs]).to(torch.float64)
    replacements = torch.cat([r for pairs in groups for _, r in pairs]).to(torch.float64)
    return targets, replacements, group_sizes(groups)


def shared(groups):
    """(targets (E, d), replacements (u, d), index (E,), rows of each concept) of groups; float64.

    The replacement of target i is row index[i]: equal blocks of them, those of one surrogate, say, are there once.
    """
    known, found, index = {}, [], []
    for _, rows in (pair for pairs in groups for pair in pairs):
        key = rows.shape, rows.dtype, sha256(rows.contiguous().numpy()).digest()
        if key not in known:
            known[key] = sum(map(len, found))
            found.append(rows)
        index.append(torch.arange(len(rows)) + known[key])
    targets = torch.cat([t for pairs in groups for t, _ in pairs]).to(torch.float64)
    return targets, torch.cat(found).to(torch.float64), torch.cat(index), group_sizes(groups)


def cross_gram(groups):
    """sum over the rows of n^T c, (d, d) float64, of targets c and replacements n."""
    width = groups[0][0][0].shape[1]
    total = torch.zeros(width, width, dtype=torch.float64)
    for run in runs(groups):
        targets, replacements, index, _ = shared(groups[run])
        total.addmm_(replacements.T, torch.zeros_like(replacements).index_add_(0, index, targets))
    return total


def group_sizes(groups):
    """Number of target rows of each concept."""
    return [sum(len(t) for t, _ in pairs) for pairs in groups]


def as_blocks(rows):
    """Rows (F, d) or a sequence of (F_i, d) as a list of blocks with rows in them."""
    return [block for block in ([rows] if isinstance(rows, torch.Tensor) else rows) if len(block)]


def count_of(rows):
    """Number of rows, (F, d) or a sequence of (F_i, d)."""
    return sum(map(len, as_blocks(rows)))


# ---------------------------------------------------------------- what is to be protected


def fixed_basis(fixed):
    """Orthonormal basis (d, r) of the span of rows (h, d), each by its direction; None for none."""
    return None if fixed is None or not len(fixed) else row_basis(fixed)


def protected_basis(rows, tau=0.0, fixed=None):
    """Orthonormal basis Q (d, r) of the directions in which rows R (F, d) have a mean square of at least tau.

    P = I - Q Q^T is the null-space projector of SPEED (Li et al. 2026) and U2 U2^T of Double Projections. The
    mean squares are the eigenvalues of R^T R / F; with tau = 0 Q spans the rows up to rounding. Fewer rows than
    d: thin QR, and an SVD of its small factor only where it matters, or what row_space has for wide text; otherwise
    a symmetric eigendecomposition. fixed: rows (h, d) that Q spans too, whatever tau is; the mean squares are then
    those of the rows outside their span.
    """
    count, width = rows.shape
    start = fixed_basis(fixed)
    if not count:
        return torch.zeros(width, 0, dtype=torch.float64) if start is None else start
    if count < width and (start is not None or width >= WIDE_TEXT):
        return strong_basis(rows, tau, start) if tau else row_basis(rows, start)
    if start is not None:
        return torch.cat([start, protected_basis(outside(rows.to(torch.float64), start), tau)], 1)
    if count >= width:
        squares, vectors = torch.linalg.eigh(gram(rows, 1 / count))
        return vectors[:, squares >= max(tau, width * 1e-15 * squares[-1].item())]
    rows = rows.to(torch.float64)
    q, r = torch.linalg.qr(rows.T)
    if not tau and (r.diagonal().abs() > RANK_TOLERANCE * rows.norm(dim=1)).all():
        return q
    u, s, _ = torch.linalg.svd(r)
    return q @ u[:, (s.square() / count >= tau) & (s > RANK_TOLERANCE * s.max())]


def require_outside(targets, editable, owner, names, every=True):
    """Raise for the first target that its part outside the protected space does not reach.

    targets, editable: (E, d), the rows and their part outside; owner: concept of each row; names: concepts. every:
    else only for a concept none of whose rows reaches outside, as where rows are taken that may carry little of it.
    """
    inside = editable.norm(dim=1) <= SPAN_TOLERANCE * targets.norm(dim=1)
    if not every:
        reaching = set(owner[~inside].tolist())
        inside &= torch.tensor([k not in reaching for k in owner.tolist()], dtype=torch.bool)
    if inside.any():
        name = names[owner[int(inside.nonzero()[0])]]
        raise ErasureError(
            f'The concept "{name}" lies in the span of what is to be preserved, so nothing is left to erase it by; '
            "take what is close to it off the preserve list, preserve fewer prompts or raise tau."
        )


# ---------------------------------------------------------------- factors


def minimal_terms(a, b):
    """(A' (d, r), B' (r, d), s (r,)) with A' B' = A B: orthogonal columns, norms s falling, balanced; float64.

    a: (d, n), b: (n, d). s are the singular values of A B, to about 1e-8 of the largest. With B^T = Q R and
    H = A R^T the rotation V of the eigenvectors of H^T H gives A B = (H V)(V^T Q^T), exact whatever the error
    of V: much cheaper than a QR of both sides and an SVD.
    """
    q, r = torch.linalg.qr(b.T)
    h = a @ r.T
    v = torch.linalg.eigh(h.T @ h)[1].flip(1)
    h = h @ v
    s = h.norm(dim=0)
    root = s.sqrt()
    return h / root.clamp_min(torch.finfo(torch.float64).tiny), root[:, None] * (v.T @ q.T), s


def text_map(terms, sizes, width):
    """TextMap of sum_k A_k B_k with as few terms as float32 needs, one group of terms per concept.

    terms: iterable over concepts of (A_k (width, n_k), B_k (n_k, width)), float64, used up one by one;
    sizes: the n_k.
    """
    room = sum(min(n, width) for n in sizes)
    # terms as rows of both, so that what is not written takes no memory and dropping some needs no second copy
    a, b, values = torch.empty(room, width), torch.empty(room, width), torch.zeros(room, dtype=torch.float64)
    owners, largest = [], 0.0
    for k, (ak, bk) in enumerate(terms):
        ak, bk, s = minimal_terms(ak, bk)
        largest = max(largest, s[0].item() if len(s) else 0.0)  # falling, so those to keep come first
        count = int((s > RANK_TOLERANCE * largest).sum())
        mine = slice(len(owners), len(owners) + count)
        a[mine], b[mine], values[mine] = ak.T[:count], bk[:count], s[:count]
        owners += [k] * count
    keep = (values[: len(owners)] > RANK_TOLERANCE * largest).nonzero().flatten().tolist()
    for rows in (a, b):
        for new, old in enumerate(keep):
            if new != old:
                rows[new] = rows[old]
    a, b = a[: len(keep)], b[: len(keep)]
    if 2 * len(keep) < room:
        a, b = a.clone(), b.clone()  # else the whole room stays reserved
    return TextMap(a.T, b, tuple(owners[i] for i in keep))
