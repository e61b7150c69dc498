"""From concept words to the rows of text vectors that the closed-form methods take."""

import re
from dataclasses import dataclass

from ..errors import ErasureError

ARROW = "->"
# what is written for "->": longer and double ones, those that a word processor makes, and the arrows of Unicode
ARROWS = re.compile(
    r"[-=\u2010-\u2015\u2212]+>|[\u2192\u21a6\u21d2\u21e8\u21fe\u2794\u2799-\u279e\u27a1\u27f6\u27f9]\ufe0f?"
)
BULLET = re.compile(r"\s*(?:[-*+]\s+|[\u00b7\u2013\u2014\u2022\u2023\u2043\u2219\u25aa\u25cf\u25e6]\s*)(?!>)")
INVISIBLE = re.compile("[\u200b-\u200f\u2060\ufeff]")  # spaces without width, marks of direction and of a file's start
COMMAS = re.compile(r"[,;\u3001\uff0c\uff1b]")
LOOKS_LIKE_ARROW = re.compile(r"\s[=~>|/]\s|:\s|\s:|\uff1a")


@dataclass(frozen=True)
class Concept:
    """One thing to erase and what takes its place ("" is the empty prompt)."""

    text: str
    surrogate: str


def parse_concepts(text, surrogate=""):
    """Concepts from lines ``concept`` or ``concept -> replacement``; `surrogate` fills in where a line has none.

    A line may begin with a bullet, and any usual spelling of the arrow is taken for it. A concept is written as plain()
    writes it.
    """
    concepts = []
    for line in filter(str.strip, (without_bullet(INVISIBLE.sub("", line)) for line in _lines(text))):
        word, *others = map(plain, ARROWS.split(line))
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


def without_bullet(line):
    """A line without the bullet that it begins with, if any."""
    return BULLET.sub("", line, count=1) if BULLET.match(line) else line


def remarks(concepts, preserved, unknown=(), missing=()):
    """Sentences on what may be meant otherwise than it is taken: lists in one line, a sign that looks like an arrow, a
    concept that is also preserved, words that a text encoder has not learned, embeddings that are not there.

    concepts: Concepts; preserved: lines; unknown: the words; missing: names of embeddings.
    """
    kept, found = {line.lower() for line in preserved}, []
    for concept in concepts:
        parts = [part for part in COMMAS.split(concept.text) if part.strip()]
        if len(parts) > 1:
            found.append(
                f'"{concept.text}" was taken as one concept; write one per line to erase {_count(len(parts))}.'
            )
        elif LOOKS_LIKE_ARROW.search(concept.text):
            found.append(
                f'"{concept.text}" was taken as one concept; write "concept {ARROW} replacement" to say what comes '
                "instead."
            )
        if concept.text.lower() in kept:
            found.append(f'"{concept.text}" is also to be kept; it was erased. Take it out of one of the two lists.')
    for line in preserved:
        parts = [part for part in COMMAS.split(line) if part.strip()]
        if len(parts) > 2 and all(len(part.split()) < 4 for part in parts):
            found.append(f'"{line}" was kept as one prompt; write one per line to keep {_count(len(parts))}.')
    for word in dict.fromkeys(unknown):
        found.append(
            f'"{word}" is no word of the text encoder, which spells it; the model may not know it. Look for a spelling '
            "mistake, or for the usual name."
        )
    for name in missing:
        found.append(f'There is no embedding "{name}", so it was read as nothing; put its file into models/embeddings.')
    return found


def _count(number):
    return {2: "both", 3: "all three"}.get(number, f"all {number}")


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


def parse_preserved(text):
    """The same without bullets: what is to be kept, one per line."""
    return list(dict.fromkeys(filter(None, (without_bullet(line).strip() for line in _lines(text)))))


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
