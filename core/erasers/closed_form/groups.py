"""Which rows of a job's encoded prompts the methods take: by concept, pairs of targets and replacements."""

import torch

from ...text.rows import after_start, aligned, side_by_side, subject

SUBJECT, ALL = TOKENS = ("subject", "all")


def aligned_groups(job, encoded):
    """By concept, the rows from the last subject token on of each prompt pair: what UCE edits."""
    groups = [[] for _ in job.concepts]
    for i, target, replacement in job.pairs():
        concept = job.concepts[i]
        both = encoded[target], encoded[replacement]
        places = (subject(prompt, encoded[word]) for prompt, word in zip(both, (concept.text, concept.surrogate)))
        groups[i].append(aligned(*both, *places))
    return groups


def whole_groups(job, encoded, start=0):
    """By concept, all rows from index `start` on of each prompt pair: what RECE derives from."""
    groups = [[] for _ in job.concepts]
    for i, target, replacement in job.pairs():
        groups[i].append(side_by_side(encoded[target], encoded[replacement], start))
    return groups


def token_groups(job, encoded):
    """By concept, what null-space editing takes of each prompt pair: the row of the last subject token, or all rows
    after the start token, as the settings' `tokens` say."""
    groups = [[] for _ in job.concepts]
    for i, target, replacement in job.pairs():
        concept = job.concepts[i]
        old, new = encoded[target], encoded[replacement]
        if job.settings.tokens == ALL:
            count = min(len(after_start(old)), len(after_start(new)))
            groups[i].append((after_start(old)[:count], after_start(new)[:count]))
            continue
        places = subject(old, encoded[concept.text]), subject(new, encoded[concept.surrogate])
        groups[i].append(tuple(prompt.rows[k : k + 1] for prompt, k in zip((old, new), places)))
    return groups


def preserved_rows(job, encoded, captions):
    """Rows (F, d) of the {prompt: subject} that null-space editing protects; F may be 0."""
    if job.settings.tokens == ALL:
        rows = [after_start(encoded[prompt]) for prompt in captions]
    else:
        rows = [encoded[p].rows[subject(encoded[p], encoded[word])][None] for p, word in captions.items()]
    return torch.cat(rows) if rows else torch.zeros(0, encoded.width)


def safe_surrogates(job, groups):
    """Rows of the surrogates that are not erased themselves: a concept in the safe span would stay as it is."""
    erased = [c.text.lower() for c in job.concepts]
    return [r for c, pairs in zip(job.concepts, groups) if c.surrogate.lower() not in erased for _, r in pairs]
