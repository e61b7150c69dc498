"""One behaviour suite over every file format of adapters: whoever wrote the file, the pictures are the same."""

import asyncio
import json
import logging
import os
import shutil
import types
import zipfile

import comfy.utils
import folder_paths
import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.adapters.permeability import FIXED, TRANSPORT, Permeability
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.errors import ErasureError
from membrane.core.formats import native, registry
from membrane.core.formats.factors import gather, low_rank
from membrane.core.formats.format import Format
from membrane.core.host.files import folders
from membrane.core.host.model.layers import layer_keys, modules
from membrane.core.host.page import routes
from membrane.core.host.patches.stack import apply_stack
from safetensors.torch import load_file, save_file

STAR, HEART = "a red star on snow", "a blue heart on sand"
RANK, ALPHA, STRENGTH = 4, 2.0, 0.8
SCALE = ALPHA / RANK
SAME = 2e-4  # of an adapter's effect: float32, summed in another order
EPS = {"float32": SAME, "float16": 1e-3, "bfloat16": 6e-3}  # of an adapter's effect: rounding its factors
EXPORTED = 5e-3  # the factors of a text map's export are float16
WORDS = TextMap(
    torch.randn(128, 3, generator=torch.Generator().manual_seed(1)) * 0.1,
    torch.randn(3, 128, generator=torch.Generator().manual_seed(2)) * 0.1,
    (0, 0, 0),
)


@pytest.fixture(scope="module", autouse=True)
def plain(demo):
    """{key: weight} of the text's readers before anything was patched."""
    readers = ("attn2.to_k.weight", "attn2.to_v.weight")
    return {k: m.weight.detach().clone().double() for k, m in modules(demo[0]).items() if k.endswith(readers)}


@pytest.fixture(scope="module")
def base(demo, sample):
    return sample(demo[0])


@pytest.fixture(scope="module")
def close(close):
    return lambda found, expected, base, bound=SAME: close(found, expected, base, bound)


# one set of random factors, in the spelling and the container of each format


class Layer(types.SimpleNamespace):
    """host: its path in the network; diffusers: the same in diffusers' names; up, down: factors; convolution."""


def table(model):
    """{host path: diffusers path} of the host's own table, without parameters."""
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    return {ours.removesuffix(".weight"): name.removesuffix(".weight") for name, ours in names.items()}


def transformer_layers(model, seed=3, size=0.15):
    """Every linear layer and 1x1 convolution of the middle's and the last transformer, with factors of a size that
    is seen; two of seven, for time."""
    g = torch.Generator().manual_seed(seed)
    diffusers, layers = table(model), []
    for key, module in modules(model).items():
        path = key.removeprefix("diffusion_model.").removesuffix(".weight")
        convolution = path.endswith(("1.proj_in", "1.proj_out"))
        inside = convolution or ("transformer_blocks" in path and hasattr(module, "in_features"))
        if inside and path.startswith(("middle_block", "output_blocks.3")):
            out, width = module.weight.shape[:2]
            up = torch.randn(out, RANK, generator=g) * size
            down = torch.randn(RANK, width, generator=g) * width**-0.5
            layers.append(
                Layer(host=path, diffusers=diffusers[path], up=up, down=down, convolution=convolution, key=key)
            )
    return layers


def rounded(layers, dtype):
    """The same layers with factors of a number type."""
    return [Layer(**(vars(x) | {"up": x.up.to(dtype), "down": x.down.to(dtype)})) for x in layers]


def factors(layer, fold=False):
    """(down, up) as files hold them, four-dimensional for convolutions; fold: with the scale in them."""
    down, up = layer.down, layer.up * (SCALE if fold else 1.0)
    return (down[:, :, None, None], up[:, :, None, None]) if layer.convolution else (down, up)


def kohya(layers, path=lambda x: x.diffusers):
    tensors = {}
    for layer in layers:
        name = "lora_unet_" + path(layer).replace(".", "_")
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = factors(layer)
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    return tensors


def in_names(layers, pattern, fold):
    """pattern: of a key, with the layer's path and "A" or "B", or "down" or "up"."""
    tensors = {}
    for layer in layers:
        down, up = factors(layer, fold)
        tensors[pattern(layer, "A", "down")], tensors[pattern(layer, "B", "up")] = down, up
    return tensors


def mace(layer, _, way):
    attention, _, part = layer.diffusers.removesuffix(".0").rpartition(".")
    return f"{attention}.processor.{part}_lora.{way}.weight"


def adapter_of(layers, method="SPM", concepts=(STAR,), bias=None):
    changes = {
        x.host.replace(".", "_"): LowRank(x.up, x.down, ALPHA, None if bias is None else bias.get(x.key))
        for x in layers
    }
    return ErasureAdapter(Card(method, concepts, family="SD15"), {"low_rank": changes})


SPM = {"prompts": f"{STAR},", "rank": str(RANK), "alpha": str(ALPHA)}
PREVIEW = [{"target": STAR, "positive": STAR, "neutral": "", "action": "erase"}]
LECO = {"ss_leco_prompt_count": "1", "ss_leco_preview": json.dumps(PREVIEW)}
PEFT = {"lora_adapter_metadata": json.dumps({"unet.r": RANK, "unet.lora_alpha": ALPHA})}
# format: (end of the file's name, tensors and metadata of layers); what else a format is stands below
FILES = {
    "spm": (".safetensors", lambda x: (kohya(x), SPM)),
    "leco": (".safetensors", lambda x: (kohya(x), LECO)),
    "slider": (".pt", lambda x: (kohya(x), None)),
    "kohya ldm": (".safetensors", lambda x: (kohya(x, lambda layer: layer.host), None)),
    "peft": (
        ".safetensors",
        lambda x: (in_names(x, lambda n, ab, _: f"unet.{n.diffusers}.lora_{ab}.weight", False), PEFT),
    ),
    "diffusers": (
        ".safetensors",
        lambda x: (in_names(x, lambda n, _, way: f"unet.{n.diffusers}.lora.{way}.weight", True), None),
    ),
    "mace": (".bin", lambda x: (in_names(x, mace, True), None)),
}
FORMATS = ["native", *FILES, "export"]
CASES = [(kind, dtype) for kind in FORMATS for dtype in EPS]
CASES += [("native words", "float32"), ("export words", "float16")]
# each format with one of the types, for what the type of the factors hardly touches
FEW = [(kind, list(EPS)[i % 3]) for i, kind in enumerate(FORMATS)] + CASES[-2:]
few = pytest.mark.parametrize("case", FEW, indirect=True, ids="-".join)
# and some of them, for what does not ask how the adapter came to be
some = pytest.mark.parametrize("case", [FEW[i] for i in (0, 1, 2, 7, -2, -1)], indirect=True, ids="-".join)
STOCK = {"spm", "leco", "slider", "kohya ldm", "export", "export words"}  # what the host's own loader reads


def write(content, metadata, name, category="erasure_adapters"):
    """Writes tensors in the container that a name's end says into one of the host's folders."""
    path = os.path.join(folder_paths.get_folder_paths(category)[0], name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if isinstance(content, bytes):
        with open(path, "wb") as file:
            file.write(content)
    elif name.endswith(".safetensors"):
        save_file({key: tensor.contiguous() for key, tensor in content.items()}, path, metadata)
    else:
        torch.save(content, path)
    return path


def load(node, name):
    return node("MembraneLoadAdapter", adapter_name=name)[0]


def save(node, adapter, prefix, model=None):
    """Name of a saved file; with a model as a LoRA, in models/loras."""
    how = {"format": "LoRA (kohya)", "model": model} if model else {}
    return node("MembraneSaveAdapter", adapter=adapter, filename_prefix=prefix, **how).ui["text"][0]


def to_adapters(name, new):
    """Copies a file from models/loras to the erasure adapters."""
    target = os.path.join(folder_paths.get_folder_paths("erasure_adapters")[0], new)
    shutil.copyfile(folder_paths.get_full_path("loras", name), target)
    return new


def entry(node, adapter, stack=None, strength=STRENGTH, mode=FIXED, **more):
    return node("MembraneStack", adapter=adapter, strength=strength, permeability=mode, stack=stack, **more)[0]


def apply(node, demo, stack, model=None):
    return node("MembraneApply", model=model or demo[0], clip=demo[1], stack=stack)[0]


@pytest.fixture(scope="module")
def layers(demo):
    return transformer_layers(demo[0])


@pytest.fixture(scope="module")
def reference(node, demo, layers, sample):
    """reference(which, dtype) -> latents with the native file of the same factors, applied as patches of the host."""
    known = {}

    def latents(which, dtype):
        if (which, dtype) not in known:
            if which == "words":
                adapter = ErasureAdapter(Card("UCE", (STAR,)), {"map": {"text": WORDS}})
            else:
                chosen = [x for x in layers if which == "all" or ".attn" in x.host]
                adapter = adapter_of(rounded(chosen, getattr(torch, dtype)))
            name = f"reference_{which}_{dtype}.safetensors"
            native.save(adapter, os.path.join(folder_paths.get_folder_paths("erasure_adapters")[0], name))
            known[which, dtype] = sample(apply(node, demo, entry(node, load(node, name))))
        return known[which, dtype]

    return latents


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, node, demo, layers):
    """A file of one format in models/erasure_adapters, and what was loaded from it.

    which: the layers it can express; name; adapter; rounding: of the numbers in the file; bound: between formats.
    """
    kind, dtype = request.param
    which = "words" if kind.endswith("words") else "attention" if kind == "mace" else "all"
    chosen = rounded([x for x in layers if which == "all" or ".attn" in x.host], getattr(torch, dtype))
    stem = f"{kind.replace(' ', '_')}_{dtype}"
    if kind in FILES:
        end, content = FILES[kind]
        name = stem + end
        write(*content(chosen), name)
    else:
        own = ErasureAdapter(Card("UCE", (STAR,)), {"map": {"text": WORDS}}) if which == "words" else adapter_of(chosen)
        if kind.startswith("export"):
            name = to_adapters(save(node, own, stem, demo[0]), f"{stem}.safetensors")
        else:
            name = save(node, own, stem)
    bound = SAME if kind != "export words" else EXPORTED
    return types.SimpleNamespace(
        kind=kind, dtype=dtype, which=which, name=name, adapter=load(node, name), bound=bound, layers=chosen
    )


@pytest.fixture(scope="module")
def fixed(node, demo, case, sample):
    """Latents of the case, applied without gates."""
    return sample(apply(node, demo, entry(node, case.adapter)))


def test_equals_the_native_file(case, fixed, reference, base, close):
    dtype = "float32" if case.which == "words" else case.dtype
    close(fixed, reference(case.which, dtype), base, case.bound)


@pytest.fixture(scope="module")
def product(demo, plain, layers, sample):
    """product(which) -> latents of the host's weights with s U D added by hand; a text map as W A B."""
    known = {}

    def latents(which):
        if which not in known:
            if which == "words":
                delta = {key: weight @ WORDS.a.double() @ WORDS.b.double() for key, weight in plain.items()}
            else:
                chosen = [x for x in layers if which == "all" or ".attn" in x.host]
                delta = {x.key: SCALE * x.up.double() @ x.down.double() for x in chosen}
                delta = {x.key: delta[x.key][:, :, None, None] if x.convolution else delta[x.key] for x in chosen}
            model = demo[0].clone()
            model.add_patches({key: ("diff", (d.float(),)) for key, d in delta.items()}, STRENGTH)
            known[which] = sample(model)
        return known[which]

    return latents


def test_equals_the_product_on_the_weights(case, fixed, product, base, close):
    close(fixed, product(case.which), base, max(case.bound, EPS[case.dtype]))


def test_what_the_file_says(case, demo):
    """All layers, once each, in the file's own number type."""
    adapter = case.adapter
    assert adapter.name == case.name and (adapter.maps.get("text") is None) == (case.kind != "native words")
    says = case.kind in ("native", "spm", "leco", "export", "native words", "export words")
    assert adapter.card.concepts == ((STAR,) if says else ())
    if case.which != "words":
        keys = layer_keys(demo[0])
        assert sorted(keys[name] for name in adapter.low_rank) == sorted(x.key for x in case.layers)
        assert {str(t.dtype) for c in adapter.low_rank.values() for t in (c.up, c.down)} == {f"torch.{case.dtype}"}
        assert all(c.up.dim() == c.down.dim() == 2 for c in adapter.low_rank.values())


@few
def test_gates_at_one_equal_the_patches(node, demo, case, fixed, sample, base, close):
    """As a bypass beside the layers: by the prompt where the file says its concept, and by the side for all."""
    found = {}
    if case.adapter.card.concepts:
        found["text"] = sample(apply(node, demo, entry(node, case.adapter, mode=TRANSPORT)))
        close(found["text"], fixed, base)
    else:
        with pytest.raises(ErasureError, match=f"{case.name} does not say which concepts .*set the permeability"):
            entry(node, case.adapter, mode=TRANSPORT)
    tuned = node(
        "MembranePermeability", stack=entry(node, case.adapter), mode=FIXED, factor=1.0, threshold=0.0, negative="off",
        top_k=1,
    )[0]  # fmt: skip
    expected = sample(apply(node, demo, entry(node, case.adapter)), cfg=1.0)
    close(sample(apply(node, demo, tuned), cfg=1.0), expected, sample(demo[0], cfg=1.0))


def by_key(adapter, model):
    keys = layer_keys(model)
    return {keys[name]: change for name, change in adapter.low_rank.items()}


def same_changes(found, expected):
    assert found.keys() == expected.keys()
    for key, change in expected.items():
        other = found[key]
        assert other.alpha == change.alpha and other.up.dtype == change.up.dtype
        assert torch.equal(other.up, change.up) and torch.equal(other.down, change.down)


def test_round_trip_through_the_native_file(node, case):
    name = save(node, case.adapter, "again/native")
    again = load(node, name)
    assert again.card == case.adapter.card and again.name == name
    same_changes(again.low_rank, case.adapter.low_rank)
    if case.adapter.maps.get("text") is not None:
        assert torch.equal(again.maps["text"].a, WORDS.a) and torch.equal(again.maps["text"].b, WORDS.b)


def test_round_trip_through_a_lora(node, demo, case):
    name = save(node, case.adapter, "again/lora", demo[0])
    tensors = load_file(folder_paths.get_full_path("loras", name))
    for key, tensor in tensors.items():  # as sd-scripts writes them
        if not key.endswith(".alpha"):
            assert tensor.dim() == (4 if "_proj_in." in key or "_proj_out." in key else 2)
    again = load(node, to_adapters(name, "again.safetensors"))
    assert again.card == case.adapter.card
    if case.adapter.maps.get("text") is None:
        same_changes(by_key(again, demo[0]), by_key(case.adapter, demo[0]))
    else:
        assert len(again.low_rank) == 14 and {c.rank for c in again.low_rank.values()} == {3}


@few
def test_the_stock_loader_reads_the_lora(node, demo, case, fixed, sample, base, caplog, close):
    """As any program reads what we save."""
    name = save(node, case.adapter, "again/lora", demo[0])
    with caplog.at_level(logging.WARNING):
        loaded = node("LoraLoader", model=demo[0], clip=demo[1], lora_name=name, strength_model=STRENGTH,
                      strength_clip=0.0)[0]  # fmt: skip
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]  # no key that was not loaded
    close(sample(loaded), fixed, base, case.bound if case.kind != "native words" else EXPORTED)


@few
def test_strength_zero_is_no_node(node, demo, case):
    modes = (FIXED, TRANSPORT) if case.adapter.card.concepts else (FIXED,)
    for how in ({"strength": 0.0}, {"enabled": False}, {"start_percent": 1.0}, {"end_percent": 0.0}):
        for mode in modes:
            model = apply(node, demo, entry(node, case.adapter, mode=mode, **how))
            assert model is demo[0]


@pytest.fixture(scope="module")
def others(node, demo):
    """Files of a text map and of other layers, to stack with."""
    root = folder_paths.get_folder_paths("erasure_adapters")[0]
    words = ErasureAdapter(Card("UCE", ("heart",)), {"map": {"text": WORDS}})
    more = adapter_of(transformer_layers(demo[0], 11, 0.1), "SPM", ("star",))
    for name, adapter in (("words", words), ("more", more)):
        native.save(adapter, os.path.join(root, f"sub_{name}.safetensors"))
    return [load(node, f"sub_{name}.safetensors") for name in ("words", "more")]


@some
def test_orders_agree(node, demo, case, others, sample, base, close):
    words, more = others
    rows = [(case.adapter, 0.7, FIXED), (words, -0.4, FIXED), (more, 0.6, TRANSPORT)]

    def latents(rows):
        stack = None
        for adapter, strength, mode in rows:
            stack = entry(node, adapter, stack, strength, mode)
        return sample(apply(node, demo, stack))

    expected = latents(rows)
    close(latents([rows[i] for i in (2, 0, 1)]), expected, base)
    # and one after the other
    model = demo[0]
    for adapter, strength, mode in rows:
        model = apply(node, demo, entry(node, adapter, None, strength, mode), model)
    close(sample(model), expected, base)


@some
def test_clones_are_isolated_and_requeue_repeats(node, demo, case, fixed, others, sample, base):
    """Other clones in between, the same model again, and the same nodes once more: bit for bit."""
    model, other = (apply(node, demo, entry(node, adapter)) for adapter in (case.adapter, others[1]))
    patches = {key: len(value) for key, value in model.patches.items()}
    between = sample(other)
    assert torch.equal(sample(model), fixed)
    assert torch.equal(sample(demo[0]), base)
    assert torch.equal(sample(other), between)
    again = apply(node, demo, entry(node, load(node, case.name)))
    assert torch.equal(sample(again), fixed)
    assert {key: len(value) for key, value in model.patches.items()} == patches and not demo[0].patches


@few
def test_the_editor_equals_the_nodes(node, demo, case, others, sample):
    rows = [
        {"adapter": case.name, "strength": STRENGTH, "permeability": {"mode": FIXED}},
        {"adapter": others[1].name.replace("/", "\\"), "strength": 0.5, "end_percent": 0.6},
        {"adapter": others[0].name, "enabled": False},
    ]
    stack, concepts, *_ = node("MembraneStackEditor", stack_json=json.dumps({"membrane_stack": 1, "entries": rows}))
    assert concepts.split("\n") == [*case.adapter.card.concepts, "star"]
    chained = entry(node, case.adapter)
    chained = entry(node, others[1], chained, 0.5, "automatic", end_percent=0.6)
    chained = entry(node, others[0], chained, 1.0, "automatic", enabled=False)
    assert torch.equal(sample(apply(node, demo, stack)), sample(apply(node, demo, chained)))


@pytest.mark.parametrize("case", [c for c in FEW if c[0] != "native words"], indirect=True, ids="-".join)
def test_a_lora_stack(node, demo, case, fixed, sample, base, close):
    """The rows of other packs' stack nodes, with a file in models/loras: as the host's own loader has it."""
    source = folder_paths.get_full_path("erasure_adapters", case.name)
    name = f"stack_{case.name}"
    shutil.copyfile(source, os.path.join(folder_paths.get_folder_paths("loras")[0], name))
    stack = node("MembraneStackEditor", stack_json="", lora_stack=[(name, STRENGTH, 1.0)])[0]
    assert [e.mode for e in stack.entries] == [FIXED]
    found = sample(apply(node, demo, stack))
    close(found, fixed, base)
    if case.kind in STOCK:
        stock = node("LoraLoaderModelOnly", model=demo[0], lora_name=name, strength_model=STRENGTH)[0]
        close(found, sample(stock), base)


def picture(chart):
    return chart.dim() == 4 and chart.shape[0] == 1 and chart.shape[3] == 3 and 0 <= chart.min() < chart.max() <= 1


@few
def test_previews(node, demo, case):
    stack = entry(node, case.adapter, mode="automatic")
    chart, report = node("MembranePreview", clip=demo[1], stack=stack, prompts=f"{STAR}\n{HEART}")
    assert picture(chart) and case.name in report and STAR in report and HEART in report
    values = [float(line.split()[-1]) for line in report.splitlines() if case.name in line]
    assert values[0] == pytest.approx(STRENGTH, abs=1e-3)
    follows = case.kind in ("native", "spm", "export")  # as published, only SPM's open by the text
    assert (0 < values[1] < STRENGTH - 0.01) if follows else values[1] == pytest.approx(STRENGTH, abs=1e-3)
    impact = {"model": demo[0], "clip": demo[1], "stack": stack, "prompts": f"{STAR}\n{HEART}"}
    if case.adapter.maps.get("text") is not None:
        chart, report = node("MembraneImpact", **impact)
        assert picture(chart) and STAR in report and "%" in report
    else:
        with pytest.raises(ErasureError, match=f"{case.name} changes layers inside the model, not the text"):
            node("MembraneImpact", **impact)


# what not every format has


@pytest.mark.parametrize("mode", [FIXED, TRANSPORT])
def test_biases(node, demo, layers, sample, base, mode, close):
    """The change of a layer's bias, native and as kohya's diff_b; the gates act on it as on the rest."""
    g = torch.Generator().manual_seed(5)
    found = modules(demo[0])
    bias = {x.key: torch.randn(len(x.up), generator=g) * 0.05 for x in layers if found[x.key].bias is not None}
    assert 0 < len(bias) < len(layers)
    name = save(node, adapter_of(layers, bias=bias), "biased")
    adapter = load(node, name)
    lora = save(node, adapter, "biased", demo[0])
    model = demo[0].clone()
    diffs = {x.key: SCALE * (x.up @ x.down) for x in layers}
    patches = {x.key: ("diff", (diffs[x.key].reshape(found[x.key].weight.shape),)) for x in layers}
    model.add_patches(patches | {k.removesuffix("weight") + "bias": ("diff", (b,)) for k, b in bias.items()}, STRENGTH)
    expected = sample(model)
    without = sample(apply(node, demo, entry(node, adapter_of(layers))))
    assert (expected - without).norm() > 0.01 * base.norm()
    close(sample(apply(node, demo, entry(node, adapter, mode=mode))), expected, base)
    again = load(node, to_adapters(lora, "biased_lora.safetensors"))
    close(sample(apply(node, demo, entry(node, again, mode=mode))), expected, base)
    close(sample(node("LoraLoaderModelOnly", model=demo[0], lora_name=lora, strength_model=STRENGTH)[0]), expected,
          base)  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
def test_every_layer_of_the_network(node, demo, sample, base, bias, close):
    """3x3 convolutions, also those with a stride, and the linear layers of the time: patches equal the bypass."""
    g, changes, found = torch.Generator().manual_seed(6), {}, 0
    for key, module in modules(demo[0]).items():
        if module.weight.dim() < 2:
            continue
        out, *inside = module.weight.shape
        found += 3 in inside
        down = torch.randn(2, *inside, generator=g) * module.weight[0].numel() ** -0.5
        down = down.flatten(1) if inside[1:] == [1, 1] else down  # as files are read
        shift = torch.randn(out, generator=g) * 0.01 if bias and module.bias is not None else None
        change = LowRank(torch.randn(out, 2, generator=g) * 0.03, down, 2.0, shift)
        changes[key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")] = change
    assert found > 10
    adapter = ErasureAdapter(Card("SPM", (STAR,)), {"low_rank": changes})
    patched, bypass = (sample(apply(node, demo, entry(node, adapter, mode=mode))) for mode in (FIXED, TRANSPORT))
    close(bypass, patched, base)
    lora = save(node, adapter, "everything", demo[0])
    stock = node("LoraLoaderModelOnly", model=demo[0], lora_name=lora, strength_model=STRENGTH)[0]
    close(sample(stock), patched, base)
    again = load(node, to_adapters(lora, "everything.safetensors"))
    same_changes(by_key(again, demo[0]), by_key(adapter, demo[0]))


def test_text_maps_and_layers_in_one_file(node, demo, layers, sample, base, close):
    """A native file may hold both; it equals the two apart, and cannot become one LoRA."""
    whole = adapter_of(layers)
    both = ErasureAdapter(whole.card, {"map": {"text": WORDS}, "low_rank": whole.low_rank})
    again = load(node, save(node, both, "both"))
    apart = entry(node, whole, entry(node, ErasureAdapter(whole.card, {"map": {"text": WORDS}})))
    expected = sample(apply(node, demo, apart))
    for mode in (FIXED, TRANSPORT):
        close(sample(apply(node, demo, entry(node, again, mode=mode))), expected, base)
    with pytest.raises(ErasureError, match="changes the text, layers or single weights"):
        save(node, both, "both", demo[0])


@pytest.mark.parametrize("kind", ["spm", "peft", "native words"])
def test_one_file_on_day_and_night(node, demo, layers, sample, base, kind):
    """The same file, both variants: each changes, by the same change of the weights."""
    night = node("MembraneDemoModel", variant="night")
    if kind == "native words":
        name = save(node, ErasureAdapter(Card("UCE", (STAR,)), {"map": {"text": WORDS}}), "both_variants")
    else:
        name = "both_variants.safetensors"
        write(*FILES[kind][1](layers), name)
    adapter = load(node, name)
    dark = sample(night[0])
    assert not torch.equal(dark, base)
    for variant, before in ((demo, base), (night, dark)):
        found = sample(apply(node, variant, entry(node, adapter)))
        assert (found - before).norm() > 0.01 * before.norm()
        assert torch.equal(sample(variant[0]), before)
    if adapter.low_rank:
        changes = [apply(node, v, entry(node, adapter)).patches for v in (demo, night)]
        assert changes[0].keys() == changes[1].keys() and len(changes[0]) == len(layers)


# refusals


def refusal(action):
    """The one sentence of an ErasureError: what is wrong, then what to do."""
    with pytest.raises(ErasureError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and (";" in message or "," in message)
    return message


def damaged(kind, layers):
    """(tensors or bytes, end of the name) of a file that is no adapter, or not a whole one."""
    tensors = kohya([x for x in layers if not x.convolution][:3])
    first = next(iter(tensors)).split(".")[0]
    if kind == "pickle":
        return pickle_with_code(), ".pt"
    if kind == "3-D":  # not CPE's down factor, which has its own sentence
        tensors[f"{first}.lora_up.weight"] = tensors[f"{first}.lora_up.weight"][..., None]
    if kind == "NaN":
        tensors[f"{first}.lora_up.weight"][0] = float("nan")
    if kind == "rank":
        tensors[f"{first}.lora_up.weight"] = tensors[f"{first}.lora_up.weight"][:, :3]
    if kind == "alpha":
        tensors[f"{first}.alpha"] = torch.full((RANK,), ALPHA)
    if kind == "no alpha":
        tensors[f"{first}.alpha"] = torch.tensor(float("inf"))
    if kind == "no up":
        tensors.pop(f"{first}.lora_up.weight")
    if kind == "CPE":
        tensors[f"{first}.lora_down.weight"] = tensors[f"{first}.lora_down.weight"][None]
    if kind == "integers":
        tensors[f"{first}.lora_up.weight"] = torch.ones(128, RANK, dtype=torch.int8)
    if kind == "weights":
        tensors = {f"{layers[4].diffusers}.weight": torch.zeros(64, 64)}
    if kind == "nothing known":
        tensors = {"a": torch.zeros(2)}
    return tensors, ".safetensors"


def pickle_with_code():
    """A torch file whose pickle calls os.mkdir, built by hand: the name of a folder that must not appear."""
    folder = os.path.join(folder_paths.get_folder_paths("erasure_adapters")[0], "ran")
    name = os.name if os.name == "nt" else "posix"
    data = f"c{name}\nmkdir\n(V{folder}\ntR.".encode("raw_unicode_escape")
    path = os.path.join(folder_paths.get_folder_paths("erasure_adapters")[0], "code.zip")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("code/data.pkl", data)
        file.writestr("code/version", "3\n")
        file.writestr("code/byteorder", "little")
    with open(path, "rb") as file:
        content = file.read()
    os.remove(path)
    return content


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", ("cannot be read", "download or save it again")),
        ("empty", ("it is empty (0 bytes)", "download")),
        ("pickle", ("holds more than weights (it asks for the Python object", "never runs")),
        ("NaN", ("numbers that are not finite in up of mid_block_", "get another one")),
        ("3-D", ("shapes (128, 4, 1", "(up)", "expected (out, rank) and (rank, in)")),
        ("rank", ("3", "(up)", "(down)", "expected (out, rank) and (rank, in)")),
        ("alpha", ("holds alpha of mid_block_", "with the shape (4,)", "expected one number")),
        ("no alpha", ("not finite in alpha of mid_block_", "get another one")),
        ("no up", ("holds alpha and down of mid_block_", "but no up factor", "expected both factors")),
        ("CPE", ("is a CPE file", "use the program it was made with")),
        ("integers", ("holds up of mid_block_", "as int8", "expected floating point numbers")),
        ("weights", ("holds whole weights of 1 layers", "use Extract Erasure Adapter")),
        ("nothing known", ("is of no format that Membrane reads (it holds a)", "choose an erasure adapter")),
    ],
)
def test_a_damaged_file(node, layers, kind, words):
    name = f"damaged_{kind.replace(' ', '_')}"
    if kind in ("truncated", "empty"):
        name += ".safetensors"
        path = write(kohya(layers[:3]), None, name)
        os.truncate(path, os.path.getsize(path) // 2 if kind == "truncated" else 0)
    else:
        content, end = damaged(kind, rounded(layers, torch.float32))
        name += end
        write(content, None, name)
    message = refusal(lambda: load(node, name))
    assert name in message and all(word in message for word in words), message
    spec = json.dumps({"membrane_stack": 1, "entries": [{"adapter": name}]})
    assert refusal(lambda: node("MembraneStackEditor", stack_json=spec)) == message
    assert not os.path.exists(os.path.join(folder_paths.get_folder_paths("erasure_adapters")[0], "ran"))


def sd15(width=320):
    """A published SPM's first layers, of the full-size network."""
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    return {f"{name}.lora_down.weight": torch.ones(1, 768), f"{name}.lora_up.weight": torch.ones(width, 1)}


def flux():
    name = "lora_unet_single_transformer_blocks_3_attn_to_k"
    return {f"{name}.lora_down.weight": torch.ones(1, 64), f"{name}.lora_up.weight": torch.ones(64, 1)}


@pytest.mark.parametrize("mode", [FIXED, TRANSPORT])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (sd15, ("changes down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k as a layer of shape (320, 768)",
                "it has the shape (64, 128)")),
        (flux, ("None of the 1 layers", "exists in this", "the first is single_transformer_blocks_3_attn_to_k")),
    ],
)  # fmt: skip
def test_another_family(node, demo, content, words, mode, sample, base):
    name = f"other_{content.__name__}.safetensors"
    write(content(), {"prompts": STAR, "rank": "1", "alpha": "1.0"}, name)
    stack = entry(node, load(node, name), mode=mode)
    message = refusal(lambda: apply(node, demo, stack))
    assert name in message and all(word in message for word in words), message
    assert "use an adapter made for this family" in message
    message = refusal(lambda: node("MembraneApply", model=demo[0], clip=demo[1], stack=stack, apply_to="weights"))
    assert name in message
    assert torch.equal(sample(demo[0]), base)


def test_an_export_for_another_family(node, demo):
    write(flux(), None, "other_flux.safetensors")
    adapter = load(node, "other_flux.safetensors")
    before = set(folder_paths.get_filename_list("loras"))
    message = refusal(lambda: save(node, adapter, "other", demo[0]))
    assert "lacks 1 of the 1 layers that other_flux.safetensors changes" in message and "family" in message
    assert set(folder_paths.get_filename_list("loras")) == before


def test_ranks_that_the_reference_cannot_combine(node, demo, layers):
    pieces = [adapter_of(layers), adapter_of([Layer(**(vars(x) | {"up": x.up[:, :2], "down": x.down[:2]}))
                                              for x in layers])]  # fmt: skip
    stack = None
    for adapter in pieces:
        stack = entry(node, adapter, stack, mode="reference")
    message = refusal(lambda: apply(node, demo, stack))
    assert "have the ranks 2, 4 at diffusion_model." in message and "expected equal ranks" in message


def test_a_missing_file(node, pack):
    name = "not/here.safetensors"
    message = refusal(lambda: load(node, name))
    assert f'The erasure adapter "{name}" was not found in ' in message and "put the file there" in message
    assert pack.NODE_CLASS_MAPPINGS["MembraneLoadAdapter"].VALIDATE_INPUTS(name) == message
    spec = json.dumps({"membrane_stack": 1, "entries": [{"adapter": name}]})
    assert refusal(lambda: node("MembraneStackEditor", stack_json=spec)) == message
    message = refusal(lambda: node("MembraneStackEditor", stack_json="", lora_stack=[(name, 1.0, 1.0)]))
    assert f'The LoRA "{name}" was not found in ' in message
    for row in ("name", ("name",), (1, 2.0, 3.0)):
        message = refusal(lambda row=row: node("MembraneStackEditor", stack_json="", lora_stack=[row]))
        assert "expected (file name, model strength, clip strength)" in message


def test_rows_of_a_lora_stack_that_name_no_file(node):
    """As other packs' stackers leave rows that are not used; a row without a number is a mistake."""
    rows = [("None", 1.0, 1.0), ["None", None, None], (None, 1.0, 1.0), ("", 0.5, 0.5)]
    assert not node("MembraneStackEditor", stack_json="", lora_stack=rows)[0].entries
    for row in (("x.safetensors", None, None), ("x.safetensors", "1", 1.0), ("x.safetensors",), 3):
        message = refusal(lambda row=row: node("MembraneStackEditor", stack_json="", lora_stack=[row]))
        assert message.startswith("The LORA_STACK has the row")


def test_the_time_in_a_file_name(node, demo, layers, monkeypatch):
    """As ComfyUI's own nodes and its page write it."""
    monkeypatch.setattr(folders.time, "localtime", lambda: (2026, 3, 4, 15, 6, 7, 2, 63, 0))
    assert folders.dated("star_%date:yyyy-MM-dd%_%hour%%minute%") == "star_2026-03-04_1506"
    assert folders.dated("100%_%width%") == "100%_%width%"
    adapter = ErasureAdapter(Card("SPM", ("star",)), {"low_rank": {}})
    saved = node("MembraneSaveAdapter", adapter=adapter, filename_prefix="%year%/star_%date:hhmmss%").ui["text"][0]
    assert saved == "2026/star_150607_00001_.safetensors"


def test_a_replaced_file_is_seen(node, pack, layers):
    """The host asks IS_CHANGED before it reuses what a node gave."""
    write(kohya(layers[:2]), SPM, "replaced.safetensors")
    spec = json.dumps({"membrane_stack": 1, "entries": [{"adapter": "replaced.safetensors"}]})
    asked = [
        lambda: pack.NODE_CLASS_MAPPINGS["MembraneLoadAdapter"].IS_CHANGED("replaced.safetensors"),
        lambda: pack.NODE_CLASS_MAPPINGS["MembraneStackEditor"].IS_CHANGED(spec),
    ]
    before = [ask() for ask in asked]
    assert before == [ask() for ask in asked]
    write(kohya(layers[1:3]), SPM, "replaced.safetensors")
    assert all(ask() != old for ask, old in zip(asked, before))


def test_a_stack_of_two_unlike_parts_keeps_its_own_settings(demo, layers, sample, base):
    """One gated and one not, of the same layers, at strengths that cancel: nothing is left."""
    adapter = adapter_of(layers)
    stack = ErasureStack((
        Entry(adapter, 1.5, permeability=Permeability(FIXED)),
        Entry(adapter, -1.5, permeability=Permeability(TRANSPORT)),
    ))  # fmt: skip
    found = sample(apply_stack(demo[0], stack, demo[1]))
    assert (found - base).norm() < 1e-4 * base.norm()


# ---------------------------------------------------------------- another format: one record, registered in one line


def toy_split(key):
    layer, _, part = key.rpartition("|")
    return (layer, {"p": "up", "q": "down", "a": "alpha"}[part]) if layer else None


def toy_card(contents):
    return Card("toy", (contents.metadata["toy.words"],), family="SD15")


def toy_parse(contents):
    changes = {layer: low_rank(contents.name, layer, parts) for layer, parts in gather(contents, toy_split).items()}
    return ErasureAdapter(toy_card(contents), {"low_rank": changes}, contents.name)


TOY = Format("toy", lambda contents: any(key.endswith("|q") for key in contents.tensors), toy_parse, toy_card)


@pytest.fixture
def toy(layers):
    """Name of a file with keys that no format of the pack has."""
    tensors = {}
    for layer in layers:
        down, up = factors(layer)
        tensors |= {f"{layer.host}|p": up, f"{layer.host}|q": down, f"{layer.host}|a": torch.tensor(ALPHA)}
    path = write(tensors, {"toy.words": STAR}, "toy.safetensors")
    yield "toy.safetensors"
    os.remove(path)


def asked(name):
    """What the browser page is told of a file."""
    return asyncio.run(routes.adapter(types.SimpleNamespace(query={"name": name})))


def test_a_format_that_is_not_registered(node, toy):
    with pytest.raises(ErasureError, match='"toy.safetensors" is of no format that Membrane reads'):
        load(node, toy)
    with pytest.raises(ErasureError, match='"toy.safetensors" is no erasure adapter that Membrane reads'):
        asked(toy)


def test_a_registered_format_is_loaded_shown_and_followed(node, demo, toy, sample, reference, base, close, monkeypatch):
    monkeypatch.setattr(registry, "FORMATS", list(registry.FORMATS))
    registry.register(TOY)
    adapter = load(node, toy)
    assert (adapter.name, adapter.card) == (toy, Card("toy", (STAR,), family="SD15"))
    expected = reference("all", "float32")
    close(sample(apply(node, demo, entry(node, adapter))), expected, base)
    close(sample(apply(node, demo, entry(node, adapter, mode=TRANSPORT))), expected, base)
    found = asked(toy)
    assert (found["method"], found["concepts"], found["family"]) == ("toy", [STAR], "SD15")


def test_look_alikes_come_before_a_registered_format(node, layers, monkeypatch):
    monkeypatch.setattr(registry, "FORMATS", list(registry.FORMATS))
    registry.register(TOY)
    name = layers[0].host
    path = write({f"{name}|q": torch.ones(1, 4), f"{name}.hada_w1_a": torch.ones(4, 1)}, {"toy.words": STAR},
                 "alike.safetensors")  # fmt: skip
    try:
        for ask in (lambda: load(node, "alike.safetensors"), lambda: asked("alike.safetensors")):
            with pytest.raises(ErasureError, match="LoHa"):
                ask()
    finally:
        os.remove(path)
