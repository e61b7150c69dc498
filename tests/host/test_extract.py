"""From edited weights to an adapter: applied to the base model it gives the pictures of the edited weights."""

import os
import re

import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from membrane.core.errors import ErasureError
from membrane.core.host.model.layers import layer_keys, modules
from safetensors.torch import save_file

pytestmark = pytest.mark.slow
STAR, HEART = "a red star on snow", "a blue heart on sand"
UNET = "diffusion_model."
FLOAT16 = 5e-3  # of an edit's effect: factors may be stored in float16, which costs 1e-3 of each layer's product


@pytest.fixture(scope="module")
def night(node):
    return node("MembraneDemoModel", variant="night")


@pytest.fixture(scope="module", autouse=True)
def state(demo):
    """{key: tensor} of the network before anything was patched, keys as diffusion_model.<path>."""
    return {k: v.clone() for k, v in demo[0].model.state_dict().items() if k.startswith(UNET)}


@pytest.fixture(scope="module")
def base(demo, sample):
    return sample(demo[0])


@pytest.fixture(scope="module")
def with_weights(node, state, sample):
    """with_weights({key: tensor}) -> latents of a model of its own with these weights in place of its own."""
    own = node("MembraneDemoModel", variant="day")[0]

    def latents(changed):
        with torch.inference_mode():
            network = own.model.diffusion_model
            values = {k.removeprefix(UNET): v.float() for k, v in (state | changed).items()}
            network.load_state_dict(values, strict=True)
        return sample(own)

    return latents


@pytest.fixture(scope="module")
def close(close):
    return lambda found, expected, base, bound=FLOAT16: close(found, expected, base, bound)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# edits: {key of the host: new tensor}


def readers(state):
    return [k for k in state if k.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]


def closed_form(state, keys=None, rank=2, size=0.15):
    """UCE's edit of the text: W (I + A B) in every layer that reads it."""
    e = size * randn(128, rank, seed=1) @ randn(rank, 128, seed=2) / 128**0.5
    return {key: state[key] @ (torch.eye(128) + e) for key in keys or readers(state)}


def low_rank(state, keys, rank=3, size=0.2):
    """A change of rank 3 in each layer; convolutions of any size; biases where there are any."""
    changed = {}
    for i, key in enumerate(keys):
        weight = state[key]
        flat = weight.flatten(1)
        delta = randn(len(flat), rank, seed=i) @ randn(rank, flat.shape[1], seed=i + 100)
        changed[key] = weight + (delta * size * flat.std() / rank**0.5).reshape(weight.shape)
        bias = key.removesuffix("weight") + "bias"
        if bias in state:
            changed[bias] = state[bias] + 0.02 * randn(len(weight), seed=i + 200)
    return changed


MIXED = (
    "middle_block.1.proj_in",
    "middle_block.1.transformer_blocks.0.attn1.to_q",
    "middle_block.1.transformer_blocks.0.attn2.to_k",
    "middle_block.1.transformer_blocks.0.ff.net.0.proj",
    "output_blocks.2.1.transformer_blocks.0.attn2.to_out.0",
    "output_blocks.2.0.in_layers.2",
    "time_embed.2",
)


def mixed(state):
    """Layers of every kind: 1x1 and 3x3 convolutions, linear ones with and without bias, one of the time."""
    return low_rank(state, [f"{UNET}{name}.weight" for name in MIXED])


# spellings


def diffusers(demo, tensors):
    """The same tensors by diffusers' names."""
    names = {
        ours: theirs for theirs, ours in comfy.utils.unet_to_diffusers(demo[0].model.model_config.unet_config).items()
    }
    return {names[key.removeprefix(UNET)]: value for key, value in tensors.items()}


def ldm(tensors):
    return {f"model.{key}": value for key, value in tensors.items()}


def nested(tensors, prefix="unet."):
    """As ESD saves it: a dictionary for each layer."""
    whole = {}
    for name, value in tensors.items():
        layer, _, parameter = name.rpartition(".")
        whole.setdefault(prefix + layer, {})[parameter] = value
    return whole


def write(content, name):
    folder = folder_paths.get_folder_paths("erasure_adapters")[0]
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name)
    if name.endswith(".safetensors"):
        save_file({key: value.contiguous() for key, value in content.items()}, path)
    else:
        torch.save(content, path)
    return name


def extract(node, model, name="none", edited=None, **settings):
    """Adapter and report."""
    more = {} if edited is None else {"edited_model": edited}
    return node("MembraneExtract", model=model, weights_file=name, **more, **settings)


def apply(node, demo, adapter, model=None, strength=1.0, mode="automatic", to="text"):
    stack = node("MembraneStack", adapter=adapter, strength=strength, permeability=mode)[0]
    return node("MembraneApply", model=model or demo[0], clip=demo[1], stack=stack, apply_to=to)[0]


def changed_keys(demo, adapter):
    keys = layer_keys(demo[0])
    return {keys[name] for name in adapter.low_rank}


def weights_of(tensors):
    return {key for key in tensors if key.endswith(".weight")}


def fine(report):
    return "WARNING" not in report and "of an edit of this very model" in report


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_uce(node, demo, state, sample, base, with_weights, dtype, close):
    """A part of the network with diffusers' names; the adapter is of the rank of the edit."""
    edited = closed_form(state)
    content = {key: value.to(dtype) for key, value in diffusers(demo, edited).items()}
    name = write(content, f"uce_{str(dtype)[6:]}.safetensors")
    adapter, report = extract(node, demo[0], name, concepts="star\na red star on snow")
    assert adapter.card.method == "UCE" and adapter.card.concepts == ("star", STAR) and not adapter.name
    assert adapter.card.settings["extracted_from"] == name
    assert changed_keys(demo, adapter) == set(readers(state)) and adapter.card.family
    assert {c.rank for c in adapter.low_rank.values()} == {2}
    assert "14 layers compared, 14 changed" in report and "Rank 2 to 2" in report and fine(report)
    expected = with_weights(edited)
    bound = FLOAT16 if dtype == torch.float32 else 2e-2  # rounding of whole weights is not small against an edit
    close(sample(apply(node, demo, adapter)), expected, base, bound)
    # in every other form as well; the prompt is a concept, so the gate is 1
    close(sample(apply(node, demo, adapter, mode="facilitated transport")), expected, base, bound)
    close(sample(apply(node, demo, adapter, to="weights")), expected, base, bound)
    assert torch.equal(sample(demo[0]), base)


@pytest.mark.parametrize("half", [False, True])
def test_esd(node, demo, state, sample, base, with_weights, half, close):
    """A nested .pt of attention layers, in float32 or moved a little from the model's weights in bfloat16."""
    keys = [k for k in state if ".attn1." in k and k.endswith("weight")]
    if half:
        edited = {k: state[k].bfloat16() for k in keys}
        for i, key in enumerate(keys):  # training at a small rate moves some of the rows only
            edited[key][:5] += (0.3 * edited[key].float().std() * randn(5, edited[key].shape[1], seed=i)).bfloat16()
    else:
        edited = low_rank(state, keys, size=0.6)
    name = write(nested(diffusers(demo, edited)), f"esd_{half}.pt")
    adapter, report = extract(node, demo[0], name, energy=1.0)
    assert adapter.card.method == "ESD" and "WARNING" not in report
    assert changed_keys(demo, adapter) == set(keys)
    assert max(c.rank for c in adapter.low_rank.values()) == (5 if half else 3)
    if half:  # what bfloat16 did to all other numbers is left out
        moved = {k: state[k].clone() for k in keys}
        for key in keys:
            moved[key][:5] = edited[key][:5].float()
        edited = moved
    close(sample(apply(node, demo, adapter)), with_weights(edited), base, 2e-2 if half else FLOAT16)


@pytest.mark.parametrize("spelling", ["ldm", "ldm in a checkpoint", "diffusers", "unet prefix"])
def test_a_whole_unet(node, demo, state, sample, base, with_weights, spelling, close):
    """Some layers differ by a low rank and a bias; the others are found to be equal."""
    edited = mixed(state)
    whole = state | edited
    content, name = {
        "ldm": lambda: (ldm(whole), "whole_ldm.safetensors"),
        "ldm in a checkpoint": lambda: (
            {"state_dict": ldm(whole) | {"cond_stage_model.x": torch.ones(2), "first_stage_model.y": torch.ones(2)},
             "global_step": 7}, "whole.ckpt"),
        "diffusers": lambda: (diffusers(demo, whole), "whole_diffusers.safetensors"),
        "unet prefix": lambda: ({f"unet.{k}": v for k, v in diffusers(demo, whole).items()}, "whole_unet.pt"),
    }[spelling]()  # fmt: skip
    adapter, report = extract(node, demo[0], write(content, name), energy=0.9999)
    assert changed_keys(demo, adapter) == weights_of(edited)
    assert {c.rank for c in adapter.low_rank.values()} == {3}
    assert f"{len(modules(demo[0]))} layers compared, {len(MIXED)} changed" in report and fine(report)
    assert sum(c.bias is not None for c in adapter.low_rank.values()) == len(edited) - len(MIXED)
    expected = with_weights(edited)
    close(sample(apply(node, demo, adapter)), expected, base)
    # a file of its own, and a LoRA for other programs
    for form in ({}, {"format": "LoRA (kohya)", "model": demo[0]}):
        saved = node("MembraneSaveAdapter", adapter=adapter, filename_prefix=f"extracted_{name[:-5]}", **form)
        if form:
            again = node("LoraLoaderModelOnly", model=demo[0], lora_name=saved.ui["text"][0], strength_model=1.0)[0]
        else:
            again = apply(node, demo, node("MembraneLoadAdapter", adapter_name=saved.ui["text"][0])[0])
        close(sample(again), expected, base)


def test_a_half_precision_checkpoint(node, demo, state, sample, base, with_weights, close):
    """float16 of all weights is no edit."""
    edited = mixed(state)
    content = {key: value.half() for key, value in ldm(state | edited).items()}
    adapter, report = extract(node, demo[0], write(content, "half.safetensors"), energy=0.9999)
    assert changed_keys(demo, adapter) == weights_of(edited)
    assert fine(report) and "different by rounding only" in report
    close(sample(apply(node, demo, adapter)), with_weights(edited), base, 2e-2)


def test_what_factors_cannot_express_is_named(node, demo, state):
    norm = f"{UNET}middle_block.1.transformer_blocks.0.norm2.weight"
    edited = mixed(state) | {norm: state[norm] * 1.5}
    adapter, report = extract(node, demo[0], write(ldm(state | edited), "norm.safetensors"))
    assert norm not in changed_keys(demo, adapter)
    assert "cannot express them: 1 layers (middle_block_1_transformer_blocks_0_norm2)" in report


def test_less_energy_and_rank(node, demo, state, sample, base, with_weights):
    """The report says what was cut, and less is closer to the base model."""
    edited = low_rank(state, [k for k in readers(state) if "middle" in k], rank=8, size=1.0)
    name = write(diffusers(demo, edited), "cut.safetensors")
    expected, errors = with_weights(edited), []
    for rank in (8, 4, 1):
        adapter, report = extract(node, demo[0], name, energy=1.0, max_rank=rank)
        assert {c.rank for c in adapter.low_rank.values()} == {rank}
        assert (f"2 layers need more than max_rank {rank}" in report) == (rank < 8)
        errors.append((sample(apply(node, demo, adapter)) - expected).norm().item())
    assert errors[0] < FLOAT16 * (expected - base).norm() and errors == sorted(errors)
    adapter, report = extract(node, demo[0], name, energy=0.5)
    lost = float(re.search(r"discarded ([\d.]+)%", report)[1])
    assert 10 < lost < 50 and max(c.rank for c in adapter.low_rank.values()) < 8


# from a connected model


def lora(model, keys, strength=1.0, seed=0, size=0.3):
    """A clone with a LoRA of rank 2 on some layers."""
    found, tensors = modules(model), {}
    for i, key in enumerate(keys):
        name = "lora_unet_" + key.removeprefix(UNET).removesuffix(".weight").replace(".", "_")
        out, width = found[key].weight.shape[:2]
        tensors[f"{name}.lora_up.weight"] = randn(out, 2, seed=seed + i) * size
        tensors[f"{name}.lora_down.weight"] = randn(2, width, seed=seed + i + 50) * size
    return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0.0)[0]


@pytest.mark.parametrize("loaded", ["nothing", "the edited model", "another clone"])
def test_a_model_with_a_lora(node, demo, state, sample, base, loaded, close):
    """Whichever clone's weights are in place at the moment."""
    keys = readers(state)[:6]
    edited = lora(demo[0], keys, 0.7)
    expected = sample(edited)
    sample({"nothing": demo[0], "the edited model": edited, "another clone": lora(demo[0], keys, 2.0, 9)}[loaded])
    adapter, report = extract(node, demo[0], edited=edited, concepts="star")
    assert changed_keys(demo, adapter) == set(keys) and {c.rank for c in adapter.low_rank.values()} == {2}
    assert fine(report) and adapter.card.concepts == ("star",) and "the edited model" in report
    close(sample(apply(node, demo, adapter)), expected, base)
    assert torch.equal(sample(demo[0]), base)


def test_a_merge(node, demo, night, sample, base):
    """A merge of day and night, extracted from day: everything differs, which is reported."""
    merged = node("ModelMergeSimple", model1=demo[0], model2=night[0], ratio=0.7)[0]
    expected = sample(merged)
    adapter, report = extract(node, demo[0], edited=merged, energy=1.0, max_rank=1024)
    assert "WARNING: only " in report
    # norms are left out, so the picture is near the merge's only
    assert "cannot express them" in report
    found = sample(apply(node, demo, adapter))
    assert (found - expected).norm() < 0.5 * (expected - base).norm()


def test_a_merge_of_an_edit(node, demo, sample, base, state, close):
    """Half of a LoRA through the host's own merge."""
    edited = lora(demo[0], readers(state)[:4])
    half = node("ModelMergeSimple", model1=demo[0], model2=edited, ratio=0.5)[0]
    expected = sample(half)
    adapter, report = extract(node, demo[0], edited=half)
    assert {c.rank for c in adapter.low_rank.values()} == {2} and fine(report)
    close(sample(apply(node, demo, adapter)), expected, base)


def test_an_erasure_on_the_weights(node, demo, sample, base, state, close):
    """A closed-form erasure of ours, put on the weights, comes back as layers."""
    erased = node("MembraneErase", model=demo[0], clip=demo[1], concepts="star -> circle", preserve="heart")[1]
    model = apply(node, demo, erased, to="weights")
    expected = sample(model)
    adapter, _ = extract(node, demo[0], edited=model, energy=1.0)
    assert changed_keys(demo, adapter) == set(readers(state))
    close(sample(apply(node, demo, adapter)), expected, base)


def test_the_base_counts_as_it_is(node, demo, state, sample, base, close):
    """A LoRA-patched base model: only what the edit adds to base and LoRA is extracted."""
    keys = readers(state)
    patched = lora(demo[0], keys[:6], 0.8, size=0.3)
    before = sample(patched)
    delta = {}
    for i, key in enumerate(keys[:6]):
        delta[key] = 0.8 * (randn(len(state[key]), 2, seed=i) * 0.3) @ (randn(2, 128, seed=i + 50) * 0.3)
    effective = {key: state[key] + delta.get(key, 0.0) for key in keys}
    name = write(diffusers(demo, closed_form(effective, keys, rank=1)), "of_a_lora.safetensors")
    for place in (patched, demo[0]):  # whichever is loaded
        sample(place)
        adapter, report = extract(node, patched, name)
        assert {c.rank for c in adapter.low_rank.values()} == {1} and fine(report)
    own = demo[0].clone()
    own.add_patches({k: ("diff", (v - state[k],)) for k, v in closed_form(effective, keys, rank=1).items()}, 1.0)
    expected = sample(own)
    close(sample(apply(node, demo, adapter, patched)), expected, before)
    # of the bare model, the LoRA is part of the difference
    adapter, _ = extract(node, demo[0], name, energy=0.99999)
    assert max(c.rank for c in adapter.low_rank.values()) == 3
    close(sample(apply(node, demo, adapter)), expected, base)


# the wrong base model, and what is no weights


@pytest.mark.parametrize("kind", ["erasure", "small erasure", "random", "float16", "bfloat16", "values only", "whole"])
def test_night_as_the_base_model(node, demo, night, state, kind):
    """Weights made from day differ from night by 4 to 6 % everywhere, and by the edit; only the latter is wanted."""
    if kind in ("random", "whole"):
        edited = closed_form(state)
    else:
        erased = node("MembraneErase", model=demo[0], clip=demo[1], concepts="star -> circle", preserve="heart")[1]
        e = erased.maps["text"].matrix() * (0.1 if kind == "small erasure" else 1.0)
        edited = {k: state[k] @ (torch.eye(128) + e) for k in readers(state) if kind != "values only" or "to_v" in k}
    if kind in ("float16", "bfloat16"):
        edited = {key: value.to(getattr(torch, kind)) for key, value in edited.items()}
    name = write(ldm(state | edited if kind == "whole" else edited), f"of_day_{kind.replace(' ', '_')}.safetensors")
    assert "WARNING" not in extract(node, demo[0], name)[1]
    report = extract(node, night[0], name)[1]
    assert "of an edit of this very model" not in report, report
    if kind != "bfloat16":  # taken for training, which may change anything
        warning = next((line for line in report.splitlines() if line.startswith("WARNING")), None)
        assert warning and "made from another base model" in warning, report


def test_another_family(node, demo):
    stem = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    write({f"{stem}.to_k.weight": torch.ones(320, 768)}, "sd15.safetensors")
    with pytest.raises(ErasureError, match=r'"sd15.safetensors" does not fit .* is 320 x 768 \(Stable Diffusion 1\)'):
        extract(node, demo[0], "sd15.safetensors")
    write({"transformer_blocks.0.attn.to_k.weight": torch.ones(8, 8)}, "flux.safetensors")
    with pytest.raises(ErasureError, match='"flux.safetensors" holds 1 layers .* none of which the connected model'):
        extract(node, demo[0], "flux.safetensors")


def test_nothing_to_extract(node, demo, state):
    with pytest.raises(ErasureError, match="nothing to extract from; choose a weights_file or connect"):
        extract(node, demo[0])
    same = node("ModelMergeSimple", model1=demo[0], model2=lora(demo[0], readers(state)[:1]), ratio=1.0)[0]
    for edited in (demo[0], demo[0].clone(), same):
        with pytest.raises(ErasureError, match='"the edited model" has no change that an adapter can hold'):
            extract(node, demo[0], edited=edited)
    name = write(ldm(state), "same.safetensors")
    with pytest.raises(ErasureError, match=f'"{name}" has no change that an adapter can hold'):
        extract(node, demo[0], name)


def test_each_file_has_its_node(node, demo, state, pack):
    """An adapter is no weights and weights are no adapter; each sentence names the other node."""
    name = write(diffusers(demo, closed_form(state)), "for_extract.safetensors")
    with pytest.raises(ErasureError, match="use Extract Erasure Adapter with the base model"):
        node("MembraneLoadAdapter", adapter_name=name)
    adapter = extract(node, demo[0], name)[0]
    saved = node("MembraneSaveAdapter", adapter=adapter, filename_prefix="for_load").ui["text"][0]
    with pytest.raises(ErasureError, match="use Load Erasure Adapter"):
        extract(node, demo[0], saved)
    cls = pack.NODE_CLASS_MAPPINGS["MembraneExtract"]
    assert cls.VALIDATE_INPUTS("none") is True and cls.VALIDATE_INPUTS(name) is True
    assert "was not found" in cls.VALIDATE_INPUTS("nowhere.pt")
    assert cls.IS_CHANGED("none") == "" and cls.IS_CHANGED(name) != cls.IS_CHANGED(saved)


def test_damaged_weights(node, demo, state):
    edited = diffusers(demo, closed_form(state))
    first = next(iter(edited))
    edited[first][0] = float("nan")
    name = write(edited, "nan.safetensors")
    with pytest.raises(ErasureError, match=f'"{name}" holds numbers that are not finite in down_blocks_1'):
        extract(node, demo[0], name)
    edited[first] = edited[first].nan_to_num().to(torch.int8)
    name = write(edited, "integers.safetensors")
    with pytest.raises(ErasureError, match=f'"{name}" holds .* as int8; expected floating point numbers'):
        extract(node, demo[0], name)


def test_the_model_is_left_as_it_was(node, demo, state, sample, base):
    name = write(ldm(state | mixed(state)), "left.safetensors")
    edited = lora(demo[0], readers(state)[:2])
    sample(edited)
    patches = {key: list(value) for key, value in edited.patches.items()}
    for model in (None, edited):
        extract(node, demo[0], name, edited=model)
    assert edited.patches.keys() == patches.keys()
    assert torch.equal(sample(demo[0]), base)
    assert all(torch.equal(v, state[k]) for k, v in demo[0].model.state_dict().items() if k in state)
