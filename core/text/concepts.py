"""From concept words to the rows of text vectors that the closed-form methods take."""

import re
from dataclasses import dataclass

from ..errors import ErasureError

ARROW = "->"
ARROWS = re.compile("->|=>|[\u2013\u2014\u2212]>|[\u2192\u21d2\u27f6\u2794]")  # as word processors and habits write it
INVISIBLE = re.compile("[\u200b-\u200f\u2060\ufeff]")  # spaces without width, marks of direction and of a file's start


@dataclass(frozen=True)
class Concept:
    """One thing to erase and what takes its place ("" is the empty prompt)."""

    text: str
    surrogate: str


def parse_concepts(text, surrogate=""):
    """Concepts from lines ``concept`` or ``concept -> replacement``; `surrogate` fills in where a line has none.

    The arrow may be another one, such as =>; a concept is written as plain() writes it.
    """
    concepts = []
    for line in _lines(text):
        word, *others = (plain(part) for part in ARROWS.split(line))
        if len(others) > 1:
            raise ErasureError(
                f'The line "{plain(line)}" has {len(others)} arrows; write "concept {ARROW} replacement" with one, and '
                "another line for another concept."
            )
        concept = Concept(word, others[0] if others else plain(surrogate))
        if not word:
            raise ErasureError(
                f'The line "{line.strip()}" names no concept before "{ARROW}"; write "concept {ARROW} replacement".'
            )
        if same(concept.text, concept.surrogate):
            raise ErasureError(
                f'The concept "{word}" is to be replaced by itself, which erases nothing; '
                "give it another replacement or leave the replacement empty."
            )
        if any(same(concept.text, known.text) for known in concepts):
            raise ErasureError(f'The concept "{word}" is listed twice; keep one of the two lines.')
        concepts.append(concept)
    if not concepts:
        raise ErasureError("No concept to erase was given; write at least one, each on a line of its own.")
    return concepts


def plain(text):
    """A text without characters that show nothing, and with one space where it has some."""
    return " ".join(INVISIBLE.sub("", text).split())


def same(text, other):
    """Whether two texts name one thing: case, spaces and invisible characters do not count."""
    return plain(text).casefold() == plain(other).casefold()


def mentions(text, word):
    """Whether a text has a word, or several in a row, as words and not as part of longer ones."""
    word = plain(word).casefold()
    return bool(word) and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", plain(text).casefold()) is not None


def parse_lines(text):
    """The non-empty lines, stripped, without repeats."""
    return list(dict.fromkeys(line.strip() for line in _lines(text)))


def _lines(text):
    """The non-empty lines; raises ErasureError for half characters, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ErasureError(
            f"The text has a half of a character at place {error.start + 1}; write it again or delete that character."
        ) from error
    return [line for line in text.splitlines() if line.strip()]


def parse_templates(text):
    """Caption templates, each with one {} for the concept; the bare concept when there is none."""
    templates = parse_lines(text) or ["{}"]
    for template in templates:
        if template.count("{}") != 1:
            raise ErasureError(
                f'The template "{template}" has {template.count("{}")} places for the concept; '
                'write "{}" exactly once where the concept belongs, as in "a photo of {}".'
            )
    return templates


def up_to(template, word):
    """The template filled up to the end of the word, where a search for its tokens may miss it, else None.

    That is where letters or signs touch it with which a tokenizer may make one token of its beginning or end, as of 's
    or of ), and where what stands behind it has the word again.
    """
    before, _, after = template.partition("{}")
    if not word or not after.strip():
        return None
    merged = _merge(before[-1:], word[0]) or _merge(word[-1], after[0]) or before.endswith("'")
    return fill(f"{before}{{}}", word) if merged or mentions(after, word) else None


def _merge(left, right):
    """Whether two characters side by side may be of one token: two of a word, or two signs."""
    return bool(left.strip() and right.strip()) and left.isalnum() == right.isalnum()


def fill(template, word):
    """The template with the word in it; an empty word leaves no double spaces."""
    return " ".join(template.replace("{}", word).split())
