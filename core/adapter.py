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


@dataclass(frozen=True, eq=False)
class LowRank:
    """A low-rank change of one layer, W -> W + (alpha / r) up down (LoRA; SPM, Lyu et al. 2024, eq. 2 with r = 1).

    up: (out, r); down: (r, in) of a linear layer, (r, in, height, width) of a convolution; alpha: scale times rank;
    bias: (out,), added to the layer's bias, or None.
    """

    up: torch.Tensor
    down: torch.Tensor
    alpha: float
    bias: torch.Tensor | None = None

    def __post_init__(self):
        up, down, bias = self.up, self.down, self.bias
        fits = up.dim() == 2 and down.dim() in (2, 4) and 0 < up.shape[1] == down.shape[0]
        if not fits or (bias is not None and bias.shape != up.shape[:1]):
            shapes = " and ".join(str(tuple(t.shape)) for t in (up, down, bias) if t is not None)
            raise ErasureError(
                f"A low-rank change has factors of shapes {shapes}; expected (out, rank) and (rank, in); "
                "the file is damaged, get it again."
            )

    @property
    def rank(self):
        """Rank r."""
        return self.up.shape[1]

    @property
    def scale(self):
        """The factor alpha / r of the product."""
        return self.alpha / self.rank


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
    """One erasure: its card and its deltas, a map of the text or changes of layers or both.

    low_rank: {site: LowRank}, with sites in the spelling of core/sites.py, whatever the file's was. pooled_map: of the
    pooled vector that SDXL reads beside the text, None where it is left alone.
    """

    card: Card
    text_map: TextMap | None = None
    name: str = ""  # file name it was loaded from, or "" when computed in the graph
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    pooled_map: TextMap | None = None

    def describe(self):
        """One line for messages: the file, the concepts or the method."""
        return self.name or ", ".join(self.card.concepts) or self.card.method
