"""The probes of a closed-form erasure: directions that tell the texts of its concepts from all others.

The map's own response, the largest |A B c| / |c| of a row, was to be the measure. With few captions and what is close
preserved it tells a concept from the rest by 3 to 1, but with the built-in captions it does not: on the demo U-Net it
is 1.05 and more for texts with a star and up to 1.61 for other shapes where nothing is preserved, since a map that
nothing holds moves them too (and up to 0.97 for neutral captions); colours and T5's rows overlap even with all others
preserved. A probe that is fitted to tell them apart leaves a gap on both demo models, with a preserve list or without
(benchmarks/results/erasure_meaning.md counts what comes of it).
"""

import torch

from ...adapters.probe import Probe
from ...text.concepts import fill, mentions
from .groups import subject_of

SHRINKAGE = 10.0  # times the mean variance of a row; 3 to 30 do as well, 1 and less open for synonyms too late
FOLDS = 4  # captions are scored by probes that were not fitted on them
CLOSED, CERTAIN = 0.99, 0.25  # quantiles: of the responses of other texts, and of those of texts with the concept
# A gate opens within this part of the way between the two. For ten concepts of the demo models, each in five or more
# styles that no caption has, 20 to 30 % opened fully for all texts with the concept and all synonyms. Of the other
# texts 0.03 % (U-Net) and none (transformer) opened with a preserve list, 0.7 % and 3.4 % without; these numbers were
# chosen with that in view. With the lowest 5 % in place of 25 some concepts are not told apart on the transformer, as
# some captions for anything are no place for a noun. The part is short: half an erasure is nobody's wish.
OPENING = (0.2, 0.3)
APART = 0.05  # responses that are closer tell nothing apart
PADDING_KEPT = 4  # rows of a prompt's padding that are fitted; they are many and alike


def probes_of(job, encoded, others):
    """Probes of a job at one text entry, for those of its concepts that can be told from other texts there.

    encoded: Encoded of the job's prompts at the entry; others: of everyday_captions(). A probe is fitted for what a
    concept's captions have at its last word, against all rows of the captions of what replaces it, of what is kept and
    of everyday things; captions that have the concept among them are left out.
    """
    kept = {prompt: encoded[prompt] for prompt in job.preserved()}
    for _, _, replacement in job.pairs():
        kept[replacement] = encoded[replacement]
    kept |= {prompt.prompt: prompt for prompt in others}
    found = [_probe(k, job, encoded, kept) for k in range(len(job.concepts))]
    return tuple(probe for probe in found if probe is not None)


def _probe(k, job, encoded, kept):
    """Probe of a job's concept number k, None where its texts cannot be told from others."""
    word = job.concepts[k].text
    with_it = [fill(template, word) for template in job.templates]
    without = [prompt for text, prompt in kept.items() if text not in with_it and not mentions(text, word)]
    targets = [_unit(encoded[p].rows[subject_of(job, encoded, p, word)][None]) for p in with_it]
    rows = [_unit(prompt.with_padding(PADDING_KEPT).rows) for prompt in without]
    scores = [], []
    folds = min(FOLDS, len(targets))
    for fold in range(folds) if folds > 1 else ():
        direction = _direction(_left_out(targets, fold, folds), _left_out(rows, fold, folds))
        scores[0].extend(_response(encoded[p].rows, direction) for p in with_it[fold::folds])
        scores[1].extend(_response(prompt.rows, direction) for prompt in without[fold::folds])
    direction = _direction(targets, rows)
    if folds < 2:
        scores[0].append(_response(encoded[with_it[0]].rows, direction))
        scores[1].extend(_response(prompt.rows, direction) for prompt in without)
    certain, closed = (torch.tensor(s).quantile(q).item() for s, q in zip(scores, (CERTAIN, CLOSED)))
    if certain - closed < APART:
        return None
    low, high = (closed + part * (certain - closed) for part in OPENING)
    return Probe(k, direction.float(), low, high)


def _left_out(parts, fold, folds):
    return [part for i, part in enumerate(parts) if i % folds != fold]


def _response(rows, direction):
    return (_unit(rows) @ direction).max().item()


def _direction(targets, others):
    """Direction (d,) of length 1, float64, of the discriminant between two lists of blocks of rows of length 1.

    Ridge regression of 1 for the targets and 0 for the others, both classes of equal weight: with C the covariance of
    all rows, d their width, m the difference of the classes' means, (C + s tr(C) / d) p ~ m.
    """
    one, two = torch.cat(targets), torch.cat(others)
    means = one.mean(dim=0), two.mean(dim=0)
    difference, middle = means[0] - means[1], (means[0] + means[1]) / 2
    weights = [torch.full((len(rows),), (0.5 / len(rows)) ** 0.5, dtype=rows.dtype) for rows in (one, two)]
    x = (torch.cat([one, two]) - middle) * torch.cat(weights)[:, None]
    ridge = SHRINKAGE * x.square().sum() / x.shape[1]
    return _unit(_solved(x, ridge, difference))


def _solved(x, ridge, right):
    """(X^T X + ridge)^-1 right for X (n, d), by the smaller of the two Gram matrices."""
    count, width = x.shape
    if width <= count:
        return torch.linalg.solve(x.T @ x + ridge * torch.eye(width, dtype=x.dtype), right)
    inner = torch.linalg.solve(x @ x.T + ridge * torch.eye(count, dtype=x.dtype), x @ right)
    return (right - x.T @ inner) / ridge


def _unit(rows):
    return torch.nn.functional.normalize(rows.double(), dim=-1)
