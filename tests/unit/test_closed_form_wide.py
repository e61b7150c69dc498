"""The closed form where the text is wider than there are rows, with fixed rows and weights, against naive float64."""

import pytest
import torch
from membrane.core.erasers.closed_form.row_space import Rows, row_basis, row_ridge, strong_basis
from membrane.core.erasers.closed_form.solver import by_concept, fixed_basis, gram, mean_square
from membrane.core.erasers.closed_form.uce import uce_of, uce_row_terms, uce_solver, uce_terms
from membrane.core.errors import ErasureError
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
@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_a_relative_anchor_means_the_same_at_every_length(preserved, scale):
    def found(scale, **more):
        c, n, r, h = (draw(k, seed, scale=scale) for k, seed in ((N, 1), (N, 2), (preserved, 3), (2, 4)))
        return uce_of(grouped(c, n), r, anchor=0.02, fixed=h, **more).matrix().double()

    assert difference(found(scale, relative=True), found(1.0, relative=True)) < 1e-5
    if scale != 1.0:
        assert difference(found(scale), found(1.0)) > 1e-4


def test_the_scale_of_rows():
    rows, h = draw(300, 1).float(), draw(3, 2)
    expected = rows.double().square().sum(1).mean().item()
    assert mean_square(rows) == pytest.approx(expected, rel=1e-12)
    assert mean_square(list(rows.split(7))) == pytest.approx(expected, rel=1e-12)
    q = torch.linalg.qr(h.T)[0]
    left = (rows.double() - rows.double() @ q @ q.T).square().sum(1).mean().item()
    assert mean_square(rows, h) == pytest.approx(left, rel=1e-12)
    assert mean_square(rows[:0]) == 1.0


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
