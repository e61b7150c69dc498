"""Inputs of a layer that are switched off: pruned neurons and attention heads."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...errors import ErasureError
from .delta import Delta, register


@register
@dataclass(frozen=True, eq=False)
class Neurons(Delta):
    """Inputs of a layer that are taken out, W_ij -> W_ij (1 - s o_j) with o_j = 1 for those: of a second feed-forward
    layer the neurons (Concept erasure by minimal masks, Minimalist Concept Erasure 2025, section 3.2), of the layer
    behind an attention its heads.

    off: (in,) bool; outputs: number of the layer's outputs; s: the strength.
    """

    kind: ClassVar[str] = "neurons"
    last: ClassVar[bool] = True

    off: torch.Tensor
    outputs: int

    def __post_init__(self):
        if self.off.dtype != torch.bool or self.off.dim() != 1 or self.outputs < 1:
            raise ErasureError(
                f"Inputs that are switched off are given as {tuple(self.off.shape)} {self.off.dtype} of a layer with "
                f"{self.outputs} outputs; expected (in,) of torch.bool; the file is damaged, get it again."
            )

    @property
    def shape(self):
        """(out, in) of the layer."""
        return self.outputs, len(self.off)

    def difference(self, weight, strength=1.0):
        """See Delta."""
        return weight.float() * (-strength * self.off.to(weight.device))

    def on(self, device):
        """See Delta."""
        return Neurons(self.off.to(device), self.outputs)

    def changed(self, weight, strength):
        """See Delta."""
        return (weight * (1.0 - strength * self.off.to(weight.dtype))).to(weight.dtype)

    def parts(self):
        """See Delta."""
        return {"off": self.off.to(torch.uint8), "outputs": torch.tensor(self.outputs)}

    @classmethod
    def of_parts(cls, parts):
        """See Delta."""
        return cls(parts["off"].bool(), int(parts["outputs"]))
