"""Marked weights of a layer: pruning and dampening. Its record, and its path on the weight."""

from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar

import numpy as np
import torch

from ...errors import ErasureError
from .delta import OPEN, Delta, register


@register
@dataclass(frozen=True, eq=False)
class Mask(Delta):
    """Marked weights of one layer, W -> W * (1 - s (1 - kept)) there, s the strength: pruning (Chavhan et al. 2024)
    with kept = 0, Selective Synaptic Dampening (Foster et al. 2024) with kept = beta.

    shape: (out, in); bits: (in, ceil(out / 8)) uint8, for each input the marked outputs, the first in the highest
    bit; kept: (marked,) what is left of each marked weight at strength 1, row by row, or None when it is nothing.
    """

    kind: ClassVar[str] = "mask"
    last: ClassVar[bool] = True

    bits: torch.Tensor
    shape: tuple[int, int]
    kept: torch.Tensor | None = None

    def __post_init__(self):
        out, inside = self.shape
        wanted = (inside, -(-out // 8))
        if self.bits.dtype != torch.uint8 or tuple(self.bits.shape) != wanted:
            raise ErasureError(
                f"A mask of a layer of shape {(out, inside)} has bits of shape {tuple(self.bits.shape)} and type "
                f"{self.bits.dtype}; expected {wanted} and torch.uint8; the file is damaged, get it again."
            )
        if self.kept is not None and self.kept.shape != (self.marked,):
            raise ErasureError(
                f"A mask marks {self.marked} weights and says what to keep of {tuple(self.kept.shape)}; expected one "
                "number for each; the file is damaged, get it again."
            )

    @classmethod
    def of(cls, marks, kept=None):
        """Mask of the true entries of marks (out, in); kept: (out, in), read at those entries."""
        bits = torch.from_numpy(np.packbits(marks.T.cpu().numpy(), axis=1))
        return cls(bits, tuple(marks.shape), None if kept is None else kept[marks].cpu())

    @property
    def marked(self):
        """How many weights are marked."""
        return int(self.marks().sum())

    @property
    def density(self):
        """Share of the layer's weights that are marked."""
        return self.marked / (self.shape[0] * self.shape[1])

    def marks(self):
        """(out, in) bool."""
        out = self.shape[0]
        return torch.from_numpy(np.unpackbits(self.bits.numpy(), axis=1, count=out)).bool().T

    def places(self):
        """(marked,) int64, the marked entries of the flattened weight, rising."""
        return self.marks().contiguous().view(-1).nonzero().view(-1)

    def factor(self, strength):
        """What marked weights are multiplied by: one number, or (marked,) float32 where they differ."""
        return 1.0 - strength * (1.0 if self.kept is None else 1.0 - self.kept.float())

    def difference(self, weight, strength=1.0):
        """(out, in) float32: what the mask adds to a weight, 0 where nothing is marked."""
        found, places = torch.zeros(self.shape), self.places()
        found.view(-1)[places] = weight.float().reshape(-1)[places] * (self.factor(strength) - 1.0)
        return found

    def on(self, device):
        """See Delta."""
        return _Marked(self.places().to(device), None if self.kept is None else self.kept.float().to(device))


class _Marked:
    """The marked places of a flattened weight and what is kept of them, on one device."""

    def __init__(self, places, kept):
        self.places, self.kept = places, kept

    def changed(self, weight, strength):
        """See Delta."""
        weight = weight.clone(memory_format=torch.contiguous_format)
        flat = weight.view(-1)
        factor = 1.0 - strength * (1.0 if self.kept is None else 1.0 - self.kept)
        flat[self.places] = (flat[self.places] * factor).to(weight.dtype)
        return weight


def joined(terms):
    """The Terms of a layer, with one Mask for all that take their weights out entirely and are not gated: the same
    weights, bit for bit, for the cost of one."""

    def whole(term):
        return term.gate == OPEN and term.factor == 1.0 and isinstance(term.delta, Mask) and term.delta.kept is None

    found = [term for term in terms if whole(term)]
    if len(found) < 2:
        return tuple(terms)
    bits = reduce(torch.bitwise_or, (term.delta.bits for term in found))
    one = replace(found[0], delta=replace(found[0].delta, bits=bits))
    return tuple(one if term is found[0] else term for term in terms if term is found[0] or not whole(term))
