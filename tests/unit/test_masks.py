"""Masks: W -> W * (1 - s (1 - kept)) at marked weights; packed, saved, exported, and in a plan."""

import zlib
from dataclasses import replace

import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.delta import OPEN
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.adapters.deltas.mask import Mask
from membrane.core.adapters.permeability import OFF, Permeability
from membrane.core.adapters.plan import make_plan
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.errors import ErasureError
from membrane.core.formats import kohya, native
from safetensors.torch import load_file, save_file

SITES = ("down_0_ff_net_2", "mid_ff_net_2")


def marks_of(out=10, inside=21, seed=0, share=0.1):
    return torch.rand(out, inside, generator=torch.Generator().manual_seed(seed)) < share


def adapter(kept=False):
    g = torch.Generator().manual_seed(5)
    masks = {
        site: Mask.of(marks_of(10 + i, 21, i), torch.rand(10 + i, 21, generator=g) if kept else None)
        for i, site in enumerate(SITES)
    }
    return ErasureAdapter(Card("ConceptPrune", ("star",), family="SD15"), {"mask": masks})


@pytest.mark.parametrize("shape", [(1, 1), (8, 3), (9, 16), (320, 1280)])
def test_bits_hold_what_was_marked(shape):
    marks = marks_of(*shape)
    mask = Mask.of(marks)
    assert torch.equal(mask.marks(), marks)
    assert mask.marked == marks.sum() and mask.density == pytest.approx(marks.double().mean().item())
    assert torch.equal(mask.places(), marks.flatten().nonzero().flatten())
    assert mask.bits.numel() == shape[1] * -(-shape[0] // 8)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 1.5, -1.0])
@pytest.mark.parametrize("has_kept", [False, True])
def test_difference_is_the_formula(strength, has_kept):
    marks, weight = marks_of(), torch.randn(10, 21, generator=torch.Generator().manual_seed(3))
    kept = torch.rand(10, 21, generator=torch.Generator().manual_seed(4)) if has_kept else None
    mask = Mask.of(marks, kept)
    for i in range(10):
        for j in range(21):
            left = float(kept[i, j]) if has_kept else 0.0
            expected = float(weight[i, j]) * (1 - strength * (1 - left)) if marks[i, j] else float(weight[i, j])
            assert (weight + mask.difference(weight, strength))[i, j].item() == pytest.approx(expected, abs=1e-6)
    if strength == 1.0 and not has_kept:
        assert (weight + mask.difference(weight))[marks].eq(0).all()


@pytest.mark.parametrize("kept", [False, True])
def test_file_round_trip(tmp_path, kept):
    original, path = adapter(kept), str(tmp_path / "mask.safetensors")
    native.save(original, path)
    loaded = native.load(path)
    assert loaded.card == original.card and list(loaded.masks) == list(SITES)
    for site, mask in original.masks.items():
        assert torch.equal(loaded.masks[site].marks(), mask.marks())
        if kept:
            assert (loaded.masks[site].kept.float() - mask.kept).abs().max() < 1e-3
        else:
            assert loaded.masks[site].kept is None


def test_a_layer_as_sparse_as_published_takes_a_fiftieth_of_its_weights(tmp_path):
    columns = torch.rand(5120, generator=torch.Generator().manual_seed(1)) < 0.2  # neurons more active on the target
    marks = marks_of(1280, 5120, 2, 0.1) & columns
    path = tmp_path / "mask.safetensors"
    native.save(replace(adapter(), deltas={"mask": {"x": Mask.of(marks)}}), str(path))
    assert path.stat().st_size < 1280 * 5120 * 2 / 50


def damage(tmp_path, change):
    path = str(tmp_path / "mask.safetensors")
    native.save(adapter(True), path)
    tensors = load_file(path)
    change(tensors)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    return path


KEY = f"mask.{SITES[0]}"


def bomb(tensors):
    data = zlib.compress(bytes(10_000_000), 9)
    tensors[f"{KEY}.bits"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t.pop(f"{KEY}.bits"), "without its bits"),
        (lambda t: t.pop(f"{KEY}.shape"), "without its shape"),
        (lambda t: t.update({f"{KEY}.shape": torch.tensor([10, 22])}), "more or fewer bits"),
        (lambda t: t.update({f"{KEY}.shape": torch.tensor([2**40, 2**40])}), "of shape"),
        (lambda t: t.update({f"{KEY}.shape": torch.tensor([0, 21])}), "of shape"),
        (lambda t: t.update({f"{KEY}.shape": torch.tensor([10.0, 21.0])}), "wrong type"),
        (lambda t: t.update({f"{KEY}.bits": t[f"{KEY}.bits"][:-9].clone()}), "more or fewer bits"),
        (lambda t: t.update({f"{KEY}.bits": torch.arange(20, dtype=torch.uint8)}), "cannot be unpacked"),
        (bomb, "more or fewer bits"),
        (lambda t: t.update({f"{KEY}.kept": t[f"{KEY}.kept"][1:].clone()}), "does not fit together"),
        (lambda t: t[f"{KEY}.kept"].fill_(float("nan")), "not finite"),
    ],
)
def test_damaged_file_says_what_is_wrong(tmp_path, change, says):
    with pytest.raises(ErasureError, match=says):
        native.load(damage(tmp_path, change))


def test_file_without_masks_keeps_the_version_older_releases_read(tmp_path):
    path = str(tmp_path / "x.safetensors")
    layers = {"x": LowRank(torch.ones(4, 1), torch.ones(1, 4), 1.0)}
    native.save(ErasureAdapter(Card("SPM", ("star",)), {"low_rank": layers}), path)
    assert b'"membrane.version":"2"' in open(path, "rb").read(4000)
    native.save(adapter(), path)
    assert b'"membrane.version":"3"' in open(path, "rb").read(4000)


def test_export_is_the_difference(tmp_path):
    masks, weights = adapter(), {}
    for i, site in enumerate(SITES):
        weights[site] = torch.randn(10 + i, 21, generator=torch.Generator().manual_seed(i)).half().float()
    path = str(tmp_path / "lora.safetensors")
    kohya.save_masks(masks, weights.get, path, {s: f"lora_unet_{s}" for s in SITES})
    tensors = load_file(path)
    assert sorted(tensors) == sorted(f"lora_unet_{s}.diff" for s in SITES)
    for site, mask in masks.masks.items():
        pruned = weights[site] + tensors[f"lora_unet_{site}.diff"].float()
        assert torch.equal(pruned, weights[site] * ~mask.marks())
    with pytest.raises(ErasureError, match="lacks 1 of the 2 layers"):
        kohya.save_masks(masks, weights.get, path, {SITES[0]: "a"})


def test_plan_has_fixed_masks_with_their_strength_and_gated_ones_with_a_gate():
    keys = {site: f"diffusion_model.{site}.weight" for site in SITES}
    fixed = Entry(adapter(), 0.5, permeability=Permeability(factor=0.5))
    plan = make_plan(ErasureStack((fixed,)), keys=keys)
    assert plan and not plan.follows and not plan.gates
    assert [(t.factor, t.gate) for layer in plan.layers.values() for t in layer.on_weight] == [(0.25, OPEN)] * 2
    for gated in (replace(fixed, end_percent=0.5), replace(fixed, permeability=Permeability(negative=OFF))):
        plan = make_plan(ErasureStack((fixed, gated)), keys=keys)
        assert plan.follows and [gate.entry for gate in plan.gates] == [0, 1]
        assert [term.gate for term in plan.layers[keys[SITES[0]]].on_weight] == [OPEN, 1]
    assert not make_plan(ErasureStack((replace(fixed, strength=0.0),)), keys=keys)


@pytest.mark.parametrize("bits, kept", [(torch.zeros(21, 1), None), (torch.zeros(20, 2, dtype=torch.uint8), None)])
def test_bits_of_another_shape_are_refused(bits, kept):
    with pytest.raises(ErasureError, match="bits of shape"):
        Mask(bits, (10, 21), kept)
