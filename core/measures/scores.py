"""The field's scores: what a classifier still sees of the erased concepts, and of everything else."""

import re
from dataclasses import dataclass

from ..errors import ErasureError

SEPARATOR = " = "


@dataclass(frozen=True)
class Prompt:
    """A prompt, the class it asks for or None, and whether it asks in other words."""

    text: str
    label: str | None = None
    synonym: bool = False


@dataclass(frozen=True)
class Share:
    """So many of so many pictures."""

    right: int
    of: int

    @property
    def value(self):
        """The share, 0 to 1."""
        return self.right / self.of


@dataclass(frozen=True)
class Scores:
    """Shares before and after the erasure; None where there was nothing to count.

    erased: the erased concept is recognised, in prompts that name it; synonym: in prompts that ask for it in other
    words; kept: the wanted class is recognised, in all others.
    """

    erased: Share | None
    kept: Share | None
    synonym: Share | None
    erased_before: Share | None
    kept_before: Share | None
    synonym_before: Share | None

    @property
    def harmonic(self):
        """Harmonic mean of 1 - erased, kept and 1 - synonym (MACE, Lu et al. 2024, eq. 9), as far as there are such."""
        gone = [1 - share.value for share in (self.erased, self.synonym) if share]
        return harmonic_mean(gone + ([self.kept.value] if self.kept else []))


def harmonic_mean(values):
    """Harmonic mean of shares; 0 when one is 0, None of nothing."""
    values = list(values)
    if not values:
        return None
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / v for v in values)


def named_class(text, classes):
    """The class that a prompt names in whole words, the longest one if several; None when there is none."""
    found = [c for c in classes if re.search(rf"(?<!\w){re.escape(c)}(?!\w)", text, re.IGNORECASE)]
    return max(found, key=len) if found else None


def parse_prompt(line, classes):
    """Prompt of a line: "a red pentagram = star" asks for the class star in other words. Raises ErasureError."""
    text, separator, label = line.rpartition(SEPARATOR)
    if not classes or not separator:
        return Prompt(line, named_class(line, classes))
    known = {c.lower(): c for c in classes}
    name = label.strip().lower()
    if name not in known:
        raise ErasureError(
            f'The prompt "{line}" asks for the class "{label.strip()}", which is not among the class names '
            f"({', '.join(classes)}); add it there or correct the line."
        )
    return Prompt(text.strip(), known[name], named_class(text, classes) != known[name])


def scores(answers, erased):
    """Scores of answers [(Prompt, class seen in the original's picture, class seen in the erased one's)].

    erased: the classes that were erased; prompts without a class do not count.
    """
    groups = {"erased": [], "synonym": [], "kept": []}
    for prompt, before, after in answers:
        if prompt.label is not None:
            group = "kept" if prompt.label not in erased else "synonym" if prompt.synonym else "erased"
            groups[group].append((before == prompt.label, after == prompt.label))
    shares = {}
    for name, pairs in groups.items():
        for suffix, place in (("_before", 0), ("", 1)):
            shares[name + suffix] = Share(sum(pair[place] for pair in pairs), len(pairs)) if pairs else None
    return Scores(**shares)
