"""What a method needs to know of the layers that read the text: S = sum_l W_l^T W_l, in the form that suits them."""

import numpy as np
import torch

from .row_space import Rows
from .solver import WIDE_TEXT, gram, solve_rows

PIVOT = 1e-8  # smallest over largest pivot of a system that counts as solvable
FINE = 1e-5  # a correction that is this small leaves 1e-6 at most, for it is at most a tenth of the one before


class LayerGram:
    """S of layers with fewer outputs together than the text is wide, by the layers W (o, d) themselves.

    weights: (o_l, d) each. rough, in what follows: whether products with W are made in float32, in half the time, and
    right to 1e-7 of the lengths of what is multiplied.
    """

    def __init__(self, weights):
        self.weights = list(weights)
        self.rows, self.rough = Rows(self.weights), Rows(self.weights, precision=np.float32)

    def __len__(self):
        return self.rows.width

    @property
    def single(self):
        """Whether the weights are no more precise than float32."""
        return all(weight.dtype == torch.float32 for weight in self.weights)

    def square(self, rough=False):
        """W W^T, (o, o) float64."""
        return self._rows(rough).square

    def heard(self, rows, rough=False):
        """What the layers make of rows x (E, d): W x, (E, o) float64."""
        layers = self._rows(rough)
        return Rows([rows], precision=layers.precision).times(layers)

    def back(self, heard, rough=False):
        """y W, (E, d) float64, of rows y (E, o)."""
        return self._rows(rough).combined(heard)

    def loudness(self, rows):
        """sum_l ||W_l x||^2 of each of the rows x (E, d), (E,)."""
        return self.heard(rows).square().sum(dim=1)

    def dense(self):
        """S, (d, d) float64."""
        return gram(self.weights)

    def _rows(self, rough):
        return self.rough if rough else self.rows


def layer_gram(weights, outputs, on_layer=None):
    """S of weights (o_l, d), float32, that come one by one: (d, d) float64, or a LayerGram where the text is wide and
    the layers have fewer outputs than it; outputs: sum of the o_l. on_layer(done): called after each."""
    total, kept = None, []
    for i, weight in enumerate(weights):
        if weight.shape[1] >= WIDE_TEXT and outputs < weight.shape[1]:
            kept.append(weight)
        else:
            weight = weight.double()
            product = weight.T @ weight
            total = product if total is None else total + product
        if on_layer:
            on_layer(i + 1)
    return LayerGram(kept) if kept else total


class LowRankMap:
    """P = I + sum A_k B_k of factors A (d, n), B (n, d), and the layers V = W P that it makes of layers W, without
    either.

    layers: LayerGram.
    """

    def __init__(self, layers):
        self.layers, self.pairs, self.heard = layers, [], {}

    def add(self, a, b):
        """P -> P + A B."""
        self.pairs.append((a, b))

    def of(self, rows):
        """P x, (E, d), of rows x."""
        return rows + sum((rows @ b.T) @ a.T for a, b in self.pairs)

    def transposed(self, rows):
        """P^T x, (E, d), of rows x."""
        return rows + sum((rows @ a) @ b for a, b in self.pairs)

    def square(self, rough=False):
        """V V^T, (o, o) = W W^T + W A B W^T + (W A B W^T)^T + W A B B^T A^T W^T; rough: see LayerGram."""
        b = torch.cat([b for _, b in self.pairs])
        heard_a, heard_b = self._heard(rough)
        mixed = (heard_b + 0.5 * (b @ b.T) @ heard_a).T @ heard_a
        return (self.layers.square(rough) + mixed).add_(mixed.T)

    def _heard(self, rough):
        """W A and W B^T, (n, o) each; of factors that were there before, as they were found then."""
        known = self.heard.setdefault(rough, [])
        known += [[self.layers.heard(x, rough) for x in (a.T, b)] for a, b in self.pairs[len(known) :]]
        return (torch.cat(part) for part in zip(*known))

    def ridge(self, heard, weight, rough=False):
        """V^T (k I + V V^T)^-1 h, (E, d), of rows h (E, o) and k = weight > 0; LinAlgError where that is singular.

        rough: by a V V^T and a factor of it in float32, whose solution is then refined with V in float64 (Higham,
        "Accuracy and Stability of Numerical Algorithms", ch. 12) until what is left matters less than 1e-6; LinAlgError
        too where it does not get better so.
        """
        system = self.square(rough)
        system.diagonal().add_(weight)
        factor = torch.linalg.cholesky(system.float() if rough else system)
        del system
        pivots = factor.diagonal().square()
        if min(pivots.min(), weight) < PIVOT * pivots.max():
            raise torch.linalg.LinAlgError("The layers' ridge has almost no weight.")
        step = solve_rows(factor, heard.to(factor.dtype)).double()
        if not rough:
            return self.transposed(self.layers.back(step))
        found, whole = 0.0, 0.0
        while (step.norm(dim=1) > FINE * (whole + step).norm(dim=1)).any():
            found, whole, size = found + self.transposed(self.layers.back(step)), whole + step, step.norm(dim=1)
            left = heard - weight * whole - self.layers.heard(self.of(found))
            step = solve_rows(factor, left.float()).double()
            if not (step.norm(dim=1) <= 0.1 * size).all():
                raise torch.linalg.LinAlgError("The layers' weights are too uneven for float32.")
        return found + self.transposed(self.layers.back(step, rough))

    def inverse_of(self, rows):
        """P^-1 x, (E, d), of rows x, and the smallest over the largest pivot of I + B A, whose determinant is P's."""
        a, b = torch.cat([a for a, _ in self.pairs], 1), torch.cat([b for _, b in self.pairs])
        factor, pivots, failed = torch.linalg.lu_factor_ex(torch.eye(len(b), dtype=torch.float64) + b @ a)
        size = factor.diagonal().abs()
        if failed or size.min() == 0:
            return rows, 0.0
        return rows - torch.linalg.lu_solve(factor, pivots, b @ rows.T).T @ a.T, (size.min() / size.max()).item()
