"""The LoRA file: W A B to the stored digits, with the names and metadata that loaders and browsers read."""

import os

import pytest
import torch
from membrane.core import files
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.text_map import TextMap, compact, layer_factors
from membrane.core.formats import kohya
from safetensors import safe_open
from safetensors.torch import load_file

D = 24
NAMES = {f"key.{i}": f"lora_unet_down_blocks_{i}_attentions_0_transformer_blocks_0_attn2_to_k" for i in range(3)}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapter(terms=4, repeats=1, scale=1.0):
    """Terms of two concepts; repeats: each is there so many times."""
    a = randn(D, terms).repeat(1, repeats).float() * scale
    b = randn(terms, D, seed=1).repeat(repeats, 1).float() / scale
    card = Card("UCE", ("star", "heart, red"), ("circle", "x"), "SDXL", "abcd", {"anchor": 0.5}, "MIT")
    return ErasureAdapter(card, {"map": {"text": TextMap(a, b, tuple(i % 2 for i in range(terms * repeats)))}})


def weights():
    """Layers wider and narrower than the rank."""
    return {key: randn(out, D, seed=i).float() for i, (key, out) in enumerate(zip(NAMES, (32, 10, 2)))}


def saved(tmp_path, *args, layers=None, **kwargs):
    path = str(tmp_path / "star.safetensors")
    made = adapter(*args, **kwargs)
    layers = layers or weights()
    kohya.save(made, {"text": layers.items()}, path, NAMES)
    return load_file(path), made, layers


def delta(tensors, name):
    """What the stock loaders add at strength 1."""
    up, down = (tensors[f"{name}.lora_{kind}.weight"].double() for kind in ("up", "down"))
    return tensors[f"{name}.alpha"].item() / len(down) * up @ down


def expected(made, weight):
    return weight.double() @ made.maps["text"].a.double() @ made.maps["text"].b.double()


@pytest.mark.parametrize("scale", [1.0, 1e6])
@pytest.mark.parametrize(("terms", "repeats", "rank"), [(4, 1, 4), (4, 9, 4), (40, 1, D), (1, 1, 1)])
def test_compact_keeps_the_map_and_drops_what_repeats(terms, repeats, rank, scale):
    text_map = adapter(terms, repeats, scale).maps["text"]
    a, b = compact(text_map.a, text_map.b)
    whole = text_map.a.double() @ text_map.b.double()
    assert a.shape == (D, rank) and b.shape == (rank, D)
    assert (a @ b - whole).norm() < 1e-6 * whole.norm()
    assert torch.allclose(b @ b.T, torch.eye(rank, dtype=torch.float64))


@pytest.mark.parametrize("out", [2, 4, 32])
def test_factors_are_exact_and_no_larger_than_the_layer(out):
    text_map, weight = adapter(6).maps["text"], randn(out, D)
    up, down = layer_factors(weight, *compact(text_map.a, text_map.b))
    whole = weight @ text_map.a.double() @ text_map.b.double()
    assert up.shape[1] == len(down) <= min(out, 6)
    assert (up @ down - whole).norm() < 1e-6 * whole.norm()


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("terms", [1, 4, 40])
def test_the_file_holds_the_erasure(tmp_path, terms, scale):
    tensors, made, layers = saved(tmp_path, terms, 1, scale)
    assert set(tensors) == {
        f"{name}.{part}" for name in NAMES.values() for part in ("lora_up.weight", "lora_down.weight", "alpha")
    }
    for key, weight in layers.items():
        whole = expected(made, weight)
        assert tensors[f"{NAMES[key]}.lora_up.weight"].dtype == torch.float16
        assert (delta(tensors, NAMES[key]) - whole).norm() <= 1e-3 * whole.norm()


def test_float32_where_half_precision_is_not_enough(tmp_path):
    layers = weights()
    key = next(iter(layers))
    layers[key] = layers[key] * 1e12  # beyond float16
    tensors, made, _ = saved(tmp_path, layers=layers)
    assert tensors[f"{NAMES[key]}.lora_up.weight"].dtype == torch.float32
    whole = expected(made, layers[key])
    assert (delta(tensors, NAMES[key]) - whole).norm() <= 1e-6 * whole.norm()
    assert tensors[f"{NAMES['key.1']}.lora_up.weight"].dtype == torch.float16


def test_a_map_that_does_nothing(tmp_path):
    text_map = TextMap(torch.zeros(D, 2), torch.zeros(2, D), (0, 0))
    path = str(tmp_path / "nothing.safetensors")
    kohya.save(
        ErasureAdapter(Card("UCE", ("star",)), {"map": {"text": text_map}}), {"text": weights().items()}, path, NAMES
    )
    tensors = load_file(path)
    assert all(torch.isfinite(t).all() for t in tensors.values())
    assert not any(delta(tensors, name).any() for name in NAMES.values())


@pytest.mark.parametrize(
    ("family", "version", "architecture"),
    [
        ("SD15", "sd_v1", "stable-diffusion-v1/lora"),
        ("SD20", "sd_v2", "stable-diffusion-v2-512/lora"),
        ("SDXL", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
        ("", "", "unknown/lora"),
    ],
)
def test_metadata(tmp_path, family, version, architecture):
    made = adapter()
    path = str(tmp_path / "star.safetensors")
    card = Card(made.card.method, made.card.concepts, family=family)
    kohya.save(ErasureAdapter(card, {"map": {"text": made.maps["text"]}}), {"text": weights().items()}, path, NAMES)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == version and metadata["modelspec.architecture"] == architecture
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "4"
    assert metadata["modelspec.title"] == "erases star, heart, red"
    assert metadata["membrane.method"] == "UCE" and metadata["membrane.concepts"] == '["star", "heart, red"]'


@pytest.mark.parametrize("when", ["writing", "computing"])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, when):
    path = tmp_path / "star.safetensors"
    path.write_bytes(b"old")

    def full_disk(tensors, name, metadata):
        open(name, "wb").write(b"half")
        raise OSError("No space left on device")

    def interrupted():
        yield "key.0", torch.ones(4, D)
        raise OSError("No space left on device")

    if when == "writing":
        monkeypatch.setattr(files, "save_file", full_disk)
    layers = weights().items() if when == "writing" else interrupted()
    with pytest.raises(OSError, match="No space"):
        kohya.save(adapter(), {"text": layers}, str(path), NAMES)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["star.safetensors"]
