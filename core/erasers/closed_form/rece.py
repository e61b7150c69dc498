"""Reliable and Efficient Concept Erasure (Gong et al., ECCV 2024) on one d x d map.

The published loop edits every cross-attention matrix; with W_l -> W_l P for all of them it only
needs P and the Gram matrix S of the original weights.
"""

from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from ...errors import ErasureError
from .groups import aligned_groups, carrying, spreads, whole_groups
from .layers import PIVOT, LayerGram, LowRankMap
from .method import Method
from .row_space import Rows, row_ridge
from .solver import (
    as_blocks,
    count_of,
    cross_gram,
    fixed_basis,
    gram,
    group_sizes,
    ridge,
    runs,
    shared,
    solve_rows,
    stacked,
    text_map,
)
from .uce import PRESET, Scales, target_rows, uce_of, uce_row_terms, uce_solver, uce_terms

PENALTIES = ("length", "outputs", "distance", "both", "replacement")  # what the penalty is on, see Derivation
EDIT_SCALE = 0.1  # weight of a preserved row in the rounds, of the published code
EDIT_ANCHOR = 0.1  # weight of changing nothing in the rounds, of the published code


class Derivation:
    """c' = K c + L n, which makes the edited layers W P answer like the original to c; all float64.

    argmin sum_l ||W_l P c' - W_l c||^2 + penalty times one of these (RECE eq. 4; the published code's names), with
    S = sum_l W_l^T W_l, A = P^T S P, B = P^T S. K = F^-1 R, and L = penalty F^-1 for "replacement" only.

        length       ||c'||^2 (regzero): F = penalty I + A, R = B
        distance     ||c' - c||^2 (surrogate, 2nd): F = penalty I + A, R = B + penalty I
        outputs      sum_l ||W_l P (c' - c)||^2 (surrogate, 1st): K = ((1 + penalty) A)^-1 (B + penalty A)
        both         the sum of the two before: F = penalty I + (1 + penalty) A, R = B + penalty (I + A)
        replacement  ||c' - n||^2 (standard), n the replacement: F = penalty I + A, R = B

    dense: K and L are made once, which is cheaper for more rows than d; else F and R are applied to the rows.
    """

    def __init__(self, weight_gram, p, penalty, penalty_on="length", dense=True):
        self.factor = self.anchored = None
        if penalty_on == "outputs":
            self.matrix = _unpenalised_size(p, penalty)
            return
        right = p.T @ weight_gram
        system = right @ p  # symmetric up to rounding; the factorisation reads one triangle
        if penalty_on == "both":
            right.add_(system, alpha=penalty)
            system.mul_(1 + penalty)
        system.diagonal().add_(penalty)
        factor, failed = torch.linalg.cholesky_ex(system)
        del system
        pivots = factor.diagonal().square()
        if failed or pivots.min() < PIVOT * pivots.max():
            raise _nearly_singular(penalty)
        if penalty_on in ("distance", "both"):
            right.diagonal().add_(penalty)
        self.penalty = penalty if penalty_on == "replacement" else None
        if dense:
            if self.penalty is not None:
                self.anchored = penalty * torch.cholesky_inverse(factor)
            self.matrix = torch.cholesky_solve(right, factor, out=right)
        else:
            self.matrix, self.factor = right, factor

    def __call__(self, targets, replacements):
        """c' (E, d) of targets c and replacements n, (E, d)."""
        derived = targets @ self.matrix.T
        if self.anchored is not None:
            return derived.addmm_(replacements, self.anchored.T)
        if self.factor is None:
            return derived
        if self.penalty is not None:
            derived.add_(replacements, alpha=self.penalty)
        return solve_rows(self.factor, derived)


def _unpenalised_size(p, penalty):
    """K of the penalty on outputs, (P^-1 + penalty I) / (1 + penalty): A^-1 B = P^-1, whatever the weights are."""
    factor, pivots, failed = torch.linalg.lu_factor_ex(p)
    size = factor.diagonal().abs()
    if failed or size.min() < 1e-12 * size.max():
        raise _no_inverse()
    k = torch.linalg.lu_solve(factor, pivots, torch.eye(len(p), dtype=p.dtype))
    k.diagonal().add_(penalty)
    return k / (1 + penalty)


def _nearly_singular(penalty):
    return ErasureError(
        f"RECE cannot derive its embeddings with a penalty of {penalty:g}: the edited layers are nearly "
        "singular; raise the penalty (0.1 for easy concepts, 0.001 for hard ones) or take fewer epochs."
    )


def _no_inverse():
    return ErasureError(
        'RECE cannot derive its embeddings with a penalty on "outputs", because the edited layers have no '
        'inverse; put the penalty on "length" or take fewer epochs.'
    )


def derived_by_rows(targets, replacements, p, penalty, penalty_on="length"):
    """The same c' (E, d) where the layers W have fewer outputs than the text is wide; p: LowRankMap.

    With V = W P, k = penalty and s = 1 they are z + s V^T (k I + V V^T)^-1 (W c - V z), where z is 0 for the penalty
    on "length", c for "distance" and "both" and n for "replacement"; for "both" k = penalty / (1 + penalty) and
    s = 1 / (1 + penalty). Nothing is larger than (o, o), o the number of outputs.
    """
    if penalty_on == "outputs":
        inverse, pivots = p.inverse_of(targets)
        if pivots < 1e-12:
            raise _no_inverse()
        return inverse.add_(targets, alpha=penalty).div_(1 + penalty)
    scale = 1 / (1 + penalty) if penalty_on == "both" else 1.0
    start = {"length": None, "replacement": replacements}.get(penalty_on, targets)
    heard = p.layers.heard(targets)
    if start is not None:
        heard -= p.layers.heard(p.of(start))
    found = _ridge(p, scale * heard, scale * penalty, penalty)
    return found if start is None else found.add_(start)


def _ridge(p, heard, weight, penalty):
    """LowRankMap's ridge, by float32 where the weights have no more and it is enough."""
    for rough in (True, False) if p.layers.single else (False,):
        try:
            return p.ridge(heard, weight, rough)
        except torch.linalg.LinAlgError:
            if not rough:
                raise _nearly_singular(penalty) from None


def derived_embeddings(concepts, weight_gram, p, penalty, penalty_on="length", replacements=None):
    """Vectors c' (E, d) of concepts c (E, d); replacements n (E, d) where the penalty is on them; see Derivation."""
    return Derivation(weight_gram, p, penalty, penalty_on, len(concepts) > len(p))(concepts, replacements)


class Moments:
    """What a linear map of all rows needs to know of them: C^T C, N^T C and N^T N, each (d, d) float64.

    targets C and replacements N of groups; with_replacements: whether N^T N is wanted.
    """

    def __init__(self, groups, with_replacements):
        self.cc, self.nc = gram(target_rows(groups)), cross_gram(groups)
        self.nn = gram([n for pairs in groups for _, n in pairs]) if with_replacements else None

    def derived(self, derive):
        """C'^T C' of the derived embeddings c' = K c + L n."""
        k, l_ = derive.matrix, derive.anchored
        found = k @ self.cc @ k.T
        if l_ is not None:
            mixed = l_ @ self.nc @ k.T
            found += mixed + mixed.T + l_ @ self.nn @ l_.T
        return found

    def missing(self, derive, derived):
        """(N - C')^T C', given C'^T C'."""
        found = self.nc @ derive.matrix.T
        if derive.anchored is not None:
            found.addmm_(self.nn, derive.anchored.T)
        return found.sub_(derived)


@contextmanager
def rounds_of(anchor):
    """What is solved in here is an edit of the rounds, whose weight of changing nothing is theirs and not UCE's."""
    try:
        yield
    except (ErasureError, torch.linalg.LinAlgError):
        raise ErasureError(
            f"A round of RECE has no stable solution with an anchor weight of {anchor:g}; take fewer epochs, put the "
            'penalty on "length" or raise the anchor weight of the rounds in Erase Concepts Settings.'
        ) from None


@dataclass(frozen=True)
class Rounds:
    """What is the same in every round: RECE's settings, and the Gram matrices S and R^T R, (d, d) float64.

    count: number of the concepts' rows; basis: orthonormal basis (d, h) of the fixed rows or None.
    """

    preserve_gram: torch.Tensor
    weight_gram: torch.Tensor
    count: int
    preserve_scale: float
    anchor: float
    penalty: float
    penalty_on: str
    basis: torch.Tensor | None
    erase_scale: float

    def derivation(self, p, dense):
        """Derivation of the embeddings that the layers W P take for the concepts."""
        return Derivation(self.weight_gram, p, self.penalty, self.penalty_on, dense)

    def ridge(self, derived_gram):
        """Ridge of the edit that takes the derived embeddings away; derived_gram: theirs, used up."""
        scales = self.erase_scale, self.preserve_scale, self.anchor
        with rounds_of(self.anchor):
            return ridge(derived_gram, self.preserve_gram, *scales, self.count, basis=self.basis)


class RowsEpoch:
    """One round of RECE on the map P: the edit that takes the derived embeddings c' to the replacements n.

    Of every row it adds the term s (P (n - c')) (c'^T G^-1), all of them made at once; s: the erase scale. edited: P +
    the terms, or None for the last epoch.
    """

    def __init__(self, rounds, groups, p, last):
        targets, replacements, self.sizes = stacked(groups)
        derived = rounds.derivation(p, dense=False)(targets, replacements)
        solve = rounds.ridge(gram(derived))
        self.changes, self.rows = p @ replacements.sub_(derived).mul_(rounds.erase_scale).T, solve(derived)
        self.edited = None if last else torch.addmm(p, self.changes, self.rows)

    def terms(self, run):
        """[(A (d, n), B (n, d))] of some concepts."""
        return list(zip(self.changes.split(self.sizes, 1), self.rows.split(self.sizes)))[run]


class MomentsEpoch:
    """The same where there are more rows than d: the terms are linear in c and n, so only (d, d) matrices are kept, and
    the terms are made for a few concepts at a time, when they are asked for. moments: Moments of the groups."""

    def __init__(self, rounds, groups, moments, p, last):
        self.groups, self.erase_scale = groups, rounds.erase_scale
        derive = rounds.derivation(p, dense=True)
        derived_gram = moments.derived(derive)
        change = None if last else moments.missing(derive, derived_gram).mul_(rounds.erase_scale)
        solve = rounds.ridge(derived_gram)
        self.edited = None if last else torch.addmm(p, p, solve(change))
        # A = of_replacements[0] n - of_targets[0] c, B = c of_targets[1] + n of_replacements[1]
        self.of_targets = p @ derive.matrix, solve(derive.matrix.T)
        self.of_replacements = p, None
        if derive.anchored is not None:
            self.of_replacements = p - p @ derive.anchored, solve(derive.anchored.T)

    def terms(self, run):
        """[(A (d, n), B (n, d))] of some concepts."""
        targets, replacements, index, sizes = shared(self.groups[run])
        changes = (replacements @ self.of_replacements[0].T)[index].T
        changes.addmm_(self.of_targets[0], targets.T, alpha=-1.0).mul_(self.erase_scale)
        rows = targets @ self.of_targets[1]
        if self.of_replacements[1] is not None:
            rows += (replacements @ self.of_replacements[1])[index]
        return list(zip(changes.split(sizes, 1), rows.split(sizes)))


def held_rows(groups, preserve_scale, erase_scale=1.0):
    """Blocks of the concepts' own rows c, which the rounds are to leave where UCE's edit took them.

    A derived embedding c' lies where that edit does not reach, or beyond: what tells it from the preserved rows is then
    the opposite of what tells c from them, and the round that takes c' to the replacement takes c back to the concept.
    Kept at the weight of a target, c stays erased. preserve_scale, erase_scale: weights of a preserved row and of a
    target in the rounds.
    """
    size = preserve_scale**-0.5 * erase_scale**0.5
    return [rows * size for rows in target_rows(groups)]


def rece_terms(
    groups,
    full_groups,
    preserve_gram,
    weight_gram,
    *,
    epochs=1,
    penalty=0.1,
    penalty_on="length",
    edit_anchor=EDIT_ANCHOR,
    edit_preserve_scale=EDIT_SCALE,
    edit_erase_scale=1.0,
    on_epoch=None,
    erase_scale=1.0,
    fixed=None,
    held=(),
    **uce_scales,
):
    """For each concept factors A (d, n), B (n, d), float64, of UCE followed by RECE; see rece_of()."""
    target_gram = gram(target_rows(groups))
    change = cross_gram(groups).sub_(target_gram).mul_(erase_scale)
    start = uce_solver(
        groups, preserve_gram, target_gram=target_gram, erase_scale=erase_scale, fixed=fixed, **uce_scales
    )
    p, done = start(change), []
    del change, target_gram
    p.diagonal().add_(1.0)
    count, basis = sum(group_sizes(full_groups)), fixed_basis(fixed)
    moments = Moments(full_groups, penalty_on == "replacement") if count > len(p) else None
    if held:
        preserve_gram = preserve_gram + gram(held)
    scales = edit_preserve_scale, edit_anchor, penalty, penalty_on
    rounds = Rounds(preserve_gram, weight_gram, count, *scales, basis, edit_erase_scale)
    for number in range(1, epochs + 1):
        last = number == epochs
        done.append(
            MomentsEpoch(rounds, full_groups, moments, p, last) if moments else RowsEpoch(rounds, full_groups, p, last)
        )
        p = done[-1].edited
        if on_epoch:
            on_epoch(number)
    del preserve_gram, rounds, p, moments
    for run in runs(full_groups):
        parts = [epoch.terms(run) for epoch in done]
        for mine in zip(uce_terms(groups[run], start, erase_scale), *parts):
            yield torch.cat([a for a, _ in mine], 1), torch.cat([b for _, b in mine])


def rece_row_terms(
    groups,
    full_groups,
    preserved,
    layers,
    basis=None,
    *,
    kept=None,
    epochs=1,
    penalty=0.1,
    penalty_on="length",
    edit_anchor=EDIT_ANCHOR,
    edit_preserve_scale=EDIT_SCALE,
    edit_erase_scale=1.0,
    on_epoch=None,
    **uce_scales,
):
    """The same where the rows, and the outputs of the layers, are fewer than the text is wide, without (d, d) matrices.

    preserved: Rows or None, outside of basis; layers: LayerGram; basis: orthonormal (d, h) of the fixed rows or None.
    kept: Rows that the rounds preserve, None for the same.
    """
    kept = preserved if kept is None else kept
    parts = [list(uce_row_terms(groups, preserved, basis, **uce_scales))]
    p = LowRankMap(layers)
    targets, replacements, sizes = stacked(full_groups)
    for number in range(1, epochs + 1):
        p.add(*(torch.cat(factors, dim) for factors, dim in zip(zip(*parts[-1]), (1, 0))))
        derived = derived_by_rows(targets, replacements, p, penalty, penalty_on)
        with rounds_of(edit_anchor):
            rows = row_ridge(Rows([derived], basis), kept, edit_erase_scale, edit_preserve_scale, edit_anchor)
        changes = p.of(replacements - derived).mul_(edit_erase_scale**0.5).T
        parts.append(list(zip(changes.split(sizes, 1), rows.split(sizes))))
        if on_epoch:
            on_epoch(number)
    for mine in zip(*parts):
        yield torch.cat([a for a, _ in mine], 1), torch.cat([b for _, b in mine])


def rece_of(
    groups,
    full_groups,
    preserve,
    weight_gram,
    *,
    epochs=1,
    anchor=0.5,
    edit_anchor=EDIT_ANCHOR,
    fixed=None,
    hold=False,
    **settings,
):
    """TextMap of UCE followed by `epochs` rounds of RECE.

    groups, preserve: as for uce_of(). full_groups: every row of the concepts' embeddings and of their
    replacements at the same places (no slicing at the last subject token here, as published). weight_gram:
    S of the unedited layers that read the text, (d, d) or LayerGram. settings: penalty, penalty_on (one of PENALTIES),
    edit_erase_scale and edit_preserve_scale of the rounds, those of UCE, and on_epoch, which is called with the number
    of finished epochs. fixed: as for uce_of(). hold: whether the rounds leave the erased rows where they are, see
    held_rows().
    """
    width, first, full = len(weight_gram), group_sizes(groups), group_sizes(full_groups)
    settings.update(epochs=epochs, anchor=anchor, edit_anchor=edit_anchor)
    scales = settings.get("edit_preserve_scale", EDIT_SCALE), settings.get("edit_erase_scale", 1.0)
    held = held_rows(full_groups, *scales) if hold else []
    by_layers = isinstance(weight_gram, LayerGram)
    if by_layers and max(sum(first), sum(full)) + count_of(preserve) + count_of(held) < width:
        basis, blocks = fixed_basis(fixed), as_blocks(preserve)
        preserved = Rows(blocks, basis) if blocks else None
        kept = Rows([*blocks, *held], basis) if held else preserved
        terms = rece_row_terms(groups, full_groups, preserved, weight_gram, basis, kept=kept, **settings)
    else:
        weight_gram = weight_gram.dense() if by_layers else weight_gram.to(torch.float64)
        terms = rece_terms(groups, full_groups, gram(preserve), weight_gram, fixed=fixed, held=held, **settings)
    return text_map(terms, [n + epochs * m for n, m in zip(first, full)], width)


@dataclass(frozen=True)
class Settings(Scales):
    """UCE's scales; epochs, penalty, penalty_on: RECE's rounds, and the weight and object of the penalty on its derived
    embeddings; edit_erase_scale, edit_preserve_scale, edit_anchor: the weights of UCE's three terms in the rounds."""

    epochs: int = 1
    penalty: float = 0.1
    penalty_on: str = PENALTIES[0]
    edit_erase_scale: float = 1.0
    edit_preserve_scale: float = EDIT_SCALE
    edit_anchor: float = EDIT_ANCHOR


def solve(job, encoded, weight_gram=None, on_round=None, hold=False):
    """TextMap of a job, see Method; without a weight_gram, which embeddings are derived from, its UCE part."""
    settings = asdict(job.settings)
    if spreads(job, encoded):
        found = carrying(job, encoded)
        groups, full, preserve = found.groups, found.groups, [*found.preserved.values(), *found.replacing]
        settings["fixed"] = found.fixed
    else:
        groups, full = aligned_groups(job, encoded), whole_groups(job, encoded)
        preserve = [encoded[p].rows for p in job.preserved()]
    if weight_gram is None:
        return uce_of(groups, preserve, **{k: v for k, v in settings.items() if k in (*asdict(Scales()), "fixed")})
    return rece_of(groups, full, preserve, weight_gram, on_epoch=on_round, hold=hold, **settings)


OBJECT = PRESET | {"penalty_on": PENALTIES[0], "epochs": 1, "penalty": 0.1}  # of the published scripts
PRESETS = {"object": OBJECT, "style": OBJECT | {"penalty": 0.001}, "person": OBJECT, "nudity": OBJECT | {"epochs": 3}}
RECE = Method(
    "RECE", Settings, solve, lambda job: True, PRESETS, by_preserved=True, rounds=lambda settings: settings.epochs
)
REGULARISED = replace(RECE, name="RECE, regularised", solve=partial(solve, hold=True))
