"""How well texts match concepts: Facilitated Transport of SPM, Lyu et al. 2024 (arXiv 2312.16145), section 3.3."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from .concepts import fill
from .encoded import WORD
from .words import runs, share_of_words

CAPTIONS = Path(__file__).with_name("neutral_captions.txt")
ALONE = "{}"
ROWS_FROM = (
    "a photo of {}",
    "a painting of {}",
)  # a concept's rows are means over these; first words are like each other
MEASURED_ON = ("a picture that shows {}", "an old drawing of {}", "{} in the middle of a room")  # texts that have it
CHANCE = 0.95  # share of neutral texts that stay closed
CAPTION = 10  # rows of a caption: shorter texts, and those of unknown words, are taken to have so many
APART = 0.15  # cosines that are closer say nothing


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

    def untold(self, _rows):
        """Which concepts the vectors of a text of unknown words say nothing sure of, (C,): all, as the cosine of a text
        that has the concept among other words is small."""
        return torch.ones(len(self.names), dtype=torch.bool)

    def _overlap(self, row, otherwise):
        if row is None:
            return otherwise
        return [len(own & row) / len(own) if own else 0.0 for own in self.tokens]


@dataclass(frozen=True, eq=False)
class Bank:
    """Word rows of neutral captions: what any text looks like to an encoder.

    mean: (d,) mean of the rows, each scaled to length 1, since the first token of a language model may be a thousand
    times longer than all others; rows: (N, d) float16, without the mean and of length 1, one caption after the other.
    """

    mean: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(cls, prompts):
        """From EncodedPrompts of captions."""
        rows = _unit(torch.cat([word_rows(prompt.rows, prompt.heard) for prompt in prompts]).float())
        mean = rows.mean(dim=0)
        return cls(mean, _unit(rows - mean).half())


@dataclass(frozen=True)
class Similarity:
    """How well a text matches a concept.

    words: share of the concept's words that it has, None where its words are not known. cosine: late interaction, None
    where the text has no rows; lo, hi: the cosine of neutral texts of its length, and of texts with the concept;
    calibrated: whether those two were measured.
    """

    words: float | None
    cosine: float | None
    lo: float
    hi: float
    calibrated: bool

    @property
    def apart(self):
        """Whether the cosine tells texts with the concept from others."""
        return self.hi - self.lo >= APART

    @property
    def meaning(self):
        """clip((cosine - lo) / (hi - lo), 0, 1). Where the two are not apart it is 0 or 1: open at hi where the words
        are not known, closed where they are."""
        if self.cosine is None:
            return 0.0
        if not self.apart:
            return float(self.words is None and self.cosine >= self.hi)
        return min(1.0, max(0.0, (self.cosine - self.lo) / (self.hi - self.lo)))

    @property
    def value(self):
        """The match, in [0, 1]: the better of words and meaning; without a calibration known words alone count."""
        if self.words is None:
            return self.meaning
        return max(self.words, self.meaning) if self.calibrated else self.words


@dataclass(frozen=True, eq=False)
class WordConcept:
    """One concept of WordConcepts.

    words: its runs of words. tokens: sets of token ids that stand for it, alone and after another word, without those
    that stand around every prompt; they count where a text's words are not known but its ids are. rows: (n, d) float32
    of its own tokens, centred and of length 1. hi: the cosine of texts with it. bank: Bank, or None.
    """

    name: str
    words: tuple[tuple[str, ...], ...]
    tokens: tuple[frozenset[int], ...]
    rows: torch.Tensor
    hi: float = 1.0
    bank: Bank | None = None

    @cached_property
    def chance(self):
        """(n, N) cosines of its rows with those of the bank."""
        return self.rows @ self.bank.rows.float().T

    def lo(self, length):
        """The cosine that 95 of 100 neutral texts of so many rows stay below: of windows of the bank, since the best of
        more rows is larger."""
        if self.bank is None:
            return 0.0
        length = max(1, min(length, self.chance.shape[1]))
        best = torch.nn.functional.max_pool1d(self.chance[None], length, max(1, length // 4))[0]
        return torch.quantile(best.mean(dim=0), CHANCE).item()

    def cosine(self, rows):
        """Late interaction with rows (m, d), centred and of length 1: the mean over its own rows of the largest cosine
        (Khattab and Zaharia 2020, arXiv 2004.12832, eq. 3, as a mean)."""
        return (self.rows @ rows.T).amax(dim=1).mean().item()

    def share(self, heard):
        """Share of its words in what is known of a text, None where that is not enough."""
        if heard is None:
            return None
        words = getattr(heard, "words", None)
        if words is not None:
            return share_of_words(self.words, words)
        return max((len(tokens & heard) / len(tokens) for tokens in self.tokens), default=None)


@dataclass(frozen=True, eq=False)
class WordConcepts:
    """Concepts of encoders whose rows differ in number, such as T5's and language models': their words decide, and
    where these are not all there, how near their meaning is.

    Place by place such texts have nothing in common, and the cosine of their means is large for any two texts. So each
    row of a concept is compared with the nearest row of a text, without what is common to all texts, and the cosine is
    measured on neutral texts (0) and on texts with the concept (1).
    """

    each: tuple[WordConcept, ...]

    @classmethod
    def of(cls, encoded, bank=None):
        """From encoded prompts, of which the last is the empty one: rows of the bare words, not calibrated."""
        *each, empty = encoded
        return cls(tuple(_concept(prompt, empty, [], bank) for prompt in each))

    @classmethod
    def calibrated(cls, names, encoded, bank):
        """From Encoded examples_of(names) and a Bank; not calibrated where it is not known which rows are words."""
        found = []
        for name in names:
            alone, *examples = (encoded[fill(template, name)] for template in (ALONE, *ROWS_FROM))
            concept = _concept(alone, encoded[""], examples, bank)
            others = [encoded[fill(template, name)] for template in MEASURED_ON]
            scores = [concept.cosine(_centred(rows, bank)) for rows in map(_known_rows, others) if len(rows)]
            measured = {"hi": torch.tensor(scores).median().item(), "bank": bank} if scores else {"bank": None}
            found.append(replace(concept, name=name, **measured))
        return cls(tuple(found))

    @property
    def names(self):
        return tuple(concept.name for concept in self.each)

    @property
    def tokens(self):
        """The token sets of each."""
        return tuple(concept.tokens for concept in self.each)

    @property
    def shape(self):
        """Shape of the texts they are compared with; any number of rows."""
        return ("any", self.each[0].rows.shape[1])

    def __add__(self, other):
        """Both together; of one shape."""
        return WordConcepts(self.each + other.each)

    def match(self, vectors, tokens=None):
        """How well texts match the concepts, (rows, C) float32 in [0, 1].

        vectors: (rows, T, d); tokens: Heard of each row or None where nothing is known, for which plain sets of token
        ids do as well.
        """
        heard = tokens or [None] * len(vectors)
        found = [[s.value for s in self.similarities(rows, own)] for rows, own in zip(vectors, heard)]
        return torch.tensor(found, dtype=torch.float32).reshape(len(vectors), len(self.each))

    def untold(self, rows):
        """The same: those whose likeness is not measured, or tells nothing apart; rows: (T, d)."""
        return torch.tensor([not (found.calibrated and found.apart) for found in self.similarities(rows)])

    def similarities(self, rows, heard=None):
        """The Similarity of one text to each concept; rows: (T, d), heard: what is known of it."""
        own = word_rows(rows.detach().float().cpu(), heard)
        length = CAPTION if _places(heard) is None else max(CAPTION, len(own))
        centred, found = {}, []
        for concept in self.each:
            if id(concept.bank) not in centred:
                centred[id(concept.bank)] = _centred(own, concept.bank)
            cosine = concept.cosine(centred[id(concept.bank)]) if len(own) else None
            calibrated = concept.bank is not None
            found.append(Similarity(concept.share(heard), cosine, concept.lo(length), concept.hi, calibrated))
        return found


def examples_of(names):
    """The texts that WordConcepts.calibrated() needs of concepts, each once."""
    templates = (ALONE, *ROWS_FROM, *MEASURED_ON)
    return tuple(dict.fromkeys(["", *(fill(template, name) for name in names for template in templates)]))


def neutral_captions():
    """Paragraphs of captions of everyday subjects, 76 sentences in all."""
    return tuple(CAPTIONS.read_text(encoding="ascii").splitlines())


def short_captions():
    """The first sentence of each of neutral_captions()."""
    return [f"{caption.split('. ')[0].removesuffix('.')}." for caption in neutral_captions()]


def word_rows(rows, heard=None):
    """Those of rows (T, d) that stand for words; all that are not zero where that is not known."""
    places = _places(heard)
    return rows[rows.any(dim=1)] if places is None else rows[list(places)]


def _known_rows(prompt):
    """Rows (m, d) of a prompt that are known to stand for words."""
    return word_rows(prompt.rows, prompt.heard) if _places(prompt.heard) else prompt.rows[:0]


def _places(heard):
    return getattr(heard, "places", None)


def _concept(alone, empty, examples, bank):
    """WordConcept of a concept's EncodedPrompt; its rows are means over examples that end in it, else its own."""
    own = _known_rows(alone) if _places(alone.heard) else alone.rows[alone.roles == WORD]
    own = own if len(own) else alone.rows[:1]
    count = len(alone.inside) or len(own)
    found = [rows[-count:] for rows in map(_known_rows, examples)]
    found = [rows for rows in found if len(rows) == count] or [own]
    tokens = tuple(filter(None, (ids - empty.heard for ids in alone.spoken)))
    rows = torch.stack([_centred(rows, bank) for rows in found]).mean(dim=0)
    return WordConcept(alone.prompt, tuple(runs(alone.prompt)), tokens, _unit(rows), 1.0, bank)


def _centred(rows, bank):
    """Rows (T, d) of length 1, without what is common to all texts."""
    rows = _unit(rows.float())
    return rows if bank is None else _unit(rows - bank.mean)


def _unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def opening_matches(concepts, vectors, heard):
    """How well texts match for gates, (rows, C) float32: match(), and 1 where neither words nor vectors tell, since a
    text that is not known may have the concept; one whose vectors are all zero has none.

    vectors: (rows, T, d); heard: what is known of each row, None of unknown ones.
    """
    score = concepts.match(vectors, heard)
    unknown = [own is None and bool(rows.any()) for rows, own in zip(vectors, heard)]
    opens = [
        concepts.untold(rows) if one else torch.zeros(score.shape[1], dtype=torch.bool)
        for rows, one in zip(vectors, unknown)
    ]
    return score.masked_fill(torch.stack(opens).to(score.device), 1.0)


def matches(concepts, encoded):
    """(prompts, C) matches of Encoded prompts, None where nothing is compared."""
    if concepts is None:
        return None
    return torch.cat([opening_matches(concepts, prompt.rows[None], [prompt.heard]) for prompt in encoded])


def calibration_report(concepts, encoded):
    """What the matches of WordConcepts with Encoded prompts are made of, as text; "" for concepts of other kinds."""
    if not isinstance(concepts, WordConcepts):
        return ""
    width = max(len(name) for name in concepts.names)
    lines = [
        "How prompts match: words is the share of the concept's words; s is the likeness of rows, from lo, which 95 of",
        "100 neutral texts of that length stay below, to hi, that of texts with the concept. The better one counts.",
    ]
    for prompt in encoded:
        lines.append(prompt.prompt)
        for concept, found in zip(concepts.each, concepts.similarities(prompt.rows, prompt.heard)):
            lines.append(f"  {concept.name:{width}}  {_told(found)}")
    return "\n".join(lines)


def _told(found):
    """A Similarity as one line."""
    words = "words   -  " if found.words is None else f"words {found.words:5.3f}"
    if not found.calibrated:
        return f"{words}  not measured: which rows stand for words is not known  match {found.value:5.3f}"
    cosine = "s   -   " if found.cosine is None else f"s {found.cosine:6.3f}"
    apart = "" if found.apart else "  (lo and hi are not apart: s does not count)"
    return f"{words}  {cosine}  lo {found.lo:6.3f}  hi {found.hi:6.3f}  match {found.value:5.3f}{apart}"
