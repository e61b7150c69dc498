"""Training in the host: gradients reach the adapter and nothing else, and nothing is left behind."""

import os
from dataclasses import replace

import comfy.model_base
import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.adapters.permeability import Permeability
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.errors import ErasureError
from membrane.core.families.sites import site
from membrane.core.formats import native
from membrane.core.host.model.names import kohya_names
from membrane.core.host.patches.stack import apply_stack
from membrane.core.host.runs.training import HostDenoiser, trainable_sites

FIXED = Permeability("fixed")


@pytest.fixture
def train(node, demo):
    def run(**inputs):
        wanted = {
            "concepts": "star",
            "steps": 4,
            "learning_rate": 1e-3,
            "width": 64,
            "height": 64,
            "warmup": 0,
            "rollout_steps": 4,
        }
        return node("MembraneTrain", **{"model": demo[0], "clip": demo[1], **wanted, **inputs})

    return run


def folder():
    return folder_paths.get_folder_paths("erasure_adapters")[0]


def saved(prefix):
    return sorted(name for name in os.listdir(folder()) if name.startswith(prefix))


def state_of(model):
    return {key: value.clone() for key, value in model.model.state_dict().items()}


def left_behind(model):
    """What training puts onto modules of the host."""
    found = []
    for module in model.model.diffusion_model.modules():
        forward = module.__dict__.get("forward")
        if type(forward).__module__.startswith("membrane"):
            found.append(forward)
        found += [p for p in module._parameters.values() if p is not None and not isinstance(p, torch.nn.Parameter)]
    return found


def difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_the_network_with_gradients_is_the_hosts(demo, node):
    """Noise as predicted here against the host's own apply_model; the adapter starts closed."""
    model = demo[0]
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([400, 900])
    text = torch.cat([node("CLIPTextEncode", clip=demo[1], text=p)[0][0][0] for p in ("a red star", "")])
    comfy.model_management.load_models_gpu([model])
    with torch.no_grad():
        expected = model.model.diffusion_model(x, t, context=text, transformer_options={})
    with torch.inference_mode(False), torch.enable_grad(), HostDenoiser(model, trainable_sites(model)) as denoiser:
        for on in (False, True):
            with torch.no_grad():
                assert difference(denoiser.predict(x, t, text.clone(), on), expected) < 1e-5
        assert difference(denoiser.predict(x, t, text.clone(), True), expected) < 1e-5
    assert left_behind(model) == []


def test_gradients_are_those_of_a_small_change(demo, node):
    """Against central differences in the direction of the gradient, for one layer of each kind."""
    model = demo[0]
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(1, 4, 8, 8, generator=g), torch.tensor([500])
    goal = torch.randn(1, 4, 8, 8, generator=g)
    text = node("CLIPTextEncode", clip=demo[1], text="a red star")[0][0][0]
    with torch.inference_mode(False), torch.enable_grad(), HostDenoiser(model, trainable_sites(model)) as denoiser:
        text = text.clone()
        with torch.no_grad():
            for layer in denoiser.layers.values():
                layer.up.normal_(0, 0.05, generator=g)

        def loss():
            return (denoiser.predict(x, t, text, True).double() - goal).square().mean()

        loss().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in denoiser.parameters())
        for name in ("input_blocks_3_1_proj_in", "middle_block_1_transformer_blocks_0_attn1_to_q"):
            for parameter in (denoiser.layers[name].down, denoiser.layers[name].up):
                direction = parameter.grad / parameter.grad.norm()
                with torch.no_grad():
                    values = []
                    for sign in (1, -1):
                        parameter += sign * 0.02 * direction
                        values.append(loss().item())
                        parameter -= sign * 0.02 * direction
                slope = (values[0] - values[1]) / 0.04
                assert slope == pytest.approx(parameter.grad.norm().item(), rel=0.1)


def test_a_trained_adapter_comes_out_and_is_in_a_file(train, demo, node):
    before = state_of(demo[0])
    adapter, report = train(filename_prefix="runs/first", preserve="heart\nsquare", rank=2)
    assert "Saved as runs/first_00001_.safetensors after 4 steps" in report and "step 4 of 4" in report
    assert len(adapter.low_rank) == len(trainable_sites(demo[0]))
    assert all(c.rank == 2 and torch.isfinite(c.up).all() for c in adapter.low_rank.values())
    assert any(c.up.abs().max() > 1e-4 for c in adapter.low_rank.values())
    card = adapter.card
    assert (card.method, card.concepts, card.surrogates) == ("SPM", ("star",), ("",))
    assert (
        card.settings["trained_steps"] == 4 and card.settings["anchor_kind"] == "texts" and card.settings["rank"] == 2
    )
    assert card.settings["preserve"] == ["heart", "square"] and card.text_encoder
    loaded = node("MembraneLoadAdapter", adapter_name="runs/first_00001_.safetensors")[0]
    assert loaded.card == card and all(torch.equal(loaded.low_rank[n].up, c.up) for n, c in adapter.low_rank.items())
    after = demo[0].model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items()) and left_behind(demo[0]) == []
    assert node("MembraneStack", adapter=loaded)[0].entries[0].mode == "facilitated transport"


def test_original_and_erased_are_shown_while_it_trains(train, monkeypatch):
    pictures = []

    class Bar:
        def __init__(self, total):
            pass

        def update_absolute(self, value, total=None, preview=None):
            if preview is not None:
                pictures.append(torch.from_numpy(np.array(preview[1])).float())

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    train(preview_every=2, learning_rate=0.05, filename_prefix="shown")
    assert len(pictures) == 2 and all(picture.shape[1] == 2 * picture.shape[0] for picture in pictures)
    (before, after), (again, later) = [picture.chunk(2, dim=1) for picture in pictures]
    assert torch.equal(before, again)
    assert (before - after).abs().mean() > 1 and (after - later).abs().mean() > 0


def test_the_same_seed_gives_the_same_adapter(train):
    first, again, other = (train(seed=seed, filename_prefix="seed")[0] for seed in (1, 1, 2))
    site = next(iter(first.low_rank))
    assert all(torch.equal(first.low_rank[n].up, again.low_rank[n].up) for n in first.low_rank)
    assert not torch.equal(first.low_rank[site].down, other.low_rank[site].down)


def test_layers_and_several_concepts(train):
    adapter = train(concepts="star -> circle\nheart", surrogate="square", layers="text keys and values")[0]
    assert adapter.card.concepts == ("star", "heart") and adapter.card.surrogates == ("circle", "square")
    assert all(name.endswith(("attn2_to_k", "attn2_to_v")) for name in adapter.low_rank)


def test_a_run_goes_on_from_its_adapter(train):
    first = train(filename_prefix="part")[0]
    second, report = train(filename_prefix="part", adapter=first, steps=6)
    assert "step 6 of 6" in report and second.card.settings["trained_steps"] == 6
    site = next(name for name, c in first.low_rank.items() if c.up.abs().max() > 0)
    assert not torch.equal(first.low_rank[site].up, second.low_rank[site].up)
    with pytest.raises(ErasureError, match="trained for 6 steps already"):
        train(adapter=second, steps=6)
    words = ErasureAdapter(
        Card("UCE", ("star",)), {"map": {"text": TextMap(torch.zeros(4, 1), torch.zeros(1, 4), (0,))}}
    )
    with pytest.raises(ErasureError, match="no trained layers"):
        train(adapter=words)


def test_a_run_goes_on_from_a_file_with_other_names_of_the_layers(train, demo):
    first = train(filename_prefix="named")[0]
    names = {site(key): site(name) for key, name in kohya_names(demo[0]).items()}
    renamed = replace(first, deltas={"low_rank": {names[name]: change for name, change in first.low_rank.items()}})
    assert not first.low_rank.keys() & renamed.low_rank.keys()
    found, expected = (train(filename_prefix="named", adapter=a, steps=6)[0] for a in (renamed, first))
    assert found.low_rank.keys() == expected.low_rank.keys()
    assert all(torch.equal(found.low_rank[name].up, change.up) for name, change in expected.low_rank.items())
    with pytest.raises(ErasureError, match="which are not trained here"):
        train(adapter=first, steps=6, layers="text keys and values")
    strange = replace(first, deltas={"low_rank": {"blocks_0_to_q": LowRank(torch.zeros(2, 1), torch.zeros(1, 2), 1.0)}})
    with pytest.raises(ErasureError, match="which are not trained here"):
        train(adapter=strange, steps=6)


def test_cancel_keeps_what_was_trained(train, demo, monkeypatch):
    own, calls = HostDenoiser.predict, []

    def predict(self, *args, **kwargs):
        calls.append(None)
        return own(self, *args, **kwargs)

    def interrupted():
        if len(calls) > 15:  # some steps are done
            raise comfy.model_management.InterruptProcessingException

    before = state_of(demo[0])
    monkeypatch.setattr(HostDenoiser, "predict", predict)
    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(filename_prefix="cancelled", steps=50)
    (name,) = saved("cancelled")
    kept = native.load(os.path.join(folder(), name))
    assert 0 < kept.card.settings["trained_steps"] < 50
    assert left_behind(demo[0]) == []
    assert all(torch.equal(demo[0].model.state_dict()[key], value) for key, value in before.items())


def test_out_of_memory_in_the_middle(train, demo, monkeypatch):
    own, calls = HostDenoiser.predict, []

    def predict(self, *args, **kwargs):
        calls.append(None)
        if len(calls) > 20:
            raise torch.cuda.OutOfMemoryError("no memory")
        return own(self, *args, **kwargs)

    monkeypatch.setattr(HostDenoiser, "predict", predict)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        train(filename_prefix="memory", steps=50)
    (name,) = saved("memory")
    assert native.load(os.path.join(folder(), name)).card.settings["trained_steps"] > 0
    assert left_behind(demo[0]) == []


def test_a_full_disk_loses_nothing(train, monkeypatch, caplog):
    def full(adapter, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native, "save", full)
    with caplog.at_level("WARNING", logger="membrane"):
        adapter, report = train(filename_prefix="full", save_every=2)
    assert "could not be saved" in report and "No space left" in report
    assert adapter.low_rank and not saved("full")


def test_a_loss_that_is_not_finite(train, demo, monkeypatch):
    own, calls = HostDenoiser.predict, []

    def predict(self, *args, **kwargs):
        calls.append(None)
        return own(self, *args, **kwargs) * (float("nan") if len(calls) > 20 else 1.0)

    monkeypatch.setattr(HostDenoiser, "predict", predict)
    with pytest.raises(ErasureError, match="not finite in step .* lower the learning rate"):
        train(filename_prefix="notfinite", steps=50)
    (name,) = saved("notfinite")
    kept = native.load(os.path.join(folder(), name))
    assert all(torch.isfinite(c.up).all() for c in kept.low_rank.values())
    assert left_behind(demo[0]) == []


def test_training_on_a_patched_model(demo, train):
    """What is patched onto the model counts, and stays."""
    g = torch.Generator().manual_seed(4)
    change = {
        name: module.weight.shape[:2] for name, module in trainable_sites(demo[0], ("cross_attention.value",)).items()
    }
    lora = ErasureAdapter(
        Card("LoRA", ()),
        {
            "low_rank": {
                n: LowRank(torch.randn(o, 2, generator=g), torch.randn(2, i, generator=g), 0.5)
                for n, (o, i) in change.items()
            }
        },
    )
    patched = apply_stack(demo[0], ErasureStack((Entry(lora, permeability=FIXED),)))
    plain = train(filename_prefix="patched")[0]
    found = train(filename_prefix="patched", model=patched)[0]
    assert any(not torch.equal(found.low_rank[n].up, plain.low_rank[n].up) for n in plain.low_rank)
    assert left_behind(patched) == []


def test_models_that_cannot_be_trained(demo, train, monkeypatch):
    monkeypatch.setattr(demo[0].model, "model_type", comfy.model_base.ModelType.EDM)
    with pytest.raises(ErasureError, match="predicts in the way EDM"):
        trainable_sites(demo[0])
    monkeypatch.undo()
    with pytest.raises(ErasureError, match="has no layers in nothing"):
        trainable_sites(demo[0], ("nothing",))
    with pytest.raises(ErasureError, match="No concept"):
        train(concepts="  ")


def test_adversarial_training_draws_the_concept_to_its_surrogate(train, demo, node):
    """A few steps on the demo model: the noise predicted for the star comes closer to the circle's, that of what is
    kept stays, and the same seed gives the same adapter."""

    def run(**inputs):
        return train(
            objective="adversarial", concepts="star -> circle", preserve="heart\nsquare\nmoon", rank=4, anchoring=10.0,
            filename_prefix="adversarial", **inputs,
        )[0]  # fmt: skip

    first, again = (run(steps=1, learning_rate=0.01) for _ in range(2))
    assert all(torch.equal(first.low_rank[n].up, again.low_rank[n].up) for n in first.low_rank)
    assert any(change.up.abs().max() > 0 for change in first.low_rank.values())
    adapter = run(steps=10, learning_rate=0.01)
    assert adapter.card.method == "Adversarial" and adapter.card.settings["anchor_kind"] == "texts"
    assert all(change.alpha == change.rank for change in adapter.low_rank.values())
    texts = [node("CLIPTextEncode", clip=demo[1], text=word)[0][0][0] for word in ("star", "circle", "heart")]
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(1, 4, 8, 8, generator=g), torch.tensor([900])
    denoiser = HostDenoiser(demo[0], trainable_sites(demo[0]), start=adapter.low_rank)
    with torch.inference_mode(False), torch.no_grad(), denoiser:
        off, on = ([denoiser.predict(x, t, one.clone(), side) for one in texts] for side in (False, True))
    before = (off[0] - off[1]).norm()
    assert (on[0] - off[1]).norm() < 0.9 * before
    assert (on[2] - off[2]).norm() < 0.5 * before
    assert left_behind(demo[0]) == []
