"""Prompts as a text entry of a model reads them: rows of vectors, and what each row stands for."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..errors import ErasureError
from ..families.family import CONTEXT

START, WORD, END, PADDING, TEMPLATE = range(5)
UNKNOWN = -1  # among token ids: a row whose token is not known; ids below it stand for embeddings


class Heard(frozenset):
    """What is known of the text that vectors were made from: the distinct token ids of the first encoder.

    words: its plain words in order, of all encoders that it went through, None where they are not known. places:
    indices of the rows that stand for words, None where that cannot be told.
    """

    words, places = None, None

    def __new__(cls, ids=(), words=None, places=None):
        found = super().__new__(cls, ids)
        found.words, found.places = words, places
        return found


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """One prompt at one text entry.

    rows: (T, d) float32 on the CPU; T differs between prompts, but for encoders that fill a context. ids: the token of
    each row, UNKNOWN where there is none. roles: (T,) what each row stands for: START, WORD, END, PADDING or TEMPLATE,
    the words that an encoder puts around every prompt. inside: the ids of its words as they are after another word,
    where tokenizers tell the two apart (" star" and "star"). heard: all ids in the first encoder's vocabulary, which a
    conditioning is known by; spoken: sets of those that stand for its words, alone and after another word. head: how
    many rows stand before the place of its words.
    """

    prompt: str
    rows: torch.Tensor
    ids: tuple[int, ...]
    roles: torch.Tensor
    inside: tuple[int, ...] = ()
    heard: frozenset[int] = frozenset()
    spoken: tuple[frozenset[int], ...] = ()
    head: int = 0

    def read_as(self, rows):
        """The same prompt with what a model reads of it, rows (T', d). What is added before or behind the encoder's
        rows counts as padding; where a model makes other rows, their tokens are not known."""
        more = len(rows) - len(self.rows)
        if not more:
            return replace(self, rows=rows)
        padding = torch.full((max(0, more),), PADDING)
        if more > 0 and not rows[:more].any():
            ids, roles = (UNKNOWN,) * more + self.ids, torch.cat([padding, self.roles])
            return replace(self, rows=rows, ids=ids, roles=roles, head=self.head + more)
        if more > 0 and not rows[-more:].any():
            return replace(self, rows=rows, ids=self.ids + (UNKNOWN,) * more, roles=torch.cat([self.roles, padding]))
        return replace(self, rows=rows, ids=(UNKNOWN,) * len(rows), roles=torch.full((len(rows),), WORD))

    def with_padding(self, count):
        """The same with so many rows of its padding at most, evenly spread over them."""
        padding = (self.roles == PADDING).nonzero().flatten()
        if len(padding) <= count:
            return self
        kept = padding[torch.linspace(0, len(padding) - 1, count).round().long()].tolist()
        rows = sorted({*(self.roles != PADDING).nonzero().flatten().tolist(), *kept})
        ids, head = tuple(self.ids[i] for i in rows), sum(i < self.head for i in rows)
        return replace(self, rows=self.rows[rows].clone(), ids=ids, roles=self.roles[rows], head=head)

    @property
    def size(self):
        """Bytes of its rows."""
        return self.rows.nbytes

    @property
    def words(self):
        """Token ids of its words."""
        return tuple(i for i, role in zip(self.ids, self.roles.tolist()) if role == WORD)


class Encoded:
    """EncodedPrompts at one text entry, found by their prompts.

    each: in order; contexts: whether all fill one context of the encoder, so that gates may compare them place by place
    (CLIP). pooled: Encoded of the pooled vectors, one row a prompt, or None. entry: the TextEntry, None where the rows
    are the encoder's alone.
    """

    def __init__(self, prompts, contexts=False, pooled=None, entry=None):
        self.each, self.contexts, self.pooled, self.entry = tuple(prompts), contexts, pooled, entry
        self.place = {prompt.prompt: prompt for prompt in self.each}

    @classmethod
    def of_contexts(cls, prompts, ids, vectors, end, pooled=None):
        """From contexts of one length: start token, words, end token, padding.

        ids: (T,) of each prompt; vectors: (n, T, d); end: id of the end token; pooled: (n, p) or None.
        """
        found = [
            EncodedPrompt(prompt, rows, tuple(own), context_roles(own, end), heard=frozenset(own))
            for prompt, own, rows in zip(prompts, ids, vectors)
        ]
        return cls(found, True, None if pooled is None else cls.of_pooled(prompts, pooled))

    @classmethod
    def of_pooled(cls, prompts, vectors):
        """From one vector a prompt, (n, p)."""
        role = torch.tensor([WORD])
        return cls([EncodedPrompt(p, row[None], (UNKNOWN,), role) for p, row in zip(prompts, vectors)])

    def at(self, entry):
        """The same at a TextEntry."""
        return Encoded(self.each, self.contexts, self.pooled, entry)

    def __getitem__(self, prompt):
        return self.place[prompt]

    def __iter__(self):
        return iter(self.each)

    @property
    def behind_norm(self):
        """Whether the rows are those behind the norm that stands before the layers."""
        return self.entry is not None and bool(self.entry.norm)

    @property
    def reach(self):
        """How far a word spreads over the rows, one of REACHES."""
        return self.entry.reach if self.entry else CONTEXT

    @property
    def prompts(self):
        """The prompts, in order."""
        return tuple(prompt.prompt for prompt in self.each)

    @property
    def width(self):
        """Width d of the vectors."""
        return self.each[0].rows.shape[-1]

    @property
    def size(self):
        """Bytes of its rows."""
        return sum(prompt.size for prompt in self) + (self.pooled.size if self.pooled else 0)

    @cached_property
    def vectors(self):
        """(n, T, d) of prompts of one length; raises ErasureError for others."""
        lengths = {len(prompt.rows) for prompt in self}
        if len(lengths) > 1:
            raise ErasureError(
                f"The text encoder gives the prompts {min(lengths)} to {max(lengths)} vectors; expected the same number"
                " for each, as encoders with contexts of one length give them; use a model with such an encoder."
            )
        return torch.stack([prompt.rows for prompt in self])


def context_roles(ids, end):
    """Roles (T,) of a context: a start token, words, then the first end token and padding."""
    ids = list(ids)
    stop = ids.index(end, 1) if end in ids[1:] else len(ids)
    return torch.tensor(([START] + [WORD] * (stop - 1) + [END] + [PADDING] * (len(ids) - stop))[: len(ids)])


@dataclass(frozen=True)
class Frame:
    """What a tokenizer puts around the words of every prompt.

    start, end: the tokens before and behind them; pad: id of the padding, None where there is none; left: whether
    padding stands in front of all. blank: what stands in the place of the words of the empty prompt, a space that a
    template has before them.
    """

    start: tuple[int, ...]
    end: tuple[int, ...]
    pad: int | None
    left: bool = False
    blank: tuple[int, ...] = ()

    @classmethod
    def of(cls, empty, other, pad=None):
        """From the token ids of the empty prompt and of one with words: what both begin with stands before them, and
        what both end with behind them, but for padding between the words and the end of a template. A token that the
        empty prompt repeats to its end is padding, and so is one that it repeats from its beginning and more often than
        the other; pad: where neither shows it, its id as the tokenizer says."""
        left = len(empty) > 1 and _run(empty, empty[0]) > max(1, _run(other, empty[0]))
        if left:
            pad = empty[0]
        elif len(empty) > 1 and empty[-1] == empty[-2]:
            pad = empty[-1]
        bare, words = _without(empty, pad, left), _without(other, pad, left)
        head = _same(bare, words)
        tail = _same(bare[head:][::-1], words[head:][::-1])
        place = len(bare) - tail
        end = bare[place:]
        return cls(tuple(bare[:head]), tuple(end[_run(end, pad) :]), pad, left, tuple(bare[head:place]))

    def fits(self, ids):
        """Whether a prompt's tokens begin and end as it says; others were put into another template."""
        bare = tuple(_without(ids, self.pad, self.left))
        head, tail = len(self.start), len(self.end)
        return len(bare) >= head + tail and bare[:head] == self.start and bare[len(bare) - tail :] == self.end

    def head(self, ids):
        """How many of a prompt's tokens stand before the place of its words."""
        return (_run(ids, self.pad) if self.left else 0) + len(self.start)

    def roles(self, ids):
        """Roles (T,) of a prompt's tokens.

        One token before the words is a start token, one behind them an end token; more are a template. Where nothing
        stands behind them, the first token of the padding is the end token, as in CLIP; none is where padding stands
        in front.
        """
        head, tail, front = len(self.start), len(self.end), self.head(ids) - len(self.start)
        bare = _without(ids, self.pad, self.left)
        between = bare[head : max(head, len(bare) - tail)]
        words = _without(between, self.pad, False)
        found = [PADDING] * front + [START if head == 1 else TEMPLATE] * head
        found += [TEMPLATE if tuple(words) == self.blank else WORD] * len(words)
        found += [PADDING] * (len(between) - len(words)) + [END if tail == 1 else TEMPLATE] * tail
        padding = [PADDING] * (len(ids) - len(found))
        if padding and not tail and not self.left:
            padding[0] = END
        return torch.tensor((found + padding)[: len(ids)])


def _same(some, others):
    """With how many of the same some ids and others begin."""
    return next((n for n, (one, other) in enumerate(zip(some, others)) if one != other), min(len(some), len(others)))


def _run(ids, pad):
    """How often some ids begin with a token."""
    return next((place for place, token in enumerate(ids) if token != pad), len(ids))


def _without(ids, pad, left):
    """Ids without the padding at their end, or at their beginning."""
    if pad is None:
        return list(ids)
    if left:
        return list(ids)[_run(ids, pad) :]
    return list(ids)[: len(ids) - _run(list(ids)[::-1], pad)]
