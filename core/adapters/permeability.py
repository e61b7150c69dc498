"""Permeability: how far each adapter opens for a text. Facilitated Transport, routing, fixed values.

SPM, Lyu et al. 2024 (arXiv 2312.16145), section 3.3.
"""

from dataclasses import dataclass

import torch

from ..errors import ErasureError

AUTOMATIC, FIXED, TRANSPORT, REFERENCE, ROUTE = MODES = (
    "automatic",
    "fixed",
    "facilitated transport",
    "reference",
    "route",
)
SAME, OWN, OFF = NEGATIVES = ("same as positive", "own", "off")


@dataclass(frozen=True)
class Permeability:
    """How an adapter opens.

    mode: "fixed", always by `factor`; "facilitated transport", by factor * (how well the text matches the
    adapter's concepts), the paper's linear rule; "reference", as the published code combines adapters: squared
    and with cross terms; "route", like facilitated transport but only the top_k best matches of the stack open;
    "automatic", facilitated transport for SPM adapters and fixed for all others, as each was published.
    threshold: matches below it leave the adapter closed. negative: what the negative prompt gets, the positive
    prompt's value (as published), a value of its own, or none.
    """

    mode: str = AUTOMATIC
    factor: float = 1.0
    threshold: float = 0.0
    negative: str = SAME
    top_k: int = 1

    def __post_init__(self):
        for name, value, known in (("mode", self.mode, MODES), ("negative", self.negative, NEGATIVES)):
            if value not in known:
                raise ErasureError(
                    f'The permeability has the {name} "{value}"; expected one of {", ".join(known)}, choose one.'
                )
        for name in ("factor", "threshold"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
                raise ErasureError(f"The permeability has the {name} {value!r}; expected a finite number.")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1:
            raise ErasureError(f"The permeability has top_k {self.top_k!r}; expected a whole number of at least 1.")

    def mode_for(self, adapter):
        """The mode an adapter gets: what "automatic" stands for, else the mode itself."""
        if self.mode != AUTOMATIC:
            return self.mode
        return TRANSPORT if adapter.card.method == "SPM" and adapter.card.concepts else FIXED


@dataclass(frozen=True, eq=False)
class Concepts:
    """Concepts as the text encoder sees them: vectors (C, T, d) float32, and the distinct token ids of each."""

    names: tuple[str, ...]
    vectors: torch.Tensor
    tokens: tuple[frozenset[int], ...]

    @classmethod
    def of(cls, encoded):
        """From encoded prompts, of which the last is the empty one: its ids are the special ones."""
        special = frozenset(encoded.ids[-1])
        tokens = tuple(frozenset(ids) - special for ids in encoded.ids[:-1])
        return cls(encoded.prompts[:-1], encoded.vectors[:-1], tokens)

    def match(self, vectors, tokens=None):
        """How well texts match the concepts, (rows, C) float32: max(cosine, token overlap), eq. 10 and 11.

        vectors: (rows, T, d), of one or several contexts, of which the best counts; the cosine is that of the
        flattened contexts. tokens: the distinct ids of each row or None where they are not known, in which
        case the cosine alone counts. Overlap: share of the concept's distinct tokens that the text has.
        """
        count, length, width = self.vectors.shape
        text = vectors.float().cpu()
        rows, found = text.shape[:2]
        whole = max(1, found // length)
        length = min(length, found)
        chunks = _unit(text[:, : whole * length].reshape(rows, whole, length * width))
        concepts = _unit(self.vectors[:, :length].reshape(count, length * width))
        score = (chunks @ concepts.T).amax(dim=1)
        if tokens is not None:
            score = torch.maximum(
                score, torch.tensor([self._overlap(row, s) for row, s in zip(tokens, score.tolist())])
            )
        return score

    def _overlap(self, row, otherwise):
        if row is None:
            return otherwise
        return [len(own & row) / len(own) if own else 0.0 for own in self.tokens]


def _unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


@dataclass(frozen=True)
class Channel:
    """One gate of a plan: what opens together.

    concepts: indices into the plan's concepts, of which the best match counts; strength: factor of its value;
    mode: any but "automatic"; permeability: the other settings; start_percent, end_percent: when it acts.
    """

    concepts: tuple[int, ...]
    strength: float
    mode: str
    permeability: Permeability
    start_percent: float = 0.0
    end_percent: float = 1.0

    @property
    def always(self):
        """True when it acts in every step."""
        return self.start_percent <= 0.0 and self.end_percent >= 1.0

    @property
    def reads_text(self):
        """True when its value depends on the text."""
        return self.mode != FIXED


def gate_values(channels, score):
    """Values (rows, K) of the gates of K channels; score: (rows, C) from Concepts.match, or None when none needs it.

    With s the channel's strength, f the factor and m the best match of its concepts: s f when fixed, else s f m
    where m reaches the threshold and, when routed, is among the top_k of all routed channels; else 0.
    """
    rows = 1 if score is None else len(score)
    values = torch.zeros(rows, len(channels))
    best = torch.full((rows, len(channels)), -torch.inf)
    for k, channel in enumerate(channels):
        if channel.reads_text:
            best[:, k] = score[:, list(channel.concepts)].amax(dim=1)
    routed = [k for k, channel in enumerate(channels) if channel.mode == ROUTE]
    place = torch.zeros_like(best, dtype=torch.long)
    if routed:
        order = best[:, routed].argsort(dim=1, descending=True, stable=True)
        place[:, routed] = order.argsort(dim=1)
    for k, channel in enumerate(channels):
        settings = channel.permeability
        value = channel.strength * settings.factor
        if not channel.reads_text:
            values[:, k] = value
            continue
        opens = best[:, k] >= settings.threshold
        if channel.mode == ROUTE:
            opens &= place[:, k] < settings.top_k
        values[:, k] = torch.where(opens, value * best[:, k], 0.0)
    return values
