"""A third party's ESD as a LoRA for Flux, with transposed factors: <layer>.lora.A (in, r), <layer>.lora.B (r, out).

The change of the layer is (A B)^T. The file has no alpha; the program that it was trained with applies it four times.
"""

import logging
import re

from ..adapters.adapter import Card, ErasureAdapter
from .factors import gather, low_rank
from .format import Format

log = logging.getLogger("membrane")

KEY = re.compile(r"(.+)\.lora\.([AB])$")
PARTS = {"A": "down", "B": "up"}
STRENGTH = 4


def recognises(contents):
    """Whether a file has these keys."""
    return any(map(KEY.match, contents.tensors))


def parse(contents):
    """Adapter of such a file; raises ErasureError for a damaged one."""
    changes = {}
    for layer, parts in gather(contents, _split).items():
        if {"up", "down"} <= parts.keys() and _transposed(parts["down"], parts["up"]):
            parts = {part: tensor.T for part, tensor in parts.items()}
        changes[layer] = low_rank(contents.name, layer, parts)
    log.info("Membrane: %s says no scale; the program it was made with uses strength %d", contents.name, STRENGTH)
    return ErasureAdapter(card(contents), {"low_rank": changes}, contents.name)


def card(contents):
    """Card of such a file, which does not say what it erases."""
    return Card("LoRA", (), settings={"published_strength": STRENGTH})


def _split(key):
    found = KEY.match(key)
    return found and (found[1], PARTS[found[2]])


def _transposed(a, b):
    """Whether factors are (in, r) and (r, out), as these files have them, and not (r, in) and (out, r)."""
    return a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0] <= min(a.shape[0], b.shape[1])


FORMAT = Format("LoRA (in by rank)", recognises, parse, card)
