"""The arithmetic of the shield alone."""

import pytest
import torch
from membrane.core.erasers.shield import fitted, frames, held_back, likeness, patterns, without


@pytest.fixture
def pictures():
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_likeness_is_the_correlation_and_blind_to_contrast_and_colour_cast(pictures):
    known = patterns(pictures)
    cast = torch.tensor([2.0, -1.0, 0.5, 3.0]).view(1, 4, 1, 1)
    assert torch.allclose(likeness(pictures * 3 + cast, known).diagonal(), torch.ones(3), atol=1e-5)
    assert torch.allclose(likeness(-pictures, known).diagonal(), -torch.ones(3), atol=1e-5)
    a, b = (p.double() - p.double().mean(dim=(1, 2), keepdim=True) for p in (pictures[0], pictures[1]))
    expected = float((a * b).sum() / (a.norm() * b.norm()))
    assert abs(float(likeness(pictures[:1], known)[0, 1]) - expected) < 1e-6 and abs(expected) < 0.3


def test_a_blank_picture_resembles_nothing(pictures):
    known = patterns(torch.full((1, 4, 8, 8), 0.7))
    assert (likeness(pictures, known).abs() < 1e-5).all()
    assert (likeness(torch.zeros(1, 4, 8, 8), patterns(pictures)) == 0).all()


def test_a_pattern_is_taken_out_whole(pictures):
    known, near = patterns(pictures), pictures + 0.5 * torch.flip(pictures, (3,))
    rest = without(near, known)
    assert (likeness(near, known).diagonal() > 0.7).all()
    assert (likeness(rest, known).diagonal().abs() < 1e-5).all()
    assert torch.allclose(rest.mean(dim=(2, 3)), near.mean(dim=(2, 3)), atol=1e-5)  # its colours stay


def test_the_negative_side_is_followed_where_there_is_one(pictures):
    known, negative = patterns(pictures), torch.flip(pictures, (0,))
    assert torch.allclose(held_back(pictures, negative, known, 1.0), negative, atol=1e-6)
    negative[1] = 0  # hosts that leave the negative side out say so with zeros
    found = held_back(pictures, negative, known, 1.0)
    assert torch.allclose(found[0], negative[0], atol=1e-6)
    assert torch.allclose(found[1], without(pictures, known)[1], atol=1e-6)
    assert torch.allclose(held_back(pictures, None, known, 1.0), without(pictures, known), atol=1e-6)
    half = held_back(pictures, None, known, 0.5)
    assert torch.allclose(half, (pictures + without(pictures, known)) / 2, atol=1e-6)
    assert torch.equal(held_back(pictures, None, known, 0.0), pictures)


def test_pictures_of_another_size_cover_it_and_are_cut_at_the_middle():
    picture = torch.arange(8.0).expand(1, 1, 4, 8)
    assert fitted(picture, (4, 8)) is picture
    assert torch.equal(fitted(picture, (4, 4)), picture[..., 2:6])
    assert fitted(picture, (7, 5)).shape == (1, 1, 7, 5) and fitted(picture, (3, 16)).shape == (1, 1, 3, 16)
    enlarged = fitted(picture, (8, 8))
    assert abs(float(enlarged.mean()) - 3.5) < 1e-5 and enlarged.min() > 1.5


def test_every_frame_of_a_video_is_a_picture():
    video = torch.randn(2, 4, 3, 5, 6)
    found = frames(video)
    assert found.shape == (6, 4, 5, 6) and torch.equal(found[4], video[1, :, 1])
    assert frames(found) is found
