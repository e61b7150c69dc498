"""The native file: what goes in comes out, damage is named, nothing is half-written."""

import json
import os

import pytest
import torch
from membrane.core.adapter import Card, ErasureAdapter, TextMap
from membrane.core.errors import ErasureError
from membrane.core.formats import files, native
from safetensors.torch import load_file, save_file


def adapter(width=16, concepts=("star", "heart, red")):
    g = torch.Generator().manual_seed(0)
    terms = 2 * len(concepts)
    text_map = TextMap(
        torch.randn(width, terms, generator=g),
        torch.randn(terms, width, generator=g),
        tuple(i // 2 for i in range(terms)),
    )
    card = Card(
        "UCE", tuple(concepts), tuple("x" * len(concepts)), "SD15", "abcd", {"anchor": 0.5, "templates": ["{}"]}
    )
    return ErasureAdapter(card, text_map)


def rewrite(path, change_tensors=None, change_metadata=None):
    """The same file with some tensors or metadata changed."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    if change_tensors:
        change_tensors(tensors)
    if change_metadata:
        change_metadata(metadata)
    save_file(tensors, path, metadata)


@pytest.fixture
def path(tmp_path):
    path = str(tmp_path / "star.safetensors")
    native.save(adapter(), path)
    return path


def test_round_trip(path):
    original, loaded = adapter(), native.load(path)
    assert loaded.card == original.card
    assert loaded.name == "star.safetensors"
    assert torch.equal(loaded.text_map.a, original.text_map.a) and torch.equal(loaded.text_map.b, original.text_map.b)
    assert loaded.text_map.concept == (0, 0, 1, 1)


def test_metadata_is_what_model_browsers_read(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert all(isinstance(v, str) for v in metadata.values())
    assert metadata["modelspec.title"] == "erases star, heart, red"
    assert json.loads(metadata["membrane.concepts"]) == ["star", "heart, red"]


def test_a_failed_save_leaves_the_old_file(path, monkeypatch):
    before = open(path, "rb").read()

    def full_disk(tensors, name, metadata):
        open(name, "wb").write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        native.save(adapter(), path)
    assert open(path, "rb").read() == before
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]


def drop(key):
    return lambda mapping: mapping.pop(key)


def put(key, value):
    return lambda mapping: mapping.update({key: value})


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (None, drop("membrane.format"), "is not a Membrane erasure adapter"),
        (None, put("membrane.version", "2"), "format version 2, and this pack reads up to 1; update"),
        (None, put("membrane.version", "x"), "format version x"),
        (None, put("membrane.concepts", "[oops"), "damaged description"),
        (None, put("membrane.concepts", "[]"), "names no concepts"),
        (None, put("membrane.concepts", '["a"]'), "names 1 concepts"),
        (drop("text_map.b"), None, "lacks text_map.b"),
        (put("text_map.a", torch.zeros(16, 3)), None, "factors of shapes"),
        (put("text_map.a", torch.full((16, 4), float("nan"))), None, "not finite"),
        (put("text_map.a", torch.zeros(16, 4, dtype=torch.int64)), None, "wrong number types"),
        (put("text_map.concept", torch.tensor([0, 0, 1, -1])), None, "terms for concept number"),
    ],
)
def test_damage_is_named(path, tensors, metadata, message):
    rewrite(path, tensors, metadata)
    with pytest.raises(ErasureError, match=message) as caught:
        native.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_other_files_are_refused(tmp_path, content):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(ErasureError, match='"x.safetensors" cannot be read'):
        native.load(str(file))


def test_a_plain_lora_is_refused_by_what_it_holds(tmp_path):
    file = str(tmp_path / "lora.safetensors")
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(4, 1)}, file)
    with pytest.raises(ErasureError, match="it holds lora_unet_x.lora_up.weight"):
        native.load(file)
