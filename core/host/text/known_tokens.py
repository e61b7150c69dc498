"""Which tokens a conditioning was made from.

A conditioning that reaches the sampler is vectors only, but Facilitated Transport also compares tokens. So the
host's CLIP is watched while it encodes: what goes in and comes out is passed on untouched. Until a gate that follows
the text exists, nothing more than a weak reference to the vectors is kept; then the token ids are kept under a hash of
the vectors, per context of 77 tokens. This is the pack's one piece of state outside a MODEL; the environment variable
MEMBRANE_TOKEN_MEMORY=off leaves the CLIP alone, and gates go by the cosine of the texts.
"""

import functools
import hashlib
import os
import weakref
from collections import OrderedDict, deque
from numbers import Integral

import comfy.sd
import torch

LIMIT = 4096  # contexts; about 1 MB
SWITCH = "MEMBRANE_TOKEN_MEMORY"


class Prompts:
    """Token ids of the contexts that were encoded lately, found by their vectors."""

    def __init__(self, limit=LIMIT):
        self.limit = limit
        self.known = OrderedDict()
        self.noted, self.wanted = deque(maxlen=limit), False

    def note(self, tokens, vectors):
        """Vectors (1, n T, d) made of a tokenized text; looked at when somebody asks, at once from then on."""
        if self.wanted:
            self.remember(tokens, vectors)
        else:
            self.noted.append((tokens, weakref.ref(vectors)))

    def want(self):
        """There is somebody who asks: what was noted and is still in use is looked at."""
        self.wanted = True
        while self.noted:
            tokens, reference = self.noted.popleft()
            vectors = reference()
            if vectors is not None:
                self.remember(tokens, vectors)

    def remember(self, tokens, vectors):
        """Keeps the ids of a tokenized text, {encoder: [contexts of (token, weight)]}, for its vectors (1, n T, d)."""
        contexts = next(iter(tokens.values()))
        if not contexts or vectors.dim() != 3 or vectors.shape[1] % len(contexts):
            return
        for context, chunk in zip(contexts, vectors[0].chunk(len(contexts))):
            key = _key(chunk)
            ids = [int(t[0]) if isinstance(t[0], Integral) else None for t in context]
            self.known[key] = (len(chunk), frozenset(i for i in ids if i is not None), _first_end(ids))
            self.known.move_to_end(key)
        while len(self.known) > self.limit:
            self.known.popitem(last=False)

    def recall(self, vectors):
        """Distinct token ids of each row of vectors (rows, n T, d); None for a row with a context that is not known."""
        self.want()
        found = [self._contexts(row) for row in vectors]
        return [frozenset().union(*(ids for _, ids, _ in contexts)) if contexts else None for contexts in found]

    def ends(self, vectors):
        """[(length, place of the first end token)] of the contexts of each row of vectors; None as in recall()."""
        self.want()
        found = [self._contexts(row) for row in vectors]
        return [[(length, end) for length, _, end in contexts] if contexts else None for contexts in found]

    def _contexts(self, row):
        """What is known of the contexts that a row (n T, d) is made of, or None."""
        for length in {known[0] for known in self.known.values()}:
            if len(row) and len(row) % length == 0:
                found = [self.known.get(_key(chunk)) for chunk in row.split(length)]
                if all(found):
                    return found
        return None


def _first_end(ids):
    """Place of the first end token of a context: where its last tokens begin to repeat, or before that where a context
    is filled up with zeros, as Stable Diffusion 2 and the larger encoder of XL do."""
    place = len(ids) - 1
    while place > 1 and ids[place - 1] == ids[-1]:
        place -= 1
    return place - 1 if ids[-1] == 0 else place


def _key(vectors):
    data = vectors.detach().to("cpu", torch.float32).contiguous()
    return hashlib.blake2b(data.view(torch.uint8).numpy().tobytes(), digest_size=16).digest()


PROMPTS = Prompts()


def watch(clip_class=comfy.sd.CLIP, prompts=PROMPTS):
    """Notes what the host's CLIP encodes from now on; a second call changes nothing, and neither does one with the
    memory switched off."""
    if os.environ.get(SWITCH, "").lower() == "off":
        return
    for name in ("encode_from_tokens", "encode_from_tokens_scheduled"):
        method = getattr(clip_class, name, None)
        if method is not None and not hasattr(method, "membrane"):
            setattr(clip_class, name, _watched(method, prompts))


def _watched(method, prompts):
    @functools.wraps(method)
    def encode(self, tokens, *args, **kwargs):
        result = method(self, tokens, *args, **kwargs)
        for vectors in _vectors(result):
            if isinstance(tokens, dict) and isinstance(vectors, torch.Tensor):
                prompts.note(tokens, vectors)
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
