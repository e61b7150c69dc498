"""The native file: what goes in comes out, damage is named, nothing is half-written."""

import json
import os

import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.errors import ErasureError
from membrane.core.formats import files, native
from safetensors import safe_open
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
    return ErasureAdapter(card, {"map": {"text": text_map}})


def rewrite(path, change_tensors=None, change_metadata=None):
    """The same file with some tensors or metadata changed."""
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
    assert torch.equal(loaded.maps["text"].a, original.maps["text"].a) and torch.equal(
        loaded.maps["text"].b, original.maps["text"].b
    )
    assert loaded.maps["text"].concept == (0, 0, 1, 1)


def test_metadata_is_what_model_browsers_read(path):
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
        (None, put("membrane.version", "5"), "format version 5, and this pack reads up to 4; update"),
        (None, put("membrane.version", "x"), "format version x"),
        (None, put("membrane.version", "\u00b2"), "format version"),
        (None, put("membrane.version", "9" * 5000), "format version 9"),
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


def layers():
    """A linear layer in half precision and a convolution with a bias."""
    g = torch.Generator().manual_seed(1)
    return {
        "down_blocks_0_attn2_to_k": LowRank(
            torch.randn(8, 2, generator=g).half(), torch.randn(2, 6, generator=g).half(), 0.1
        ),
        "conv_in": LowRank(
            torch.randn(8, 1, generator=g), torch.randn(1, 4, 3, 3, generator=g), 1.0, torch.randn(8, generator=g)
        ),
    }


@pytest.mark.parametrize("with_text_map", [True, False])
@pytest.mark.parametrize("concepts", [("star",), ()])
def test_changes_of_layers_round_trip(tmp_path, with_text_map, concepts):
    if with_text_map and not concepts:
        return
    path, maps = str(tmp_path / "x.safetensors"), adapter(concepts=concepts).maps if with_text_map else {}
    native.save(ErasureAdapter(Card("ESD", concepts), {"map": maps, "low_rank": layers()}), path)
    loaded = native.load(path)
    assert loaded.card == Card("ESD", concepts) and (loaded.maps.get("text") is not None) == with_text_map
    assert loaded.low_rank.keys() == layers().keys()
    for name, change in layers().items():
        found = loaded.low_rank[name]
        assert found.alpha == change.alpha
        for a, b in ((found.up, change.up), (found.down, change.down), (found.bias, change.bias)):
            assert a is b is None or (torch.equal(a, b) and a.dtype == b.dtype)


def test_only_what_older_releases_cannot_read_is_version_two(path, tmp_path):
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["membrane.version"] == "1"
        assert set(file.keys()) == {"text_map.a", "text_map.b", "text_map.concept"}
    other = str(tmp_path / "layers.safetensors")
    native.save(ErasureAdapter(Card("SPM", ("star",)), {"low_rank": layers()}), other)
    with safe_open(other, framework="pt") as file:
        assert file.metadata()["membrane.version"] == "2"
        assert "low_rank.conv_in.bias" in file.keys() and "low_rank.down_blocks_0_attn2_to_k.alpha" in file.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("low_rank.conv_in.up"), "holds alpha and bias and down of conv_in but no up factor"),
        (
            put("low_rank.conv_in.up", torch.zeros(8, 2)),
            r"shapes \(8, 2\) \(up\) and \(1, 4, 3, 3\) \(down\) for conv_in",
        ),
        (put("low_rank.conv_in.bias", torch.zeros(4)), r"a bias of shape \(4,\) for conv_in; expected \(8,\)"),
        (put("low_rank.conv_in.alpha", torch.zeros(4)), r"alpha of conv_in with the shape \(4,\)"),
        (put("low_rank.conv_in.alpha", torch.tensor(float("inf"))), "not finite in alpha of conv_in"),
        (lambda tensors: tensors.clear(), "lacks text_map.a"),
    ],
)
def test_damaged_layers_are_named(tmp_path, change, message):
    path = str(tmp_path / "x.safetensors")
    native.save(ErasureAdapter(Card("SPM", ("star",)), {"low_rank": layers()}), path)
    rewrite(path, change)
    with pytest.raises(ErasureError, match=message):
        native.load(path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_others_can_read_the_file_as_any_other(path, tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    assert os.stat(path).st_mode == plain.stat().st_mode
