"""The descent of text vectors on a toy whose pull and gradient are known."""

import pytest
import torch
from membrane.core.erasers.mitigation import Softening, softened

VECTORS = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))


def pulls(leaf):
    """The pull is the vectors' length, whose gradient is their direction."""
    with torch.no_grad():
        length = leaf.norm()
        return float(length), leaf / length


def naive(vectors, steps, rate, growth):
    """Adam by its definition, in float64: [pull at each step]."""
    x, m, v, found = vectors.double(), 0.0, 0.0, []
    rate = rate * float(x.square().mean().sqrt())
    for step in range(1, steps + 1):
        found.append(float(x.norm()))
        g = x / x.norm()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        x = x - rate * growth ** (step - 1) * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return [*found, float(x.norm())]


def test_it_is_adam_by_its_definition():
    lengths = naive(VECTORS, 6, 0.05, 1.2)
    found = softened(VECTORS, pulls, Softening(target=0.0, steps=6, rate=0.05, growth=1.2))
    assert found.before == pytest.approx(lengths[0], rel=1e-5) and found.after == pytest.approx(lengths[-1], rel=1e-5)
    assert float(found.vectors.norm()) == pytest.approx(found.after) and found.steps == 6


def test_it_stops_at_the_target_and_leaves_what_is_below():
    own = float(VECTORS.norm())
    found = softened(VECTORS, pulls, Softening(share=0.8, steps=50))
    assert found.target == pytest.approx(0.8 * own) and 0.7 * own < found.after <= found.target < found.before
    for still in (Softening(target=own * 1.01), Softening(share=1.0)):
        kept = softened(VECTORS, pulls, still)
        assert kept.vectors is VECTORS and kept.steps == 0 and kept.after == kept.before


def test_the_least_pull_on_the_way_is_kept():
    """A rate so large that the descent jumps over the least one and back up."""
    seen = []

    def noted(leaf):
        seen.append(float(leaf.detach().norm()))
        return pulls(leaf)

    found = softened(VECTORS, noted, Softening(target=0.0, steps=8, rate=1.5))
    assert found.after == min(seen) < seen[-1]
    assert float(found.vectors.norm()) == pytest.approx(found.after)
