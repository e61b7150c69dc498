"""Unified Concept Editing (Gandikota et al., WACV 2024) in its weight-free form."""

from dataclasses import asdict, dataclass

from .groups import aligned_groups, carrying, spreads
from .method import Method
from .solver import gram, group_sizes, ridge, runs, stacked, text_map


def target_rows(groups):
    """The target rows of groups as a flat list of blocks (r, d)."""
    return [targets for pairs in groups for targets, _ in pairs]


def uce_solver(groups, preserve_gram, *, target_gram=None, erase_scale=1.0, preserve_scale=1.0, anchor=0.5):
    """Ridge of UCE's matrix for groups of rows; preserve_gram: R^T R of the preserved rows.

    target_gram: that of the target rows, where it is known; it is used up.
    """
    target_gram = gram(target_rows(groups)) if target_gram is None else target_gram
    return ridge(target_gram, preserve_gram, erase_scale, preserve_scale, anchor, sum(group_sizes(groups)))


def uce_terms(groups, solve, erase_scale=1.0):
    """For each concept factors U (d, E), V (E, d), float64, with W_new = W (I + sum U V) for every edited matrix.

    groups: rows by concept, row i of the targets C is sent to row i of the replacements N. Minimises
    sum ||W' c - W n||^2 s + sum ||W' r - W r||^2 p + anchor ||W' - W||^2 (eq. 5 to 7): the numerator is
    W (G + s (N - C)^T C), so W cancels.
    """
    for run in runs(groups):
        targets, replacements, sizes = stacked(groups[run])
        rows = solve(targets)
        yield from zip((erase_scale * (replacements - targets).T).split(sizes, 1), rows.split(sizes))


def uce_of(groups, preserve, *, erase_scale=1.0, **scales):
    """TextMap of UCE. groups: rows by concept (see by_concept()); preserve: (F, d) or a sequence of such."""
    base = gram(preserve)
    solve = uce_solver(groups, base, erase_scale=erase_scale, **scales)
    return text_map(uce_terms(groups, solve, erase_scale), group_sizes(groups), len(base))


@dataclass(frozen=True)
class Scales:
    """The weights of UCE's three terms."""

    erase_scale: float = 1.0
    preserve_scale: float = 1.0
    anchor: float = 0.5


def solve(job, encoded, weight_gram=None, on_round=None):
    """TextMap of a job, see Method."""
    if spreads(job, encoded):
        found = carrying(job, encoded)
        preserved = [*found.preserved.values(), *found.replacing]
        return uce_of(found.groups, preserved, fixed=found.fixed, **asdict(job.settings))
    return uce_of(aligned_groups(job, encoded), [encoded[p].rows for p in job.preserved()], **asdict(job.settings))


PRESET = {"erase_scale": 1.0, "anchor": 0.5}
PRESETS = dict.fromkeys(("object", "style", "person", "nudity"), PRESET)
UCE = Method("UCE", Scales, solve, presets=PRESETS, by_preserved=True)
