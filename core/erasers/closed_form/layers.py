"""What a method needs to know of the layers that read the text: S = sum_l W_l^T W_l, in the form that suits them."""

import torch

from .row_space import Rows
from .solver import WIDE_TEXT, gram


class LayerGram:
    """S of layers with fewer outputs together than the text is wide, by the layers W (o, d) themselves.

    weights: (o_l, d) each, float32.
    """

    def __init__(self, weights):
        self.weights = list(weights)
        self.rows = Rows(self.weights)

    def __len__(self):
        return self.rows.width

    @property
    def square(self):
        """W W^T, (o, o) float64."""
        return self.rows.square

    def heard(self, rows):
        """What the layers make of rows x (E, d): W x, (E, o) float64."""
        return Rows([rows]).times(self.rows)

    def back(self, heard):
        """y W, (E, d) float64, of rows y (E, o)."""
        return self.rows.combined(heard)

    def loudness(self, rows):
        """sum_l ||W_l x||^2 over rows x (E, d)."""
        return self.heard(rows).square().sum()

    def dense(self):
        """S, (d, d) float64."""
        return gram(self.weights)


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
    """P = I + sum A_k B_k of factors A (d, n), B (n, d), and the layers W P that it makes of layers W, without either.

    layers: LayerGram.
    """

    def __init__(self, layers):
        self.layers, self.pairs, self.heard = layers, [], []

    def add(self, a, b):
        """P -> P + A B."""
        self.pairs.append((a, b))
        self.heard.append((self.layers.heard(a.T), self.layers.heard(b)))

    def of(self, rows):
        """P x, (E, d), of rows x."""
        return rows + sum((rows @ b.T) @ a.T for a, b in self.pairs)

    def transposed(self, rows):
        """P^T x, (E, d), of rows x."""
        return rows + sum((rows @ a) @ b for a, b in self.pairs)

    def square(self):
        """(W P) (W P)^T, (o, o) = W W^T + W A B W^T + (W A B W^T)^T + W A B B^T A^T W^T."""
        b = torch.cat([b for _, b in self.pairs])
        heard_a, heard_b = (torch.cat(part) for part in zip(*self.heard))  # (n, o)
        mixed = (heard_b + 0.5 * (b @ b.T) @ heard_a).T @ heard_a
        return (self.layers.square + mixed).add_(mixed.T)

    def inverse_of(self, rows):
        """P^-1 x, (E, d), of rows x, and the smallest over the largest pivot of I + B A, whose determinant is P's."""
        a, b = torch.cat([a for a, _ in self.pairs], 1), torch.cat([b for _, b in self.pairs])
        factor, pivots, failed = torch.linalg.lu_factor_ex(torch.eye(len(b), dtype=torch.float64) + b @ a)
        size = factor.diagonal().abs()
        if failed or size.min() == 0:
            return rows, 0.0
        return rows - torch.linalg.lu_solve(factor, pivots, b @ rows.T).T @ a.T, (size.min() / size.max()).item()
