"""Captions of everyday things: what a concept's probe is told apart from, whatever else is kept."""

from .captions import captions_of
from .concepts import fill
from .similarity import short_captions

THINGS = (
    "house", "dog", "cat", "woman", "man", "car", "tree", "flower", "city", "mountain", "river", "chair", "table",
    "bird", "horse", "boat", "book", "lamp", "hat", "apple", "bridge", "ship", "cloud", "sun", "fish", "cake", "clock",
    "guitar", "train", "child", "building", "street", "garden", "lake", "bottle", "cup", "door", "window", "shoe",
    "bear",
)  # fmt: skip
QUALITIES = (
    "old", "big", "small", "wooden", "wet", "bright", "dark", "golden", "broken", "empty", "round", "tall", "modern",
    "ancient", "soft", "shiny", "foggy", "sunny", "quiet", "rusty",
)  # fmt: skip
EACH = 2  # captions of a word
STRIDE = 7  # from one of its captions to the next, so that neighbours do not share them


def everyday_captions():
    """Captions of 60 words, each in two of the captions for anything, the first sentences of the neutral captions, and
    the empty prompt, without repeats: the same for every erasure, so that they are encoded once for a text encoder."""
    templates = captions_of("anything").templates
    found = [
        fill(templates[(i + STRIDE * k) % len(templates)], word)
        for i, word in enumerate((*THINGS, *QUALITIES))
        for k in range(EACH)
    ]
    return tuple(dict.fromkeys([*found, *short_captions(), ""]))
