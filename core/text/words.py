"""The plain words of texts, however a tokenizer cuts them up: which of a concept's words a text has."""

import re
import sys
import unicodedata

# scripts without spaces, and digits, which some tokenizers part: kana, Han, Hangul
SINGLE = r"\d\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
RUN = re.compile(rf"(?:[{SINGLE}]|[^\W_])+(?:'[^\W_]+)*")
PART = re.compile(rf"[{SINGLE}]|[^\W{SINGLE}]+")


def runs(text):
    """Parts of each run of a text between spaces and signs, as a list of tuples.

    Part by part: a word in lower case without the ending of a plural or of a possessive, or one character of a script
    that puts no spaces between words, or one digit.
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    text = re.sub(r"\s+'\s*(?=s\b)", "'", text)  # as some tokenizers write a possessive
    found = []
    for run in RUN.findall(text):
        found.append(tuple(_singular(part) for part in PART.findall(run.removesuffix("'s"))))
    return found


def plain_words(text):
    """The parts of all runs of a text, one after the other."""
    return tuple(sys.intern(part) for run in runs(text) for part in run)


def share_of_words(concept, words):
    """Share of a concept's runs, as runs() gives them, that a text has; words: as plain_words() gives them.

    A text that has the whole phrase has all of them. What a run is made of has to follow one another in the text.
    """
    if not concept:
        return 0.0
    return sum(_has(words, run) for run in concept) / len(concept)


def _has(words, run):
    if len(run) == 1:
        return run[0] in words
    return any(words[i : i + len(run)] == run for i in range(len(words) - len(run) + 1))


def _singular(word):
    """The word as singular and plural share it: "boxes" and "box", "movies" and "movie" become the same."""
    word = word.removesuffix("'s")
    if len(word) > 3 and word[-1] == "s" and word[-2] not in "sui":
        word = word[:-1]
    if len(word) > 3 and word.endswith("ie"):
        return word[:-2] + "y"
    if len(word) > 3 and word[-1] == "e" and (word[-2] in "sxzo" or word[-3:-1] in ("ch", "sh")):
        return word[:-1]
    return word
