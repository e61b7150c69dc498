"""The demo transformer's own networks, its training and the quality its card claims."""

import argparse

import numpy as np
import pytest
import torch
from membrane.core.demo.world import ASSETS, load_config
from membrane.tools.pixel_world import evaluate, train_flux, world
from membrane.tools.pixel_world import tokenizer as tokenizers
from membrane.tools.pixel_world.flux import Flux, rotate, rotations, timestep_embedding
from membrane.tools.pixel_world.muon import Muon, orthogonal, squares
from membrane.tools.pixel_world.t5 import T5, buckets
from membrane.tools.pixel_world.train_t5 import read_rows

FILE = ASSETS / "transformer.safetensors"


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def flux():
    """A network none of whose weights is zero."""
    torch.manual_seed(0)
    flux = Flux(load_config()["flux"])
    for weight in flux.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return flux.requires_grad_(False)


@pytest.fixture(scope="module")
def text():
    return train_flux.Text(FILE)


def test_flux_has_the_published_names():
    flux = Flux(load_config()["flux"])
    assert sum(weight.numel() for weight in flux.parameters()) == 2_906_512
    assert {
        "double_blocks.2.img_attn.norm.query_norm.scale",
        "double_blocks.0.txt_mlp.2.weight",
        "single_blocks.3.modulation.lin.bias",
        "single_blocks.0.linear1.weight",
        "final_layer.adaLN_modulation.1.weight",
        "vector_in.in_layer.weight",
    } <= set(flux.state_dict())


def test_a_new_flux_predicts_nothing():
    flux = Flux(load_config()["flux"])
    out = flux(numbers(1, 2, 4, 16, 16), torch.tensor([0.1, 0.9]), numbers(2, 2, 32, 128), numbers(3, 2, 128))
    assert out.shape == (2, 4, 16, 16) and not out.any()


def test_flux_does_not_mix_the_pictures_of_a_batch(flux):
    x, t = numbers(1, 2, 4, 16, 16), torch.tensor([0.1, 0.9])
    rows, pooled = numbers(2, 2, 32, 128), numbers(3, 2, 128)
    both = flux(x, t, rows, pooled)
    alone = flux(x[1:], t[1:], rows[1:], pooled[1:])
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-4)
    for changed in (flux(x, t, rows + 1, pooled), flux(x, t, rows, pooled + 1), flux(x, t / 2, rows, pooled)):
        assert (changed - both).abs().amax(dim=(1, 2, 3)).min() > 1e-2


def test_flux_does_not_know_the_order_of_the_text_rows(flux):
    """They all stand at the origin, so only the encoder can tell what was said where."""
    x, t, rows, pooled = numbers(1, 1, 4, 16, 16), torch.tensor([0.5]), numbers(2, 1, 32, 128), numbers(3, 1, 128)
    torch.testing.assert_close(flux(x, t, rows.flip(1), pooled), flux(x, t, rows, pooled), atol=1e-4, rtol=1e-4)


def test_flux_takes_other_picture_sizes(flux):
    x, t, rows, pooled = numbers(1, 1, 4, 8, 24), torch.tensor([0.5]), numbers(2, 1, 40, 128), numbers(3, 1, 128)
    assert flux(x, t, rows, pooled).shape == (1, 4, 8, 24)


def test_rotary_scores_depend_on_distances_only():
    axes = (8, 12, 12)
    q, k = numbers(1, 32), numbers(2, 32)
    angles = rotations(0, 8, 8, axes, 1000)
    cos, sin = angles.cos().float(), angles.sin().float()
    queries, keys = (rotate(v.expand(64, 32), cos, sin).view(8, 8, 32) for v in (q, k))
    score = queries[1, 2] @ keys[3, 5]
    torch.testing.assert_close(queries[4, 1] @ keys[6, 4], score, atol=1e-4, rtol=1e-4)
    assert (queries[4, 1] @ keys[6, 5] - score).abs() > 1e-3
    text = rotations(3, 8, 8, axes, 1000)
    assert text.shape == (67, 16) and not text[:3].any()


def test_flow_times_are_told_apart():
    embedded = timestep_embedding(torch.linspace(0, 1, 21))
    assert embedded.shape == (21, 256)
    assert torch.cdist(embedded, embedded).fill_diagonal_(9).min() > 0.5


def test_t5s_buckets_are_the_published_ones():
    """Eight exact distances each way, then logarithmic up to 128; later keys in the upper half (bidirectional)."""
    table = buckets(200)
    assert table[10, 2:19].tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0, 17, 18, 19, 20, 21, 22, 23, 24]
    assert table[0, 127:130].tolist() == [31, 31, 31] and table[199, 0] == 15
    assert table[0, 12] == 25 and table[0, 11] == 24  # 8 + floor(ln(12 / 8) / ln(128 / 8) * 8) = 9


def test_t5_looks_both_ways_and_at_padding():
    torch.manual_seed(0)
    t5 = T5(load_config()["t5"]).requires_grad_(False)
    tokens = torch.arange(32)[None]
    base = t5(t5.embed(tokens))
    for place in (0, 31):
        other = tokens.clone()
        other[0, place] = 700
        assert ((t5(t5.embed(other)) - base).norm(dim=-1) > 1e-3).all()


def test_t5_rows_have_no_start_token_and_padding_of_their_own():
    tokenizer = tokenizers.load(ASSETS / "tokenizer")
    ids, ends = tokenizers.encode(tokenizer, ["a red star", ""], 8)
    rows, places = tokenizers.t5_rows(ids, ends, tokenizer.bos_token_id)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert rows.shape == (2, 7) and places.tolist() == [3, 0]
    assert rows[0].tolist() == [*ids[0, 1:4].tolist(), end, start, start, start]
    assert rows[1].tolist() == [end, *[start] * 6]


def test_captions_are_read_at_ends_padding_and_words():
    ends = np.full(20000, 6)
    rows = read_rows(ends, 32, np.random.default_rng(0))
    shares = [(rows == 6).mean(), (rows > 6).mean(), (rows < 6).mean()]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.02)
    assert rows.min() == 0 and rows.max() == 31


def test_muons_steps_are_orthogonal():
    left, _, right = torch.linalg.svd(numbers(0, 5, 64, 64))
    steps = orthogonal(left * torch.linspace(0.1, 9, 64) @ right)
    values = torch.linalg.svdvals(steps)
    assert 0.6 < values.min() and values.max() < 1.3
    assert (torch.linalg.svdvals(left.mT @ steps @ right.mT - torch.eye(64)) < 0.4).all()


@pytest.mark.parametrize("shape", [(384, 128), (128, 128), (128, 640)])
def test_muon_cuts_matrices_into_squares_in_place(shape):
    matrix = numbers(0, *shape)
    pieces = squares(matrix)
    assert pieces.shape == (max(shape) // 128, 128, 128)
    last = matrix[-128:, -128:].clone()
    torch.testing.assert_close(pieces[-1], last)
    pieces[-1].zero_()
    assert not matrix[-128:, -128:].any()


def test_muon_finds_a_linear_map():
    target, inputs = numbers(0, 32, 16), numbers(1, 16, 64)
    weight = torch.nn.Parameter(torch.zeros(32, 16))
    optimizer = Muon([weight], lr=0.1, weight_decay=0)
    errors = []
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 150)
        optimizer.zero_grad()
        error = ((weight - target) @ inputs).square().mean()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.01 * errors[0]


def test_the_target_is_the_flows_velocity():
    """A network that knows noise and picture has no loss; one that says nothing has that of the velocity."""
    latents, seen = numbers(0, 8, 4, 16, 16), {}

    class Knowing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, t, rows, pooled):
            s = t[:, None, None, None]
            seen.update(t=t)
            return self.weight * (x - latents) / s  # x - picture = t (noise - picture)

    model, given = Knowing(), (numbers(1, 8, 32, 128), numbers(2, 8, 128))
    loss = train_flux.loss_of(model, latents, *given, torch.Generator().manual_seed(0))
    assert loss < 1e-6 and ((seen["t"] > 0) & (seen["t"] < 1)).all()
    model.weight.data.zero_()
    loss = train_flux.loss_of(model, latents, *given, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(2, abs=0.3)


def test_training_pictures_go_with_their_captions(text, monkeypatch):
    monkeypatch.setattr(train_flux, "CAPTIONS_EACH", 1)
    combos, rows, pooled = train_flux.caption_pool(text, np.random.default_rng(0))
    assert not set(combos) & set(world.held_out()) and len(rows) == len(pooled) == len(combos) + 13
    latents, drawn, drawn_pooled = train_flux.draw(400, np.random.default_rng(1), combos, rows, pooled)
    empty = (drawn == rows[-1].float()).all(-1).all(-1)
    named = (drawn[:, None, 0] == rows[None, -13:-1, 0].float()).all(-1)
    assert empty.float().mean() == pytest.approx(0.1, abs=0.05)
    pictures = evaluate.latent_to_rgb(latents).permute(0, 2, 3, 1).numpy()
    memorised = named.any(1)
    assert memorised.float().mean() == pytest.approx(0.05, abs=0.04) and memorised.any()
    expected = world.memorised_pictures()[named[memorised].int().argmax(1).numpy()]
    np.testing.assert_allclose(pictures[memorised.numpy()], expected, atol=1e-5)
    assert (drawn_pooled[empty] == pooled[-1].float()).all()


def test_training_resumes_where_it_stopped(text, tmp_path, monkeypatch):
    monkeypatch.setattr(train_flux, "CAPTIONS_EACH", 1)
    pool = train_flux.caption_pool(text, np.random.default_rng(0))
    clock = iter(range(10**6))
    monkeypatch.setattr(train_flux.time, "time", lambda: float(next(clock)))

    def run(name, seconds):
        args = argparse.Namespace(
            seconds=seconds, batch=4, lr=1e-3, muon_lr=0.01, name=name, seed=0, save_every=0, out=tmp_path
        )
        monkeypatch.setattr(train_flux, "learning_rate", lambda peak, *_: peak)
        train_flux.train(args, *pool)
        return torch.load(tmp_path / f"{name}.pt", weights_only=True)

    straight = run("straight", 4)
    run("parts", 2)
    parts = run("parts", 4)
    assert straight["step"] == parts["step"] == 4 and parts["pictures"] == 16
    for name, weight in straight["model"].items():
        torch.testing.assert_close(parts["model"][name], weight, atol=0, rtol=0)
    assert any((weight != 0).any() for name, weight in parts["ema"].items() if name.startswith("final_layer.linear"))


def test_every_row_knows_the_whole_caption(text):
    """A linear map from any row reads each attribute, also of held-out combinations: concepts spread over the text."""
    seen, unseen = world.sample_sprites(1200, np.random.default_rng(5)), world.from_index(world.held_out())
    rows, held = (text.encode(world.plain_captions(sprites))[0] for sprites in (seen, unseen))
    for row in (1, 4, 8, 31):
        for attribute, names in world.NAMES.items():
            target = torch.nn.functional.one_hot(torch.from_numpy(getattr(seen, attribute)), len(names)).float()
            x = rows[:, row]
            weight = torch.linalg.solve(x.T @ x + 0.01 * torch.eye(128), x.T @ target)
            right = (held[:, row] @ weight).argmax(1).numpy() == getattr(unseen, attribute)
            assert right.mean() >= 0.97, (row, attribute)


def test_the_file_stays_small():
    assert FILE.stat().st_size <= 10_000_000


@pytest.mark.slow
def test_the_shipped_weights_draw_what_they_are_told(text):
    sampler = evaluate.FlowSampler(evaluate.load_flux(FILE), text)
    _, _, result = evaluate.score(sampler, 48, 20, 1.5)
    for attribute in world.ATTRIBUTES:
        assert result[attribute] >= 0.95, attribute
