"""The records: what an erasure adapter is. Plain data, never touches a model."""

from dataclasses import dataclass, field

import numpy as np
import torch

from ..errors import ErasureError


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


@dataclass(frozen=True, eq=False)
class Mask:
    """Marked weights of one layer, W -> W * (1 - s (1 - kept)) there, s the strength: pruning (Chavhan et al. 2024)
    with kept = 0, Selective Synaptic Dampening (Foster et al. 2024) with kept = beta.

    shape: (out, in); bits: (in, ceil(out / 8)) uint8, for each input the marked outputs, the first in the highest
    bit; kept: (marked,) what is left of each marked weight at strength 1, row by row, or None when it is nothing.
    """

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
    """One erasure: its card and its deltas, a map of the text, changes of layers, or both.

    low_rank: {site: LowRank} and masks: {site: Mask}, with sites in the spelling of core/families/sites.py, whatever
    the file's was. pooled_map: of the pooled vector that SDXL reads beside the text, None where it is left alone.
    """

    card: Card
    text_map: TextMap | None = None
    name: str = ""  # file name it was loaded from, or "" when computed in the graph
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    pooled_map: TextMap | None = None
    masks: dict[str, Mask] = field(default_factory=dict)

    @property
    def sites(self):
        """The layers it changes, in order."""
        return tuple(dict.fromkeys((*self.low_rank, *self.masks)))

    def describe(self):
        """One line for messages: the file, the concepts or the method."""
        return self.name or ", ".join(self.card.concepts) or self.card.method
