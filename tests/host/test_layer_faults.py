"""Adapters on the layers of every kind of network: names, fused parts, turned outputs, missing layers, rows out of
order. What is right is said by a second network whose weights are edited by hand."""

import os
import re
from dataclasses import replace

import comfy.utils
import folder_paths
import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.adapters.deltas.mask import Mask
from membrane.core.adapters.deltas.neurons import Neurons
from membrane.core.adapters.permeability import FIXED, OFF, TRANSPORT, Permeability
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.errors import ErasureError
from membrane.core.families.sites import site
from membrane.core.host.compat import scheduled
from membrane.core.host.model.layers import layer_keys
from membrane.core.host.model.weights import base_layers, edited_weights, text_weights
from membrane.core.host.patches.stack import apply_stack
from membrane.tools.tiny import networks
from safetensors.torch import load_file, save_file

BOUND = 1e-5  # of the effect, in float32
STAR, HOUSE = "a red star", "a small old house"
RANK = 2


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Tiny:
    """A tiny network and its text encoder."""

    def __init__(self, name, **sizes):
        self.name, self.sizes = name, sizes
        self.model, self.clip = networks.build(name, **sizes), networks.text_encoder(name)

    def text(self, prompt):
        """CONDITIONING of a prompt, made anew: the words of one from before a gate was wanted are not known."""
        return scheduled(self.clip, self.clip.tokenize(prompt))

    def predict(self, model=None, positive=STAR, negative=HOUSE, **options):
        with torch.inference_mode():
            texts = self.text(positive), self.text(negative)
            return networks.predict(model or self.model, *texts, self.name, **options)

    def edited(self, changes):
        """A second network whose parameters have {name: difference} added."""
        other = networks.build(self.name, **self.sizes)
        parameters = dict(other.model.diffusion_model.named_parameters())
        with torch.no_grad():
            for name, difference in changes.items():
                parameters[name] += difference.to(parameters[name])
        return other


@pytest.fixture(scope="module")
def tiny():
    """tiny(name) -> Tiny, or a skip where the host has no such network."""
    known = {}

    def make(name, **sizes):
        key = name, *sizes.items()
        if key not in known:
            try:
                known[key] = Tiny(name, **sizes)
            except networks.NotInThisHost as error:
                pytest.skip(str(error))
        return known[key]

    return make


def change(out, width, seed=0, size=1.0, bias=False):
    up, down = numbers(seed, out, RANK) * size, numbers(seed + 1, RANK, width) * width**-0.5
    return LowRank(up, down, float(RANK), numbers(seed + 2, out) * size if bias else None)


def product(delta):
    return delta.up @ delta.down * delta.scale


def stacked(changes, mode=FIXED, strength=1.0, negative="same as positive", kind="low_rank", **more):
    adapter = ErasureAdapter(Card("SPM", (STAR,)), {kind: changes})
    return ErasureStack((Entry(adapter, strength, permeability=Permeability(mode, negative=negative), **more),))


def close(found, expected, base, bound=BOUND):
    for mine, right, plain in zip(found, expected, base):
        effect = (right - plain).double().norm()
        assert effect > 1e-4 * plain.double().norm(), "the adapter does nothing here"
        assert (mine - right).double().norm() <= bound * effect


def turned(weight):
    """Rows as programs have them that put the shift before the scale."""
    return torch.cat(weight.chunk(2)[::-1])


BOTH = pytest.mark.parametrize("mode", [FIXED, TRANSPORT])


# ---------------------------------------------------------------- layers whose outputs other programs turn round


@BOTH
@pytest.mark.parametrize(
    ("name", "place", "layer", "bias"),
    [
        ("flux_dev", "norm_out_linear", "final_layer.adaLN_modulation.1", False),
        ("flux_dev", "norm_out_linear", "final_layer.adaLN_modulation.1", True),
        ("sd3", "norm_out_linear", "final_layer.adaLN_modulation.1", True),
        ("sd3", "transformer_blocks_1_norm1_context_linear", "joint_blocks.1.context_block.adaLN_modulation.1", True),
        ("auraflow", "norm_out_linear", "modF.1", False),  # it has none
    ],
)
def test_turned_outputs(tiny, name, place, layer, bias, mode):
    """The scale of `norm_out` stands before the shift in diffusers' names."""
    subject = tiny(name)
    module = subject.model.model.diffusion_model.get_submodule(layer)
    delta = change(module.out_features, module.in_features, bias=bias)
    edits = {f"{layer}.weight": turned(product(delta))} | ({f"{layer}.bias": turned(delta.bias)} if bias else {})
    base, expected = subject.predict(), subject.predict(subject.edited(edits))
    erased = apply_stack(subject.model, stacked({place: delta}, mode), subject.clip)
    close(subject.predict(erased), expected, base)


# ---------------------------------------------------------------- layers that this variant lacks


@BOTH
@pytest.mark.parametrize(
    ("name", "lacks", "has"),
    [
        ("flux_schnell", "guidance_in_in_layer", "txt_in"),
        ("chroma", "transformer_blocks_0_norm1_linear", "txt_in"),
        ("sd3", "transformer_blocks_0_attn2_to_q", "context_embedder"),
    ],
)
def test_layers_that_a_variant_lacks_are_missing(tiny, caplog, name, lacks, has, mode):
    subject = tiny(name)
    module = subject.model.model.diffusion_model.get_submodule(has)
    changes = {lacks: change(8, 8), has: change(module.out_features, module.in_features)}
    erased = apply_stack(subject.model, stacked(changes, mode), subject.clip)
    assert "1 of 2 changes belong to layers this model does not have" in caplog.text
    expected = subject.predict(subject.edited({f"{has}.weight": product(changes[has])}))
    close(subject.predict(erased), expected, subject.predict())
    with pytest.raises(ErasureError, match="None of the 1 layers that .* changes exists in this"):
        apply_stack(subject.model, stacked({lacks: change(8, 8)}, mode), subject.clip)


# ---------------------------------------------------------------- biases of parts of a fused layer


@BOTH
def test_biases_of_queries_keys_and_values(tiny, mode):
    subject = tiny("flux_dev")
    layer, size = "double_blocks.0.txt_attn.qkv", 64
    names = [f"transformer_blocks_0_attn_add_{part}_proj" for part in "qkv"]
    changes = {name: change(size, size, 10 * i, bias=True) for i, name in enumerate(names)}
    edits = {
        f"{layer}.weight": torch.cat([product(delta) for delta in changes.values()]),
        f"{layer}.bias": torch.cat([delta.bias for delta in changes.values()]),
    }
    erased = apply_stack(subject.model, stacked(changes, mode), subject.clip)
    close(subject.predict(erased), subject.predict(subject.edited(edits)), subject.predict())


# ---------------------------------------------------------------- export


def layers_of(model, pattern=""):
    """{site in the host's names: module} of all linear layers."""
    named = model.model.diffusion_model.named_modules()
    return {n: m for n, m in named if isinstance(m, torch.nn.Linear) and pattern in n}


def exported(node, subject, adapter, prefix, format="LoRA (kohya)"):
    """Tensors of an adapter that was saved as a LoRA, and the model with them by the host's own loader."""
    name = node("MembraneSaveAdapter", adapter=adapter, filename_prefix=prefix, format=format,
                model=subject.model).ui["text"][0]  # fmt: skip
    tensors = load_file(folder_paths.get_full_path("loras", name))
    loaded, _ = node("LoraLoader", model=subject.model, clip=subject.clip, lora_name=name, strength_model=1.0,
                     strength_clip=0.0)  # fmt: skip
    return tensors, loaded


@pytest.mark.parametrize("name", ["hidream", "mochi", "boogu", "omnigen2", "qwen_image", "wan21", "sd15"])
def test_the_hosts_loader_reads_every_exported_layer(tiny, node, name, caplog):
    """Also those called to_out, a list of one layer in some networks and the layer itself in others."""
    subject = tiny(name)
    found = {n: m for n, m in layers_of(subject.model).items() if ".attn" in n or "cross_attn" in n}
    changes = {site(n): change(m.out_features, m.in_features, i) for i, (n, m) in enumerate(found.items())}
    adapter = ErasureAdapter(Card("SPM", (STAR,)), {"low_rank": changes})
    tensors, loaded = exported(node, subject, adapter, f"export_{name}")
    assert len(tensors) == 3 * len(changes)
    mine = apply_stack(subject.model, stacked(changes), subject.clip)
    close(subject.predict(loaded), subject.predict(mine), subject.predict())
    assert "not loaded" not in caplog.text


# layers of SDXL as the trainers of kohya's scripts name them, of every kind that adapters change
SDXL_NAMES = re.compile(
    r"lora_unet_((input_blocks_\d_[01]|middle_block_[012]|output_blocks_\d_[012])_"
    r"(proj_in|proj_out|transformer_blocks_\d_(attn[12]_to_(q|k|v|out_0)|ff_net_0_proj|ff_net_2)"
    r"|in_layers_2|emb_layers_1|out_layers_3|skip_connection|op|conv)"
    r"|time_embed_[02]|label_emb_0_[02]|input_blocks_0_0|out_2)$"
)


def test_sdxl_is_exported_in_the_names_of_kohyas_own_scripts(tiny, node, caplog):
    """From names of either kind, and the host's loader and the pack's own read them."""
    subject = tiny("sdxl")
    table = comfy.utils.unet_to_diffusers(subject.model.model.model_config.unet_config)
    theirs = {ours.removesuffix(".weight"): site(name) for name, ours in table.items()}
    changes = {}
    for i, (name, module) in enumerate(layers_of(subject.model).items()):
        own = site(name)
        changes[theirs.get(name, own) if i % 2 else own] = change(module.out_features, module.in_features, i)
    adapter = ErasureAdapter(Card("SPM", (STAR,)), {"low_rank": changes})
    tensors, loaded = exported(node, subject, adapter, "original", "LoRA (kohya, original names)")
    assert len(tensors) == 3 * len(changes)
    assert not [key for key in tensors if not SDXL_NAMES.match(key.partition(".")[0])]
    mine = apply_stack(subject.model, stacked(changes), subject.clip)
    close(subject.predict(loaded), subject.predict(mine), subject.predict())
    assert "not loaded" not in caplog.text
    assert any("down_blocks" in key for key in exported(node, subject, adapter, "usual")[0])


def test_a_lora_of_factors_only(tiny, node, caplog):
    subject = tiny("sdxl")
    layers = list(layers_of(subject.model, "attn2").items())[:3]
    changes = {site(n): change(m.out_features, m.in_features, i, bias=i < 2) for i, (n, m) in enumerate(layers)}
    adapter = ErasureAdapter(Card("SPM", (STAR,)), {"low_rank": changes})
    tensors, loaded = exported(node, subject, adapter, "factors", "LoRA (kohya, factors only)")
    assert {key.partition(".")[2] for key in tensors} == {"lora_up.weight", "lora_down.weight", "alpha"}
    assert "leaves out its changes of the biases of 2 layers" in caplog.text
    assert "diffusers refuses" not in caplog.text
    mine = apply_stack(subject.model, stacked({n: replace(c, bias=None) for n, c in changes.items()}), subject.clip)
    close(subject.predict(loaded), subject.predict(mine), subject.predict())
    name, module = layers[0]
    masked = {site(name): Mask.of(torch.ones(module.weight.shape) > 0)}
    with pytest.raises(ErasureError, match="takes single weights away, which no factors hold"):
        exported(node, subject, ErasureAdapter(Card("x", ()), {"mask": masked}), "masks", "LoRA (kohya, factors only)")


@pytest.mark.parametrize("network", ["flux_dev", "z_image", "sd3"])
def test_parts_of_fused_layers_are_exported_as_the_whole_layer(tiny, node, network):
    subject = tiny(network)
    parts = {"flux_dev": ["single_transformer_blocks_1_attn_to_k", "single_transformer_blocks_1_proj_mlp",
                          "transformer_blocks_0_attn_to_q", "transformer_blocks_0_attn_to_v", "norm_out_linear"],
             "z_image": ["layers_0_attention_to_q", "layers_0_attention_to_k"],
             "sd3": ["transformer_blocks_0_attn_add_k_proj", "transformer_blocks_0_attn_to_q"]}[network]  # fmt: skip
    keys, changes = layer_keys(subject.model), {}
    for i, name in enumerate(parts):
        plain, part, *_ = keys[name]
        module = subject.model.model.diffusion_model.get_submodule(
            plain.removeprefix("diffusion_model.").removesuffix(".weight")
        )
        out = module.out_features if part is None else part[2]
        changes[name] = change(out, module.in_features, 10 * i, size=0.5)
    adapter = ErasureAdapter(Card("ESD", (STAR,)), {"low_rank": changes})
    tensors, loaded = exported(node, subject, adapter, f"fused_{network}")
    assert {key.split(".")[0] for key in tensors} == {
        "lora_unet_" + keys[name][0].removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")
        for name in parts
    }
    mine = apply_stack(subject.model, stacked(changes), subject.clip)
    close(subject.predict(loaded), subject.predict(mine), subject.predict())


def test_what_a_lora_cannot_hold_is_not_exported(tiny, node):
    subject = tiny("flux_dev")
    neurons = {"double_blocks_0_img_mlp_2": Neurons(torch.ones(256) > 0, 64)}
    adapter = ErasureAdapter(Card("x", ()), {"neurons": neurons})
    with pytest.raises(ErasureError, match="holds neurons, kinds of changes that a LoRA cannot hold"):
        exported(node, subject, adapter, "neurons")


# ---------------------------------------------------------------- neurons


@BOTH
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_neurons_that_are_switched_off(tiny, mode, strength):
    subject, layers, edits = tiny("flux_dev"), ("double_blocks.0.img_mlp.2", "single_blocks.1.linear2"), {}
    changes = {}
    for i, layer in enumerate(layers):
        module = subject.model.model.diffusion_model.get_submodule(layer)
        off = numbers(i, module.in_features) > 0
        changes[layer.replace(".", "_")] = Neurons(off, module.out_features)
        edits[f"{layer}.weight"] = -strength * module.weight.detach() * off
    erased = apply_stack(subject.model, stacked(changes, mode, strength, kind="neurons"), subject.clip)
    close(subject.predict(erased), subject.predict(subject.edited(edits)), subject.predict())


# ---------------------------------------------------------------- extraction from files of transformers


def written(name, tensors):
    """Name of a file in models/erasure_adapters that holds tensors."""
    folder = folder_paths.get_folder_paths("erasure_adapters")[0]
    os.makedirs(folder, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, os.path.join(folder, name))
    return name


def weight_and_bias(subject, name):
    """What a name of diffusers stands for in the host's network, as the host's own table of keys has it; of a second
    network, as the first may have patches in its weights."""
    key = layer_keys(subject.model)[site(name)]
    plain, part, *turn = (key, None) if isinstance(key, str) else key
    path = plain.removeprefix("diffusion_model.").removesuffix(".weight")
    module = subject.edited({}).model.diffusion_model.get_submodule(path)
    found = {"weight": module.weight.detach()} | ({} if module.bias is None else {"bias": module.bias.detach()})
    found = found if part is None else {kind: tensor.narrow(*part) for kind, tensor in found.items()}
    return path, {kind: (turn[0](tensor) if turn else tensor).clone() for kind, tensor in found.items()}


@BOTH
@pytest.mark.parametrize(
    ("network", "layers"),
    [
        # UCE's entries of Flux and HiDream
        ("flux_dev", ["context_embedder", "time_text_embed.text_embedder.linear_1"]),
        ("hidream", ["caption_projection.3.linear", "caption_projection.48.linear"]),
        ("qwen_image", ["txt_in"]),
        # ESD's layers, parts of fused ones
        ("flux_dev", [*(f"transformer_blocks.0.attn.{name}" for name in ("to_k", "to_v", "add_q_proj")),
                      "single_transformer_blocks.0.attn.to_q", "norm_out.linear"]),
        ("z_image", ["layers.1.attention.to_q", "layers.0.attention.to_v", "layers.0.attention.to_out.0"]),
        ("sd3", ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_v_proj"]),
    ],
)  # fmt: skip
def test_extraction_from_the_files_of_transformers(tiny, node, network, layers, mode):
    """Every layer of the file is found, and the adapter that comes of it is the edit."""
    subject = tiny(network)
    if any(site(layer) not in layer_keys(subject.model) for layer in layers):
        pytest.skip(f"this host has no {networks.NETWORKS[network].config}")
    tensors, edits = {}, {}
    for i, layer in enumerate(layers):
        path, stored = weight_and_bias(subject, layer)
        delta = product(change(*stored["weight"].shape, 10 * i))
        tensors |= {f"{layer}.{kind}": tensor for kind, tensor in stored.items()}
        tensors[f"{layer}.weight"] = stored["weight"] + delta
        key = layer_keys(subject.model)[site(layer)]
        plain, part, *turn = (key, None) if isinstance(key, str) else key
        delta = turn[0](delta) if turn else delta
        module = subject.model.model.diffusion_model.get_submodule(path)
        whole = edits.setdefault(f"{path}.weight", torch.zeros_like(module.weight))
        (whole if part is None else whole.narrow(*part)).add_(delta)
    name = written(f"edited_{network}_{len(layers)}.safetensors", tensors)
    adapter, report = node(
        "MembraneExtract", model=subject.model, weights_file=name, concepts=STAR, energy=1.0, max_rank=8
    )
    assert len(adapter.low_rank) == len(layers), report
    base, expected = subject.predict(), subject.predict(subject.edited(edits))
    erased = apply_stack(subject.model, stacked(adapter.low_rank, mode), subject.clip)
    close(subject.predict(erased), expected, base, 1e-3)  # the adapter's factors are float16


# ---------------------------------------------------------------- weights that are stored as something else


@pytest.mark.parametrize("kind", networks.LAYOUTS)
@pytest.mark.parametrize("network", ["flux_dev", "wan21"])
def test_quantised_weights_are_read_as_the_numbers_they_stand_for(kind, network):
    try:
        model, numbers = networks.quantised(network, kind)
    except networks.NotInThisHost as error:
        pytest.skip(str(error))
    layers = base_layers(model)
    assert numbers
    for key, expected in numbers.items():
        found = layers[site(key)].read()[0]
        assert found.dtype == torch.float32 and torch.equal(found, expected)
    plain = set(edited_weights(model).tensors)
    assert {(site(key), "weight") for key in numbers} <= plain
    for reader, weight in text_weights(model):
        assert torch.equal(weight, numbers[reader]) if reader in numbers else weight.isfinite().all()


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int8_tensorwise"])
def test_an_edit_of_quantised_weights_is_extracted(kind, node):
    try:
        model, numbers = networks.quantised("flux_dev", kind)
    except networks.NotInThisHost as error:
        pytest.skip(str(error))
    key = "diffusion_model.txt_in.weight"
    delta = product(change(*numbers[key].shape))
    name = written(f"edited_{kind}.safetensors", {"txt_in.weight": numbers[key] + delta})
    adapter, _ = node("MembraneExtract", model=model, weights_file=name, concepts=STAR, energy=1.0, max_rank=8)
    assert (product(adapter.low_rank["txt_in"]) - delta).norm() < 1e-3 * delta.norm()


# ---------------------------------------------------------------- layers that get the batch in an order of their own


MIXED = {
    "hidream": ["double_stream_blocks.0.block.ff_i.experts.0.w1", "double_stream_blocks.1.block.ff_i.experts.1.w2"],
    "cosmos1": ["blocks.block0.blocks.0.block.attn.to_q.0", "blocks.block1.blocks.2.block.layer1"],
    "pixart_sigma": ["blocks.0.cross_attn.kv_linear"],
    "hunyuan_dit": ["pooler.v_proj"],
    "pixeldit": ["pixel_blocks.0.mlp.fc1"],
}


def gated_and_edited(subject, layers):
    """(changes, the edits that they are) of layers of a network."""
    changes, edits = {}, {}
    for i, layer in enumerate(layers):
        module = subject.model.model.diffusion_model.get_submodule(layer)
        changes[site(layer)] = change(module.out_features, module.in_features, 10 * i)
        edits[f"{layer}.weight"] = product(changes[site(layer)])
    return changes, edits


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("rows", [1, 2])
def test_equal_gates_are_right_whatever_the_order(tiny, name, rows):
    """The negative prompt gets the opening of the positive one, as published, so all pictures of a batch have one."""
    subject = tiny(name)
    changes, edits = gated_and_edited(subject, MIXED[name])
    base, expected = subject.predict(rows=rows), subject.predict(subject.edited(edits), rows=rows)
    erased = apply_stack(subject.model, stacked(changes, TRANSPORT), subject.clip)
    close(subject.predict(erased, rows=rows), expected, base)


@pytest.mark.parametrize("name", MIXED)
def test_gates_that_differ_are_refused_by_the_layers_name(tiny, name):
    subject = tiny(name)
    changes, _ = gated_and_edited(subject, MIXED[name][:1])
    erased = apply_stack(subject.model, stacked(changes, TRANSPORT, negative=OFF), subject.clip)
    with pytest.raises(ErasureError, match=f"The layer {MIXED[name][0]} gets the .* pictures of a batch in an order"):
        subject.predict(erased, STAR, "a blue cat", rows=2)


# ---------------------------------------------------------------- layers that prepare the text


@BOTH
def test_layers_that_run_while_the_text_is_prepared(tiny, mode):
    subject = tiny("anima")
    layers = ["llm_adapter.blocks.0.cross_attn.k_proj", "llm_adapter.blocks.0.mlp.0", "llm_adapter.out_proj"]
    changes, edits = gated_and_edited(subject, layers)
    erased = apply_stack(subject.model, stacked(changes, mode), subject.clip)
    close(subject.predict(erased), subject.predict(subject.edited(edits)), subject.predict())


def test_the_negative_prompt_of_layers_that_prepare_the_text(tiny):
    subject = tiny("anima")
    changes, edits = gated_and_edited(subject, ["llm_adapter.blocks.0.cross_attn.v_proj"])
    erased = apply_stack(subject.model, stacked(changes, TRANSPORT, negative=OFF), subject.clip)
    cond, uncond = subject.predict(erased)
    base, expected = subject.predict(), subject.predict(subject.edited(edits))
    close([cond], expected[:1], base[:1])
    assert torch.equal(uncond, base[1])


def test_such_layers_cannot_begin_with_a_step(tiny):
    subject = tiny("anima")
    changes, _ = gated_and_edited(subject, ["llm_adapter.out_proj"])
    erased = apply_stack(subject.model, stacked(changes, start_percent=0.2), subject.clip)
    with pytest.raises(ErasureError, match="The layer llm_adapter.out_proj prepares the text once for all steps"):
        subject.predict(erased)


@pytest.mark.parametrize(("kind", "mode"), [("low_rank", TRANSPORT), ("neurons", FIXED), ("neurons", TRANSPORT)])
@pytest.mark.parametrize(("network", "layer"), [("wan21", "blocks.1.ffn.2"), ("ltxv", "transformer_blocks.1.ff.net.2")])
def test_layers_that_the_host_folds_an_activation_into(network, layer, kind, mode):
    """Of weights stored as int8; the host rounds what such layers read too, so only most of the effect is the same."""
    try:
        model, numbers = networks.quantised(network, "int8_tensorwise")
    except networks.NotInThisHost as error:
        pytest.skip(str(error))
    subject, weight = Tiny(network), numbers[f"diffusion_model.{layer}.weight"]
    if kind == "low_rank":
        delta = change(*weight.shape, size=2.0)
        difference = product(delta)
    else:
        delta = Neurons(torch.arange(weight.shape[1]) % 2 > 0, len(weight))
        difference = delta.difference(weight)
    erased = apply_stack(model, stacked({site(layer): delta}, mode, kind=kind), subject.clip)
    texts = subject.text(STAR), subject.text(HOUSE)
    with torch.no_grad():  # such weights cannot be loaded in inference mode
        found, before = (networks.predict(m, *texts, network) for m in (erased, model))
    edited, plain = subject.predict(subject.edited({f"{layer}.weight": difference})), subject.predict()
    for mine, without, right, base in zip(found, before, edited, plain):
        effect = (right - base).double()
        assert ((mine - without).double() - effect).norm() < 0.2 * effect.norm()


# ---------------------------------------------------------------- convolutions of videos, names of other programs


@BOTH
def test_the_convolution_that_cuts_a_video_into_pieces(tiny, mode):
    subject = tiny("wan21")
    module = subject.model.model.diffusion_model.patch_embedding
    up, down = numbers(0, module.out_channels, RANK), numbers(1, RANK, module.in_channels, *module.kernel_size) * 0.2
    delta = LowRank(up, down, float(RANK), numbers(2, module.out_channels))
    weight = torch.einsum("or,rithw->oithw", up, down)
    expected = subject.predict(subject.edited({"patch_embedding.weight": weight, "patch_embedding.bias": delta.bias}))
    erased = apply_stack(subject.model, stacked({"patch_embedding": delta}, mode), subject.clip)
    close(subject.predict(erased), expected, subject.predict())


# what a published LoRA of each kind names its layers, and what these are in the host's network
ADDED, DUAL = ("add_q_proj", "add_k_proj"), ("to_q", "to_k", "add_q_proj", "add_k_proj")
DIFFUSERS = "transformer.transformer_blocks.{}.attn.{}.lora_{}.weight"
PUBLISHED = {
    "GEM on Flux": ("flux_dev", DIFFUSERS, DUAL),
    "GEM on SD3": ("sd3", DIFFUSERS, DUAL),
    "GEM on Qwen-Image": ("qwen_image", "base_model.model.transformer_blocks.{}.attn.{}.lora_{}.weight", DUAL),
    "EraseAnything": ("flux_dev", DIFFUSERS, ADDED),
    "Concept Sliders": ("flux_dev", "lora_unet_{}_attn_{}.lora_{}.weight", ("to_q", "to_k")),
    "Wan Fun": ("wan21", "lora_unet__blocks_{}_{}.lora_{}.weight", ("cross_attn_k", "ffn_2")),
    "Mochi's own": ("mochi", "blocks.{}.attn.{}.lora_{}", ("qkv_x", "qkv_y", "proj_x")),
    "in by rank": ("flux_dev", "single_transformer_blocks.{}.attn.{}.lora.{}", ("to_q", "to_v")),
}
FACTORS = {"Concept Sliders": ("down", "up"), "Wan Fun": ("down", "up")}


@BOTH
@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_loras_change_the_layers_that_they_name(tiny, node, kind, mode):
    network, pattern, parts = PUBLISHED[kind]
    subject, tensors, edits = tiny(network), {}, {}
    first, second = FACTORS.get(kind, ("A", "B"))
    blocks = ("transformer_blocks_0", "single_transformer_blocks_1") if kind == "Concept Sliders" else (0, 1)
    for i, (block, part) in enumerate((block, part) for block in blocks for part in parts):
        name = site(pattern.format(block, part, "X").partition(".lora")[0])
        path, stored = weight_and_bias(subject, name)
        delta = change(*stored["weight"].shape, 10 * i, size=0.5)
        transposed = kind == "in by rank"
        tensors[pattern.format(block, part, first)] = delta.down.T if transposed else delta.down
        tensors[pattern.format(block, part, second)] = delta.up.T if transposed else delta.up
        key = layer_keys(subject.model)[name]
        module = subject.model.model.diffusion_model.get_submodule(path)
        whole = edits.setdefault(f"{path}.weight", torch.zeros(module.weight.shape))
        (whole if isinstance(key, str) else whole.narrow(*key[1])).add_(product(delta))
    adapter = node("MembraneLoadAdapter", adapter_name=written("published.safetensors", tensors))[0]
    assert adapter.card.method == kind.partition(" on")[0] or adapter.card.method == "LoRA"
    assert len(adapter.low_rank) == len(blocks) * len(parts)
    erased = apply_stack(subject.model, stacked(adapter.low_rank, mode), subject.clip)
    close(subject.predict(erased), subject.predict(subject.edited(edits)), subject.predict())


@pytest.mark.parametrize("prompt", [STAR, "a " * 40 + "star"], ids=["short", "long"])
def test_a_file_of_z_erase_changes_the_texts_rows_alone(tiny, node, prompt):
    """Z-Image fills the text up to 32 rows, or 64, and they stand before the picture's."""
    subject, tensors, changes = tiny("z_image"), {}, {}
    for i, name in enumerate(f"layers.{block}.attention.to_{part}" for block in (0, 1) for part in "qk"):
        _, stored = weight_and_bias(subject, name)
        changes[name] = change(*stored["weight"].shape, 10 * i)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = changes[name].down, changes[name].up
    adapter = node("MembraneLoadAdapter", adapter_name=written("z_erase.safetensors", tensors))[0]
    stack = node("MembraneStack", adapter=adapter, strength=0.7)[0]
    erased = node("MembraneApply", model=subject.model, clip=subject.clip, stack=stack)[0]
    other, count = subject.edited({}), 32 if prompt == STAR else 64
    for block in (0, 1):
        module = other.model.diffusion_model.layers[block].attention.qkv
        terms = torch.zeros(module.weight.shape)
        terms[:512] = torch.cat([product(changes[f"layers.{block}.attention.to_{part}"]) for part in "qk"])

        def forward(x, module=module, terms=terms):
            y = type(module).forward(module, x)
            y[:, :count] += 0.7 * x[:, :count] @ terms.T
            return y

        module.forward = forward
    found, base = (subject.predict(model, prompt, prompt) for model in (erased, subject.model))
    close(found, subject.predict(other, prompt, prompt), base)
