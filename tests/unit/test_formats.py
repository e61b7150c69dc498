"""Every published format: read by its keys, or refused with a sentence that says what it is."""

import ast
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.errors import ErasureError
from membrane.core.formats import containers, kohya, labels, native, registry
from membrane.core.formats.registry import load, load_weights
from safetensors.torch import load_file, save_file

SITE = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
LDM_PATH = "input_blocks.1.1.transformer_blocks.0.attn2"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(name, out=8, width=6, rank=1, alpha=1.0, down="lora_down", up="lora_up"):
    """A layer of a LoRA as sd-scripts names it."""
    tensors = {f"{name}.{down}.weight": randn(rank, width), f"{name}.{up}.weight": randn(out, rank, seed=1)}
    if alpha is not None:
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.fixture
def put(tmp_path):
    """Writes tensors or anything else as a file with a name that says nothing, and returns its path."""

    def write(content, metadata=None, name="x.safetensors"):
        path = str(tmp_path / name)
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif name.endswith(".safetensors"):
            save_file(content, path, metadata)
        else:
            torch.save(content, path)
        return path

    return write


def refused(path, reader=load):
    """The one sentence with which a file is refused."""
    with pytest.raises(ErasureError) as caught:
        reader(path)
    message = str(caught.value)
    assert os.path.basename(path) in message and "\n" not in message and message.endswith(".") and ";" in message
    return message


def product(change):
    return change.scale * torch.einsum("or,r...->o...", change.up.double(), change.down.double())


SPM = {"prompts": "mickey, mickey mouse,", "rank": "1", "alpha": "1.0"}


def test_spm(put):
    tensors = pair(f"lora_unet_{SITE}", alpha=0.5) | {
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": randn(1, 8, 1, 1),
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": randn(8, 1, 1, 1),
        "lora_unet_down_blocks_0_attentions_0_proj_in.alpha": torch.tensor(1.0),
    }
    adapter = load(put(tensors, SPM))
    assert adapter.card == Card("SPM", ("mickey", "mickey mouse")) and adapter.name == "x.safetensors"
    assert adapter.maps.get("text") is None
    assert set(adapter.low_rank) == {SITE, "down_blocks_0_attentions_0_proj_in"}
    change = adapter.low_rank[SITE]
    assert change.alpha == 0.5 and change.rank == 1
    assert torch.equal(change.down, tensors[f"lora_unet_{SITE}.lora_down.weight"])
    flat = adapter.low_rank["down_blocks_0_attentions_0_proj_in"]
    assert flat.down.shape == (1, 8) and flat.up.shape == (8, 1)


@pytest.mark.parametrize("prompts", ["", " , ,", ","])
def test_an_spm_without_concepts(put, prompts):
    assert "names no concept" in refused(put(pair(f"lora_unet_{SITE}"), SPM | {"prompts": prompts}))


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
@pytest.mark.parametrize(("alpha", "expected"), [(None, 4.0), (1.0, 1.0), (torch.tensor(2), 2.0)])
def test_kohya_lora(put, name, alpha, expected):
    tensors = pair(f"lora_unet_{SITE}", rank=4, alpha=None)
    if alpha is not None:
        tensors[f"lora_unet_{SITE}.alpha"] = torch.as_tensor(alpha)
    adapter = load(put(tensors, name=name))
    assert adapter.card == Card("LoRA", ())
    assert adapter.low_rank[SITE].alpha == expected and adapter.low_rank[SITE].rank == 4


def test_flux_slider(put):
    tensors = pair("lora_unet_transformer_blocks_0_attn_to_q") | pair("lora_unet_single_transformer_blocks_3_attn_to_k")
    assert set(load(put(tensors, name="slider.pt")).low_rank) == {
        "transformer_blocks_0_attn_to_q",
        "single_transformer_blocks_3_attn_to_k",
    }


def test_leco_of_sd_scripts_says_what_it_erases(put):
    preview = [
        {"target": "van gogh", "positive": "van gogh", "neutral": "", "action": "erase"},
        {"target": "", "positive": "old", "neutral": "person", "action": "erase"},
        {"target": "smile", "positive": "smile", "neutral": "", "action": "enhance"},
    ]
    metadata = {"ss_leco_prompt_count": "3", "ss_leco_preview": json.dumps(preview)}
    assert load(put(pair(f"lora_unet_{SITE}"), metadata)).card == Card("LECO", ("van gogh", "old"), ("", "person"))
    metadata["ss_leco_preview"] = "[1"
    assert load(put(pair(f"lora_unet_{SITE}"), metadata)).card == Card("LECO", ())


def test_a_convolution_keeps_its_kernel(put):
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    down, up = randn(2, 4, 3, 3), randn(8, 2, 1, 1)
    change = load(put({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up})).low_rank[
        "down_blocks_0_resnets_0_conv1"
    ]
    assert change.down.shape == (2, 4, 3, 3) and change.up.shape == (8, 2)
    assert torch.allclose(product(change), torch.einsum("orab,rihw->oihw", up, down).double())


def test_a_tucker_core_goes_into_the_down_factor(put):
    name, down, mid, up = "lora_unet_conv_in", randn(2, 4, 1, 1), randn(2, 2, 3, 3, seed=2), randn(8, 2, 1, 1, seed=1)
    parts = {"lora_down": down, "lora_mid": mid, "lora_up": up}
    tensors = {f"{name}.{part}.weight": tensor for part, tensor in parts.items()} | {f"{name}.alpha": torch.tensor(1.0)}
    change = load(put(tensors)).low_rank["conv_in"]
    x = randn(1, 4, 5, 5, seed=3)
    conv = torch.nn.functional.conv2d
    expected = 0.5 * conv(conv(conv(x, down), mid, padding=1), up)
    assert torch.allclose(conv(x, product(change).float(), padding=1), expected, atol=1e-5)


def test_text_encoders_are_left_out(put, caplog):
    tensors = pair(f"lora_unet_{SITE}")
    text = {}
    for name in ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te1_a", "lora_te2_a"):
        text |= pair(name)
    with caplog.at_level(logging.INFO, "membrane"):
        assert set(load(put(tensors | text)).low_rank) == {SITE}
    assert "left out 3 layers of text encoders" in caplog.text
    assert "changes 3 layers of a text encoder and none of the denoiser" in refused(put(text))


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_x.hada_w1_a", "LoHa"),
        ("lora_unet_x.lokr_w1", "LoKr"),
        ("lora_unet_x.dora_scale", "DoRA"),
        ("unet.x.lora_magnitude_vector", "DoRA"),
        ("lora_unet_x.oft_blocks", "OFT"),
        ("lora_unet_x.diff", "whole differences"),
    ],
)
@pytest.mark.parametrize("with_pairs", [True, False])
def test_other_kinds_of_adapters_are_named(put, key, kind, with_pairs):
    tensors = {key: randn(4, 4)} | (pair("lora_unet_y") if with_pairs else {})
    message = refused(put(tensors))
    assert f"holds {kind}" in message and "convert it to a plain LoRA" in message


@pytest.mark.parametrize("key", ["lora_unet_mid_block_resnets_0_norm1.w_norm", "lycoris_blocks_0_norm1.b_norm"])
def test_changes_of_norms_are_named(put, key):
    """LyCORIS' train_norm; in a text encoder they are left out with the rest of it."""
    message = refused(put({key: randn(4)} | pair("lora_unet_y")))
    assert f"changes 1 layers of norms ({key}" in message and "use a LoRA loader" in message
    found = load(put({"lora_te_text_model_encoder_layers_0_layer_norm1.w_norm": randn(4)} | pair("lora_unet_y")))
    assert set(found.low_rank) == {"y"}


def test_a_trained_scalar_multiplies_the_change(put):
    """LyCORIS' use_scalar, whose files hold the factors without it."""
    tensors = pair(f"lora_unet_{SITE}", rank=2, alpha=1.0)
    with_scalar = load(put(tensors | {f"lora_unet_{SITE}.scalar": torch.tensor(0.25)})).low_rank[SITE]
    assert torch.allclose(product(with_scalar), product(load(put(tensors)).low_rank[SITE]) * 0.25)
    factors = {"w1_a": (2, 2), "w1_b": (2, 3), "w2_a": (4, 2), "w2_b": (2, 2)}
    lokr = {f"lora_unet_{SITE}.lokr_{n}": randn(*shape, seed=i) for i, (n, shape) in enumerate(factors.items())}
    whole = product(load(put(lokr)).low_rank[SITE])
    assert torch.allclose(
        product(load(put(lokr | {f"lora_unet_{SITE}.scalar": torch.tensor([-2.0])})).low_rank[SITE]), whole * -2
    )
    wrong = {f"lora_unet_{SITE}.scalar": randn(3)}
    assert "holds scalar of" in refused(put(tensors | wrong))
    assert f"holds scalar of {SITE} but no down and no up factor" in refused(put(pair("lora_unet_y") | wrong))


@pytest.mark.parametrize(
    ("kwargs", "scales"),
    [
        (
            {"qkv_proj_lora_rank": 4, "qkv_proj_lora_alpha": 8, "out_proj_lora_rank": 4, "out_proj_lora_alpha": 2},
            (2, 0.5),
        ),
        ({"qkv_proj_lora_rank": 4, "qkv_proj_lora_alpha": 8}, (2, 1)),
        (None, (1, 1)),
    ],
)
def test_the_loras_of_mochis_own_trainer(put, kwargs, scales):
    tensors = {}
    for layer in ("qkv_y", "proj_x"):
        tensors[f"blocks.0.attn.{layer}.lora_A"], tensors[f"blocks.0.attn.{layer}.lora_B"] = randn(4, 6), randn(8, 4)
    found = load(put(tensors, {"kwargs": json.dumps(kwargs)} if kwargs else None)).low_rank
    assert {name: change.scale for name, change in found.items()} == {
        "blocks_0_attn_qkv_y": scales[0],
        "blocks_0_attn_proj_x": scales[1],
    }


def test_damaged_settings_of_mochis_own_trainer(put):
    tensors = {"blocks.0.attn.qkv_y.lora_A": randn(4, 6), "blocks.0.attn.qkv_y.lora_B": randn(8, 4)}
    refused(put(tensors, {"kwargs": "["}))
    refused(put(tensors, {"kwargs": '{"qkv_proj_lora_alpha": "x"}'}))


def test_the_change_of_a_bias_belongs_to_its_layer(put):
    bias = {f"lora_unet_{SITE}.diff_b": randn(8)}
    assert torch.equal(
        load(put(pair(f"lora_unet_{SITE}") | bias)).low_rank[SITE].bias, bias[f"lora_unet_{SITE}.diff_b"]
    )
    alone = refused(put(pair("lora_unet_y") | bias))
    assert f"holds bias of {SITE} but no down and no up factor" in alone


def test_erase_anything(put):
    name = "transformer.transformer_blocks.0.attn.add_k_proj"
    tensors = {f"{name}.lora_A.weight": randn(2, 6).bfloat16(), f"{name}.lora_B.weight": randn(8, 2).bfloat16()}
    adapter = load(put(tensors))
    change = adapter.low_rank["transformer_blocks_0_attn_add_k_proj"]
    assert adapter.card == Card("LoRA", ()) and change.alpha == 2 and change.up.dtype == torch.bfloat16
    assert change.down.shape == (2, 6)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora.down.weight", "lora.up.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "unet.", "transformer.", "base_model.model.", "base_model.model.unet."])
def test_spellings_of_peft_and_diffusers(put, prefix, down, up):
    tensors = {f"{prefix}{PATH}.to_k.{down}": randn(2, 6), f"{prefix}{PATH}.to_k.{up}": randn(8, 2)}
    tensors[f"{prefix}{PATH}.to_k.alpha"] = torch.tensor(4.0)
    change = load(put(tensors)).low_rank[SITE]
    assert change.scale == 2 and change.down.shape == (2, 6) and change.up.shape == (8, 2)


def test_mace_attention_processors(put):
    tensors = {}
    for part in ("to_q", "to_k", "to_v", "to_out"):
        tensors[f"{PATH}.processor.{part}_lora.down.weight"] = randn(1, 6)
        tensors[f"{PATH}.processor.{part}_lora.up.weight"] = randn(8, 1)
    stem = SITE.removesuffix("to_k")
    assert set(load(put(tensors, name="pytorch_lora_weights.bin")).low_rank) == {
        f"{stem}{part}" for part in ("to_q", "to_k", "to_v", "to_out_0")
    }


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"unet.r": 4, "unet.lora_alpha": 8}, 2.0),
        ({"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_k": 4, "to_v": 1}}, 1.0),
        ({"text_encoder.lora_alpha": 8}, 1.0),
    ],
)
def test_scale_from_the_settings_of_peft(put, settings, scale):
    tensors = {f"unet.{PATH}.to_k.lora_A.weight": randn(4, 6), f"unet.{PATH}.to_k.lora_B.weight": randn(8, 4)}
    change = load(put(tensors, {"lora_adapter_metadata": json.dumps(settings)})).low_rank[SITE]
    assert change.scale == scale


@pytest.mark.parametrize(
    "text",
    ["[1]", "{", '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": 1' + "0" * 400 + "}", '{"unet.lora_alpha": NaN}'],
)
def test_damaged_settings_of_peft(put, text):
    tensors = {f"unet.{PATH}.to_k.lora_A.weight": randn(4, 6), f"unet.{PATH}.to_k.lora_B.weight": randn(8, 4)}
    refused(put(tensors, {"lora_adapter_metadata": text}))


def spoil(key, value):
    return lambda tensors: tensors.update({f"lora_unet_{SITE}.{key}": value})


NAN = torch.full((8, 2), float("nan"))
INF = torch.full((2, 6), float("inf"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"lora_unet_{SITE}.lora_up.weight"), "holds alpha and down of .* but no up factor"),
        (lambda t: t.pop(f"lora_unet_{SITE}.lora_down.weight"), "holds alpha and up of .* but no down factor"),
        (spoil("lora_up.weight", NAN), "not finite in up"),
        (spoil("lora_down.weight", INF), "not finite in down"),
        (spoil("lora_up.weight", torch.zeros(8, 3)), r"shapes \(8, 3\) \(up\) and \(2, 6\) \(down\)"),
        (spoil("lora_up.weight", torch.zeros(8, 2, 1)), r"shapes \(8, 2, 1\)"),
        (spoil("lora_up.weight", torch.zeros(8, 2, 3, 3)), r"shapes \(8, 2, 3, 3\)"),
        (spoil("lora_down.weight", torch.zeros(6)), r"and \(6,\) \(down\)"),
        (spoil("lora_up.weight", torch.zeros(8, 2, dtype=torch.int8)), "holds up of .* as int8"),
        (spoil("alpha", torch.zeros(2)), r"alpha of .* with the shape \(2,\); expected one number"),
        (spoil("alpha", torch.tensor(float("nan"))), "not finite in alpha"),
        (spoil("lora_mid.weight", torch.zeros(3, 2, 3, 3)), r"a core of shape \(3, 2, 3, 3\)"),
        (spoil("lora_mid.weight", torch.zeros(2, 2, 1000, 1)), "of a small convolution"),
        (spoil("unheard_of", torch.zeros(2)), "1 tensors that are no part of a LoRA"),
        (lambda t: t.update(pair(f"lycoris_{SITE}")), "two tensors for the part"),
    ],
)
def test_a_damaged_lora(put, change, message):
    tensors = pair(f"lora_unet_{SITE}", rank=2)
    change(tensors)
    assert pytest.raises(ErasureError, load, put(tensors)).match(message)
    refused(put(tensors))


def test_rank_zero(put):
    name = f"lora_unet_{SITE}"
    tensors = {f"{name}.lora_down.weight": torch.zeros(0, 6), f"{name}.lora_up.weight": torch.zeros(8, 0)}
    assert "(8, 0) (up)" in refused(put(tensors))


def test_eight_bit_floats_become_half(put):
    name = f"lora_unet_{SITE}"
    tensors = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in pair(name, rank=2).items()}
    assert load(put(tensors)).low_rank[SITE].up.dtype == torch.float16


# whole weights

KEY_VALUE = {f"{PATH}.to_k.weight": randn(8, 6), f"{PATH}.to_v.weight": randn(8, 6, seed=1)}
VALUE = {f"{PATH}.to_v.weight": randn(8, 6, seed=1)}
ESD = {f"{PATH}.to_q.weight": randn(8, 8).bfloat16(), f"{PATH}.to_out.0.bias": randn(8).bfloat16()}
UNET = KEY_VALUE | {"conv_in.weight": randn(8, 4, 3, 3), "conv_in.bias": randn(8), "conv_out.weight": randn(4, 8, 3, 3)}
LDM = {
    f"model.diffusion_model.{LDM_PATH}.to_k.weight": randn(8, 6),
    "model.diffusion_model.input_blocks.0.0.weight": randn(8, 4, 3, 3),
    "model.diffusion_model.out.2.weight": randn(4, 8, 3, 3),
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": randn(6),
    "first_stage_model.decoder.conv_in.weight": randn(8, 4, 3, 3),
    "model_ema.decay": torch.tensor(0),
}


@pytest.mark.parametrize(
    ("content", "name", "layers", "source", "whole"),
    [
        (KEY_VALUE, "x.safetensors", 2, "UCE", False),
        ({"context_embedder.weight": randn(8, 6)}, "x.safetensors", 1, "UCE", False),
        ({"caption_projection.0.linear.weight": randn(8, 6)}, "x.safetensors", 1, "UCE", False),
        (VALUE, "x.safetensors", 1, "OCE", False),
        (VALUE, "x.pt", 1, "SPEED", False),
        (ESD, "x.safetensors", 2, "ESD", False),
        ({key: t.bfloat16() for key, t in KEY_VALUE.items()}, "x.safetensors", 2, "ESD", False),
        ({f"unet.{PATH}.to_k": {"weight": randn(8, 6), "bias": randn(8)}}, "x.pt", 1, "ESD", False),
        ({"transformer_blocks.0.attn.to_k.weight": randn(8, 6)}, "x.safetensors", 1, "ESD", False),
        ({f"{PATH}.to_q.weight": randn(8, 6)}, "x.safetensors", 1, "weights", False),
        ({"unet": KEY_VALUE, "modifier_token": {}}, "delta.bin", 2, "Concept Ablation", False),
        (
            {"state_dict": {f"model.diffusion_model.{LDM_PATH}.to_k.weight": randn(8, 6)}, "embed": randn(6)},
            "delta.ckpt",
            1,
            "Concept Ablation",
            False,
        ),
        (UNET, "x.pt", 4, "weights", True),
        (UNET, "x.safetensors", 4, "weights", True),
        (LDM, "x.safetensors", 3, "weights", True),
        ({"state_dict": LDM, "global_step": 7}, "x.ckpt", 3, "weights", True),
    ],
)
def test_whole_weights(put, content, name, layers, source, whole):
    path = put(content, name=name)
    found = load_weights(path)
    assert (len(found.layers()), found.source, found.whole, found.name) == (layers, source, whole, name)
    assert all(kind in ("weight", "bias") and tensor.is_floating_point() for (_, kind), tensor in found.tensors.items())
    message = refused(path)
    assert f"holds whole weights of {layers} layers (format: {source})" in message
    assert "use Extract Erasure Adapter with the base model it was made from" in message


def test_sites_of_whole_weights(put):
    assert set(load_weights(put(ESD)).tensors) == {
        (SITE.replace("to_k", "to_q"), "weight"),
        (SITE.replace("to_k", "to_out_0"), "bias"),
    }
    assert set(load_weights(put(LDM)).tensors) == {
        ("input_blocks_1_1_transformer_blocks_0_attn2_to_k", "weight"),
        ("input_blocks_0_0", "weight"),
        ("out_2", "weight"),
    }


def test_quantised_weights(put):
    message = refused(put({f"{PATH}.to_k.weight": torch.zeros(8, 6, dtype=torch.uint8)}), load_weights)
    assert "as uint8; expected floating point numbers" in message


def test_an_adapter_is_no_whole_weights(put):
    assert "use Load Erasure Adapter" in refused(put(pair(f"lora_unet_{SITE}")), load_weights)


# files that are known but not read

CPE = {
    f"lora_unet_{SITE}.lora_down.weight": randn(1, 6, 1),
    f"lora_unet_{SITE}.lora_up.weight": randn(1, 8, 1),
    "attention_gate.encoder_layer.slf_attn.gate.scaler.weight": randn(2, 2),
}


@pytest.mark.parametrize("reader", [load, load_weights])
@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (CPE, "x.safetensors", "is a CPE file"),
        ({"lora_gloce_a_attn2_to_out_0.lora_update.weight": randn(2, 2)}, "x.safetensors", "is a GLoCE file"),
        (
            {
                "down_blocks.0.attentions.0": {
                    f"{w}.{p}": randn(2, 2) for w in ("down", "up") for p in ("weight", "bias")
                }
            },
            "eraser_weights.pt",
            "is a Receler file",
        ),
        ({"text_model.encoder.layers.0.mlp.fc1.weight": randn(2, 2)}, "x.safetensors", "holds a whole text encoder"),
        ({"emb_params": randn(2, 6)}, "x.safetensors", "is a textual inversion embedding"),
        ({"clip_l": randn(2, 6), "clip_g": randn(2, 8)}, "x.safetensors", "is a textual inversion embedding"),
        ({"string_to_param": {"*": randn(2, 6)}}, "x.pt", "is a textual inversion embedding"),
        ({"<star>": randn(6)}, "x.bin", "is a textual inversion embedding"),
        ({"controlnet_down_blocks.0.weight": randn(2), "conv_in.weight": randn(2)}, "x.safetensors", "a ControlNet"),
        ({"": randn(2)}, "x.pt", "of no format"),
        ({"a": randn(2), "b": randn(2)}, "x.safetensors", r"of no format that Membrane reads \(it holds a, b\)"),
        ({"epoch": 3}, "x.pt", r"it holds nothing"),
        (randn(3), "x.pt", r"it holds tensor"),
        ([1, 2], "x.pt", "holds one list; expected a dictionary"),
    ],
)
def test_known_but_not_read(put, content, name, message, reader):
    path = put(content, name=name)
    assert pytest.raises(ErasureError, reader, path).match(message)
    refused(path, reader)


# damaged and hostile files


def test_code_in_a_file_is_not_run(put, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = put({"unet": KEY_VALUE, "state": Hostile()}, name="x.pt")
    message = refused(path)
    assert "holds more than weights" in message and "mkdir" in message
    assert not (tmp_path / "ran").exists()


def test_old_layouts_of_pytorch_are_not_opened(put, tmp_path):
    path = str(tmp_path / "x.pt")
    torch.save(KEY_VALUE, path, _use_new_zipfile_serialization=False)
    assert "nor is it a PyTorch file of version 1.6 or later" in refused(path)


def test_torch_load_is_used_in_one_place_and_weights_only():
    """The pack's rule about files with code in them, whatever the call is spelled like."""
    core = Path(__file__).resolve().parents[2] / "core"
    uses = []
    for path in core.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "load" and getattr(node.value, "id", "") == "torch":
                uses.append((path.name, {k.arg: k.value.value for k in parents[node].keywords}))
            assert not (isinstance(node, ast.ImportFrom) and node.module == "torch"), "import torch as a whole"
    assert uses == [("containers.py", {"map_location": "cpu", "weights_only": True, "mmap": True})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "is a Git LFS pointer"),
        (b"not a model", "cannot be read as a safetensors file"),
        (b"\x80\x02}q\x00.", "cannot be read as a safetensors file"),
        (b"PK\x03\x04 and no more", "cannot be read as a PyTorch file"),
        (b"\xff" * 64, "cannot be read as a safetensors file"),
    ],
)
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_what_is_no_model_file(put, content, message, name):
    assert message in refused(put(content, name=name))


def test_a_missing_file(tmp_path):
    assert "cannot be read" in refused(str(tmp_path / "gone.safetensors"))


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_a_truncated_file(put, name, share):
    path = Path(put(pair(f"lora_unet_{SITE}", out=400, width=600), name=name))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "cannot be read" in refused(str(path))


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(10**6, 10**6), torch.zeros(4, 4, device="meta"), torch.eye(3).to_sparse()],
    ids=["a view of one number", "no numbers", "sparse"],
)
def test_a_tensor_that_claims_more_numbers_than_the_file_has(put, tensor):
    path = put({f"lora_unet_{SITE}.lora_up.weight": tensor}, name="x.pt")
    assert "without a stored number for each of its elements" in refused(path)


def test_a_dictionary_that_holds_itself(put):
    content = {"a": randn(2)}
    content["b"] = content
    assert "it holds a" in refused(put(content, name="x.pt"))


def test_what_is_read_does_not_hang_on_the_file(put):
    path = put(pair(f"lora_unet_{SITE}"))
    change = load(path).low_rank[SITE]
    before = change.up.clone()
    with open(path, "r+b") as file:
        file.write(b"\0" * os.path.getsize(path))
    assert torch.equal(change.up, before)


# export


def low_rank(rank=1, alpha=1.0, dtype=torch.float32):
    return {
        SITE: LowRank(randn(8, rank).to(dtype), randn(rank, 6).to(dtype), alpha),
        "down_blocks_0_attentions_0_proj_in": LowRank(randn(8, rank).to(dtype), randn(rank, 8).to(dtype), alpha),
        "conv_in": LowRank(randn(8, rank).to(dtype), randn(rank, 4, 3, 3).to(dtype), alpha, randn(8).to(dtype)),
    }


def export(tmp_path, changes, concepts=("star", "red heart"), **more):
    path = str(tmp_path / "out.safetensors")
    adapter = ErasureAdapter(Card("SPM", concepts, family="SD15", licence="MIT"), {"low_rank": changes})
    kohya.save_low_rank(adapter, path, {layer: f"lora_unet_{layer}" for layer in changes}, **more)
    return path, adapter


def metadata_of(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_export_comes_back_whole(tmp_path, dtype):
    path, adapter = export(tmp_path, low_rank(2, 0.25, dtype), convolutions={"down_blocks_0_attentions_0_proj_in"})
    loaded = load(path)
    assert loaded.card == adapter.card
    for layer, change in adapter.low_rank.items():
        found = loaded.low_rank[layer]
        assert torch.equal(found.up, change.up) and torch.equal(found.down, change.down)
        assert found.up.dtype == dtype and found.alpha == change.alpha
        assert (found.bias is None) == (change.bias is None)
    assert load_file(path)["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"].shape == (2, 8, 1, 1)
    assert load_file(path)["lora_unet_conv_in.lora_up.weight"].shape == (8, 2, 1, 1)


def test_an_export_has_what_the_published_spm_code_reads(tmp_path):
    path, _ = export(tmp_path, low_rank())
    metadata = metadata_of(path)
    assert {key: metadata[key] for key in SPM} == {"prompts": "star,red heart", "rank": "1", "alpha": "1.0"}
    assert metadata["ss_network_dim"] == "1" and metadata["ss_base_model_version"] == "sd_v1"


def test_concepts_with_a_comma_are_not_written_for_the_published_code(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "membrane"):
        path, _ = export(tmp_path, low_rank(), ("star", "heart, red"))
    assert "prompts" not in metadata_of(path) and 'would split "heart, red"' in caplog.text
    assert load(path).card.concepts == ("star", "heart, red")


@pytest.mark.parametrize(("bias", "told"), [(randn(8), True), (None, False)])
def test_an_export_tells_which_programs_do_not_read_its_biases(tmp_path, caplog, bias, told):
    with caplog.at_level(logging.WARNING, "membrane"):
        export(tmp_path, {SITE: LowRank(randn(8, 2), randn(2, 6), 2.0, bias)})
    assert ("biases (.diff_b) of 1 layers" in caplog.text and "diffusers refuses" in caplog.text) is told


def test_an_export_of_several_ranks_is_a_plain_lora(tmp_path):
    path, _ = export(tmp_path, low_rank() | {SITE: LowRank(randn(8, 2), randn(2, 6), 2.0)})
    assert not SPM.keys() & metadata_of(path).keys()
    assert metadata_of(path)["ss_network_dim"] == "2"


def test_an_export_for_another_model(tmp_path):
    adapter = ErasureAdapter(Card("SPM", ("star",)), {"low_rank": low_rank()})
    with pytest.raises(ErasureError, match="lacks 3 of the 3 layers that star changes"):
        kohya.save_low_rank(adapter, str(tmp_path / "out.safetensors"), {})
    assert not os.listdir(tmp_path)


def test_layers_may_share_a_factor(tmp_path):
    shared = randn(1, 6)
    changes = {name: LowRank(randn(8, 1), shared, 1.0) for name in ("a", "b")}
    native.save(ErasureAdapter(Card("SPM", ("star",)), {"low_rank": changes}), str(tmp_path / "x.safetensors"))
    assert set(load(str(tmp_path / "x.safetensors")).low_rank) == set(load(export(tmp_path, changes)[0]).low_rank)


def test_registry_reads_native_files(tmp_path):
    path = str(tmp_path / "x.safetensors")
    native.save(ErasureAdapter(Card("SPM", ("star",)), {"low_rank": low_rank()}), path)
    assert set(load(path).low_rank) == set(low_rank())


# ---------------------------------------------------------------- the contract of a format

SPM_SAYS = {"prompts": "star, heart", "rank": "1", "alpha": "1"}
LECO_SAYS = {"ss_leco_prompt_count": "1", "ss_leco_preview": '[{"target": "a", "neutral": "b", "action": "erase"}]'}
EXPORT_SAYS = {"membrane.format": "lora", "membrane.concepts": '["star"]', "membrane.method": "ESD"}
NATIVE_SAYS = {"membrane.format": "erasure_adapter", "membrane.version": "2", "membrane.concepts": '["star"]'}
OWN_KEYS = {"low_rank.conv_in.up": randn(4, 1), "low_rank.conv_in.down": randn(1, 3)}


@pytest.mark.parametrize(
    ("content", "metadata", "kind", "concepts"),
    [
        (OWN_KEYS, NATIVE_SAYS, "Membrane", ("star",)),
        (pair("lora_unet_conv_in"), SPM_SAYS, "LoRA (kohya)", ("star", "heart")),
        (pair("lora_unet_conv_in"), LECO_SAYS, "LoRA (kohya)", ("a",)),
        (pair("lora_unet_conv_in"), EXPORT_SAYS, "LoRA (kohya)", ("star",)),
        (pair("lora_unet_conv_in"), None, "LoRA (kohya)", ()),
        (pair("unet.conv_in", down="lora_A", up="lora_B", alpha=None), None, "LoRA (PEFT, diffusers)", ()),
    ],
)
def test_a_formats_card_is_the_adapters_without_its_numbers(put, content, metadata, kind, concepts):
    path = put(content, metadata)
    found = registry.format_of(containers.read(path))
    assert found.name == kind and found in registry.FORMATS
    header = labels.header(path)
    assert all(tensor.is_meta for tensor in header.tensors.values()) and registry.format_of(header) is found
    assert found.card(header) == load(path).card == labels.label(path).card
    assert load(path).card.concepts == concepts


@pytest.mark.parametrize("kind", [kind for kind in registry.FORMATS if kind.save], ids=lambda kind: kind.name)
def test_what_a_format_saves_it_reads(tmp_path, kind):
    path, card = str(tmp_path / "x"), Card("ESD", ("star",), family="SD15")
    change = LowRank(randn(4, 2), randn(2, 3, seed=1), 2.0)
    kind.save(ErasureAdapter(card, {"low_rank": {"conv_in": change}}), path)
    contents = containers.read(path)
    assert registry.format_of(contents) is kind and kind.card(contents) == card
    found = kind.parse(contents).low_rank["conv_in"]
    assert torch.equal(found.up, change.up) and torch.equal(found.down, change.down) and found.alpha == 2.0


def test_every_look_alike_is_refused_before_a_format_but_one_that_says_its_name(put):
    tensors = pair("lora_unet_x") | {"lora_unet_y.hada_w1_a": randn(2, 2)}
    assert "LoHa" in refused(put(tensors))
    assert load(put(OWN_KEYS | {"x.hada_w1_a": randn(2, 2)}, NATIVE_SAYS)).card.concepts == ("star",)
