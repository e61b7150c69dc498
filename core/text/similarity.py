"""How well texts match concepts: Facilitated Transport of SPM, Lyu et al. 2024 (arXiv 2312.16145), section 3.3."""

from dataclasses import dataclass

import torch


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
