"""From concept words to the rows of text vectors that the closed-form methods take."""

from dataclasses import dataclass

from ..errors import ErasureError

ARROW = "->"


@dataclass(frozen=True)
class Concept:
    """One thing to erase and what takes its place ("" is the empty prompt)."""

    text: str
    surrogate: str


def parse_concepts(text, surrogate=""):
    """Concepts from lines ``concept`` or ``concept -> replacement``; `surrogate` fills in where a line has none."""
    concepts = []
    for line in _lines(text):
        word, arrow, other = (part.strip() for part in line.partition(ARROW))
        concept = Concept(word, other if arrow else surrogate.strip())
        if not word:
            raise ErasureError(
                f'The line "{line.strip()}" names no concept before "{ARROW}"; write "concept {ARROW} replacement".'
            )
        if concept.text.lower() == concept.surrogate.lower():
            raise ErasureError(
                f'The concept "{word}" is to be replaced by itself, which erases nothing; '
                "give it another replacement or leave the replacement empty."
            )
        if concept.text.lower() in (c.text.lower() for c in concepts):
            raise ErasureError(f'The concept "{word}" is listed twice; keep one of the two lines.')
        concepts.append(concept)
    if not concepts:
        raise ErasureError("No concept to erase was given; write at least one, each on a line of its own.")
    return concepts


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


def fill(template, word):
    """The template with the word in it; an empty word leaves no double spaces."""
    return " ".join(template.replace("{}", word).split())
