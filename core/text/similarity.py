"""How well texts match concepts: Facilitated Transport of SPM, Lyu et al. 2024 (arXiv 2312.16145), section 3.3."""

from dataclasses import dataclass

import torch

from .encoded import WORD


def concepts_of(encoded):
    """What gates compare texts with, from Encoded concepts of which the last is the empty prompt.

    Contexts that all have one length are compared as published; rows of any number by their words.
    """
    return (Concepts if encoded.contexts else WordConcepts).of(encoded)


@dataclass(frozen=True, eq=False)
class Concepts:
    """Concepts as the text encoder sees them: vectors (C, T, d) float32, and the distinct token ids of each."""

    names: tuple[str, ...]
    vectors: torch.Tensor
    tokens: tuple[frozenset[int], ...]

    @classmethod
    def of(cls, encoded):
        """From encoded prompts, of which the last is the empty one: its ids are the special ones."""
        *each, empty = encoded
        tokens = tuple(prompt.heard - empty.heard for prompt in each)
        return cls(encoded.prompts[:-1], encoded.vectors[:-1], tokens)

    @property
    def shape(self):
        """Shape of the texts they are compared with."""
        return tuple(self.vectors.shape[1:])

    def __add__(self, other):
        """Both together; of one shape."""
        vectors = torch.cat([self.vectors, other.vectors])
        return Concepts(self.names + other.names, vectors, self.tokens + other.tokens)

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


@dataclass(frozen=True, eq=False)
class WordConcepts:
    """Concepts of encoders whose rows differ in number, such as T5's and language models': their words decide.

    tokens: for each the sets of token ids that stand for it, as it is alone and after another word, without those that
    stand around every prompt. vectors: (C, d) float32, means of the word rows. Place by place such texts have nothing
    in common, and the cosine of two of their means is large for any two texts, so it only counts where the words of a
    text are not known.
    """

    names: tuple[str, ...]
    vectors: torch.Tensor
    tokens: tuple[tuple[frozenset[int], ...], ...]

    @classmethod
    def of(cls, encoded):
        """From encoded prompts, of which the last is the empty one."""
        *each, empty = encoded
        tokens = (tuple(filter(None, (ids - empty.heard for ids in prompt.spoken))) for prompt in each)
        means = [prompt.rows[prompt.roles == WORD].mean(dim=0) if prompt.words else prompt.rows[0] for prompt in each]
        return cls(encoded.prompts[:-1], torch.stack(means), tuple(tokens))

    @property
    def shape(self):
        """Shape of the texts they are compared with; any number of rows."""
        return ("any", self.vectors.shape[1])

    def __add__(self, other):
        """Both together; of one shape."""
        vectors = torch.cat([self.vectors, other.vectors])
        return WordConcepts(self.names + other.names, vectors, self.tokens + other.tokens)

    def match(self, vectors, tokens=None):
        """How well texts match the concepts, (rows, C) float32 in [0, 1]: the share of a concept's tokens that a text
        has; where its tokens are not known, or the concept's stand around every prompt, the cosine of its mean row and
        the concept's mean word row.

        vectors: (rows, T, d); tokens: as for Concepts.match().
        """
        means = _unit(vectors.float().cpu().mean(dim=1))
        score = (means @ _unit(self.vectors).T).clamp(min=0)
        for i, row in enumerate(tokens or ()):
            if row is not None:
                shares = [self._overlap(own, row, cosine) for own, cosine in zip(self.tokens, score[i].tolist())]
                score[i] = torch.tensor(shares)
        return score

    @staticmethod
    def _overlap(own, row, otherwise):
        return max((len(tokens & row) / len(tokens) for tokens in own), default=otherwise)


def _unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def matches(concepts, encoded):
    """(prompts, C) matches of Encoded prompts, None where nothing is compared."""
    if concepts is None:
        return None
    rows = [concepts.match(prompt.rows[None], [prompt.heard]) for prompt in encoded]
    return torch.cat(rows)
