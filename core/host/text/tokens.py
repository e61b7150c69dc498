"""Tokenized texts: what the host's tokenizers put around words, which row is which token, and the plain words."""

import hashlib
import re
import weakref
from dataclasses import dataclass
from numbers import Integral

import torch

from ...text.encoded import UNKNOWN, WORD, Frame, Heard
from ...text.vocabulary import MARK, Vocabulary
from ...text.words import plain_words

CLIP_STREAMS = {"l", "g", "h"}  # what the host calls the encoders whose prompts all fill contexts of one length
BEFORE = "a"  # a word to tell a tokenizer's frame by, and to see other words behind
# what a user says in the templates of Qwen, Llama, Mistral and Gemma
TURN = re.compile(
    r"(?:\0<\|im_start\|>\0user\n|\0<\|start_header_id\|>\0user\0<\|end_header_id\|>\0|"
    r"\0\[INST\]\0|\0<start_of_turn>\0user\n)"
    r"((?:(?!\0<\|im_end\|>\0|\0<\|eot_id\|>\0|\0\[/INST\]\0|\0<end_of_turn>\0).)*)",
    re.DOTALL,
)
PROMPT_START = "<Prompt Start>"  # where system prompts of Lumina 2 end, which are written into the text itself
KNOWN = weakref.WeakKeyDictionary()  # {tokenizer: ({encoder: Frame}, {encoder: Vocabulary or None})}


def ids_of(contexts):
    """Token ids of some contexts, one after the other: for the vector of an embedding one below UNKNOWN, the same
    wherever it stands; UNKNOWN for anything else."""
    return [_id(token[0]) for one in contexts for token in one]


def _id(token):
    if isinstance(token, Integral):
        return int(token)
    if isinstance(token, torch.Tensor) and token.dim() == 1 and token.is_floating_point():
        data = token.detach().cpu().half().contiguous().view(torch.uint8).numpy().tobytes()
        return UNKNOWN - 1 - int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "big")
    return UNKNOWN


def fills_contexts(tokens):
    """Whether a tokenized text is one of CLIP encoders alone, whose prompts all fill contexts of one length."""
    return set(tokens) <= CLIP_STREAMS


@dataclass(frozen=True, eq=False)
class Layout:
    """Which rows of an encoding are which tokens: ids and roles (T,), as EncodedPrompt has them; head: rows before the
    words; stream: the last encoder whose rows they are; places: of the words among its rows, None where the tokens are
    in another template than the tokenizer's own."""

    ids: tuple[int, ...]
    roles: torch.Tensor
    head: int = 0
    stream: str | None = None
    places: tuple[int, ...] | None = None


class Tokenizer:
    """The host's tokenizer of a CLIP, and what it shows: the tokens around every prompt, the pieces of its vocabulary.

    Tokenized texts are {encoder: [its contexts of (token, weight)]}.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.frames, self.vocabularies = KNOWN.setdefault(tokenizer, ({}, {}))

    def of(self, name):
        """The tokenizer of one encoder, by its name in a tokenized text."""
        own = (getattr(self.tokenizer, attribute, None) for attribute in (f"clip_{name}", name))
        return next((found for found in own if found is not None), self.tokenizer)

    def frame(self, name):
        """Frame of an encoder."""
        if name not in self.frames:
            texts = (self.tokenizer.tokenize_with_weights(text).get(name, ()) for text in ("", BEFORE))
            self.frames[name] = Frame.of(*map(ids_of, texts), getattr(self.of(name), "pad_token", None))
        return self.frames[name]

    def vocabulary(self, name):
        """Vocabulary of an encoder, None where its tokenizer shows none."""
        if name not in self.vocabularies:
            pieces = getattr(self.of(name), "inv_vocab", None)
            self.vocabularies[name] = Vocabulary(pieces) if pieces else None
        return self.vocabularies[name]

    def word_ids(self, name, contexts):
        """The ids that stand for words."""
        found = []
        for ids in map(ids_of, ([context] for context in contexts)):
            found += [i for i, role in zip(ids, self.frame(name).roles(ids).tolist()) if role == WORD]
        return tuple(found)

    def words(self, tokens):
        """Plain words of a tokenized text, of all encoders; None where no vocabulary tells them."""
        known = [name for name in tokens if self.vocabulary(name) is not None]
        found = dict.fromkeys(plain_words(self._text(name, tokens[name])) for name in known)
        joined = tuple(part for words in found for part in ("", *words))[1:]  # "" parts the encoders
        return joined if known else None

    def _text(self, name, contexts):
        """The text that stands in the template of an encoder, or in another one's place for what a user says."""
        vocabulary, frame = self.vocabulary(name), self.frame(name)
        if all(frame.fits(ids_of([context])) for context in contexts):
            text = vocabulary.text([i for context in contexts for i in _parted(context, frame)])
        else:
            text = vocabulary.text(ids_of(contexts), marks=True)
            text = re.sub(rf"{MARK}[^{MARK}]*{MARK}", " ", "\n".join(TURN.findall(text)) or text)
        return text.rpartition(PROMPT_START)[2]

    def layout(self, tokens, length):
        """Layout of `length` rows that a tokenized text was encoded to."""
        streams, cut = _streams(tokens, length)
        if not streams:
            return Layout((UNKNOWN,) * length, torch.full((length,), WORD))
        ids, roles, fits, starts = [], [], True, {}
        for name in streams:
            frame, starts[name] = self.frame(name), len(ids)
            for own in map(ids_of, ([context] for context in tokens[name])):
                fits &= frame.fits(own)
                ids += own
                roles.append((frame if frame.fits(own) else Frame((), (), frame.pad, frame.left)).roles(own))
        roles, last = torch.cat(roles), streams[-1]
        head = self.frame(streams[0]).head(ids_of(tokens[streams[0]][:1])) if fits else cut
        cut = min(cut, head)  # no words are cut off: what more is missing, is behind them
        words = (roles == WORD).nonzero().flatten().tolist()
        places = tuple(i - cut for i in words if max(starts[last], cut) <= i < cut + length) if fits else None
        return Layout(tuple(ids)[cut : cut + length], roles[cut : cut + length], head - cut, last, places)

    def heard(self, tokens, length):
        """Heard of a tokenized text that was encoded to `length` rows."""
        ids = frozenset(ids_of(next(iter(tokens.values())))) - {UNKNOWN}
        return Heard(ids, self.words(tokens), self.layout(tokens, length).places)


def _parted(context, frame):
    """Ids of a context's words, with UNKNOWN where the weight changes: spaces there are lost to some tokenizers."""
    before, found = None, []
    for token, role in zip(context, frame.roles(ids_of([context])).tolist()):
        if role == WORD:
            weight = token[1] if len(token) > 1 else 1.0
            found += [UNKNOWN] if before not in (None, weight) else []
            found += ids_of([[token]])
            before = weight
    return found


def _streams(tokens, length):
    """(names of the encoders whose tokens are the rows, how many rows were cut off in front).

    The rows are those of one encoder, or of the first and the last one after the other, as SD3 joins them; language
    models cut their template off the front. Beside another encoder CLIP-L alone gives no rows, only a pooled vector.
    """
    sizes = {name: sum(map(len, contexts)) for name, contexts in tokens.items()}
    if "g" not in sizes:
        sizes = {name: size for name, size in sizes.items() if name not in CLIP_STREAMS} or sizes
    names = list(sizes)
    for name in names:
        if sizes[name] == length:
            return (name,), 0
    if len(names) > 1 and sizes[names[0]] + sizes[names[-1]] == length:
        return (names[0], names[-1]), 0
    longer = next((name for name in reversed(names) if sizes[name] > length), None)
    return ((longer,), sizes[longer] - length) if longer else ((), 0)
