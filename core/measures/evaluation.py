"""An evaluation from beginning to end: what is compared, what was measured before, and what stays after a stop."""

import time
from typing import Protocol

import numpy as np

from ..errors import ErasureError
from ..text.concepts import parse_lines
from .compare import compare
from .record import EMPTY, ERASE, NEIGHBOUR, UNRELATED
from .render_page import page
from .scores import Prompt, parse_prompt
from .summary import summarise

WRITE_EVERY = 5  # seconds between two versions of the file


class Place(Protocol):
    """Where an evaluation is kept, see core/host/files/reports.py: write(ending, text) gives how the file is called."""

    def write(self, ending, text): ...


def prompts_of(classes, erase, neighbour, unrelated):
    """{stratum: [Prompt]} of three texts, one prompt a line, and the empty prompt; raises ErasureError when nothing is
    to be compared."""
    found = {}
    for stratum, text in ((ERASE, erase), (NEIGHBOUR, neighbour), (UNRELATED, unrelated)):
        lines = parse_lines(text)
        if lines:
            found[stratum] = [parse_prompt(line, classes) for line in lines]
    if not found:
        raise ErasureError("No prompt to compare was given; write at least one, each on a line of its own.")
    return {**found, EMPTY: [Prompt("")]}


def same(earlier, record):
    """Whether two records are of the same settings and the same models, as far as those answer to one noise."""
    if earlier.fingerprint() != record.fingerprint():
        return False
    a, b = (np.array(r.probe, np.float64) for r in (earlier, record))
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-2, atol=1e-3 * np.abs(b).max()))


def seeds_from(seed, count):
    """A function of a prompt's number that gives its `count` seeds, each prompt others."""
    return lambda number: [(seed + number * count + i) % 2**64 for i in range(count)]


def evaluate(record, prompts, pairs, distances, seeds_of, judge, shown, place):
    """Fills a Record as compare() does and writes it to a Place, now and then and at the end; (its summary, [how the
    JSON file and the page are called]). An exception, such as Cancel, leaves both files of what was measured."""
    written = time.monotonic()

    def save():
        nonlocal written
        if time.monotonic() - written > WRITE_EVERY:
            place.write("json", record.to_json())
            written = time.monotonic()

    try:
        compare(record, prompts, pairs, distances, seeds_of, judge, shown, save)
    finally:
        if record.rows:
            found = summarise(record)
            files = [place.write("json", record.to_json(found)), place.write("html", page(record, found))]
    return found, files
