"""The published loops of benchmarks/_flux_loops.py: what they change, and what their parts compute."""

import pytest
import torch
from membrane.benchmarks import _flux_loops as loops
from membrane.tools.pixel_world.evaluate import load_flux

KEPT = ["circle", "heart", "moon"]


@pytest.fixture
def latents():
    return torch.randn(1, *loops.SHAPE, generator=torch.Generator().manual_seed(1))


def low_rank():
    return loops.Trained(("txt", "img"), (loops.QUERIES, loops.KEYS), rank=2, alpha=2.0)


def test_a_change_starts_closed(latents):
    trained = low_rank()
    with torch.no_grad():
        assert torch.equal(trained.velocity(latents, 0.5, ["star"]), trained.velocity(latents, 0.5, ["star"], on=False))


def test_a_change_beside_the_layers_is_that_of_their_weights(latents):
    trained, plain = low_rank(), load_flux(loops.ASSETS / "transformer.safetensors")
    with torch.no_grad():
        for layer in trained.layers.values():
            for up in layer.up:
                up.normal_(0, 0.5, generator=trained.generator)
        still = trained.velocity(latents, 0.5, ["star"], on=False)
        weights = dict(plain.named_parameters())
        for name, change in trained.changes().items():
            weights[f"{name}.weight"] += change
        star = trained.prompt("star")
        found, expected = trained.velocity(latents, 0.5, ["star"]), plain(latents, torch.full((1,), 0.5), star.rows,
                                                                         star.pooled)  # fmt: skip
    assert (found - expected).norm() < 1e-5 * expected.norm() and (found - still).norm() > 0.01 * still.norm()


def test_attention_maps_are_those_of_the_network(latents):
    """Over all rows they add to 1, and weigh the values as the network's own attention does."""
    trained = low_rank()
    seen = []
    block = trained.model.double_blocks[1]
    block.img_attn.proj.register_forward_hook(lambda _, given, out: seen.append(given[0]))
    with torch.no_grad(), loops.AttentionMaps(trained.model) as maps:
        trained.velocity(latents, 0.5, ["star"])
        everything = maps.of_words(10**6)
        (_, _, words), (_, _, places) = maps.calls[2:4]
    assert len(everything) == 3 and everything[1].shape[2:] == (64, 32 + 64)
    torch.testing.assert_close(everything[1].sum(dim=-1), torch.ones(1, 4, 64))
    weighed = everything[1] @ torch.cat([words, places], dim=2)
    torch.testing.assert_close(weighed.transpose(1, 2).flatten(2), seen[0], rtol=1e-4, atol=1e-5)
    assert trained.prompt("star").words == 1 and trained.prompt("a red star").words == 3


@pytest.mark.parametrize(
    ("name", "streams", "parts"),
    [("ESD", ("txt", "img"), (0, 1, 2)), ("GEM", ("txt", "img"), (0, 1)), ("EraseAnything", ("txt",), (0, 1))],
)
def test_a_loop_moves_what_it_is_published_for(name, streams, parts):
    trained = loops.LOOPS[name]("star", "circle", KEPT, steps=2)
    changes = trained.changes()
    assert set(changes) == {f"double_blocks.{i}.{s}_attn.qkv" for i in range(3) for s in streams}
    for change in changes.values():
        moved = [bool(part.any()) for part in change.chunk(3)]
        assert moved == [i in parts for i in range(3)]
    assert trained.bytes == 2 * sum(p.numel() for p in trained.parameters())


def test_gem_draws_the_concept_to_its_surrogate(latents):
    """What the change draws it to comes nearer within a few steps."""
    before = loops.Trained(("txt",), (loops.QUERIES,))
    trained = loops.gem("star", "circle", KEPT, steps=6)

    def gap(of):
        with torch.no_grad():
            (found,) = of.velocity(latents, 1.0, ["star"])
            (aim,) = before.velocity(latents, 1.0, ["circle"])
        return (found - aim).norm()

    assert gap(trained) < 0.995 * gap(before)


def test_a_roll_out_is_the_models_own_sampling(latents):
    """From the same noise, all steps of it are those of Euler over equal times with guidance."""
    trained = low_rank()
    path = list(trained.walk("a red star", 2))
    assert [round(float(t), 4) for _, t in path] == [1.0, round(27 / 28, 4), round(26 / 28, 4)]
    x, t = path[1]
    empty, toward = trained.velocity(x, t, ["", "a red star"]).detach().chunk(2)
    expected = x - (empty + loops.GUIDANCE * (toward - empty)) / loops.STEPS
    torch.testing.assert_close(path[2][0], expected, rtol=1e-4, atol=1e-5)
