"""Known pictures kept out of what is sampled, on both demo models and on latents of videos."""

import logging

import numpy as np
import pytest
import torch
from membrane.benchmarks.memorization_detection import copies
from membrane.core.demo.world import rgb_to_latent
from membrane.core.erasers.shield import likeness, patterns
from membrane.core.errors import ErasureError
from membrane.core.host.patches.shield import Shield
from membrane.core.host.runs.sampling import Sampling, conditioning, decode, sample
from membrane.tools.pixel_world import world
from membrane.tools.tiny import networks

pytestmark = pytest.mark.usefixtures("inference")
SEEDS = [100, 101, 102, 103]
COPIED = (0, 5)


@pytest.fixture(scope="module")
def demo(either):
    return either[0]


@pytest.fixture(scope="module")
def known(demo):
    """The memorised pictures as the pictures that a node gets, (12, 128, 128, 3)."""
    return torch.from_numpy(world.memorised_pictures()).repeat_interleave(8, 1).repeat_interleave(8, 2)


@pytest.fixture(scope="module")
def shielded(node, demo, known):
    return lambda **inputs: node(
        "MembraneShield", **{"model": demo[0], "pictures": known, "vae": demo[2], **inputs}
    )[0]  # fmt: skip


def draw(model, demo, caption, cfg=1.5, steps=12):
    settings = Sampling(steps, cfg, "euler", "normal", 128, 128)
    return sample(model, conditioning(demo[1], caption), conditioning(demo[1], ""), SEEDS, settings)


def sprites(demo, latents):
    return decode(demo[2], latents)[:, 4::8, 4::8].numpy()


def alike(demo, latents, number):
    """Likeness (n,) of latents with a memorised picture."""
    own = rgb_to_latent(torch.from_numpy(world.memorised_pictures()[number])[None].permute(0, 3, 1, 2))
    return likeness(demo[0].model.process_latent_in(latents), patterns(own))[:, 0]


def test_memorised_pictures_are_held_back_and_others_stay_bit_by_bit(demo, shielded):
    model = shielded()
    for number in COPIED:
        caption, own = world.MEMORISED_CAPTIONS[number], np.full(len(SEEDS), number)
        before, after = draw(demo[0], demo, caption), draw(model, demo, caption)
        assert copies(sprites(demo, before), own).sum() >= 3 and (alike(demo, before, number) > 0.9).sum() >= 3
        assert not copies(sprites(demo, after), own).any()
        assert (alike(demo, after, number) < 0.7).all()
        assert torch.equal(draw(demo[0], demo, caption), before)  # the model that came in
    for caption in ("a red star on snow", "a striped blue heart on sand"):
        assert torch.equal(draw(model, demo, caption), draw(demo[0], demo, caption))


def test_latents_and_pictures_protect_alike(node, demo, shielded, known):
    latents = node("VAEEncode", pixels=known[:1], vae=demo[2])[0]
    caption = world.MEMORISED_CAPTIONS[0]
    by_latents = draw(shielded(pictures=None, vae=None, latents=latents), demo, caption, steps=4)
    by_pictures = draw(shielded(pictures=known[:1]), demo, caption, steps=4)
    assert torch.allclose(by_latents, by_pictures, atol=1e-3)
    assert not torch.allclose(by_latents, draw(demo[0], demo, caption, steps=4), atol=0.1)
    both = draw(shielded(pictures=known[1:], latents=latents), demo, caption, steps=4)
    assert torch.allclose(both, by_pictures, atol=1e-3)


def test_a_picture_of_another_size_protects_too(demo, shielded, known):
    caption, larger = world.MEMORISED_CAPTIONS[0], known[:1].repeat_interleave(2, 1).repeat_interleave(2, 2)
    after = draw(shielded(pictures=larger), demo, caption)
    assert not copies(sprites(demo, after), np.zeros(len(SEEDS), int)).any()


def test_it_holds_without_a_negative_side(demo, shielded):
    caption = world.MEMORISED_CAPTIONS[0]
    before, after = (draw(model, demo, caption, cfg=1.0) for model in (demo[0], shielded()))
    assert (alike(demo, before, 0) > 0.9).sum() >= 3
    assert (alike(demo, after, 0) < 0.7).all()
    assert after.isfinite().all() and after.abs().max() > 0.1


def test_strength_0_is_no_node_and_half_is_between(demo, shielded):
    assert shielded(strength=0.0) is demo[0]
    caption = world.MEMORISED_CAPTIONS[0]
    none, half, whole = (draw(model, demo, caption, steps=1) for model in (demo[0], shielded(strength=0.5), shielded()))
    assert torch.allclose(half, (none + whole) / 2, atol=1e-3) and not torch.allclose(none, whole, atol=0.1)


def test_users_mistakes(demo, node, shielded, known):
    with pytest.raises(ErasureError, match="No picture to protect was given"):
        shielded(pictures=None)
    with pytest.raises(ErasureError, match="without a VAE"):
        shielded(vae=None)
    with pytest.raises(ErasureError, match=r"\(1, 16, 8, 8\), but .* 4 channels; encode them with the VAE"):
        shielded(pictures=None, latents={"samples": torch.zeros(1, 16, 8, 8)})
    with pytest.raises(ErasureError, match='no radius "far"'):
        shielded(radius="far")


def test_frames_rows_and_types_are_separate(caplog):
    g = torch.Generator().manual_seed(0)
    picture, others = torch.randn(1, 4, 6, 6, generator=g), torch.randn(2, 4, 3, 6, 6, generator=g)
    video = others.clone()
    video[1, :, 2] = picture[0] * 2 + video[1, :, 2] / 2
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = Shield([picture], 0.6, 1.0)({"denoised": video.to(dtype), "uncond_denoised": None})
        same = found == video.to(dtype)
        assert found.dtype == dtype and same[0].all() and same[1, :, :2].all() and not same[1, :, 2].all()
        assert abs(float(likeness(found[1:, :, 2], patterns(picture)))) < 0.02
    with caplog.at_level(logging.WARNING):
        audio = torch.randn(1, 8, 100, generator=g)
        one = Shield([picture], 0.6, 1.0)
        assert one({"denoised": audio, "uncond_denoised": None}) is audio
        one({"denoised": audio, "uncond_denoised": None})
    assert caplog.text.count("leaves latents of the shape") == 1


@pytest.mark.parametrize("name", ["flux_dev", "wan21"])
def test_other_families(name, node):
    try:
        model = networks.build(name)
    except networks.NotInThisHost as error:
        pytest.skip(str(error))
    clip, settings = networks.text_encoder(name), Sampling(2, 2.0, "euler", "normal", 64, 64)

    def drawn(model):
        return sample(model, conditioning(clip, "a red star"), conditioning(clip, ""), [0, 1], settings)

    plain = drawn(model)
    found = drawn(node("MembraneShield", model=model, latents={"samples": plain[:1]}, threshold=0.5)[0])
    assert found.shape == plain.shape and not torch.allclose(found[0], plain[0], atol=1e-3)
    far = {"samples": torch.randn(plain.shape, generator=torch.Generator().manual_seed(99))}  # no noise of the pictures
    assert torch.equal(drawn(node("MembraneShield", model=model, latents=far)[0]), plain)
