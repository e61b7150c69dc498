"""The closed form where the text is wider than there are rows, with fixed rows and weights, against naive float64."""

import pytest
import torch
from membrane.core.erasers.closed_form.double_projection import double_projection_of, double_projection_terms
from membrane.core.erasers.closed_form.layers import LayerGram, LowRankMap, layer_gram
from membrane.core.erasers.closed_form.rece import PENALTIES, derived_by_rows, rece_of, rece_row_terms, rece_terms
from membrane.core.erasers.closed_form.row_space import Rows, row_basis, row_ridge, strong_basis
from membrane.core.erasers.closed_form.solver import by_concept, fixed_basis, gram, shared
from membrane.core.erasers.closed_form.speed import (
    constrained_rows,
    invariants,
    prior_scores,
    speed_of,
    speed_terms,
)
from membrane.core.erasers.closed_form.uce import uce_of, uce_row_terms, uce_solver, uce_terms
from membrane.core.errors import ErasureError
from membrane.core.measures.impact import relative_change
from torch.utils._python_dispatch import TorchDispatchMode

D, N, M = 60, 7, 12
SCALES = [(1.0, 1.0, 0.5), (2.0, 0.1, 0.1), (0.5, 3.0, 5.0), (1.0, 0.0, 0.5)]


def draw(count, seed, width=D, scale=1.0):
    """Vectors (count, width) around a common one, float64."""
    common = torch.randn(width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    return scale * (torch.randn(count, width, generator=g, dtype=torch.float64) + common)


def grouped(targets, replacements, concepts=3):
    owner = torch.arange(len(targets)) * concepts // len(targets)
    return by_concept(targets, replacements, owner, concepts)


def product(terms):
    return sum(a @ b for a, b in terms)


def difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def constrained(c, change, r, h, e, p, anchor):
    """E of min e ||E c - change||^2 + p ||E r||^2 + anchor ||E||^2 subject to E h = 0: E = Y Z^T, where Z spans what is
    orthogonal to h, by least squares for Y."""
    z = torch.linalg.svd(torch.nn.functional.normalize(h))[2][len(h) :].T
    eye = torch.eye(z.shape[1], dtype=torch.float64)
    rows = torch.cat([e**0.5 * c @ z, p**0.5 * r @ z, anchor**0.5 * eye])
    right = torch.zeros(len(rows), c.shape[1], dtype=torch.float64)
    right[: len(c)] = e**0.5 * change
    return torch.linalg.lstsq(rows, right, driver="gelsd").solution.T @ z.T


def naive(c, n, r, e, p, anchor):
    """UCE eq. 7 for W = I, a plain inverse; E = W' - I."""
    eye = torch.eye(c.shape[1], dtype=torch.float64)
    numerator, denominator = anchor * eye, anchor * eye
    for ci, ni in zip(c, n):
        numerator, denominator = numerator + e * torch.outer(ni, ci), denominator + e * torch.outer(ci, ci)
    for ri in r:
        numerator, denominator = numerator + p * torch.outer(ri, ri), denominator + p * torch.outer(ri, ri)
    return numerator @ torch.linalg.inv(denominator) - eye


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        made = found if isinstance(found, (tuple, list)) else [found]
        self.size = max(self.size, *(t.numel() for t in made if isinstance(t, torch.Tensor)), 0)
        return found


# ---------------------------------------------------------------- UCE


@pytest.mark.parametrize(("e", "p", "anchor"), SCALES)
@pytest.mark.parametrize("preserved", [0, M])
def test_the_ridge_in_row_space_is_that_of_the_whole_matrix(e, p, anchor, preserved):
    c, n, r = draw(N, 1), draw(N, 2), draw(preserved, 3)
    groups, scales = grouped(c, n), {"erase_scale": e, "preserve_scale": p, "anchor": anchor}
    found = list(uce_row_terms(groups, Rows([r]) if preserved else None, **scales))
    whole = list(uce_terms(groups, uce_solver(groups, gram(r), **scales), e))
    assert difference(product(found), naive(c, n, r, e, p, anchor)) < 1e-12
    for mine, theirs in zip(found, whole):
        assert difference(mine[0] @ mine[1], theirs[0] @ theirs[1]) < 1e-12


def test_a_map_of_few_rows_makes_no_square_matrix_of_the_width():
    c, n, r, h = (draw(count, seed, 700).float() for count, seed in ((9, 1), (9, 2), (30, 3), (4, 4)))
    with Largest() as largest:
        found = uce_of(grouped(c, n), list(r.split(7)), fixed=h)
    assert 0 < largest.size < 700 * 100
    expected = constrained(c.double(), (n - c).double(), r.double(), h.double(), 1.0, 1.0, 0.5)
    assert difference(found.matrix().double(), expected) < 1e-6


def test_an_erase_scale_of_zero_changes_nothing():
    found = uce_of(grouped(draw(N, 1), draw(N, 2)), draw(M, 3), erase_scale=0.0)
    assert found.concept == ()


@pytest.mark.parametrize("rows", [M, 2 * D])
def test_uce_says_when_the_system_has_no_solution(rows):
    with pytest.raises(ErasureError, match="no stable solution with an anchor weight of 0;"):
        uce_of(grouped(draw(N, 1), draw(N, 2)), draw(1, 3).expand(rows, D), anchor=0.0)


@pytest.mark.parametrize("preserved", [M, 2 * D])
@pytest.mark.parametrize("length", [1.0, 1000.0])
def test_uce_with_fixed_rows_is_the_constrained_optimum(preserved, length):
    """In the space of the rows and of the whole matrix, with a fixed row far longer than the others."""
    c, n, r, h = draw(N, 1), draw(N, 2), draw(preserved, 3), draw(3, 4)
    h[0] *= length
    r[:2] += h[:1]
    c[3] += h[1]
    groups, scales = grouped(c, n), {"erase_scale": 2.0, "preserve_scale": 0.3, "anchor": 0.5}
    found = uce_of(groups, r, fixed=torch.cat([h, h[:1] * 2]), **scales)  # a repeated one too
    expected = constrained(c, n - c, r, h, 2.0, 0.3, 0.5)
    if preserved < D:
        exact = product(uce_row_terms(groups, Rows([r], fixed_basis(h)), fixed_basis(h), **scales))
    else:
        exact = product(uce_terms(groups, uce_solver(groups, gram(r), fixed=h, **scales), 2.0))
    assert difference(exact, expected) < (1e-11 if preserved < D else 1e-8)  # the long row's squares are subtracted
    assert difference(found.matrix().double(), expected) < 1e-6
    assert ((h @ found.matrix().double().T).norm(dim=1) / h.norm(dim=1)).max() < 1e-6
    free = uce_of(groups, r, **scales).matrix().double()
    assert ((h @ free.T).norm(dim=1) / h.norm(dim=1)).max() > 1e-3


@pytest.mark.parametrize("preserved", [M, 2 * D])
@pytest.mark.parametrize("weight", [4, 9])
def test_rows_times_the_root_of_a_weight_count_so_much(preserved, weight):
    """As often as if they were there `weight` times."""
    c, n, r = draw(N, 1), draw(N, 2), draw(preserved, 3)
    root = weight**0.5
    found = uce_of(grouped(torch.cat([root * c[:1], c[1:]]), torch.cat([root * n[:1], n[1:]])), r).matrix()
    repeated = uce_of(grouped(torch.cat([c[:1]] * weight + [c[1:]]), torch.cat([n[:1]] * weight + [n[1:]])), r)
    assert difference(found.double(), repeated.matrix().double()) < 1e-6
    found = uce_of(grouped(c, n), torch.cat([root * r[:1], r[1:]])).matrix()
    repeated = uce_of(grouped(c, n), torch.cat([r[:1]] * weight + [r[1:]])).matrix()
    assert difference(found.double(), repeated.double()) < 1e-6


@pytest.mark.parametrize("preserved", [M, 2 * D])
def test_no_fixed_rows_are_no_constraint(preserved):
    groups, r, empty, none = grouped(draw(N, 1), draw(N, 2)), draw(preserved, 3), draw(5, 4), torch.zeros(0, D)
    weights = LayerGram(layers())
    for found, more in (
        (uce_of, (r,)),
        (speed_of, (r[:M], empty)),
        (double_projection_of, (r[:M],)),
        (lambda g, *rest, **fixed: rece_of(g, g, *rest, **fixed), (r, weights)),
    ):
        assert torch.equal(found(groups, *more, fixed=none).matrix(), found(groups, *more).matrix())


# ---------------------------------------------------------------- rows and their spans


def test_rows_are_read_some_columns_at_a_time(monkeypatch):
    monkeypatch.setattr("membrane.core.erasers.closed_form.row_space.BLOCK", 1)
    x, y, h = draw(5, 1, 300), draw(9, 2, 300).float(), draw(2, 3, 300)
    q = torch.linalg.qr(h.T)[0]
    rows, others = Rows([x[:2], x[2:]], q), Rows([y])
    x = x - x @ q @ q.T
    assert len(list(rows.columns(64))) == 5
    assert difference(rows.square, x @ x.T) < 1e-14
    assert difference(rows.times(others), x @ y.double().T) < 1e-14
    weights = draw(3, 4, 5)
    assert difference(rows.combined(weights), weights @ x) < 1e-14


def test_a_row_ridge_of_no_weight_is_refused():
    with pytest.raises(torch.linalg.LinAlgError):
        row_ridge(Rows([draw(3, 1)]), None, 1.0, 1.0, 0.0)


@pytest.mark.parametrize("count", [40, 600])
def test_a_basis_of_rows_ignores_repeats_and_lengths(count):
    """Also rows that repeat to float32 only, and rows 1e5 times as long as others."""
    rows = draw(count, 1, 700)
    lengths = torch.logspace(0, 5, count, dtype=torch.float64)[:, None]
    repeats = torch.cat([(rows * lengths).float(), (rows[: count // 3] * 3).float(), rows[:1].float() * 0])
    start = torch.linalg.qr(draw(5, 2, 700).T)[0]
    basis = row_basis(repeats, start)
    assert basis.shape == (700, count + 5) and torch.equal(basis[:, :5], start)
    assert (basis.T @ basis - torch.eye(count + 5, dtype=torch.float64)).norm() < 1e-11
    left = repeats.double() - (repeats.double() @ basis) @ basis.T
    assert (left.norm(dim=1) <= 1e-6 * repeats.double().norm(dim=1)).all()
    assert torch.equal(row_basis(repeats[-count // 3 :], basis), basis)


def test_a_basis_of_the_strong_directions():
    g = torch.Generator().manual_seed(1)
    axes = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64))[0]
    size = torch.tensor([3.0] * 6 + [0.05] * (D - 6), dtype=torch.float64)
    rows = torch.randn(30, D, generator=g, dtype=torch.float64) * size @ axes
    squares, vectors = torch.linalg.eigh(rows.T @ rows / 30)
    expected = vectors[:, squares >= 0.1]
    basis = strong_basis(rows, 0.1)
    assert basis.shape == (D, 6)
    assert difference(basis @ basis.T, expected @ expected.T) < 1e-12


# ---------------------------------------------------------------- SPEED and Double Projections


def wide_text(monkeypatch):
    """The paths of wide text at a width that the naive forms can follow."""
    for module in ("solver", "double_projection"):
        monkeypatch.setattr(f"membrane.core.erasers.closed_form.{module}.WIDE_TEXT", D)


def speed_optimum(c1, change, c0, c2, h, rho, lam):
    """The constrained optimum of SPEED for W = I; constraints with slack are squares of weight 1 / lam."""
    empty = torch.zeros(0, D, dtype=torch.float64)
    exact, slack = (torch.cat([c0, h]), c2) if lam else (torch.cat([c0, c2, h]), empty)
    return constrained(c1, change, slack, exact, 1 / len(c1), 1 / lam if lam else 0.0, rho)


@pytest.mark.parametrize(("rho", "lam"), [(1.0, 0.0), (0.05, 0.0), (0.7, 0.5)])
@pytest.mark.parametrize("fixed", [0, 3])
@pytest.mark.parametrize("wide", [True, False])
def test_speed_is_the_constrained_optimum(monkeypatch, rho, lam, fixed, wide):
    if wide:
        wide_text(monkeypatch)
    c, n, c0, empty, h = draw(N, 1), draw(N, 2), draw(M, 3), draw(6, 4), draw(fixed, 5)
    settings = {"tau": 0.0, "rho": rho, "lam": lam, "prior_filter": False, "fixed": h if fixed else None}
    expected = speed_optimum(c, n - c, c0, invariants(empty), h, rho, lam)
    assert difference(product(speed_terms(grouped(c, n), c0, empty, **settings)), expected) < 1e-11
    found = speed_of(grouped(c, n), c0, empty, **settings).matrix().double()
    assert difference(found, expected) < 1e-6
    assert ((h @ found.T).norm(dim=1) / h.norm(dim=1) < 1e-6).all()


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_speed_in_row_space_is_that_of_the_whole_matrix(lam):
    editable, held = draw(N, 1), torch.linalg.qr(draw(4, 2).T)[0].T
    found = constrained_rows(editable, held, 0.3, lam)
    system = editable.T @ editable / N + 0.3 * torch.eye(D, dtype=torch.float64)
    z = torch.linalg.inv(system)
    inner = torch.linalg.inv(held @ z @ held.T + lam * torch.eye(4, dtype=torch.float64))
    assert difference(found, editable @ (z - z @ held.T @ inner @ held @ z)) < 1e-12


@pytest.mark.parametrize("targets", [N, 2 * D])
def test_prior_scores_are_the_norms_of_the_influence(targets):
    c, n, c0 = draw(targets, 1), draw(targets, 2), draw(M, 3)
    t, a = c.T @ c / targets, n.T @ c / targets
    change = (a - t) @ torch.linalg.inv(torch.eye(D, dtype=torch.float64) + t)
    assert difference(prior_scores(c0, c, n - c), (c0 @ change.T).norm(dim=1)) < 1e-12


@pytest.mark.parametrize("fixed", [None, 3])
@pytest.mark.parametrize("retained", [M, 2 * D])
@pytest.mark.parametrize("wide", [True, False])
def test_speed_with_a_threshold_protects_what_it_does_in_the_whole_space(monkeypatch, fixed, retained, wide):
    """The second moment's strong directions outside the fixed rows, and those."""
    if wide:
        wide_text(monkeypatch)
    c, n, empty = draw(N, 1), draw(N, 2), draw(6, 4)
    g = torch.Generator().manual_seed(8)
    size = torch.tensor([3.0] * 8 + [0.05] * (D - 8), dtype=torch.float64)
    c0 = torch.randn(retained, D, generator=g, dtype=torch.float64) * size
    h = draw(fixed, 5) if fixed else torch.zeros(0, D, dtype=torch.float64)
    q = torch.linalg.qr(h.T)[0]
    rest = c0 - c0 @ q @ q.T
    squares, vectors = torch.linalg.eigh(rest.T @ rest / retained)
    strong = vectors[:, squares >= 0.1].T
    assert 0 < len(strong) < M
    expected = speed_optimum(c, n - c, strong, invariants(empty), h, 1.0, 0.0)
    found = product(speed_terms(grouped(c, n), c0, empty, prior_filter=False, fixed=h if fixed else None))
    assert difference(found, expected) < 1e-10


@pytest.mark.parametrize("fixed", [None, 3])
@pytest.mark.parametrize("wide", [True, False])
def test_double_projection_is_exact_on_targets_and_nothing_on_the_others(monkeypatch, fixed, wide):
    if wide:
        wide_text(monkeypatch)
    c, n, c0 = draw(N, 1), draw(N, 2), draw(M, 3)
    h = draw(fixed, 5) if fixed else torch.zeros(0, D, dtype=torch.float64)
    still = torch.cat([c0, h])
    u2 = torch.linalg.svd(still.T)[0][:, len(still) :]
    expected = (n - c).T @ torch.linalg.pinv(u2.T @ c.T) @ u2.T
    settings = {"fixed": h if fixed else None}
    assert difference(product(double_projection_terms(grouped(c, n), c0, **settings)), expected) < 1e-11
    found = double_projection_of(grouped(c, n), c0, **settings).matrix().double()
    assert difference(c @ found.T, n - c) < 1e-6
    assert ((h @ found.T).norm(dim=1) / h.norm(dim=1) < 1e-6).all()


@pytest.mark.parametrize("fixed", [None, 3])
def test_double_projection_on_a_safe_span_that_goes_on_from_the_retained(monkeypatch, fixed):
    """As from scratch, which narrow text does."""
    c, c0, more = draw(N, 1), draw(M, 3), draw(4, 6)
    settings = {"safe": torch.cat([c0, more]), "fixed": draw(fixed, 5) if fixed else None}
    expected = product(double_projection_terms(grouped(c, c), c0, **settings))
    wide_text(monkeypatch)
    assert difference(product(double_projection_terms(grouped(c, c), c0, **settings)), expected) < 1e-10


def test_wide_speed_and_double_projection_make_no_square_matrix():
    width = 4096
    c, n, r, empty, h = (draw(k, i, width).float() for i, k in enumerate((9, 9, 300, 20, 5)))
    with Largest() as largest:
        speed_of(grouped(c, n), r, empty, fixed=h)
        double_projection_of(grouped(c, n), r, fixed=h, safe=torch.cat([r, n]))
    assert 0 < largest.size < 400 * width


@pytest.mark.parametrize("method", ["SPEED", "Double Projections"])
def test_a_concept_inside_the_fixed_rows_is_refused(method):
    c, n, h = draw(1, 1), draw(1, 2), draw(3, 3)
    c = 0.3 * h[:1] - 2.0 * h[1:2]
    with pytest.raises(ErasureError, match='The concept "1" lies in the span'):
        if method == "SPEED":
            speed_of([[(c, n)]], draw(4, 4), draw(5, 5), fixed=h)
        else:
            double_projection_of([[(c, n)]], draw(4, 4), fixed=h)


# ---------------------------------------------------------------- RECE


OUTPUTS = (9, 14)  # of two layers, together fewer than the width


def layers(seed=6, width=D):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(o, width, generator=g, dtype=torch.float64) for o in OUTPUTS]


def naive_derived(start, current, c, n, penalty, penalty_on, p):
    """RECE's derived embeddings with each of the published penalties, by plain inverses."""
    eye = torch.eye(D, dtype=torch.float64)
    if penalty_on == "outputs":  # (V^T V)^-1 V^T W is P^-1 where it is defined
        return (c @ torch.linalg.inv(p).T + penalty * c) / (1 + penalty)
    a = sum(w.T @ w for w in current)
    right = sum(w.T @ v for w, v in zip(current, start)) @ c.T
    if penalty_on == "both":
        right, a = right + penalty * (a + eye) @ c.T, (1 + penalty) * a
    right = right + penalty * {"distance": c.T, "replacement": n.T}.get(penalty_on, 0.0)
    return (torch.linalg.inv(penalty * eye + a) @ right).T


def naive_rece(start, c, n, full_c, full_n, r, h, epochs, penalty, penalty_on, hold=False, erase_scale=1.0):
    """The published loop on every layer; the edits vanish on h. hold: the rounds also keep the concepts' rows, each at
    the weight of a target, which is erase_scale there."""
    p = torch.eye(D, dtype=torch.float64) + constrained(c, n - c, r, h, 1.0, 0.7, 0.5)
    r = torch.cat([r, full_c * (erase_scale / 0.2) ** 0.5]) if hold else r
    for _ in range(epochs):
        current = [w @ p for w in start]
        derived = naive_derived(start, current, full_c, full_n, penalty, penalty_on, p)
        p = p + p @ constrained(derived, full_n - derived, r, h, erase_scale, 0.2, 0.3)
    return p - torch.eye(D, dtype=torch.float64)


RECE_SETTINGS = {"penalty": 0.3, "edit_anchor": 0.3, "edit_preserve_scale": 0.2, "preserve_scale": 0.7, "anchor": 0.5}


@pytest.mark.parametrize("penalty_on", PENALTIES)
@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("fixed", [0, 3])
@pytest.mark.parametrize("rows", ["few", "few, whole matrix", "many"])
def test_rece_is_the_loop_on_every_layer(penalty_on, epochs, fixed, rows):
    """In the space of the rows, and with (d, d) matrices for fewer and for more rows than the width."""
    many = rows == "many"
    full_c, full_n = draw(80 if many else 9, 1), draw(80 if many else 9, 2)
    c, n, r, h = full_c[3:7], full_n[3:7], draw(M, 3), draw(fixed, 4)
    groups, full_groups, start = grouped(c, n, 2), grouped(full_c, full_n, 2), layers()
    weight_gram = LayerGram(start) if rows == "few" else sum(w.T @ w for w in start)
    settings = {**RECE_SETTINGS, "epochs": epochs, "penalty_on": penalty_on}
    expected = naive_rece(start, c, n, full_c, full_n, r, h, epochs, 0.3, penalty_on)
    if rows == "few":
        basis = fixed_basis(h) if fixed else None
        terms = list(rece_row_terms(groups, full_groups, Rows([r], basis), weight_gram, basis, **settings))
        whole = rece_terms(groups, full_groups, gram(r), weight_gram.dense(), fixed=h if fixed else None, **settings)
        for mine, theirs in zip(terms, whole):
            assert difference(mine[0] @ mine[1], theirs[0] @ theirs[1]) < 1e-9
        assert difference(product(terms), expected) < 1e-10
    found = rece_of(groups, full_groups, list(r.split(5)), weight_gram, fixed=h if fixed else None, **settings)
    stored = found.a.double() @ found.b.double()
    assert difference(stored, expected) < 2e-6
    assert ((h @ stored.T).norm(dim=1) / h.norm(dim=1) < 1e-6).all()


UNEVEN = {"even": 0.0, "two decades": 2.0, "one far longer direction": None}


@pytest.mark.parametrize("penalty_on", PENALTIES)
@pytest.mark.parametrize("uneven", UNEVEN)
def test_rece_by_weights_of_float32_is_the_loop_in_float64(monkeypatch, penalty_on, uneven):
    """Solved roughly and refined; where the weights are too uneven for that, in float64 as a whole."""
    weights = torch.cat(layers())
    if UNEVEN[uneven] is None:
        weights = weights + 100 * torch.outer(draw(1, 8, len(weights))[0], draw(1, 9)[0])
    else:
        u, _, v = torch.linalg.svd(weights, full_matrices=False)
        weights = 8.0 * u @ torch.logspace(0, -UNEVEN[uneven], len(weights), dtype=torch.float64).diag() @ v
    weights, rough = weights.float(), []
    monkeypatch.setattr(LowRankMap, "square", recording(LowRankMap.square, rough))
    c, n, r, h = draw(9, 1), draw(9, 2), draw(M, 3), draw(3, 4)
    found, whole = (
        product(
            rece_row_terms(
                *[grouped(c, n)] * 2, Rows([r], fixed_basis(h)), LayerGram([w]), fixed_basis(h), epochs=2,
                penalty_on=penalty_on, **RECE_SETTINGS,
            )
        )
        for w in (weights, weights.double())
    )  # fmt: skip
    expected = naive_rece([weights.double()], c, n, c, n, r, h, 2, 0.3, penalty_on)
    assert difference(found, expected) < max(1e-6, 2 * difference(whole, expected))  # plain inverses lose much too
    if penalty_on != "outputs":
        assert rough == ([True, False] * 2 if UNEVEN[uneven] is None else [True] * 2) + [False] * 2


def recording(function, told):
    """The function, which also notes its second argument in a list."""

    def call(first, second):
        told.append(second)
        return function(first, second)

    return call


def rounds_case(rows):
    """(c, n, all rows of both, preserved and held rows, layers, both as groups, S) for rounds of rows or moments."""
    full_c, full_n = draw(80 if rows == "many" else 9, 1), draw(80 if rows == "many" else 9, 2)
    c, n, start = full_c[3:7], full_n[3:7], layers()
    weight_gram = LayerGram(start) if rows == "few" else sum(w.T @ w for w in start)
    groups = grouped(c, n, 2), grouped(full_c, full_n, 2)
    return c, n, full_c, full_n, draw(M, 3), draw(3, 4), start, *groups, weight_gram


@pytest.mark.parametrize("penalty_on", PENALTIES)
@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("rows", ["few", "few, whole matrix", "many"])
def test_regularised_rece_keeps_the_erased_rows_in_its_rounds(penalty_on, epochs, rows):
    c, n, full_c, full_n, r, h, start, groups, full_groups, weight_gram = rounds_case(rows)
    settings = {**RECE_SETTINGS, "epochs": epochs, "penalty_on": penalty_on, "hold": True}
    expected = naive_rece(start, c, n, full_c, full_n, r, h, epochs, 0.3, penalty_on, hold=True)
    found = rece_of(groups, full_groups, r, weight_gram, fixed=h, **settings)
    assert difference(found.a.double() @ found.b.double(), expected) < 2e-6
    published = rece_of(groups, full_groups, r, weight_gram, fixed=h, **{**settings, "hold": False})
    assert difference(published.a.double() @ published.b.double(), expected) > 1e-2


@pytest.mark.parametrize("penalty_on", ["length", "replacement"])
@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("rows", ["few", "few, whole matrix", "many"])
def test_the_rounds_have_scales_of_their_own(penalty_on, hold, rows):
    """Two rounds whose targets weigh 2.5, of rows, of whole matrices and of moments."""
    c, n, full_c, full_n, r, h, start, groups, full_groups, weight_gram = rounds_case(rows)
    settings = {**RECE_SETTINGS, "epochs": 2, "penalty_on": penalty_on, "hold": hold}
    found, plain = (
        rece_of(groups, full_groups, r, weight_gram, fixed=h, edit_erase_scale=scale, **settings) for scale in (2.5, 1)
    )
    expected = naive_rece(start, c, n, full_c, full_n, r, h, 2, 0.3, penalty_on, hold, 2.5)
    assert difference(found.a.double() @ found.b.double(), expected) < 2e-6
    assert difference(plain.a.double() @ plain.b.double(), expected) > 1e-2


def test_regularised_rece_brings_less_of_the_concept_back():
    """What the rounds do to the concepts' own rows, beside what they do as published."""
    c, n, r, weights = draw(9, 1), draw(9, 2), draw(M, 3), LayerGram(layers())
    after_uce = c @ uce_of(grouped(c, n), r).matrix().double().T
    moved = [
        (c @ rece_of(grouped(c, n), grouped(c, n), r, weights, hold=hold).matrix().double().T - after_uce).norm()
        for hold in (True, False)
    ]
    assert 0 < moved[0] < 0.5 * moved[1]


def test_rece_by_layers_with_more_rows_than_the_width_is_that_of_the_whole_matrix():
    c, n, r, weights = draw(9, 1), draw(9, 2), draw(2 * D, 3), LayerGram(layers())
    found = rece_of(grouped(c, n), grouped(c, n), r, weights).matrix()
    assert torch.equal(found, rece_of(grouped(c, n), grouped(c, n), r, weights.dense()).matrix())


def test_rece_by_layers_makes_no_square_matrix():
    g = torch.Generator().manual_seed(6)
    c, n, r = (draw(k, i, 4096).float() for i, k in enumerate((9, 9, 300)))
    weights = LayerGram([torch.randn(40, 4096, generator=g), torch.randn(60, 4096, generator=g)])
    with Largest() as largest:
        found = rece_of(grouped(c, n), grouped(c, n), r, weights, epochs=2)
    assert len(found.concept) and 0 < largest.size < 400 * 4096


@pytest.mark.parametrize("penalty", [0.0, 1e-12])
def test_rece_by_layers_says_when_the_penalty_is_too_small(penalty):
    c, n, r = draw(9, 1), draw(9, 2), draw(M, 3)
    with pytest.raises(ErasureError, match="raise the penalty"):
        rece_of(grouped(c, n), grouped(c, n), r, LayerGram(layers()), penalty=penalty)


def test_rece_by_layers_says_when_the_edit_has_no_inverse():
    p = LowRankMap(LayerGram(layers()))
    first = torch.zeros(1, D, dtype=torch.float64)
    first[0, 0] = 1.0
    p.add(-first.T, first)
    with pytest.raises(ErasureError, match='put the penalty on "length"'):
        derived_by_rows(draw(3, 1), draw(3, 2), p, 0.1, "outputs")


def test_rece_by_layers_says_when_the_edit_has_no_solution():
    c, n = draw(9, 1), draw(9, 2)
    sentence = "A round of RECE has no stable solution with an anchor weight of 0; take fewer epochs"
    with pytest.raises(ErasureError, match=sentence):
        rece_of(grouped(c, n), grouped(c, n), draw(M, 3), LayerGram(layers()), edit_anchor=0.0)
    with pytest.raises(ErasureError, match=sentence):  # in whole matrices, flat in a direction that no row reaches
        rece_of(grouped(c, n), grouped(c, n), draw(M, 3), sum(w.T @ w for w in layers()), edit_anchor=0.0)
    with pytest.raises(ErasureError, match="The closed-form system has no stable solution with an anchor weight of 0;"):
        rece_of(grouped(c, n), grouped(c, n), draw(M, 3), LayerGram(layers()), anchor=0.0)


def test_a_low_rank_map_of_layers_is_the_whole_one():
    p = LowRankMap(LayerGram(layers()))
    whole, w, x = torch.eye(D, dtype=torch.float64), torch.cat(layers()), draw(5, 7)
    for seed in (1, 2):
        a, b = 0.1 * draw(3, seed).T, 0.1 * draw(3, seed + 2)
        p.add(a, b)
        whole = whole + a @ b
    assert difference(p.of(x), x @ whole.T) < 1e-12
    assert difference(p.transposed(x), x @ whole) < 1e-12
    assert difference(p.square(), (w @ whole) @ (w @ whole).T) < 1e-12
    inverse, pivots = p.inverse_of(x)
    assert difference(inverse, x @ torch.linalg.inv(whole).T) < 1e-12 and pivots > 1e-3


@pytest.mark.parametrize(("width", "outputs", "kind"), [(4096, 3, LayerGram), (4096, 5000, torch.Tensor)])
def test_the_form_of_the_layers_gram(width, outputs, kind):
    """By the layers where the text is wide and they have fewer outputs than it."""
    g, calls = torch.Generator().manual_seed(6), []
    weights = [torch.randn(2, width, generator=g), torch.randn(1, width, generator=g)]
    found = layer_gram(iter(weights), outputs, calls.append)
    assert isinstance(found, kind) and len(found) == width and calls == [1, 2]
    narrow = layer_gram([w[:, :50] for w in weights], 3)
    expected = sum(w[:, :50].double().T @ w[:, :50].double() for w in weights)
    assert torch.equal(narrow, expected)


def test_the_impact_on_layers_is_that_of_their_gram():
    weights, delta, vectors = LayerGram(layers()), draw(4, 1).float(), draw(4, 2).float()
    found = relative_change(delta, vectors, weights)
    assert found == pytest.approx(relative_change(delta, vectors, weights.dense()), rel=1e-9)


def test_equal_replacements_are_there_once():
    """Wherever they come from; others of the same shape are not."""
    blank, other = draw(4, 1), draw(4, 2)
    groups = [[(draw(4, 3), blank)], [(draw(4, 4), blank.clone())], [(draw(4, 5), other)]]
    targets, replacements, index, sizes = shared(groups)
    assert torch.equal(replacements, torch.cat([blank, other])) and sizes == [4, 4, 4]
    assert torch.equal(replacements[index], torch.cat([blank, blank, other])) and len(targets) == 12
