"""Solves in the space of the rows, for text that is wider than there are rows: no (d, d) matrix is made.

With rows X (n, d) and G = l I + X^T X the rows X G^-1 are K^-1 X, where K = l I + X X^T is (n, n). Everything is
float64; rows that come in may be float32 and are widened some columns at a time.
"""

from functools import cached_property

import numpy as np
import torch

BLOCK = 1 << 23  # numbers to widen at a time, 64 MB
PANEL = 256  # rows to make orthonormal at a time
CLEAR = 0.03  # of a row's length outside the rows before it, from which there is no doubt
REPEATS = 1e-6  # of a row's length: what is left of a row that encoders gave before; they repeat to this


def outside(rows, basis):
    """The part of rows (E, d) outside the span of an orthonormal basis (d, r)."""
    return rows - (rows @ basis) @ basis.T


class Rows:
    """Rows X (n, d), read some columns at a time.

    blocks: (n_i, d) each, float32 or float64, at least one; basis: orthonormal, (d, h), or None; with it X is the part
    of the rows outside its span. precision: NumPy's type in which columns are multiplied; sums and results are float64.
    """

    def __init__(self, blocks, basis=None, precision=np.float64):
        self.precision = precision
        self.blocks = [block.detach().numpy() for block in blocks]
        self.basis = None if basis is None or not basis.shape[1] else basis.numpy()
        if self.basis is not None:
            self.inside = np.concatenate([block.astype(np.float64) @ self.basis for block in self.blocks])

    def __len__(self):
        return sum(map(len, self.blocks))

    @property
    def width(self):
        """d."""
        return self.blocks[0].shape[1]

    def columns(self, size):
        """Arrays (n, size) of X, from left to right, all in the same memory."""
        room = np.empty(len(self) * min(size, self.width), self.precision)
        for start in range(0, self.width, size):
            found = [block[:, start : start + size] for block in self.blocks]
            part = room[: len(self) * found[0].shape[1]].reshape(len(self), -1)
            np.concatenate(found, out=part)
            if self.basis is not None:
                part -= self.inside @ self.basis[start : start + size].T
            yield part

    @cached_property
    def square(self):
        """X X^T, (n, n), a tensor."""
        total, product = self._sums(len(self))
        for part in self.columns(_width(len(self))):
            total += np.matmul(part, part.T, out=product)  # half the work of a product of two matrices
        return torch.from_numpy(total)

    def times(self, other):
        """X Y^T, (n, m), a tensor, with other Rows Y (m, d) of the same precision."""
        size = _width(len(self) + len(other))
        total, product = self._sums(len(other))
        for x, y in zip(self.columns(size), other.columns(size)):
            total += np.matmul(x, y.T, out=product)
        return torch.from_numpy(total)

    def combined(self, weights):
        """weights X, (k, d), a tensor, of weights (k, n)."""
        weights, size = weights.numpy().astype(self.precision, copy=False), _width(len(self))
        found = np.empty((len(weights), self.width), self.precision)
        for start, part in zip(range(0, self.width, size), self.columns(size)):
            np.matmul(weights, part, out=found[:, start : start + size])
        return torch.from_numpy(found.astype(np.float64, copy=False))

    def _sums(self, columns):
        """Zeros (n, columns), and room for a product to add to them."""
        return np.zeros((len(self), columns)), np.empty((len(self), columns), self.precision)


def _width(count):
    """Number of columns to widen at a time of `count` rows."""
    return max(64, BLOCK // max(count, 1))


def row_ridge(targets, preserved, target_scale, preserve_scale, anchor):
    """sqrt(s) C G^-1, (n, d) float64, with G = anchor I + s C^T C + p R^T R: the right factor of UCE's map.

    targets: Rows C (n, d); preserved: Rows R (m, d) or None; target_scale s, preserve_scale p. The left factor is
    sqrt(s) (N - C)^T. Raises LinAlgError where G is numerically singular.
    """
    n, root = len(targets), target_scale**0.5
    system = target_scale * targets.square
    if preserved is not None:
        both, cross = (target_scale * preserve_scale) ** 0.5, targets.times(preserved)
        low = torch.cat([both * cross.T, preserve_scale * preserved.square], 1)
        system = torch.cat([torch.cat([system, both * cross], 1), low])
    system.diagonal().add_(anchor)
    factor = torch.linalg.cholesky(system)
    if anchor <= 0 or not torch.isfinite(factor.diagonal()).all():  # what is not finite spreads to the diagonal
        raise torch.linalg.LinAlgError("The ridge has no weight, and there are fewer rows than columns.")
    del system
    weights = torch.cholesky_solve(torch.eye(len(factor), n, dtype=torch.float64), factor).T
    rows = targets.combined(root * weights[:, :n])
    if preserved is not None:
        rows += preserved.combined(preserve_scale**0.5 * weights[:, n:])
    return rows


# ---------------------------------------------------------------- spans


def _orthonormal(rows):
    """(orthonormal rows (r, d) that span rows (n, d) of length 1 at most, without what only repeats; whether nothing
    of them was nearly lost, so that rounding was not made larger either)."""
    square = rows @ rows.T
    factor, failed = torch.linalg.cholesky_ex(square)
    if failed or not (factor.diagonal() > CLEAR).all():
        squares, vectors = torch.linalg.eigh(square)
        keep = squares > REPEATS**2
        return (vectors[:, keep] / squares[keep].sqrt()).T @ rows, False
    rows = torch.linalg.solve_triangular(factor, rows, upper=False)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(rows @ rows.T), rows, upper=False), True


def row_basis(rows, start=None):
    """Orthonormal basis (d, r) of the span of rows (F, d) and of an orthonormal basis `start` (d, h).

    Gram-Schmidt by panels, again where much was taken away: products of matrices, several times as fast as a QR of
    this shape. Every row counts by its direction; what is left of it outside the rows before it is dropped below
    REPEATS of its length.
    """
    rank = 0 if start is None else start.shape[1]
    basis = torch.empty(rank + len(rows), rows.shape[1], dtype=torch.float64)
    if rank:
        basis[:rank] = start.T
    for panel in rows.split(PANEL):
        part, clear = torch.nn.functional.normalize(panel.to(torch.float64)), False
        while not clear:
            part = outside(part, basis[:rank].T)
            part, clear = _orthonormal(part[part.norm(dim=1) > REPEATS])
        basis[rank : rank + len(part)] = part
        rank += len(part)
    return basis[:rank].T


def strong_basis(rows, tau, start=None):
    """Orthonormal basis (d, r) of the directions in which rows (F, d) have a mean square of at least tau > 0.

    start: orthonormal basis (d, h) or None; the rows count outside it, and the basis begins with it.
    """
    rows = Rows([rows], start)
    squares, vectors = torch.linalg.eigh(rows.square / len(rows))
    keep = squares >= max(tau, len(rows) * 1e-15 * squares[-1].item())
    found = rows.combined((vectors[:, keep] / (len(rows) * squares[keep]).sqrt()).T)
    if start is not None:
        found = torch.cat([start.T, found])
    return found.T
