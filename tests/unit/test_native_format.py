"""The native file: what goes in comes out, damage is named, nothing is half-written."""

import json
import os
import zlib
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from membrane.core import files
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.delta import KINDS, Delta, register
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.adapters.deltas.mask import Mask
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.errors import ErasureError
from membrane.core.formats import native
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


# ---------------------------------------------------------------- versions


def version_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()["membrane.version"]


def metadata(version, concepts='["star"]'):
    return {"membrane.format": "erasure_adapter", "membrane.version": version, "membrane.concepts": concepts}


A, B = torch.tensor([[1.0], [2.0], [0.0]]), torch.tensor([[0.5, 0.0, -1.0]])
OWNER = torch.tensor([0], dtype=torch.int32)


def test_a_file_of_version_one_as_the_first_release_wrote_it(tmp_path):
    path = str(tmp_path / "1.safetensors")
    more = {"membrane.method": "UCE", "membrane.family": "SD15", "membrane.text_encoder": "ab"}
    save_file({"text_map.a": A, "text_map.b": B, "text_map.concept": OWNER}, path, metadata("1") | more)
    found = native.load(path)
    assert found.card == Card("UCE", ("star",), family="SD15", text_encoder="ab")
    assert list(found.maps) == ["text"] and not found.of_layers
    assert torch.equal(found.maps["text"].a, A) and torch.equal(found.maps["text"].b, B)
    assert found.maps["text"].concept == (0,) and not found.maps["text"].normed


def test_a_file_of_version_two(tmp_path):
    path = str(tmp_path / "2.safetensors")
    tensors = {
        "pooled_map.a": A, "pooled_map.b": B, "pooled_map.concept": OWNER, "low_rank.conv_in.up": torch.ones(4, 2),
        "low_rank.conv_in.down": torch.ones(2, 3), "low_rank.conv_in.alpha": torch.tensor(0.5, dtype=torch.float64),
        "low_rank.conv_in.bias": torch.full((4,), 3.0),
    }  # fmt: skip
    save_file(tensors, path, metadata("2"))
    found = native.load(path)
    assert list(found.maps) == ["pooled"] and torch.equal(found.maps["pooled"].a, A)
    assert list(found.low_rank) == ["conv_in"] and not found.masks
    change = found.low_rank["conv_in"]
    assert (change.rank, change.alpha, change.scale) == (2, 0.5, 0.25)
    assert torch.equal(change.bias, torch.full((4,), 3.0)) and torch.equal(change.up, torch.ones(4, 2))


def test_a_file_of_version_three(tmp_path):
    path = str(tmp_path / "3.safetensors")
    bits = zlib.compress(bytes([0b01000000, 0, 0b00100000]))  # a byte for each of the three inputs
    tensors = {
        "mask.conv_in.bits": torch.frombuffer(bytearray(bits), dtype=torch.uint8),
        "mask.conv_in.shape": torch.tensor([3, 3]),
    }
    save_file(tensors, path, metadata("3", "[]"))
    found = native.load(path)
    assert found.card.concepts == () and list(found.masks) == ["conv_in"] and not found.maps and not found.low_rank
    weight = torch.arange(1.0, 10.0).view(3, 3)
    expected = weight.clone()
    expected[1, 0] = expected[2, 2] = 0.0
    changed = weight + found.masks["conv_in"].difference(weight)
    assert torch.equal(changed, expected)


def entry_map(entry, terms=2, normed=False):
    g = torch.Generator().manual_seed(len(entry))
    return TextMap(torch.randn(6, terms, generator=g), torch.randn(terms, 6, generator=g), (0,) * terms, normed)


def test_maps_by_entry_round_trip_as_version_four(tmp_path):
    path = str(tmp_path / "x.safetensors")
    maps = {"text": entry_map("text"), "llama.3": entry_map("llama.3", 1), "t5": entry_map("t5", 3, normed=True)}
    native.save(ErasureAdapter(Card("UCE", ("star",)), {"map": maps, "low_rank": layers()}), path)
    with safe_open(path, framework="pt") as file:
        keys = {key for key in file.keys() if key.startswith("map.")}
    assert version_of(path) == "4"
    assert keys == {f"map.{entry}.{part}" for entry in maps for part in ("a", "b", "concept")} | {"map.t5.normed"}
    found = native.load(path)
    assert found.maps.keys() == maps.keys() and found.low_rank.keys() == layers().keys()
    for entry, expected in maps.items():
        one = found.maps[entry]
        assert torch.equal(one.a, expected.a) and torch.equal(one.b, expected.b)
        assert (one.concept, one.normed) == (expected.concept, entry == "t5")


MASKS = {"conv_in": Mask.of(torch.eye(3, 4).bool())}


@pytest.mark.parametrize(
    ("deltas", "version"),
    [
        ({"map": {"text": entry_map("text")}}, "1"),
        ({"map": {"text": entry_map("text"), "pooled": entry_map("pooled")}}, "2"),
        ({"map": {"pooled": entry_map("pooled")}}, "2"),
        ({"low_rank": layers()}, "2"),
        ({"map": {"text": entry_map("text")}, "low_rank": layers()}, "2"),
        ({"map": {"text": entry_map("text")}, "low_rank": layers(), "mask": MASKS}, "3"),
        ({"mask": MASKS}, "3"),
        ({"map": {"text": entry_map("text", normed=True)}}, "4"),
        ({"map": {"clip": entry_map("clip")}}, "4"),
    ],
)
def test_the_oldest_version_that_can_hold_it(tmp_path, deltas, version):
    path = str(tmp_path / "x.safetensors")
    native.save(ErasureAdapter(Card("UCE", ("star",)), deltas), path)
    assert version_of(path) == version
    with safe_open(path, framework="pt") as file:
        assert (version == "4") == any(key.startswith("map.") for key in file.keys())
    found = native.load(path).deltas
    assert {kind: set(places) for kind, places in found.items()} == {k: set(v) for k, v in deltas.items()}


@pytest.fixture
def kronecker():
    """A kind of delta that the pack does not have: W -> W + left x right (Kronecker)."""

    @register
    @dataclass(frozen=True, eq=False)
    class Kronecker(Delta):
        kind: ClassVar[str] = "kronecker"
        left: torch.Tensor
        right: torch.Tensor

        @property
        def shape(self):
            return tuple(x * y for x, y in zip(self.left.shape, self.right.shape))

        def difference(self, weight, strength=1.0):
            return torch.kron(self.left, self.right) * strength

        def parts(self):
            return {"left": self.left, "right": self.right}

        @classmethod
        def of_parts(cls, parts):
            if parts["left"].dim() != 2:
                raise ErasureError("its left factor is no matrix")
            return cls(parts["left"], parts["right"])

    yield Kronecker
    del KINDS["kronecker"]


@pytest.fixture
def toy(tmp_path, kronecker):
    """A file with a change of the toy kind, at a site with a dot, beside a text map."""
    path = str(tmp_path / "toy.safetensors")
    change = kronecker(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]))
    deltas = {"map": {"text": entry_map("text")}, "kronecker": {"blocks.0": change, "conv_in": change}}
    native.save(ErasureAdapter(Card("LoKr", ("star",)), deltas), path)
    return path


def test_another_kind_of_delta_round_trips(toy):
    assert version_of(toy) == "4"
    found = native.load(toy)
    assert set(found.deltas) == {"map", "kronecker"} and set(found.deltas["kronecker"]) == {"blocks.0", "conv_in"}
    change = found.deltas["kronecker"]["blocks.0"]
    assert change.difference(torch.zeros(2, 2)).tolist() == [[3.0, 6.0], [4.0, 8.0]]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (drop("kronecker.conv_in.right"), r'"toy.safetensors" holds a change of conv_in \(kronecker\).*right.*damaged'),
        (
            put("kronecker.blocks.0.left", torch.zeros(3)),
            r"change of blocks.0 \(kronecker\) that does not fit together \(its left factor is no matrix\)",
        ),
        (
            put("lokr.conv_in.w1", torch.zeros(3)),
            r"1 tensors of a kind .* \(lokr.conv_in.w1\); update Membrane",
        ),
        (put("kronecker.conv_in.right", torch.full((2, 1), float("nan"))), "not finite in right of conv_in"),
        (drop("map.text.b"), "lacks map.text.b"),
    ],
)
def test_damage_of_another_kind_is_named(toy, tensors, message):
    rewrite(toy, tensors)
    with pytest.raises(ErasureError, match=message):
        native.load(toy)


def test_a_kind_of_a_later_release_is_not_left_out_in_silence(toy):
    kind = KINDS.pop("kronecker")
    try:
        with pytest.raises(ErasureError, match=r"4 tensors of a kind .* \(kronecker.blocks.0.left, .*; update"):
            native.load(toy)
    finally:
        KINDS["kronecker"] = kind


@pytest.mark.parametrize("version", ["1", "2", "3"])
def test_older_files_may_hold_more(path, version):
    """As every release before read them."""
    rewrite(path, put("more", torch.zeros(2)), put("membrane.version", version))
    assert native.load(path).maps["text"].concept == (0, 0, 1, 1)
