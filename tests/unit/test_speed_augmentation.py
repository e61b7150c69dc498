"""SPEED's directed prior augmentation against the published steps, one after the other, in float64."""

import pytest
import torch
from membrane.core.erasers.closed_form.augmentation import CHUNK, DRAWS, SEED, drawn, heard_lengths, quietest
from membrane.core.erasers.closed_form.groups import AUGMENTED, FIRST, OF_2025
from membrane.core.erasers.closed_form.job import METHODS, Job, erase, solve
from membrane.core.erasers.closed_form.layers import LayerGram
from membrane.core.erasers.closed_form.solver import by_concept
from membrane.core.erasers.closed_form.speed import STARTS, invariants, speed_of
from membrane.core.text.concepts import Concept

from .test_closed_form_methods import D, dense, difference, draw, draw_flat, encoder

EYE = torch.eye(D, dtype=torch.float64)


def published(w, t, a, c0, c2, tau, rho, lam, filtered=True):
    """The change of a layer W by the published script, as it goes: filter, draws in chunks, null space, solution."""
    erased = w @ (a - t) @ torch.linalg.inv(EYE + t)
    v = torch.linalg.svd(w, full_matrices=False)[2][-1]
    v = v if v[v.abs().argmax()] > 0 else -v  # both are one; the numbers drawn are for this one
    if filtered:
        scores = torch.stack([(erased @ c).norm() for c in c0])
        c0 = c0[scores > scores.mean()]
    chance = torch.Generator().manual_seed(SEED)
    order = torch.randperm(len(c0), generator=chance)
    total, count = c0.T @ c0, len(c0)
    for start in range(0, len(c0), CHUNK):
        places = order[start : start + CHUNK]
        numbers = torch.randn(len(places), DRAWS, 1, generator=chance, dtype=torch.float64)
        moved = [c0[i] + numbers[k, j] * v for k, i in enumerate(places) for j in range(DRAWS)]
        scores = torch.stack([(erased @ c).norm() for c in moved])
        for c, score in zip(moved, scores):
            if score > scores.mean():
                total, count = total + torch.outer(c, c), count + 1
    u, sigma, _ = torch.linalg.svd(total / count)
    p = u[:, sigma < tau] @ u[:, sigma < tau].T
    m = torch.linalg.inv(t @ p + rho * EYE)
    inner = torch.linalg.inv(c2 @ p @ m @ c2.T + lam * torch.eye(len(c2), dtype=torch.float64))
    return w @ (a - t) @ p @ (EYE - m @ c2.T @ inner @ c2 @ p) @ m


@pytest.mark.parametrize("outputs", [D - 3, D, 3 * D])
@pytest.mark.parametrize(("rho", "lam", "filtered"), [(1.0, 0.0, True), (0.7, 0.5, True), (0.05, 0.0, False)])
@pytest.mark.parametrize("retained", [6, 300])
def test_one_layer_is_edited_as_published(outputs, rho, lam, filtered, retained):
    """With fewer and more outputs than the text is wide; with one and several chunks of preserved vectors."""
    w, c1, anchors, empty = draw(outputs, 9), draw(2, 1), draw(2, 2), draw(7, 4)
    c0 = draw_flat(retained, 3, rank=4)
    settings = {"tau": 0.1, "rho": rho, "lam": lam}
    groups = by_concept(c1, anchors, torch.arange(2), 2)
    found = w @ dense(speed_of(groups, c0, empty, weight_gram=w.T @ w, prior_filter=filtered, **settings))
    t, a, c2 = c1.T @ c1 / 2, anchors.T @ c1 / 2, invariants(empty)
    expected = published(w, t, a, c0, c2, filtered=filtered, **settings)
    assert difference(found, expected) < 1e-6
    assert difference(w @ dense(speed_of(groups, c0, empty, prior_filter=filtered, **settings)), expected) > 1e-3


def test_layers_count_as_one_with_all_of_their_outputs():
    layers = [draw(n, seed) for n, seed in ((5, 1), (3, 2))]
    w = torch.cat(layers)
    v = torch.linalg.svd(w, full_matrices=False)[2][-1]
    rows = draw(4, 3)
    for gram in (sum(layer.T @ layer for layer in layers), LayerGram([layer.float() for layer in layers])):
        assert abs(abs((quietest(gram) @ v).item()) - 1) < 1e-5
        assert torch.allclose(heard_lengths(rows, gram), (rows @ w.T).norm(dim=1), rtol=1e-5)


def test_wide_text_is_augmented_by_the_layers_themselves():
    """Fewer outputs than the text is wide: the same map without S."""
    w, c1, anchors, empty = draw(9, 9).float(), draw(2, 1), draw(2, 2), draw(7, 4)
    c0, groups = draw_flat(30, 3, rank=4), by_concept(c1, anchors, torch.arange(2), 2)
    by_layers, by_gram = (
        dense(speed_of(groups, c0, empty, weight_gram=gram)) for gram in (LayerGram([w]), w.double().T @ w.double())
    )
    assert difference(by_layers, by_gram) < 1e-6
    assert difference(dense(speed_of(groups, c0, empty)), by_gram) > 1e-3


def test_what_is_drawn_lies_along_the_direction_and_above_the_mean():
    retained, direction = draw(200, 5).float(), torch.nn.functional.normalize(draw(1, 6)[0], dim=0)
    found = drawn(retained, direction, lambda rows: (rows @ direction).abs())
    assert found.dtype == retained.dtype and 0 < len(found) < len(retained) * DRAWS
    beside = found.double() - (found.double() @ direction)[:, None] * direction
    kept = retained.double() - (retained.double() @ direction)[:, None] * direction
    assert torch.cdist(beside, kept).amin(1).max() < 1e-5
    assert (found.double() @ direction).abs().min() > 0.5
    assert torch.equal(found, drawn(retained, direction, lambda rows: (rows @ direction).abs()))


def test_a_job_of_the_augmented_edition():
    """From words on: sums over the tokens, the best of the clusterings, the filter by what the layers hear."""
    settings = {"tokens": "all", "rho": 0.7, "lam": 0.5}
    job = Job.of((Concept("star", "disc"),), ("heart",), ("{}",), "SPEED", edition=AUGMENTED, **settings)
    encoded, w = encoder(job.prompts()), draw(11, 8)
    found = solve(job, encoded, w.T @ w)
    old, new, empty = (encoded[word].rows.double() for word in ("star", "disc", ""))
    c0 = torch.cat([empty[1:], encoded["heart"].rows[1:].double()])
    t, a = old[1:].T @ old[1:], new[1:].T @ old[1:]
    expected = published(w, t, a, c0, invariants(empty, STARTS), 0.1, 0.7, 0.5)
    assert difference(w @ dense(found), expected) < 1e-6
    card = erase(job, {"text": encoded}, "", "", weight_gram=w.T @ w).card
    assert card.settings["edition"] == AUGMENTED


def test_where_no_layers_are_known_it_is_the_edition_without():
    """As at a second entry, and as every other edition whoever hands the layers in."""
    concepts, gram = (Concept("star", "disc"),), draw(11, 8).T @ draw(11, 8)
    plain, augmented = (Job.of(concepts, ("heart",), method="SPEED", edition=e) for e in (OF_2025, AUGMENTED))
    encoded = encoder(plain.prompts())
    expected = solve(plain, encoded).matrix()
    assert torch.equal(solve(augmented, encoded).matrix(), expected)
    assert torch.equal(solve(plain, encoded, gram).matrix(), expected)
    assert not torch.equal(solve(augmented, encoded, gram).matrix(), expected)


@pytest.mark.parametrize(
    ("method", "edition", "needed"),
    [("SPEED", FIRST, False), ("SPEED", OF_2025, False), ("SPEED", AUGMENTED, True), ("UCE", AUGMENTED, False),
     ("RECE", FIRST, True)],
)  # fmt: skip
def test_which_jobs_read_the_layers(method, edition, needed):
    assert METHODS[method].needs_gram(Job.of((Concept("star", ""),), method=method, edition=edition)) is needed


def test_nothing_preserved_leaves_nothing_to_move():
    c1, anchors, empty, w = draw(1, 1), draw(1, 2), draw(7, 4), draw(11, 8)
    groups, none = by_concept(c1, anchors, torch.zeros(1, dtype=torch.long), 1), torch.zeros(0, D)
    with_layers, without = (speed_of(groups, none, empty, weight_gram=gram) for gram in (w.T @ w, None))
    assert torch.equal(with_layers.matrix(), without.matrix())
