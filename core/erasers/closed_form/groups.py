"""Which rows of a job's encoded prompts the methods take: by concept, pairs of targets and replacements."""

from dataclasses import dataclass

import torch

from ...families.family import CONTEXT
from ...text.carriers import carriers, evened, fixed, kept, scale
from ...text.rows import after_start, aligned, last_of, side_by_side, subject

SUBJECT, ALL = TOKENS = ("subject", "all")
NEEDED, PUBLISHED = ROWS = ("as the encoder needs", "as published")
FIRST, OF_2025, AUGMENTED = EDITIONS = ("first", "scripts of 2025", "scripts of 2025, augmented")


@dataclass(frozen=True)
class Carrying:
    """The rows of a job where the encoder spreads words over others; all as long as CLIP's on average.

    groups: by concept, pairs (targets (r, d), replacements (r, d)); preserved: {prompt: rows (n, d)}; replacing: rows
    of the prompts with surrogates, which stay as they are; empty: (n, d), those of the empty prompt; fixed: (h, d),
    those that no map may change. Every pair, and every prompt, weighs as much as one row.
    """

    groups: list
    preserved: dict
    replacing: list
    empty: torch.Tensor
    fixed: torch.Tensor


def spreads(job, encoded):
    """Whether the rows to take are those that carry a concept instead of those that the methods are published with."""
    return encoded.reach != CONTEXT and job.rows == NEEDED and job.edition == FIRST


def carrying(job, encoded, captions=None):
    """Carrying of a job; captions: the prompts to preserve, all that it names unless given."""
    entry = encoded.entry
    groups, replacing = [[] for _ in job.concepts], {}
    for i, target, replacement in job.pairs():
        groups[i].append(carriers(encoded[target], encoded[replacement], entry.reach, entry.pads))
        if not job.erases(job.concepts[i].surrogate):
            replacing[replacement] = kept(encoded[replacement], entry.reach, entry.pads)
    names = job.preserved() if captions is None else captions
    preserved, empty = ({p: kept(encoded[p], entry.reach, entry.pads) for p in prompts} for prompts in (names, [""]))
    size = scale([*preserved.values(), *replacing.values(), *(pair.targets for pairs in groups for pair in pairs)])
    return Carrying(
        [[tuple(evened(rows) * size for rows in (pair.targets, pair.replacements)) for pair in pairs]
         for pairs in groups],
        {prompt: evened(rows) * size for prompt, rows in preserved.items()},
        [evened(rows) * size for prompt, rows in replacing.items() if prompt not in preserved],
        empty[""] * size,
        fixed(encoded[""], entry.reach),
    )  # fmt: skip


def subject_of(job, encoded, prompt, word):
    """Index of the last row of a word in a prompt, where the job put it."""
    head = job.heads.get((prompt, word))
    return subject(encoded[prompt], encoded[word]) if head is None else last_of(encoded[prompt], encoded[head])


def aligned_groups(job, encoded):
    """By concept, the rows from the last subject token on of each prompt pair: what UCE edits."""
    groups = [[] for _ in job.concepts]
    for i, target, replacement in job.pairs():
        concept = job.concepts[i]
        both = encoded[target], encoded[replacement]
        words = concept.text, concept.surrogate
        places = (subject_of(job, encoded, prompt, word) for prompt, word in zip((target, replacement), words))
        groups[i].append(aligned(*both, *places))
    return groups


def whole_groups(job, encoded, start=0):
    """By concept, all rows from index `start` on of each prompt pair: what RECE derives from."""
    groups = [[] for _ in job.concepts]
    for i, target, replacement in job.pairs():
        groups[i].append(side_by_side(encoded[target], encoded[replacement], start))
    return groups


def token_groups(job, encoded, tokens=SUBJECT):
    """By concept, what null-space editing takes of each prompt pair: the row of the last subject token, or all rows
    after the start token; tokens: one of TOKENS."""
    groups = [[] for _ in job.concepts]
    for i, target, replacement in job.pairs():
        concept = job.concepts[i]
        old, new = encoded[target], encoded[replacement]
        if tokens == ALL:
            count = min(len(after_start(old)), len(after_start(new)))
            groups[i].append((after_start(old)[:count], after_start(new)[:count]))
            continue
        words = concept.text, concept.surrogate
        places = (subject_of(job, encoded, prompt, word) for prompt, word in zip((target, replacement), words))
        groups[i].append(tuple(prompt.rows[k : k + 1] for prompt, k in zip((old, new), places)))
    return groups


def preserved_rows(job, encoded, captions, tokens=SUBJECT):
    """Rows (F, d) of the {prompt: subject} that null-space editing protects; F may be 0. tokens: one of TOKENS."""
    if tokens == ALL:
        rows = [after_start(encoded[prompt]) for prompt in captions]
    else:
        rows = [encoded[p].rows[subject_of(job, encoded, p, word)][None] for p, word in captions.items()]
    return torch.cat(rows) if rows else torch.zeros(0, encoded.width)


def safe_surrogates(job, groups):
    """Rows of the surrogates that are not erased themselves: a concept in the safe span would stay as it is."""
    return [r for c, pairs in zip(job.concepts, groups) if not job.erases(c.surrogate) for _, r in pairs]
