"""Words in the place of an adapter: an erasure that is computed when its stack is applied to a model."""

from dataclasses import dataclass, replace

from ..errors import ErasureError
from ..text.captions import KINDS, captions_of
from ..text.concepts import parse_concepts, parse_preserved
from .adapter import Card, ErasureAdapter
from .permeability import MEANING, TRANSPORT
from .stack import ErasureStack

ANY_KIND = next(iter(KINDS))


@dataclass(frozen=True, eq=False)
class Written(ErasureAdapter):
    """An erasure of which no more than the words is known as long as it has no deltas.

    words: what to erase, lines as parse_concepts() reads them; keep: what to keep, lines as parse_preserved() reads
    them; kind: name of one of the captions' KINDS.
    """

    words: str = ""
    keep: str = ""
    kind: str = ANY_KIND

    @classmethod
    def of(cls, words, keep="", kind=ANY_KIND):
        """Words that are not computed yet; raises ErasureError for such that name no concept, and for another kind."""
        concepts = parse_concepts(words, captions_of(kind).surrogate)
        parse_preserved(keep)  # raises for half characters
        names, surrogates = (tuple(getattr(c, part) for c in concepts) for part in ("text", "surrogate"))
        return cls(Card("", names, surrogates), words=words, keep=keep, kind=kind)

    @property
    def pending(self):
        """Whether it still has to be computed."""
        return not self.deltas

    def computed(self, adapter):
        """The same words with the card and the deltas of an adapter that was computed from them."""
        return replace(self, card=adapter.card, deltas=adapter.deltas)

    def describe(self):
        """The words in one line."""
        return ", ".join(line.strip() for line in self.words.splitlines() if line.strip())


def require_computed(stack):
    """Raises ErasureError for a stack in which words act that were not computed for a model."""
    for entry in stack.entries:
        if entry.acts and isinstance(entry.adapter, Written) and entry.adapter.pending:
            raise ErasureError(
                f'The row "{entry.adapter.describe()}" of the stack is words, which are erased when the stack is '
                "applied to a model; connect the stack to Apply Erasure, or model and clip to the Erasure Stack Editor."
            )


def by_words(stack):
    """A stack in which rows of words that were not computed open by these words, as they have no probes yet."""
    return ErasureStack(
        tuple(
            replace(entry, permeability=replace(entry.permeability, mode=TRANSPORT))
            if isinstance(entry.adapter, Written) and entry.adapter.pending and entry.mode == MEANING
            else entry
            for entry in stack.entries
        )
    )
