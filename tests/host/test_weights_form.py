"""The erasure in the weights: the same pictures as in the text, and everything that reads weights sees it."""

import copy
import logging
import os
import types
from functools import partial

import comfy.sd
import folder_paths
import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.errors import ErasureError
from membrane.core.host.model.layers import text_readers
from membrane.core.host.model.names import kohya_names
from membrane.core.host.patches.conditioning import EXTRA_CONDS
from membrane.core.host.patches.on_weights import apply_to_weights
from membrane.core.host.patches.stack import apply_stack
from membrane.core.host.patches.steps import APPLY_MODEL
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def adapter(node, demo):
    settings = {"preserve": "heart\nsquare", "templates": "{}\na red {} on snow"}
    return node("MembraneErase", model=demo[0], clip=demo[1], concepts="star -> circle", **settings)[1]


@pytest.fixture(scope="module")
def sample(sample):
    return partial(sample, negative="a heart", steps=3)


def stack_of(adapter, *args):
    return ErasureStack((Entry(adapter, *args),))


def applied(node, demo, adapter, model=None, **entry):
    stack = node("MembraneStack", adapter=adapter, **entry)[0]
    return node("MembraneApply", model=model or demo[0], clip=demo[1], stack=stack, apply_to="weights")[0]


def with_lora(model, strength=1.0):
    """A LoRA of rank 2 on every layer that reads the text."""
    g = torch.Generator().manual_seed(1)
    lora = {}
    for key, layer in text_readers(model):
        name = "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")
        lora[f"{name}.lora_up.weight"] = torch.randn(layer.weight.shape[0], 2, generator=g) * 0.1
        lora[f"{name}.lora_down.weight"] = torch.randn(2, layer.weight.shape[1], generator=g) * 0.1
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)[0]


def difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def state_of(model):
    return {key: value.clone() for key, value in model.model.state_dict().items()}


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("lora", [False, True])
def test_equals_the_text_form(node, demo, adapter, sample, lora, strength):
    model = with_lora(demo[0]) if lora else demo[0]
    base = sample(model)
    text = sample(apply_stack(model, stack_of(adapter, strength)))
    found = sample(applied(node, demo, adapter, model, strength=strength))
    print(f"difference {difference(found, text):.1e}, effect {difference(text, base):.2f}")
    assert difference(text, base) > 0.01
    assert difference(found, text) < 1e-4
    assert torch.equal(sample(model), base)


def test_the_base_is_bit_identical_afterwards(node, demo, adapter, sample):
    base = sample(demo[0])
    before = state_of(demo[0])
    sample(applied(node, demo, adapter))
    assert torch.equal(sample(demo[0]), base)
    after = state_of(demo[0])
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert not demo[0].patches


@pytest.mark.parametrize("entry", [{"strength": 0.0}, {"start_percent": 1.0}])
def test_what_does_not_act_returns_the_model_itself(node, demo, adapter, entry):
    erased = apply_stack(demo[0], stack_of(adapter))
    for model in (demo[0], erased):
        assert applied(node, demo, adapter, model, **entry) is model


def test_a_time_range_is_one_sentence(node, demo, adapter):
    with pytest.raises(ErasureError, match="star acts from 0 to 0.5 of the sampling.*set apply_to") as caught:
        applied(node, demo, adapter, end_percent=0.5)
    assert "\n" not in str(caught.value)
    timed = apply_stack(demo[0], stack_of(adapter, 1.0, 0.25, 1.0))
    with pytest.raises(ErasureError, match="star acts from 0.25 to 1 of the sampling"):
        applied(node, demo, adapter, timed)


def test_another_width_is_one_sentence(node, demo):
    other = ErasureAdapter(
        Card("UCE", ("dog",), family="SD15"), {"map": {"text": TextMap(torch.zeros(768, 1), torch.zeros(1, 768), (0,))}}
    )
    with pytest.raises(ErasureError, match="width 768"):
        applied(node, demo, other)
    with pytest.raises(ErasureError, match="width 768"):
        save_lora(node, other, demo[0])


def test_more_terms_than_a_layer_has_rows(demo, sample):
    g = torch.Generator().manual_seed(2)
    text_map = TextMap(torch.randn(128, 300, generator=g) * 0.03, torch.randn(300, 128, generator=g) * 0.03, (0,) * 300)
    whole = stack_of(ErasureAdapter(Card("UCE", ("star",)), {"map": {"text": text_map}}))
    text = sample(apply_stack(demo[0], whole))
    assert difference(text, sample(demo[0])) > 0.03
    assert difference(sample(apply_to_weights(demo[0], whole)), text) < 1e-4


def test_what_acts_on_the_text_moves_to_the_weights(node, demo, adapter, sample):
    """So erasures add up in either form, and another pack's patch stays."""
    foreign = demo[0].clone()
    seen = []

    def theirs(**kwargs):
        seen.append(1)
        return type(foreign.model).extra_conds(foreign.model, **kwargs)

    foreign.add_object_patch(EXTRA_CONDS, theirs)
    for model, left in ((demo[0], None), (foreign, theirs)):
        half = apply_stack(model, stack_of(adapter, 0.5))
        found = applied(node, demo, adapter, half, strength=0.5)
        assert found.object_patches.get(EXTRA_CONDS) is left and APPLY_MODEL not in found.object_patches
        assert half.object_patches[EXTRA_CONDS].stack.entries
        assert difference(sample(found), sample(apply_stack(demo[0], stack_of(adapter)))) < 1e-4
    assert seen


def test_a_lora_after_it(demo, adapter, sample):
    """A LoRA after the edit is not erased: W (I + E) + L, unlike in the text form."""
    model = demo[0]
    sample(model)  # no clone's weights are in place below
    plain = {key: layer.weight.detach().clone() for key, layer in text_readers(model)}
    found = sample(with_lora(apply_to_weights(model, stack_of(adapter))))
    edited = model.clone()
    e = adapter.maps["text"].matrix()
    edited.add_patches({k: ("diff", (weight @ e,)) for k, weight in plain.items()}, 1.0)
    assert difference(found, sample(with_lora(edited))) < 1e-4


@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_checkpoint_holds_it(node, demo, adapter, sample, lora):
    model, clip, vae = demo
    sample(model)  # no clone's weights are in place below
    plain = {key: layer.weight.detach().clone() for key, layer in text_readers(model)}
    others = {k: v.clone() for k, v in model.model.state_dict().items() if k.startswith("diffusion_model.")}
    base = with_lora(model, 0.5) if lora else model
    erased = applied(node, demo, adapter, base)
    node("CheckpointSave", model=erased, clip=clip, vae=vae, filename_prefix=f"erased_{lora}")
    saved = load_file(os.path.join(folder_paths.get_output_directory(), f"erased_{lora}_00001_.safetensors"))
    e = torch.eye(128, dtype=torch.float64) + adapter.maps["text"].a.double() @ adapter.maps["text"].b.double()
    g = torch.Generator().manual_seed(1)
    assert len(plain) == 14
    for key, weight in plain.items():
        weight = weight.double()
        if lora:
            up = torch.randn(weight.shape[0], 2, generator=g) * 0.1
            weight = weight + 0.5 * up.double() @ (torch.randn(2, weight.shape[1], generator=g) * 0.1).double()
        found = saved[f"model.{key}"]
        assert ((found.double() - weight @ e).norm() / (weight @ e - weight).norm()).item() < (
            1e-4 if found.dtype == torch.float32 else 1e-3
        )
    for key in others.keys() - plain.keys():
        assert torch.equal(saved[f"model.{key}"], others[key].to(saved[f"model.{key}"].dtype))


def test_merging_keeps_it(node, demo, adapter, sample):
    erased = applied(node, demo, adapter)
    expected, base = sample(erased), sample(demo[0])
    merged = node("ModelMergeSimple", model1=demo[0], model2=erased, ratio=0.0)[0]
    assert difference(sample(merged), expected) < 1e-4
    half = node("ModelMergeSimple", model1=demo[0], model2=erased, ratio=0.5)[0]
    assert difference(sample(half), sample(applied(node, demo, adapter, strength=0.5))) < 1e-4
    # and an erasure on top of a merge counts the merge
    other = node("ModelMergeSimple", model1=demo[0], model2=with_lora(demo[0]), ratio=0.0)[0]
    text = sample(apply_stack(with_lora(demo[0]), stack_of(adapter)))
    assert difference(sample(applied(node, demo, adapter, other)), text) < 1e-4
    assert torch.equal(sample(demo[0]), base)


def save_lora(node, adapter, model, prefix="erase/star"):
    saved = node("MembraneSaveAdapter", adapter=adapter, filename_prefix=prefix, format="LoRA (kohya)", model=model)
    return saved.ui["text"][0]


@pytest.mark.parametrize("lora", [False, True])
def test_the_stock_loader_reads_the_lora(node, demo, adapter, sample, caplog, lora):
    model, clip, _ = demo
    base = with_lora(model) if lora else model
    name = save_lora(node, adapter, base)
    assert name in [n.replace("\\", "/") for n in folder_paths.get_filename_list("loras")]
    with caplog.at_level(logging.WARNING):
        loaded = {
            s: node("LoraLoader", model=base, clip=clip, lora_name=name, strength_model=s, strength_clip=0.0)[0]
            for s in (1.0, 0.5)
        }
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]  # no key that was not loaded
    before = {key: len(base.patches.get(key, ())) for key, _ in text_readers(model)}
    assert {key: len(loaded[1.0].patches[key]) - n for key, n in before.items()} == dict.fromkeys(before, 1)
    for strength, erased in loaded.items():
        text = sample(apply_stack(base, stack_of(adapter, strength)))
        print(f"strength {strength}: difference {difference(sample(erased), text):.1e}")
        assert difference(sample(erased), text) < 1e-3


def test_a_lora_needs_the_model(node, adapter):
    with pytest.raises(ErasureError, match="model input is empty.*connect the model") as caught:
        save_lora(node, adapter, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["../outside", "a/../../outside"])
def test_a_lora_stays_in_its_folder(node, demo, adapter, prefix):
    with pytest.raises(ErasureError, match="outside models/loras"):
        save_lora(node, adapter, demo[0], prefix)


def test_names_are_kohyas(demo):
    everything = kohya_names(demo[0])
    assert len(set(everything.values())) == len(everything)
    names = {key: everything[key] for key, _ in text_readers(demo[0])}
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    assert names[key] == "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    assert all(
        n.startswith(("lora_unet_down_blocks_", "lora_unet_mid_block_", "lora_unet_up_")) for n in names.values()
    )


SIZES = {
    "SD15": {
        "num_res_blocks": [2] * 4,
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
    },
    "SDXL": {
        "num_res_blocks": [2] * 3,
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
    },
}


@pytest.mark.parametrize(
    ("family", "layers", "spm_layers", "names"),
    [
        (
            "SD15",
            32,
            192,
            {
                "input_blocks.1.1.transformer_blocks.0": "down_blocks_0_attentions_0_transformer_blocks_0",
                "input_blocks.8.1.transformer_blocks.0": "down_blocks_2_attentions_1_transformer_blocks_0",
                "output_blocks.11.1.transformer_blocks.0": "up_blocks_3_attentions_2_transformer_blocks_0",
            },
        ),
        (
            "SDXL",
            140,
            722,
            {
                "input_blocks.8.1.transformer_blocks.9": "down_blocks_2_attentions_1_transformer_blocks_9",
                "middle_block.1.transformer_blocks.3": "mid_block_attentions_0_transformer_blocks_3",
                "output_blocks.2.1.transformer_blocks.5": "up_blocks_0_attentions_2_transformer_blocks_5",
            },
        ),
    ],
)
def test_names_of_the_published_networks(family, layers, spm_layers, names):
    """The full networks' own modules, built without memory; the names are those of published LoRAs."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    sizes = SIZES[family]
    with torch.device("meta"):
        network = UNetModel(
            image_size=32, in_channels=4, out_channels=4, model_channels=320, num_head_channels=64, context_dim=768,
            use_spatial_transformer=True, legacy=False, use_linear_in_transformer=True, device="meta",
            operations=comfy.ops.disable_weight_init, **copy.deepcopy(sizes),
        )  # fmt: skip
    config = types.SimpleNamespace(unet_config=sizes)
    whole = kohya_names(
        types.SimpleNamespace(model=types.SimpleNamespace(diffusion_model=network, model_config=config))
    )
    assert len(set(whole.values())) == len(whole)
    layer = {f"diffusion_model.{n}.weight": m for n, m in network.named_modules() if hasattr(m, "weight")}
    inside = [n for key, n in whole.items() if "_attentions_" in n and layer[key].weight.dim() > 1]
    assert len(inside) == spm_layers
    found = {key: name for key, name in whole.items() if "attn2.to_k" in key or "attn2.to_v" in key}
    assert len(found) == layers
    for ours, theirs in names.items():
        for kind in ("k", "v"):
            assert found[f"diffusion_model.{ours}.attn2.to_{kind}.weight"] == f"lora_unet_{theirs}_attn2_to_{kind}"
    assert all("attn2_to_" in name and "input_blocks" not in name for name in found.values())
