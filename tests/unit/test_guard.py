"""The arithmetic of the guard alone."""

import numpy as np
import pytest
import torch
from membrane.core.erasers.guard import FEWEST, SHRINKAGE, Level, Redrawn, direction, features, fit, left_out_scores
from membrane.core.errors import ErasureError
from membrane.core.text.captions import captions_of
from membrane.core.text.examples import named_captions, other_captions


def drawn(n, seed, shift=0.0, width=40):
    """Features (n, width) of which the first three tell the concept."""
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    rows = rows * torch.linspace(0.1, 3.0, width) + torch.linspace(-2, 5, width)
    rows[:, :3] += shift * torch.linspace(0.1, 3.0, width)[:3]
    return rows


def naive(concept, others, shrinkage):
    """The same direction from the whole covariance matrix, in float64."""
    concept, others = (np.asarray(rows, dtype=np.float64) for rows in (concept, others))
    centred = np.concatenate([concept - concept.mean(0), others - others.mean(0)])
    covariance = centred.T @ centred / (len(concept) + len(others) - 2)
    shrunk = (1 - shrinkage) * covariance + shrinkage * np.diag(np.diag(covariance))
    return np.linalg.solve(shrunk, concept.mean(0) - others.mean(0))


@pytest.mark.parametrize("shrinkage", [0.2, SHRINKAGE, 0.9])
def test_the_direction_is_that_of_the_shrunk_covariance(shrinkage):
    concept, others = drawn(12, 0, 2.0), drawn(17, 1)
    assert np.allclose(direction(concept, others, shrinkage), naive(concept, others, shrinkage), rtol=1e-9, atol=1e-12)


def test_a_feature_that_never_varies_does_no_harm():
    concept, others = drawn(12, 0, 2.0), drawn(17, 1)
    concept[:, 5] = others[:, 5] = 7.0
    assert direction(concept, others).isfinite().all()


def test_features_are_the_mean_and_the_maximum_over_places():
    hidden = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).half()
    found, known = features(hidden), hidden.double().numpy()
    assert found.dtype == torch.float32 and found.shape == (3, 8)
    assert np.allclose(found[:, :4], known.mean((2, 3)), atol=1e-6)
    assert np.array_equal(found[:, 4:].double(), known.max((2, 3)))


def test_scores_are_of_pictures_that_were_left_out():
    """Noise in more features than there are pictures separates whole in the fit, and not at all outside of it."""
    concept, others = drawn(16, 0, width=200), drawn(24, 1, width=200)
    inside = [rows.double() @ direction(concept, others, 0.01) for rows in (concept, others)]
    assert inside[0].min() > inside[1].max()
    held = left_out_scores(concept, others)
    assert abs(float(held[0].mean() - held[1].mean())) < 0.3 and held[0].min() < held[1].max()
    changed = concept.clone()
    changed[0] += 100  # is in one part, whose scores by the other parts do not know it
    assert torch.equal(left_out_scores(changed, others)[0][4::4], held[0][4::4])


def test_a_level_scores_in_standard_deviations_of_the_others():
    concept, others, fresh = drawn(48, 0, 3.0), drawn(96, 1), drawn(400, 2)
    level = Level.of(0.5, concept, others)
    assert abs(float(level.others.mean())) < 1e-5 and abs(float(level.others.std()) - 1) < 1e-5
    assert abs(float(level.score(fresh).mean())) < 0.3 and 0.7 < float(level.score(fresh).std()) < 1.3
    assert level.tells(3.2) and not level.tells(100.0)
    own = level.score(drawn(400, 3, 3.0))
    assert float((own > 3.2).float().mean()) > 0.9
    assert abs(float(own.mean() - level.concept.mean())) < 0.7


def test_neutral_pictures_of_the_concept_are_left_out_and_named_ones_never():
    def sides(neutral):
        concept = {share: drawn(32, int(10 * share), 4.0) for share in (0.2, 0.4, 0.6, 0.8)}
        others = {
            share: torch.cat([drawn(60, 20 + int(10 * share)), drawn(6, 40 + int(10 * share), 4.0)])
            for share in concept
        }
        return fit(concept, others, torch.full((66,), neutral), 3.2)

    found = sides(True)
    assert found.left_out == 6 and [len(level.others) for level in found.levels] == [60] * 4
    assert found.fired() == ((32, 32), (0, 60)) and found.used == list(found.levels)
    assert sides(False).left_out == 0


def test_what_cannot_be_told_is_used_at_no_level():
    same = {0.5: drawn(32, 0), 0.9: drawn(32, 1)}
    found = fit(same, {share: drawn(40, 2) for share in same}, torch.zeros(40, dtype=torch.bool), 3.2)
    assert not found.used


@pytest.mark.parametrize(("concept", "others"), [(FEWEST - 1, 20), (20, FEWEST - 1)])
def test_too_few_pictures(concept, others):
    with pytest.raises(ErasureError, match=f"8 others at least, and there are {concept} and {others}; ask for more"):
        fit({0.5: drawn(concept, 0)}, {0.5: drawn(others, 1)}, torch.zeros(others, dtype=torch.bool), 4.0)


def test_a_picture_drawn_anew_is_eulers_and_asks_once_a_level():
    start, asked = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), []

    def predict(x, sigma):
        asked.append(float(sigma[0]))
        return x * 0.5 + 1

    redrawn, x = Redrawn(start), start.double()
    levels = [8.0, 3.0, 3.0, 1.0, 0.25]
    found = [redrawn.at(torch.full((2,), level), predict) for level in levels]
    assert asked == [8.0, 3.0, 1.0, 0.25] and torch.equal(found[1], found[2])
    for before, after in ((8.0, 3.0), (3.0, 1.0), (1.0, 0.25)):
        x = x + (x - (x * 0.5 + 1)) / before * (after - before)
    assert torch.allclose(found[-1].double(), x * 0.5 + 1, atol=1e-5)


def test_captions_of_examples():
    templates = captions_of("anything").templates
    assert named_captions(["star"], 3) == [template.replace("{}", "star") for template in templates[:3]]
    assert named_captions(["ring", "moon"], 4) == ["ring", "moon", "a ring", "a moon"]
    assert named_captions([], 5) == [] and len(named_captions(["x"], 100)) == 100
    others = other_captions("dog", 130)
    assert len(others) == 130 and len(set(others)) > 100 and not any("dog" in caption.split() for caption in others)
    assert any("dog" in caption.split() for caption in other_captions("star", 130))
