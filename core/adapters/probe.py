"""Linear probes: whether a text is about a concept, read off the vectors that a model reads of it.

A probe is a direction that the rows of texts with a concept have and those of others do not (Alain and Bengio 2016,
arXiv 1610.01644). It needs neither words nor a text encoder when it is used, so it works for any text that reaches the
model: synonyms, other spellings, and prompts that other packs encoded.
"""

from dataclasses import dataclass

import torch

from ..errors import ErasureError


@dataclass(frozen=True, eq=False)
class Probe:
    """One concept's probe at one text entry.

    concept: index into the card's concepts; vector: (d,) float32 of length 1. low, high: the response of texts at which
    a gate begins to open and from which on it is open, -1 to 1. Raises ErasureError where they do not fit together.
    """

    concept: int
    vector: torch.Tensor
    low: float
    high: float

    def __post_init__(self):
        if self.vector.dim() != 1 or not torch.isfinite(self.vector).all() or not self.vector.any():
            raise ErasureError(
                f"A probe has a vector of shape {tuple(self.vector.shape)} that is no direction; expected finite "
                "numbers, not all of them 0; the file is damaged, save the adapter again."
            )
        if not -1.0 <= self.low < self.high <= 1.0:
            raise ErasureError(
                f"A probe opens from {self.low:g} to {self.high:g}; expected two cosines, the first the smaller one; "
                "the file is damaged, save the adapter again."
            )

    def response(self, text):
        """The largest cosine of a row with the probe, (rows,) float32, for text vectors (rows, T, d); -1 for a text
        without rows or whose rows are all zero."""
        vector = self.vector.to(text.device)
        rows = text.float()
        lengths = rows.norm(dim=-1)
        cosines = (rows @ vector) / (lengths * vector.norm()).clamp_min(torch.finfo(torch.float32).tiny)
        cosines = torch.where(lengths > 0, cosines, -1.0)
        return cosines.amax(dim=1) if rows.shape[1] else cosines.new_full((len(rows),), -1.0)

    def match(self, text):
        """How far a gate opens for text vectors (rows, T, d), (rows,) in [0, 1]: clip((r - low) / (high - low), 0, 1)
        of the response r, so exactly 0 for all up to low and 1 from high on."""
        return ((self.response(text) - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
