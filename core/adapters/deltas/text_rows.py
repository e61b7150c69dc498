"""A low-rank change of a layer for the text's rows alone, where text and picture go through the same layer.

Z-Erase (2026, section 3: shared weights that also change the picture's rows make the picture collapse).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...errors import ErasureError
from .delta import register
from .low_rank import LowRank


@register
@dataclass(frozen=True, eq=False)
class TextLowRank(LowRank):
    """A low-rank change of a linear layer that acts on the text's rows alone: y_i = W x_i + (alpha / r) up down x_i for
    the rows i of the text, W x_i for those of the picture.

    up: (out, r); down: (r, in); alpha, bias: see LowRank. Which rows are the text's is told by the model's Family.
    """

    kind: ClassVar[str] = "text_rows"
    on_text: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.down.dim() != 2:
            raise ErasureError(
                f"A change of the text's rows has a factor of shape {tuple(self.down.shape)}; expected (rank, in) of a "
                "linear layer; the file is damaged, get it again."
            )

    def parts(self):
        """See Delta."""
        parts = {"up": self.up, "down": self.down, "alpha": torch.tensor(self.alpha, dtype=torch.float64)}
        return parts if self.bias is None else {**parts, "bias": self.bias}

    @classmethod
    def of_parts(cls, parts):
        """See Delta."""
        alpha = parts["alpha"]
        if alpha.numel() != 1 or not all(t.is_floating_point() for t in parts.values()):
            raise ErasureError("expected one alpha and factors of floating point numbers")
        return cls(parts["up"], parts["down"], float(alpha), parts.get("bias"))
