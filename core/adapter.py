"""The records: what an erasure adapter is. Plain data, never touches a model."""

from dataclasses import dataclass, field

import torch

from .errors import ErasureError


@dataclass(frozen=True, eq=False)
class TextMap:
    """A low-rank linear map of text vectors, c -> c + A (B c).

    Equals W -> W (I + A B) at every linear layer that reads the text, with the same A and B
    (UCE, Gandikota et al. 2024, eq. 7, factored). A sum of terms; each belongs to one concept.

    a: (d, n) and b: (n, d), float32; concept: n indices into the card's concepts.
    """

    a: torch.Tensor
    b: torch.Tensor
    concept: tuple[int, ...]

    def __post_init__(self):
        n = len(self.concept)
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.shape != self.b.shape[::-1] or self.a.shape[1] != n:
            raise ErasureError(
                f"A text map has factors of shapes {tuple(self.a.shape)} and {tuple(self.b.shape)} for {n} terms; "
                "expected (width, terms) and (terms, width); the file is damaged, save the adapter again."
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


@dataclass(frozen=True)
class Card:
    """What an adapter says about itself; goes into the file's metadata."""

    method: str
    concepts: tuple[str, ...]
    surrogates: tuple[str, ...] = ()
    family: str = ""
    text_encoder: str = ""  # fingerprint of the encoder the map was computed with, "" when unknown
    settings: dict = field(default_factory=dict)
    licence: str = ""


@dataclass(frozen=True, eq=False)
class ErasureAdapter:
    """One erasure: its card and its deltas."""

    card: Card
    text_map: TextMap
    name: str = ""  # file name it was loaded from, or "" when computed in the graph

    def describe(self):
        """One line for messages: the file or the concepts."""
        return self.name or ", ".join(self.card.concepts)
