"""Files of other erasures, as each of their programs writes them: known by their keys, and what they change."""

import json
import logging

import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.beside import Bypass, Rows
from membrane.core.adapters.deltas.delta import Term
from membrane.core.adapters.deltas.low_rank import LowRank, Part, beside
from membrane.core.errors import ErasureError
from membrane.core.formats import containers, labels, native, registry
from membrane.core.formats.registry import load, load_weights
from safetensors.torch import save_file


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def put(tmp_path):
    """Writes tensors as a file, safetensors or PyTorch's by the end of its name, and returns its path."""

    def write(content, name="x.safetensors", metadata=None):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif name.endswith(".safetensors"):
            save_file({key: tensor.contiguous() for key, tensor in content.items()}, str(path), metadata)
        else:
            torch.save(content, str(path))
        return str(path)

    return write


def peft(layers, width=6, out=8, rank=2, prefix="transformer."):
    """Tensors of a LoRA with PEFT's names."""
    tensors = {}
    for i, layer in enumerate(layers):
        tensors[f"{prefix}{layer}.lora_A.weight"] = randn(rank, width, seed=2 * i)
        tensors[f"{prefix}{layer}.lora_B.weight"] = randn(out, rank, seed=2 * i + 1)
    return tensors


def product(change):
    return change.scale * torch.einsum("or,r...->o...", change.up.double(), change.down.double())


def targets(*names, blocks=3):
    return [f"transformer_blocks.{block}.attn.{name}" for block in range(blocks) for name in names]


# ---------------------------------------------------------------- LoRAs that a method is known by


@pytest.mark.parametrize(
    ("layers", "method"),
    [
        (targets("add_k_proj", "add_q_proj", blocks=19), "EraseAnything"),
        (targets("add_k_proj", "add_q_proj", "to_q", "to_k"), "GEM"),
        (targets("add_k_proj", "add_q_proj", "to_q", "to_k", "to_v"), "LoRA"),
        (targets("add_k_proj", "add_q_proj") + targets("to_q", blocks=1), "LoRA"),
        (["single_transformer_blocks.0.attn.to_q", *targets("add_k_proj", "add_q_proj")], "LoRA"),
    ],
)
@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.", ""])
def test_methods_known_by_their_layers(put, layers, method, prefix):
    path = put(peft(layers, prefix=prefix))
    adapter = load(path)
    assert adapter.card == Card(method, ()) == labels.label(path).card
    assert set(adapter.low_rank) == {layer.replace(".", "_") for layer in layers}
    assert all(change.scale == 1 for change in adapter.low_rank.values())


def test_concept_sliders_for_flux(put):
    tensors = {}
    for name in ("transformer_blocks_0_attn_to_q", "single_transformer_blocks_3_attn_to_k"):
        tensors |= {f"lora_unet_{name}.lora_down.weight": randn(1, 6), f"lora_unet_{name}.lora_up.weight": randn(8, 1)}
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
    assert load(put(tensors, "slider.pt")).card == Card("Concept Sliders", ())
    few = {key: tensor for key, tensor in tensors.items() if "single" not in key}  # as other trainers name Qwen-Image's
    assert load(put(few)).card == Card("LoRA", ())


# ---------------------------------------------------------------- Z-Erase


def z_erase(rank=4):
    tensors = {}
    for i in (0, 1, 29):
        for part in "qk":
            name = f"layers.{i}.attention.to_{part}"
            tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = (
                randn(rank, 6),
                randn(8, rank, seed=i),
            )
    return tensors


def test_z_erase_changes_the_texts_rows_alone(put, caplog):
    path = put(z_erase())
    with caplog.at_level(logging.INFO, "membrane"):
        adapter = load(path)
    assert "strengths from 10 to 15" in caplog.text
    assert adapter.card.method == "Z-Erase" and not adapter.low_rank and labels.label(path).card == adapter.card
    changes = adapter.deltas["text_rows"]
    assert set(changes) == {f"layers_{i}_attention_to_{part}" for i in (0, 1, 29) for part in "qk"}
    change = changes["layers_29_attention_to_q"]
    assert change.on_text and change.scale == 1 and torch.equal(change.up, randn(8, 4, seed=29))
    with pytest.raises(ErasureError, match="use Load Erasure Adapter"):
        load_weights(path)


def test_an_ordinary_lora_of_the_same_layers_is_none(put):
    ordinary = z_erase() | {"layers.0.attention.to_q.alpha": torch.tensor(1.0)}
    assert load(put(ordinary)).card.method == "LoRA" and load(put(ordinary)).low_rank
    assert load(put(peft(["layers.0.attention.to_q"], prefix=""))).low_rank


def test_changes_of_the_texts_rows_in_a_native_file(put, tmp_path):
    adapter, path = load(put(z_erase())), str(tmp_path / "native.safetensors")
    native.save(adapter, path)
    again = load(path)
    assert again.card == adapter.card and again.deltas.keys() == {"text_rows"}
    for site, change in adapter.deltas["text_rows"].items():
        found = again.deltas["text_rows"][site]
        assert torch.equal(found.up, change.up) and torch.equal(found.down, change.down) and found.alpha == change.alpha


# ---------------------------------------------------------------- transposed, Genmo's and LoKr


@pytest.mark.parametrize("shape", [(6, 2, 8), (8, 2, 8), (4, 4, 4)])
def test_factors_of_in_by_rank(put, caplog, shape):
    width, rank, out = shape
    a, b = randn(width, rank), randn(rank, out, seed=1)
    name = "single_transformer_blocks.3.attn.to_q"
    with caplog.at_level(logging.INFO, "membrane"):
        change = load(put({f"{name}.lora.A": a, f"{name}.lora.B": b})).low_rank[name.replace(".", "_")]
    assert torch.allclose(product(change), (a.double() @ b.double()).T, atol=1e-12)
    assert "uses strength 4" in caplog.text


def test_the_same_names_with_factors_of_rank_by_in(put):
    a, b = randn(2, 6), randn(8, 2, seed=1)
    change = load(put({"blocks.0.attn.to_q.lora.A": a, "blocks.0.attn.to_q.lora.B": b})).low_rank["blocks_0_attn_to_q"]
    assert torch.allclose(product(change), b.double() @ a.double(), atol=1e-12)


def test_genmo_writes_no_weight_behind_its_factors(put):
    a, b = randn(2, 6), randn(8, 2, seed=1)
    found = load(put({"blocks.0.attn.qkv_x.lora_A": a, "blocks.0.attn.qkv_x.lora_B": b}))
    assert torch.equal(found.low_rank["blocks_0_attn_qkv_x"].down, a)
    with pytest.raises(ErasureError, match="no part of a LoRA"):
        load(put({"x.lora_A.weight": a, "x.lora_B.weight": b, "x.lora_B.bias": randn(8)}))


def lokr(convolution=False, alpha=2.0):
    """LoKr's tensors of a layer and the change that its formula gives."""
    name = "lora_unet_down_blocks_0_" + ("resnets_0_conv1" if convolution else "attentions_0_proj_in")
    w1_a, w1_b, w2_a = randn(4, 2), randn(2, 3, seed=1), randn(5, 2, seed=2)
    w2_b = randn(2, 7 * (9 if convolution else 1), seed=3)
    whole = alpha / 2 * torch.kron((w1_a @ w1_b).double(), (w2_a @ w2_b).double())
    parts = {"lokr_w1_a": w1_a, "lokr_w1_b": w1_b, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "alpha": torch.tensor(alpha)}
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}, whole.view(
        20, 21, 3, 3
    ) if convolution else whole


@pytest.mark.parametrize("convolution", [False, True])
def test_lokr_of_split_factors_is_a_lora(put, convolution):
    tensors, whole = lokr(convolution)
    path = put(tensors)
    (change,) = load(path).low_rank.values()
    assert change.rank == 4 and (product(change) - whole).norm() < 1e-6 * whole.norm()
    assert labels.label(path).card.method == "LoRA"


@pytest.mark.parametrize("drop", ["lokr_w1_b", "lokr_w2_a"])
def test_lokr_that_lacks_a_factor(put, drop):
    tensors, _ = lokr()
    with pytest.raises(ErasureError, match="expected four factors that fit together"):
        load(put({key: tensor for key, tensor in tensors.items() if drop not in key}))


def test_lokr_with_a_whole_factor_is_refused_as_before(put):
    tensors, _ = lokr()
    with pytest.raises(ErasureError, match="holds LoKr factors"):
        load(put(tensors | {"lora_unet_y.lokr_w1": randn(2, 2)}))


# ---------------------------------------------------------------- settings that PEFT keeps beside the file


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": 4, "lora_alpha": 16}, 4.0),
        ({"r": 4, "lora_alpha": 16, "use_rslora": True}, 8.0),
        ({"r": 4, "lora_alpha": 16, "alpha_pattern": {"attn.to_k": 2}}, 0.5),
        ({"r": 8, "lora_alpha": 16, "rank_pattern": {"attn.to_k": 4}}, 4.0),
        ({"r": 4, "lora_alpha": 4}, 1.0),
    ],
)
@pytest.mark.parametrize("name", ["peft/adapter_model.safetensors", "peft/adapter_model.bin"])
def test_pefts_settings_beside_the_file(put, settings, scale, name):
    path = put(peft(targets("to_k", blocks=1), rank=4, prefix="base_model.model."), name)
    put(json.dumps(settings).encode(), "peft/adapter_config.json")
    assert load(path).low_rank["transformer_blocks_0_attn_to_k"].scale == scale


def test_settings_beside_a_file_of_another_name_are_not_its(put):
    path = put(peft(targets("to_k", blocks=1), rank=4), "peft/other.safetensors")
    put(json.dumps({"lora_alpha": 16}).encode(), "peft/adapter_config.json")
    assert load(path).low_rank["transformer_blocks_0_attn_to_k"].scale == 1


@pytest.mark.parametrize("text", [b"[1]", b"{", b'{"lora_alpha": "x"}', b"\xff\xfe"])
def test_damaged_settings_beside_the_file(put, text):
    path = put(peft(targets("to_k", blocks=1)), "peft/adapter_model.safetensors")
    put(text, "peft/adapter_config.json")
    with pytest.raises(ErasureError, match="adapter_config.json is no JSON object|has the alpha x"):
        load(path)


def test_missing_settings_are_said(put, caplog):
    with caplog.at_level(logging.WARNING, "membrane"):
        load(put(peft(targets("to_k", blocks=1), prefix="base_model.model."), "peft/adapter_model.safetensors"))
    assert "does not say its alpha, which PEFT keeps in adapter_config.json" in caplog.text


# ---------------------------------------------------------------- masks of Minimalist Concept Erasure


def masks(count, size, off=3):
    """A list of logits as the published program saves it, some of them below 0."""
    found = [torch.full((size,), 3.0, dtype=torch.bfloat16) for _ in range(count)]
    for number, tensor in enumerate(found):
        tensor[number : number + off] = -2.0
        tensor[-1] = 0.0  # is not above the threshold
        tensor.requires_grad_()
    return found


def test_masks_of_feed_forward_layers(put):
    adapter = load(put(masks(38, 12288), "ff.pt"))
    assert adapter.card == Card("Minimalist Concept Erasure", ())
    changes = adapter.deltas["neurons"]
    assert set(changes) == {f"double_blocks_{b}_{stream}_mlp_2" for b in range(19) for stream in ("img", "txt")}
    change = changes["double_blocks_4_txt_mlp_2"]  # the ninth of the list
    assert change.shape == (3072, 12288) and change.off.nonzero().flatten().tolist() == [9, 10, 11, 12287]
    weight = randn(2, 12288)
    assert torch.equal(change.difference(weight) + weight, weight * ~change.off)
    assert torch.equal(change.difference(weight, 0.5), -0.5 * weight * change.off)


def test_masks_of_heads(put):
    logits = [torch.full((24,), 3.0) for _ in range(57)]
    logits[2][5] = logits[20][23] = -1.0
    changes = load(put(logits, "attn.pt")).deltas["neurons"]
    assert set(changes) == {"double_blocks_2_img_attn_proj", "double_blocks_2_txt_attn_proj", "single_blocks_1_linear2"}
    assert changes["double_blocks_2_img_attn_proj"].off.nonzero().flatten().tolist() == list(range(640, 768))
    last = changes["single_blocks_1_linear2"]
    assert last.shape == (3072, 15360) and last.off.nonzero().flatten().tolist() == list(range(2944, 3072))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.full((24,), 3.0)] * 57, "masks nothing: none of its 1368 numbers"),
        ([torch.full((18432,), -3.0) for _ in range(19)], "masks what the modulation of the text puts out"),
        ([torch.full((24,), float("nan"))] * 57, "no finite numbers"),
        ([torch.zeros(3)] * 4, "of no format that Membrane reads"),
    ],
)
def test_masks_that_are_refused(put, content, message):
    with pytest.raises(ErasureError, match=message):
        load(put(content, "masks.pt"))


def test_masks_in_a_native_file(put, tmp_path):
    adapter, path = load(put(masks(38, 12288), "ff.pt")), str(tmp_path / "native.safetensors")
    native.save(adapter, path)
    again = load(path)
    assert isinstance(again, ErasureAdapter) and again.deltas["neurons"].keys() == adapter.deltas["neurons"].keys()
    for site, change in adapter.deltas["neurons"].items():
        found = again.deltas["neurons"][site]
        assert torch.equal(found.off, change.off) and found.shape == change.shape


# ---------------------------------------------------------------- whole weights, and what is no file


@pytest.mark.parametrize(
    "tensors",
    [
        {"context_embedder.weight": randn(8, 6), "time_text_embed.text_embedder.linear_1.weight": randn(8, 4)},
        {f"caption_projection.{n}.linear.weight": randn(8, 6) for n in range(49)},
        {"txt_in.weight": randn(8, 6)},
    ],
    ids=["Flux", "HiDream", "Qwen-Image"],
)
def test_uce_of_transformers(put, tensors):
    found = load_weights(put(tensors))
    assert found.source == "UCE" and len(found.layers()) == len(tensors) and not found.whole
    with pytest.raises(ErasureError, match="use Extract Erasure Adapter"):
        load(put(tensors))


def test_xlabs_names_of_the_double_blocks(put):
    name, layers = "double_blocks.{}.processor.{}_lora{}.{}.weight", {}
    for part in ("qkv", "proj"):
        for stream in "12":
            layers[name.format(0, part, stream, "down")] = randn(2, 6, seed=int(stream))
            layers[name.format(0, part, stream, "up")] = randn(8, 2)
    found = load(put(layers)).low_rank
    assert set(found) == {f"double_blocks_0_{s}_attn_{part}" for s in ("img", "txt") for part in ("qkv", "proj")}
    assert torch.equal(found["double_blocks_0_txt_attn_qkv"].down, randn(2, 6, seed=2))


def test_the_first_format_of_loras_is_named(put):
    tensors = {"unet:0:up": randn(8, 1), "unet:0:down": randn(1, 6), "<s1>": randn(6)}
    with pytest.raises(ErasureError, match="is a LoRA of the first kind .*, whose layers have numbers and no names"):
        load(put(tensors))


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>", b"\n <html lang='en'>", b"<!doctype HTML>"])
@pytest.mark.parametrize("reader", [load, load_weights, labels.label])
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_a_web_page_is_called_that(put, page, reader, name):
    with pytest.raises(ErasureError, match='"x.* is a web page in place of the weights'):
        reader(put(page + b" " * 200, name))


@pytest.mark.parametrize("answer", [b'{"error": "Invalid credentials"}', b'\n[ {"message": "no"}]'])
@pytest.mark.parametrize("reader", [load, load_weights, labels.label])
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_the_answer_of_a_server_is_called_that(put, answer, reader, name):
    with pytest.raises(ErasureError, match=r'"x.* is text \(JSON\) in place of the weights, .*; download the file'):
        reader(put(answer, name))


def test_a_header_whose_length_looks_like_text_is_read(put):
    """8,827 bytes are written as the characters of an opened object."""
    header = json.dumps({"__metadata__": {"k": ""}, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    header = header.replace('"k": ""', f'"k": "{"x" * (0x227B - len(header))}"').encode()
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    assert content.startswith(b'{"') and list(containers.read(put(content)).tensors) == ["x"]


def test_a_lora_of_a_text_encoder_alone_has_no_label(put):
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    path = put({f"{name}.lora_down.weight": randn(4, 8), f"{name}.lora_up.weight": randn(8, 4)})
    for reader in (load, labels.label):
        with pytest.raises(ErasureError, match="layers of a text encoder and none of the denoiser"):
            reader(path)


@pytest.mark.parametrize("reader", [load, load_weights, labels.label])
def test_a_pointer_is_called_that(put, reader):
    with pytest.raises(ErasureError, match="is a Git LFS pointer"):
        reader(put(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"))


def test_every_format_has_a_name_of_its_own():
    names = [kind.name for kind in registry.FORMATS]
    assert len(set(names)) == len(names)


# ---------------------------------------------------------------- other convolutions, other names


@pytest.mark.parametrize("kernel", [(3,), (1,), (1, 2, 2), (3, 3, 3), (1, 1, 1)])
@pytest.mark.parametrize("peft_names", [False, True])
def test_convolutions_along_one_line_and_of_videos(put, kernel, peft_names):
    down, up = randn(2, 6, *kernel), randn(8, 2, *[1] * len(kernel), seed=1)
    names = ("lora_A.weight", "lora_B.weight") if peft_names else ("lora_down.weight", "lora_up.weight")
    name = "diffusion_model.patch_embedding"
    change = load(put({f"{name}.{names[0]}": down, f"{name}.{names[1]}": up})).low_rank["patch_embedding"]
    expected = torch.einsum("or,ri...->oi...", up.flatten(1).double(), down.double())
    assert torch.equal(product(change), expected if set(kernel) != {1} else expected.flatten(1))


@pytest.mark.parametrize("kernel", [3, 1, (1, 2, 2), (2, 2)])
def test_such_convolutions_beside_their_layers(kernel):
    """By the formula, each picture of a batch with a gate of its own."""
    places = len(kernel) if isinstance(kernel, tuple) else 1
    kind = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[places]
    module = kind(6, 8, kernel, stride=kernel if places > 1 else 1)
    ones = set(module.kernel_size) == {1}
    delta = LowRank(randn(8, 2), randn(2, 6) if ones else randn(2, 6, *module.kernel_size), 2.0, randn(8, seed=3))
    rows, gates = Rows(), torch.tensor([[1.0], [0.25]])
    x = randn(2, 6, *[4] * places, seed=2)
    part = Part(beside([Term(delta, gate=0)], "layer"))
    with rows.lent(gates, (0,)), torch.inference_mode():
        found = Bypass(module, [part], rows)(x)
        for row, gate in enumerate(gates.flatten()):
            other = kind(6, 8, kernel, stride=module.stride)
            other.weight.copy_(module.weight + gate * product(delta).float().view_as(module.weight))
            other.bias.copy_(module.bias + gate * delta.bias)
            assert torch.allclose(found[row], other(x[row : row + 1])[0], atol=1e-5)


def test_wan_fun_has_two_underscores(put):
    tensors = {"lora_unet__blocks_0_cross_attn_k.lora_down.weight": randn(2, 6)}
    tensors["lora_unet__blocks_0_cross_attn_k.lora_up.weight"] = randn(8, 2)
    assert set(load(put(tensors)).low_rank) == {"blocks_0_cross_attn_k"}


def test_a_file_for_the_hosts_text_encoders_only(put):
    name = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"
    with pytest.raises(ErasureError, match="changes 1 layers of a text encoder and none of the denoiser"):
        load(put({f"{name}.lora_down.weight": randn(2, 6), f"{name}.lora_up.weight": randn(8, 2)}))
