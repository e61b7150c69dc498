"""How far each row of a stack editor opens: for a conditioning while it is sampled, or by the words of a prompt."""

import re
from dataclasses import dataclass

import torch

from .permeability import OFF, SAME, gate_values
from .plan import channels_of, wanted_concepts
from .stack import ErasureStack
from .stack_json import Row

WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class RowOpening:
    """What a row of an editor got: the value of its gate, strength included, as in Preview Permeability."""

    row: Row
    value: float


@dataclass(frozen=True)
class Words:
    """Concepts of which only the names are compared."""

    names: tuple[str, ...]

    def match(self, text):
        """The share of each concept's distinct words that a text has, (1, C) float32.

        It stands in for the token overlap of Facilitated Transport (SPM, Lyu et al. 2024, eq. 11) where no text
        encoder is loaded; the cosine of the two texts, which counts when it is larger, is not known then.
        """
        found = _words(text)
        own = [_words(name) for name in self.names]
        return torch.tensor([[len(words & found) / len(words) if words else 0.0 for words in own]])


def _words(text):
    return set(WORD.findall(text.lower()))


def row_openings(stack, concepts, score, positive=None):
    """RowOpenings of the rows of a stack that act, by their matches with one conditioning or text.

    concepts: what the stack's gates compare with, by their names; score: (rows, C) matches, of which the one that
    opens a row most counts; both None when nothing follows the text. positive: for a negative prompt the
    RowOpenings of the positive one, which decide where a row says so.
    """
    channels, owners = [], []
    for entry in stack.entries:
        own = channels_of(ErasureStack((entry,)), concepts)[1]
        channels += own
        owners += [entry] * len(own)
    values = gate_values(channels, score)
    strongest = {}
    for entry, column in zip(owners, values.T.tolist()):
        if isinstance(entry, Row):
            best = max([strongest.get(id(entry), (entry, 0.0))[1], *column], key=abs)
            strongest[id(entry)] = (entry, best)
    found = [RowOpening(entry, value) for entry, value in strongest.values()]
    return found if positive is None else _negative(found, positive)


def _negative(own, positive):
    """As the host's patch gives them out: the positive prompt's opening, the negative prompt's own or none."""
    given = {id(opening.row): opening.value for opening in positive}
    values = {SAME: lambda o: given.get(id(o.row), o.value), OFF: lambda o: 0.0}
    return [RowOpening(o.row, values.get(o.row.permeability.negative, lambda o: o.value)(o)) for o in own]


def openings_by_words(stack, text):
    """RowOpenings of a stack's rows as far as the words of a prompt tell."""
    concepts = Words(wanted_concepts(stack))
    return row_openings(stack, concepts, concepts.match(text)) if concepts.names else row_openings(stack, None, None)
