"""The host that the tests of this folder run in."""

from pathlib import Path

import folder_paths
import pytest


def test_folders_are_temporary(host):
    assert Path(folder_paths.get_output_directory()).parent == host.work
    for kind in ("checkpoints", "loras", "custom_nodes"):
        assert all(Path(folder).is_relative_to(host.work) for folder in folder_paths.get_folder_paths(kind))


def test_node_fills_in_widget_defaults(node):
    (image,) = node("EmptyImage", width=16, height=8)
    assert tuple(image.shape) == (1, 8, 16, 3)


def test_node_runs_extra_nodes(node):
    (image,) = node("EmptyImage", width=16, height=16)
    (scaled,) = node("ImageScaleToTotalPixels", image=image, megapixels=0.01, upscale_method="bilinear")[:1]
    assert scaled.shape[-1] == 3
    assert scaled.shape[1] > 16


def test_node_returns_what_a_node_shows(node, host):
    (image,) = node("EmptyImage", width=16, height=16)
    outputs = node("SaveImage", images=image, filename_prefix="bootstrap")
    assert len(outputs.ui["images"]) == 1
    assert list((host.work / "output").glob("bootstrap*.png"))


def test_unknown_node_is_named(node):
    with pytest.raises(LookupError, match="NoSuchNode"):
        node("NoSuchNode")
