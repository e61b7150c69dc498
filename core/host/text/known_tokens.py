"""What conditionings were made from: token ids, plain words, and which rows stand for words.

A conditioning that reaches the sampler is vectors only, but Facilitated Transport also compares words. So the
host's CLIP is watched while it encodes: what goes in and comes out is passed on untouched. Until a gate that follows
the text exists, nothing more than a weak reference to the vectors is kept; then the text is kept under a hash of the
vectors, for CLIP per context of 77 tokens. Vectors are known again in half precision, and where several were joined;
scaled or averaged ones are not, and gates open for them. What is still in use is not forgotten, and what the pack
encodes for itself is not noted. This is the pack's one piece of state outside a MODEL; the environment variable
MEMBRANE_TOKEN_MEMORY=off leaves the CLIP alone, and gates go by the cosine of the texts.
"""

import functools
import hashlib
import logging
import os
import weakref
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.sd
import torch

from ...text.encoded import UNKNOWN, Heard
from .tokens import Tokenizer, fills_contexts, ids_of

log = logging.getLogger("membrane")

LIMIT = 4096  # texts that are not in use any more; 1 MB of CLIP's, 20 MB of long ones
SWITCH = "MEMBRANE_TOKEN_MEMORY"
ROUNDINGS = (torch.float16, torch.bfloat16)  # what vectors may have been rounded to


@dataclass(frozen=True, eq=False)
class Text:
    """What is known of vectors (length, d): Heard of them, and the place of the first end token; vectors: a weak
    reference to them."""

    length: int
    heard: Heard
    end: int
    vectors: weakref.ref


class Prompts:
    """Texts that were encoded lately, found by their vectors; limit: how many are kept that nobody uses any more."""

    def __init__(self, limit=LIMIT):
        self.limit = limit
        self.known = OrderedDict()  # {hash of vectors: Text}, for each text one of every rounding
        self.noted, self.room, self.wanted = [], limit, False  # room: how many may be noted until the next look
        self.looking_away, self.told = False, False
        self.bound = limit * len(ROUNDINGS)  # how many may be known until the next look

    @property
    def off(self):
        """Whether nothing is watched, by the user's wish."""
        return os.environ.get(SWITCH, "").lower() == "off"

    @contextmanager
    def aside(self):
        """What is encoded meanwhile is not noted."""
        before, self.looking_away = self.looking_away, True
        try:
            yield
        finally:
            self.looking_away = before

    def note(self, tokens, vectors, tokenizer=None):
        """Vectors (1, n T, d) made of a tokenized text; looked at when somebody asks, at once from then on."""
        if self.looking_away:
            return
        if self.wanted:
            self.remember(tokens, vectors, tokenizer)
        else:
            self.noted.append((tokens, weakref.ref(vectors), tokenizer))
            if len(self.noted) > self.room:  # what is in use stays
                self.noted = [noted for noted in self.noted if noted[1]() is not None]
                self.room = max(self.limit, 2 * len(self.noted))

    def want(self):
        """There is somebody who asks: what was noted and is still in use is looked at."""
        self.wanted = True
        noted, self.noted = self.noted, []
        for tokens, reference, tokenizer in noted:
            vectors = reference()
            if vectors is not None:
                self.remember(tokens, vectors, tokenizer)

    def remember(self, tokens, vectors, tokenizer=None):
        """Keeps what a tokenized text, {encoder: [contexts of (token, weight)]}, says of its vectors (1, n T, d).

        tokenizer: the host's of the CLIP; without it only ids are known. Tokens of a form that other packs made up say
        nothing.
        """
        try:
            self._remember(tokens, vectors, tokenizer)
        except Exception as error:  # somebody else's encoding must not fail of being watched
            log.debug("Membrane: tokens of %s cannot be read: %s", type(tokenizer).__name__, error)

    def _remember(self, tokens, vectors, tokenizer):
        contexts = next(iter(tokens.values()))
        if not contexts or vectors.dim() != 3 or not vectors.shape[1] or set(ids_of(contexts)) <= {UNKNOWN}:
            return
        reference, rows = weakref.ref(vectors), vectors[0]
        if fills_contexts(tokens) and len(rows) % len(contexts) == 0:
            # encoders of CLIP's kind share one vocabulary, and a word may be said to one of them alone
            for *streams, chunk in zip(*tokens.values(), rows.chunk(len(contexts))):
                if len(chunk) % len(streams[0]):  # not a token a row: ids and weights in two lists
                    return
                ids = frozenset(ids_of(streams)) - {UNKNOWN}
                self._keep(chunk, Heard(ids), _first_end(ids_of(streams[:1])), reference)
        else:
            heard = Heard(frozenset(ids_of(contexts)) - {UNKNOWN})
            if tokenizer is not None:
                heard = Tokenizer(tokenizer).heard(tokens, len(rows))
            self._keep(rows, heard, _first_end(ids_of(contexts[:1])), reference)
        self._forget()

    def _keep(self, rows, heard, end, reference):
        for rounding in ROUNDINGS:
            key = _joined(_key(rows.to(rounding)))
            self.known[key] = Text(len(rows), heard, end, reference)
            self.known.move_to_end(key)

    def _forget(self):
        """Forgets the oldest of the texts that nobody uses any more, as many as are over the limit."""
        most = self.limit * len(ROUNDINGS)
        if len(self.known) <= self.bound:
            return
        for key in list(self.known):
            if self.known[key].vectors() is None:
                del self.known[key]
                if len(self.known) <= most:
                    break
        self.bound = most if len(self.known) <= most else len(self.known) + most  # so many are in use

    def recall(self, vectors):
        """Heard of each row of vectors (rows, n T, d); None for a row with a part that is not known."""
        self.want()
        found = [self._parts(row) for row in vectors]
        if not self.told and any(parts is None and row.any() for parts, row in zip(found, vectors)):
            self.told = True
            log.warning(
                "Membrane: the words of a conditioning are not known (it was averaged or scaled, or another node "
                "encoded it); %s. This is said once.",
                "gates that follow the text go by its vectors alone, as MEMBRANE_TOKEN_MEMORY=off asks"
                if self.off
                else "gates that follow the text open for it as if it had the concept, unless its vectors tell",
            )
        return [None if parts is None else _heard(parts) for parts in found]

    def ends(self, vectors):
        """[(length, place of the first end token)] of the contexts of each row of vectors; None as in recall()."""
        self.want()
        found = [self._parts(row) for row in vectors]
        return [None if parts is None else [(text.length, text.end) for text in parts] for parts in found]

    def _parts(self, row):
        """The Texts that a row (n T, d) is made of, one after the other, or None."""
        if not len(row):
            return None
        digests = _key(row)
        lengths = sorted({text.length for text in self.known.values()}, reverse=True)
        return self._from(digests, lengths)

    def _from(self, digests, lengths):
        if not digests:
            return []
        for length in lengths:
            key = _joined(digests[:length])
            if length <= len(digests) and key in self.known:
                rest = self._from(digests[length:], lengths)
                if rest is not None:
                    self.known.move_to_end(key)
                    return [self.known[key], *rest]
        return None


def _heard(texts):
    """Heard of several texts that follow one another."""
    if len(texts) == 1:
        return texts[0].heard
    ids, words, places, start = frozenset(), (), (), 0
    for text in texts:
        own = text.heard
        ids |= own
        words = None if words is None or own.words is None else (*words, "", *own.words)  # "" parts them
        places = None if places is None or own.places is None else (*places, *(start + i for i in own.places))
        start += text.length
    return Heard(ids, words, places)


def _first_end(ids):
    """Place of the first end token of a context: where its last tokens begin to repeat, or before that where a context
    is filled up with zeros, as Stable Diffusion 2 and the larger encoder of XL do."""
    place = len(ids) - 1
    while place > 1 and ids[place - 1] == ids[-1]:
        place -= 1
    return place - 1 if ids[-1] == 0 else place


def _key(vectors):
    """A hash of each of vectors (T, d), the same in single and in half precision."""
    rounding = vectors.dtype if vectors.dtype in ROUNDINGS else ROUNDINGS[0]
    data = vectors.detach().cpu().to(rounding).contiguous().view(torch.uint8).numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in data]


def _joined(digests):
    return hashlib.blake2b(b"".join(digests), digest_size=16).digest()


PROMPTS = Prompts()


def watch(clip_class=comfy.sd.CLIP, prompts=PROMPTS):
    """Notes what the host's CLIP encodes from now on; a second call changes nothing, and neither does one with the
    memory switched off."""
    if prompts.off:
        return
    for name in ("encode_from_tokens", "encode_from_tokens_scheduled"):
        method = getattr(clip_class, name, None)
        if method is not None and not hasattr(method, "membrane"):
            setattr(clip_class, name, _watched(method, prompts))


def _watched(method, prompts):
    @functools.wraps(method)
    def encode(self, tokens, *args, **kwargs):
        with prompts.aside():  # one of the two methods may call the other
            result = method(self, tokens, *args, **kwargs)
        for vectors in _vectors(result):
            if isinstance(tokens, dict) and isinstance(vectors, torch.Tensor):
                prompts.note(tokens, vectors, getattr(self, "tokenizer", None))
        return result

    encode.membrane = True
    return encode


def _vectors(result):
    """The text vectors in whatever form the host returns them."""
    if isinstance(result, dict):
        return (result.get("cond"),)
    if isinstance(result, list):  # scheduled: [[vectors, {...}], ...]
        return tuple(entry[0] for entry in result)
    return (result[0] if isinstance(result, tuple) else result,)
