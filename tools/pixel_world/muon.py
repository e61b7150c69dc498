"""Muon, the optimiser of the demo transformer's matrices: momentum whose steps are made orthogonal.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

import torch

QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonal(x):
    """Matrices (n, rows, columns) with rows <= columns -> about their nearest semi-orthogonal ones."""
    a, b, c = QUINTIC
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def squares(matrix):
    """(rows, columns), one a multiple of the other -> its square pieces as a view (n, side, side)."""
    side = min(matrix.shape)
    return matrix.unflatten(0, (-1, side)).unflatten(2, (-1, side)).transpose(1, 2).flatten(0, 1)


class Muon(torch.optim.Optimizer):
    """params: matrices that cut into squares of one size; each square's step is made orthogonal for itself.

    The pieces of a fused matrix (queries, keys, values, MLP) are maps of their own, and one batch is faster.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            pieces = []
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                pieces.append(squares(p.grad.lerp(state["momentum"], group["momentum"])))
            steps = orthogonal(torch.cat(pieces)).split([len(piece) for piece in pieces])
            for p, step in zip(group["params"], steps):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                squares(p).sub_(step, alpha=group["lr"])
