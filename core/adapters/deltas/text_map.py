"""A low-rank map of the text: what closed-form erasure is. Its record, and its paths on the text and on weights."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ...errors import ErasureError
from ..probe import Probe
from .delta import OPEN, Delta, register
from .low_rank import LowRank


@register
@dataclass(frozen=True, eq=False)
class TextMap(Delta):
    """A low-rank linear map of text vectors, c -> c + A (B c), at one text entry of a model.

    Equals W -> W (I + A B) at every linear layer that reads the entry, with the same A and B
    (UCE, Gandikota et al. 2024, eq. 7, factored). A sum of terms; each belongs to one concept.

    a: (d, n) and b: (n, d), float32; concept: n indices into the card's concepts. normed: whether it maps the vectors
    as they are after the norm that stands before the layers, in families that have one. probes: of those concepts whose
    texts can be told from others at the entry.
    """

    kind: ClassVar[str] = "map"
    of_text: ClassVar[bool] = True

    a: torch.Tensor
    b: torch.Tensor
    concept: tuple[int, ...]
    normed: bool = False
    probes: tuple[Probe, ...] = ()

    def __post_init__(self):
        n = len(self.concept)
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.shape != self.b.shape[::-1] or self.a.shape[1] != n:
            raise ErasureError(
                f"A text map has factors of shapes {tuple(self.a.shape)} and {tuple(self.b.shape)} for {n} terms; "
                "expected (width, terms) and (terms, width); the file is damaged, save the adapter again."
            )
        odd = next((len(probe.vector) for probe in self.probes if len(probe.vector) != self.width), None)
        if odd is not None:
            raise ErasureError(
                f"A text map of width {self.width} has a probe of width {odd}; the file is damaged, save the adapter "
                "again."
            )

    @property
    def width(self):
        """Width d of the text vectors."""
        return self.a.shape[0]

    def matrix(self, strengths=None):
        """The dense E = A diag(s) B, (d, d); strengths: one number per concept, 1 unless given."""
        if strengths is None:
            return self.a @ self.b
        scale = torch.tensor([strengths[i] for i in self.concept], dtype=self.a.dtype, device=self.a.device)
        return (self.a * scale) @ self.b


# ---------------------------------------------------------------- on the text


@dataclass(frozen=True, eq=False)
class TextPart:
    """All text maps of one entry, fixed strengths folded in: c -> c + A (g * (B c)), g the terms' gates."""

    a: torch.Tensor  # (d, n)
    b: torch.Tensor  # (n, d)
    gate: torch.Tensor  # (n,), OPEN or a number of the plan's gates

    @property
    def width(self):
        """Width d of the text vectors."""
        return self.a.shape[0]

    def to(self, device):
        """The same part with its tensors on a device."""
        if self.a.device == device:
            return self
        return replace(self, a=self.a.to(device), b=self.b.to(device), gate=self.gate.to(device))

    def delta(self, context, gates=None):
        """A (g * (B c)) for text vectors (rows, T, d), float32; gates: (rows, K) or (1, K), None without gates."""
        part = self.to(context.device)
        inner = context.float() @ part.b.T
        if gates is not None:
            gates = gates.to(inner)
            columns = torch.cat([gates, gates.new_ones(len(gates), 1)], dim=1)  # OPEN, -1, is the last one
            inner = inner * columns[:, part.gate].unsqueeze(1)
        return inner @ part.a.T

    def erased(self, text, gates=None):
        """Text vectors (rows, T, d) with the maps on them, in their own type."""
        return (text.float() + self.delta(text, gates)).to(text.dtype)


def join(terms):
    """TextPart of the Terms of one entry, None of none."""
    if not terms:
        return None
    return TextPart(
        torch.cat([t.delta.a if t.factor == 1.0 else t.delta.a * t.factor for t in terms], dim=1),
        torch.cat([t.delta.b for t in terms]),
        torch.cat([torch.tensor(t.gates or (OPEN,) * len(t.delta.b)) for t in terms]),
    )


# ---------------------------------------------------------------- on weights


def compact(a, b):
    """The map A B, (d, n) and (n, d), with as few terms as float32 tells apart: (d, r) and (r, d), float64.

    Terms that repeat each other become one, so r <= min(d, n). The rows of the second factor are orthonormal.
    """
    q, r = torch.linalg.qr(b.cpu().double().T)
    u, s, vh = torch.linalg.svd(a.cpu().double() @ r.T, full_matrices=False)
    rank = max(1, int((s > s[0] * torch.finfo(torch.float32).eps).sum()))
    return u[:, :rank] * s[:rank], vh[:rank] @ q.T


def on_weights(part, weights):
    """(key, LowRank) of what a TextMap or TextPart, not gated, adds to the weights that read it: W -> W (I + A B).

    weights: (key, W (out, d or more)) pairs, taken one at a time; a pooled vector fills the first d inputs of its
    reader. With delta = A B this is W (P - I) of UCE (Gandikota et al. 2024, eq. 7) written as a LoRA: up = W A,
    down = B, of rank at most min(out, d), so that a loader's scale alpha / rank is 1.
    """
    a, b = compact(part.a, part.b)
    shared = b.float().contiguous()
    for key, weight in weights:
        weight = weight.cpu().double()
        up, down = layer_factors(weight[:, : len(a)], a, b)
        down = shared if down is b else down.float()
        down = torch.nn.functional.pad(down, (0, weight.shape[1] - len(a)))
        yield key, LowRank(up.float(), down, float(len(down)))


def layer_factors(weight, a, b):
    """What W -> W (I + A B) adds to a weight (out, d), as up (out, k) and down (k, d), float64; k <= min(out, d).

    a, b: from compact().
    """
    up = weight.double() @ a
    if len(up) < up.shape[1]:
        return torch.eye(len(up), dtype=torch.float64), up @ b
    return up, b
