"""Unified Concept Editing (Gandikota et al., WACV 2024) in its weight-free form."""

from dataclasses import asdict, dataclass

import torch

from .groups import FIRST, aligned_groups, carrying, preserved_rows, spreads, token_groups
from .method import Method
from .row_space import Rows, row_ridge
from .solver import (
    as_blocks,
    count_of,
    fixed_basis,
    gram,
    group_sizes,
    ridge,
    runs,
    stacked,
    text_map,
    unstable,
)


def target_rows(groups):
    """The target rows of groups as a flat list of blocks (r, d)."""
    return [targets for pairs in groups for targets, _ in pairs]


def uce_solver(groups, preserve_gram, *, target_gram=None, erase_scale=1.0, preserve_scale=1.0, anchor=0.5, fixed=None):
    """Ridge of UCE's matrix for groups of rows; preserve_gram: R^T R of the preserved rows.

    target_gram: that of the target rows, where it is known; it is used up. fixed: see uce_of().
    """
    target_gram = gram(target_rows(groups)) if target_gram is None else target_gram
    count = sum(group_sizes(groups))
    return ridge(target_gram, preserve_gram, erase_scale, preserve_scale, anchor, count, fixed_basis(fixed))


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


def uce_row_terms(groups, preserved, basis=None, *, erase_scale=1.0, preserve_scale=1.0, anchor=0.5):
    """The same where there are fewer rows than the text is wide, all at once and without a (d, d) matrix.

    preserved: Rows or None, outside of basis; basis: orthonormal basis (d, h) of the fixed rows or None.
    """
    targets, replacements, sizes = stacked(groups)
    try:
        rows = row_ridge(Rows([targets], basis), preserved, erase_scale, preserve_scale, anchor)
    except torch.linalg.LinAlgError:
        raise unstable(anchor) from None
    changes = replacements.sub_(targets).mul_(erase_scale**0.5).T
    return zip(changes.split(sizes, 1), rows.split(sizes))


def uce_of(groups, preserve, *, erase_scale=1.0, anchor=0.5, fixed=None, **scales):
    """TextMap of UCE. groups: rows by concept (see by_concept()); preserve: (F, d) or a sequence of such.

    fixed: rows (h, d) on which the map must vanish, such as those of a template that stands
    in every prompt: the best map among those is that of the rows' parts outside the span of the fixed ones, with the
    changes N - C as they are. A row counts w times as much when target and replacement, or the preserved row, are
    times the root of w.
    """
    width, sizes = groups[0][0][0].shape[1], group_sizes(groups)
    scales.update(erase_scale=erase_scale, anchor=anchor)
    if sum(sizes) + count_of(preserve) < width:
        basis, blocks = fixed_basis(fixed), as_blocks(preserve)
        terms = uce_row_terms(groups, Rows(blocks, basis) if blocks else None, basis, **scales)
    else:
        solve = uce_solver(groups, gram(preserve), fixed=fixed, **scales)
        terms = uce_terms(groups, solve, erase_scale)
    return text_map(terms, sizes, width)


@dataclass(frozen=True)
class Scales:
    """The weights of UCE's three terms."""

    erase_scale: float = 1.0
    preserve_scale: float = 1.0
    anchor: float = 0.5


def solve(job, encoded, weight_gram=None, on_round=None):
    """TextMap of a job, see Method.

    The script of 2025 takes the row of the last subject token alone, of every pair and of every line on the preserve
    list as it stands there, and preserves no empty prompt.
    """
    if job.edition != FIRST:
        preserve = preserved_rows(job, encoded, {line: line for line in job.preserve if not job.erases(line)})
        return uce_of(token_groups(job, encoded), preserve, **asdict(job.settings))
    if spreads(job, encoded):
        found = carrying(job, encoded)
        preserved = [*found.preserved.values(), *found.replacing]
        return uce_of(found.groups, preserved, fixed=found.fixed, **asdict(job.settings))
    return uce_of(aligned_groups(job, encoded), [encoded[p].rows for p in job.preserved()], **asdict(job.settings))


PRESET = {"erase_scale": 1.0, "anchor": 0.5}
PRESETS = dict.fromkeys(("object", "style", "person", "nudity"), PRESET)
UCE = Method("UCE", Scales, solve, presets=PRESETS, by_preserved=True)
