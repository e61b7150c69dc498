"""A text map as low-rank factors of the weights that read the text."""

import torch


def compact(a, b):
    """The map A B, (d, n) and (n, d), with as few terms as float32 tells apart: (d, r) and (r, d), float64.

    Terms that repeat each other become one, so r <= min(d, n). The rows of the second factor are orthonormal.
    """
    q, r = torch.linalg.qr(b.cpu().double().T)
    u, s, vh = torch.linalg.svd(a.cpu().double() @ r.T, full_matrices=False)
    rank = max(1, int((s > s[0] * torch.finfo(torch.float32).eps).sum()))
    return u[:, :rank] * s[:rank], vh[:rank] @ q.T


def layer_factors(weight, a, b):
    """What W -> W (I + A B) adds to a weight (out, d), as up (out, k) and down (k, d), float64; k <= min(out, d).

    With delta = A B this is W (P - I) of UCE (Gandikota et al. 2024, eq. 7) written as a LoRA: up = W A, down = B.
    a, b: from compact().
    """
    up = weight.double() @ a
    if len(up) < up.shape[1]:
        return torch.eye(len(up), dtype=torch.float64), up @ b
    return up, b
