"""Captions of example pictures: of a concept, of what it is to be told from, and of anything else."""

from .captions import captions_of, fitting
from .concepts import fill, mentions
from .everyday import everyday_captions

STRIDE = 13  # from one neutral caption to the next, so that a few are of everything


def named_captions(words, count):
    """`count` captions with words in turn, each in the captions for anything that have none of these words themselves;
    none without words."""
    templates = fitting(captions_of("anything").templates, words)
    return [
        fill(templates[(i // len(words)) % len(templates)], words[i % len(words)]) for i in range(count * bool(words))
    ]


def other_captions(concept, count):
    """`count` captions of everyday things and neutral scenes that do not mention a concept."""
    captions = [caption for caption in everyday_captions() if not mentions(caption, concept)]
    return [captions[i * STRIDE % len(captions)] for i in range(count)]
