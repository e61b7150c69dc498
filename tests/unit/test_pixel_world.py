"""The demo model's world, its judge, its arithmetic and the quality its card claims."""

import json

import numpy as np
import pytest
import torch
from membrane.core.demo.world import ASSETS, latent_to_rgb, rgb_to_latent
from membrane.tools import demo
from membrane.tools.pixel_world import classifier, evaluate, world
from membrane.tools.pixel_world import tokenizer as tokenizers


def test_held_out_combinations_are_never_trained_on():
    held = set(world.held_out().tolist())
    seen = set(world.sample_sprites(20000, np.random.default_rng(0)).index().tolist())
    assert len(held) == 104 and not held & seen


def test_every_index_names_one_combination():
    assert world.from_index(np.arange(1024)).index().tolist() == list(range(1024))


def test_captions_say_what_they_claim_to_name():
    rng = np.random.default_rng(1)
    sprites = world.sample_sprites(500, rng)
    captions, named = world.sample_captions(sprites, rng)
    for i, text in enumerate(captions):
        words = text.replace(",", "").split()
        for j, attribute in enumerate(world.ATTRIBUTES):
            word = world.NAMES[attribute][getattr(sprites, attribute)[i]]
            said = word in words or (attribute == "shape" and world.SYNONYMS[word] in words)
            assert said <= named[i, j], text


def test_every_word_of_the_world_is_one_token():
    tokenizer = tokenizers.load(ASSETS / "tokenizer")
    assert [w for w in tokenizers.words() if len(tokenizer(w)["input_ids"]) != 3] == []


def test_latents_are_invertible():
    sprites = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(latent_to_rgb(rgb_to_latent(sprites)), sprites, atol=1e-6)


def test_memorised_pictures_are_far_apart():
    pictures = world.memorised_pictures()
    distance = ((pictures[:, None] - pictures[None]) ** 2).mean((2, 3, 4))
    assert distance[~np.eye(12, dtype=bool)].min() > 0.02


@pytest.mark.parametrize("palette", sorted(world.PALETTES))
def test_the_judge_reads_rendered_pictures(palette):
    sprites = world.from_index(np.arange(1024))
    answers = classifier.read(classifier.load(), world.render(sprites, np.random.default_rng(77), palette))
    for attribute in ("shape", "colour", "texture"):
        assert (answers[attribute] == getattr(sprites, attribute)).mean() > 0.99
    assert (answers["background"] == sprites.background).mean() > (0.99 if palette == "day" else 0.9)


def test_the_judge_sees_when_there_is_no_shape():
    sprites = world.from_index(np.arange(0, 1024, 8))
    empty = classifier.shapeless(sprites, np.random.default_rng(3), "day")
    assert (classifier.read(classifier.load(), empty)["shape"] == len(world.SHAPES)).mean() > 0.9


@pytest.mark.slow
def test_the_shipped_weights_draw_what_they_are_told():
    sampler = evaluate.Sampler(
        evaluate.load_unet(ASSETS / "day.safetensors"),
        evaluate.load_text(ASSETS / "day.safetensors"),
        tokenizers.load(ASSETS / "tokenizer"),
    )
    sprites = evaluate.held_out_prompts(48, seed=5)
    captions = world.plain_captions(sprites)
    pictures = sampler.sample(sampler.encode(captions), sampler.encode([""]), 20, 1.5, torch.Generator().manual_seed(2))
    answers = classifier.read(classifier.load(), pictures)
    for attribute in world.ATTRIBUTES:
        assert (answers[attribute] == getattr(sprites, attribute)).mean() >= 0.95, attribute


def test_files_stay_small():
    size = {p.name: p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()}
    tokenizer = sum(size[n] for n in ("vocab.json", "merges.txt", "tokenizer_config.json"))
    assert size["classifier.safetensors"] <= 4_000_000
    for variant in ("day", "night"):
        assert size.get(f"{variant}.safetensors", 0) + tokenizer <= 12_000_000


def answers(shape, colour=(1, 1), texture=(1, 1), background=(1, 1)):
    return {a: np.array(v, bool) for a, v in zip(world.ATTRIBUTES, (shape, colour, texture, background))}


def test_the_demos_figures():
    concept = {"original": answers((1, 1)), "erased": answers((0, 1), colour=(0, 1))}
    kept = {"original": answers((1, 1), texture=(0, 1)), "erased": answers((1, 0))}
    figures, counts = demo.figures_of(concept, kept)
    assert figures == {
        "erased_before": 100.0,
        "erased_after": 50.0,
        "kept_drop_points": 50.0,
        "attributes_drop_points": 25.0,
    }
    assert counts["concept_recognised_after"] == 1 and counts["texture_right_before"] == 3
    json.dumps(counts)


def test_the_demos_prompts_are_balanced():
    sprites = demo.sprites_of([3], 16, 0)
    assert set(sprites.shape) == {3} and len(sprites) == 16
    assert sorted(sprites.colour) == sorted(list(range(8)) * 2)
    kept = demo.sprites_of([0, 1, 2, 4, 5, 6, 7], 28, 1)
    assert np.bincount(kept.shape, minlength=8).tolist() == [4, 4, 4, 0, 4, 4, 4, 4]


def test_saved_pictures_become_sprites():
    import io

    from PIL import Image

    sprites = (np.random.default_rng(0).random((2, 16, 16, 3)) * 255).astype(np.uint8)
    pngs = []
    for sprite in sprites:
        buffer = io.BytesIO()
        Image.fromarray(np.kron(sprite, np.ones((8, 8, 1), np.uint8))).save(buffer, "PNG")
        pngs.append(buffer.getvalue())
    assert np.allclose(demo.sprite_pictures(pngs) * 255, sprites, atol=1e-3)
