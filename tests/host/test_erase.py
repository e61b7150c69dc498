"""Erasing on a real host: exact, undoable, and without a trace on anything else."""

from functools import partial
from pathlib import Path

import comfy.sd
import pytest
import torch
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.errors import ErasureError
from membrane.core.host.model.layers import text_readers
from membrane.core.host.patches.stack import apply_stack
from membrane.core.host.text.encode import encode
from membrane.core.text.concepts import fill

TEMPLATES = "{}\na red {} on snow\na blue {} on coal"
SETTINGS = {"concepts": "star -> circle", "preserve": "heart\nsquare", "templates": TEMPLATES}


@pytest.fixture(scope="module")
def sample(sample):
    return partial(sample, positive="a plain red star on snow", negative="a blue heart", steps=4, batch=2)


def erase(node, demo, model=None, **settings):
    return node("MembraneErase", model=model or demo[0], clip=demo[1], **{**SETTINGS, **settings})


def difference(found, expected, base):
    return ((found - expected).norm() / (expected - base).norm()).item()


def edited_weights(model, deltas):
    """A clone with dense differences on its weights, through the host's own patches."""
    clone = model.clone()
    clone.add_patches({key: ("diff", (delta,)) for key, delta in deltas.items()}, 1.0)
    return clone


def uce_on_every_layer(demo, concept="star", surrogate="circle", preserve=("heart", "square")):
    """UCE eq. 7 layer by layer on the host's weights, in float64, from the host's own encodings."""
    model, clip, _ = demo
    templates = TEMPLATES.splitlines()
    old, new = ([fill(t, w) for t in templates] for w in (concept, surrogate))
    kept = list(dict.fromkeys(["", *preserve, *(fill(t, w) for w in preserve for t in templates)]))
    encoded = encode(clip, [*old, *new, *kept])
    places = (1, 3, 3)  # of the concept's token in the three templates
    c = torch.cat([encoded[p].rows[i:] for p, i in zip(old, places)]).double()
    n = torch.cat([encoded[p].rows[i:] for p, i in zip(new, places)]).double()
    r = torch.cat([encoded[p].rows for p in kept]).double()
    inverse = torch.linalg.inv(0.5 * torch.eye(c.shape[1], dtype=torch.float64) + c.T @ c + r.T @ r)
    deltas = {}
    for key, layer in text_readers(model):
        w = layer.weight.detach().double()
        deltas[key] = ((0.5 * w + (w @ n.T) @ c + (w @ r.T) @ r) @ inverse - w).float()
    return deltas


def test_equals_uce_on_every_layer(node, demo, sample):
    base, erased = sample(demo[0]), sample(erase(node, demo, replacements="as published")[0])
    expected = sample(edited_weights(demo[0], uce_on_every_layer(demo)))
    assert (base - expected).norm() > 0.1 * base.norm()
    assert difference(erased, expected, base) < 1e-3


def test_rece_goes_further_than_uce(node, demo, sample):
    base, uce = sample(demo[0]), sample(erase(node, demo)[0])
    rece = sample(erase(node, demo, method="RECE", epochs=2)[0])
    assert torch.isfinite(rece).all()
    assert (rece - uce).norm() > 1e-3 * base.norm()


def test_rece_counts_a_lora_on_the_model(node, demo):
    """The Gram matrix is that of the effective weights."""
    from membrane.core.host.model.weights import text_gram

    model = demo[0]
    delta = {key: torch.full_like(layer.weight, 0.01) for key, layer in text_readers(model)}
    expected = sum(
        (layer.weight.detach() + 0.01).double().T @ (layer.weight.detach() + 0.01).double()
        for _, layer in text_readers(model)
    )
    found = text_gram(edited_weights(model, delta))
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("how", ["erase", "stack", "timed"])
def test_strength_zero_is_no_node(node, demo, sample, how):
    base = sample(demo[0])
    if how == "erase":
        model = erase(node, demo, strength=0.0)[0]
    else:
        adapter = erase(node, demo)[1]
        entry = {"strength": 0.0} if how == "stack" else {"strength": 1.0, "start_percent": 1.0}
        stack = node("MembraneStack", adapter=adapter, **entry)[0]
        model = node("MembraneApply", model=demo[0], clip=demo[1], stack=stack)[0]
    assert torch.equal(sample(model), base)


def test_clones_do_not_influence_each_other(node, demo, sample):
    base = sample(demo[0])
    first = erase(node, demo)[0]
    alone = sample(first)
    second = erase(node, demo, concepts="heart -> square", preserve="star")[0]
    other = sample(second)
    assert not torch.equal(alone, other)
    for model, expected in ((first, alone), (second, other), (demo[0], base), (second, other), (first, alone)):
        assert torch.equal(sample(model), expected)
    assert torch.equal(sample(demo[0]), base)


def test_stacking_commutes_and_chains(node, demo, sample):
    star, heart = erase(node, demo)[1], erase(node, demo, concepts="heart -> square", preserve="")[1]
    base = sample(demo[0])

    def stacked(*entries):
        stack = None
        for adapter, strength in entries:
            stack = node("MembraneStack", adapter=adapter, strength=strength, **({"stack": stack} if stack else {}))[0]
        return node("MembraneApply", model=demo[0], clip=demo[1], stack=stack)[0]

    both = sample(stacked((star, 0.5), (heart, 1.5)))
    assert difference(sample(stacked((heart, 1.5), (star, 0.5))), both, base) < 1e-4
    once = node("MembraneStack", adapter=heart, strength=1.5)[0]
    chained = node("MembraneApply", model=stacked((star, 0.5)), clip=demo[1], stack=once)[0]
    assert difference(sample(chained), both, base) < 1e-4
    undone = node("MembraneApply", model=stacked((star, 1.0)), clip=demo[1], stack=node(
        "MembraneStack", adapter=star, strength=-1.0)[0])[0]  # fmt: skip
    assert difference(sample(undone) + 0, base, both) < 1e-4


def test_time_ranges(node, demo, sample):
    """A range equals sampling in two legs by hand; a full range equals no range; two halves equal the whole."""
    model, clip, _ = demo
    adapter = erase(node, demo)[1]
    full = sample(apply_stack(model, ErasureStack((Entry(adapter),))))
    base = sample(model)
    early = apply_stack(model, ErasureStack((Entry(adapter, 1.0, 0.0, 0.5),)))
    found = sample(early)
    assert not torch.equal(found, full) and not torch.equal(found, base)
    positive, negative = (
        node("CLIPTextEncode", clip=clip, text=t)[0] for t in ("a plain red star on snow", "a blue heart")
    )
    sampling = model.model.model_sampling
    threshold = sampling.percent_to_sigma(0.5)
    steps = 4
    leg = {
        "noise_seed": 7,
        "steps": steps,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "positive": positive,
        "negative": negative,
    }
    first_leg = {"add_noise": "enable", "start_at_step": 0, "return_with_leftover_noise": "enable"}
    latent = node("EmptyLatentImage", width=64, height=64, batch_size=2)[0]
    import comfy.samplers

    try:
        sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    except AttributeError:
        sigmas = comfy.samplers.calculate_sigmas_scheduler(model.model, "normal", steps)
    switch = int((sigmas[:-1] >= threshold).sum())
    assert 0 < switch < steps
    whole = apply_stack(model, ErasureStack((Entry(adapter),)))
    first = node("KSamplerAdvanced", model=whole, latent_image=latent, end_at_step=switch, **leg, **first_leg)[0]
    second_leg = {"add_noise": "disable", "start_at_step": switch, "return_with_leftover_noise": "disable"}
    second = node("KSamplerAdvanced", model=model, latent_image=first, end_at_step=steps, **leg, **second_leg)[0][
        "samples"
    ]
    assert (found - second).norm() < 1e-4 * second.norm()
    assert torch.equal(sample(model), base)


def test_a_lora_before_and_after(node, demo, sample):
    """A LoRA and the erasure act together whatever their order."""
    model = demo[0]
    key, layer = next(text_readers(model))
    g = torch.Generator().manual_seed(1)
    name = "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")
    lora = {
        f"{name}.lora_up.weight": torch.randn(layer.weight.shape[0], 2, generator=g),
        f"{name}.lora_down.weight": torch.randn(2, layer.weight.shape[1], generator=g) * 0.1,
    }
    before = apply_stack(
        comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0], ErasureStack((Entry(erase(node, demo)[1]),))
    )
    after = comfy.sd.load_lora_for_models(erase(node, demo)[0], None, lora, 1.0, 0.0)[0]
    base = sample(model)
    assert (sample(before) - base).norm() > 1e-2 * base.norm()
    assert torch.equal(sample(before), sample(after))
    assert not torch.equal(sample(before), sample(erase(node, demo)[0]))


def test_a_control_net_reads_the_unedited_text(node, demo):
    """Only the U-Net's text is erased, as in the published edit."""
    model, clip, _ = demo
    erased = erase(node, demo)[0]
    text = node("CLIPTextEncode", clip=clip, text="a star")[0][0][0]
    patch = erased.object_patches["extra_conds"]
    out = patch(cross_attn=text, control=object(), noise=torch.zeros(1, 4, 8, 8), device=torch.device("cpu"))
    assert not torch.equal(out["c_crossattn"].cond, text)
    assert torch.equal(out["crossattn_controlnet"].cond, text)


def test_save_and_load(node, demo, sample, host):
    model, adapter = erase(node, demo)
    saved = node("MembraneSaveAdapter", adapter=adapter, filename_prefix="objects/star")
    name = saved.ui["text"][0]
    assert name == "objects/star_00001_.safetensors"
    loaded, concepts = node("MembraneLoadAdapter", adapter_name=name.replace("/", "\\"))
    assert concepts == "star"
    assert loaded.card == adapter.card
    again = node("MembraneApply", model=demo[0], clip=demo[1], stack=node("MembraneStack", adapter=loaded)[0])[0]
    assert torch.equal(sample(again), sample(model))
    assert (
        node("MembraneSaveAdapter", adapter=adapter, filename_prefix="objects/star")
        .ui["text"][0]
        .endswith("00002_.safetensors")
    )


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/../../outside", "C:\\outside"])
def test_saving_outside_the_folder_is_refused(node, demo, name):
    with pytest.raises(ErasureError, match="outside"):
        node("MembraneSaveAdapter", adapter=erase(node, demo)[1], filename_prefix=name)


@pytest.mark.parametrize("name", ["../../x.safetensors", "nothing.safetensors", "/etc/passwd"])
def test_loading_what_is_not_in_the_folder_is_refused(node, pack, name):
    loader = pack.NODE_CLASS_MAPPINGS["MembraneLoadAdapter"]
    assert "was not found" in loader.VALIDATE_INPUTS(name)
    with pytest.raises(ErasureError, match="was not found"):
        node("MembraneLoadAdapter", adapter_name=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"concepts": " \n"}, "No concept to erase was given"),
        ({"concepts": "star -> star"}, "replaced by itself"),
        ({"concepts": "star " * 80}, "shorten it"),
        ({"templates": "no place"}, "exactly once"),
        ({"preserve": "heart " * 80}, "shorten it"),
    ],
)
def test_bad_input_is_one_sentence(node, demo, settings, message):
    with pytest.raises(ErasureError, match=message) as caught:
        erase(node, demo, **settings)
    assert "\n" not in str(caught.value)


def test_a_model_without_cross_attention(node, demo, monkeypatch):
    model = demo[0].clone()
    monkeypatch.setattr(model.model.model_config, "unet_config", {})
    with pytest.raises(ErasureError, match="no cross-attention"):
        erase(node, demo, model=model)


def test_an_adapter_of_another_width(node, demo):
    from membrane.core.adapters.adapter import Card, ErasureAdapter
    from membrane.core.adapters.deltas.text_map import TextMap

    adapter = ErasureAdapter(
        Card("UCE", ("dog",), family="SD15"), {"map": {"text": TextMap(torch.zeros(768, 1), torch.zeros(1, 768), (0,))}}
    )
    stack = node("MembraneStack", adapter=adapter)[0]
    with pytest.raises(ErasureError, match="width 768 .SD15., but this model reads vectors of width 128"):
        node("MembraneApply", model=demo[0], clip=demo[1], stack=stack)


def test_start_after_end(node, demo):
    with pytest.raises(ErasureError, match="start <= end"):
        node("MembraneStack", adapter=erase(node, demo)[1], start_percent=0.8, end_percent=0.2)


def test_regions_and_uneven_prompts(node, demo):
    """Two areas with prompts of different lengths against a negative: each conditioning is erased by itself."""
    model, clip, _ = demo
    long = "a plain red star on snow, " * 12  # fills two contexts

    def run(model):
        def conditioning(text):
            return node("CLIPTextEncode", clip=clip, text=text)[0]

        left, right = (
            node("ConditioningSetArea", conditioning=conditioning(text), width=64, height=128, x=x, y=0, strength=1.0)[
                0
            ]
            for text, x in (("a blue star on coal", 0), (long, 64))
        )
        positive = node("ConditioningCombine", conditioning_1=left, conditioning_2=right)[0]
        latent = node("EmptyLatentImage", width=128, height=128, batch_size=1)[0]
        return node(
            "KSampler",
            model=model,
            seed=3,
            steps=3,
            cfg=4.0,
            sampler_name="euler",
            scheduler="normal",
            positive=positive,
            negative=conditioning("a heart"),
            latent_image=latent,
            denoise=1.0,
        )[0]["samples"]

    base = run(model)
    expected = run(edited_weights(model, uce_on_every_layer(demo)))
    assert difference(run(erase(node, demo, replacements="as published")[0]), expected, base) < 1e-3


def test_another_packs_patch_in_the_same_place_is_called(node, demo, sample):
    """Chained politely: what another pack put on extra_conds still runs, and sees the erased text."""
    model = demo[0].clone()
    seen = []

    def theirs(**kwargs):
        seen.append(kwargs["cross_attn"])
        return type(model.model).extra_conds(model.model, **kwargs)

    model.add_object_patch("extra_conds", theirs)
    adapter = erase(node, demo)[1]
    erased = apply_stack(apply_stack(model, ErasureStack((Entry(adapter, 0.5),))), ErasureStack((Entry(adapter, 0.5),)))
    assert torch.allclose(sample(erased), sample(erase(node, demo)[0]), atol=1e-4)
    assert len(seen) == 2
    text = node("CLIPTextEncode", clip=demo[1], text="a blue heart")[0][0][0]
    assert not torch.equal(seen[1], text)


def test_cancel(node, demo, sample):
    import comfy.model_management as management

    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        erase(node, demo)
    management.interrupt_current_processing(False)
    assert torch.isfinite(sample(erase(node, demo)[0])).all()


def test_no_clip(node, demo):
    with pytest.raises(ErasureError, match="CLIP input is empty"):
        node("MembraneErase", model=demo[0], clip=None, **SETTINGS)


def test_words_with_brackets_and_weights_are_taken_as_they_are(node, demo):
    plain = erase(node, demo, preserve="a (red:1.5) heart")[1]
    escaped = erase(node, demo, preserve="a \\(red:1.5\\) heart")[1]
    assert torch.equal(plain.maps["text"].a, escaped.maps["text"].a)
    assert not torch.equal(plain.maps["text"].a, erase(node, demo, preserve="a red heart")[1].maps["text"].a)


def test_several_concepts_have_their_own_terms(node, demo, sample):
    adapter = erase(node, demo, concepts="star -> circle\nheart", replace_with="square", preserve="")[1]
    assert adapter.card.concepts == ("star", "heart") and adapter.card.surrogates == ("circle", "square")
    assert set(adapter.maps["text"].concept) == {0, 1}
    whole = adapter.maps["text"].matrix()
    assert torch.allclose(
        adapter.maps["text"].matrix([1.0, 0.0]) + adapter.maps["text"].matrix([0.0, 1.0]), whole, atol=1e-5
    )


@pytest.mark.parametrize("method", ["UCE", "RECE", "SPEED", "Double Projections"])
def test_a_concept_among_the_preserved_is_erased_all_the_same(node, demo, method):
    both = erase(node, demo, preserve="heart\nSTAR", method=method)[1]
    alone = erase(node, demo, preserve="heart", method=method)[1]
    assert torch.equal(both.maps["text"].a, alone.maps["text"].a) and torch.equal(
        both.maps["text"].b, alone.maps["text"].b
    )


@pytest.mark.parametrize("method", ["SPEED", "Double Projections"])
def test_null_space_methods_leave_the_preserved_subject_alone(node, demo, method):
    model, clip, _ = demo
    adapter = erase(node, demo, preserve="heart", templates="{}", method=method, tau=0.0)[1]
    encoded = encode(clip, ["star", "circle", "heart"])
    star, circle, heart = (encoded[word].rows[1] for word in encoded.prompts)
    e = adapter.maps["text"].matrix()
    assert (e @ heart).norm() < 1e-4 * heart.norm()
    assert (star + e @ star - circle).norm() < 0.2 * (star - circle).norm()


def test_a_preset_sets_the_published_numbers(node, demo):
    card = erase(node, demo, concepts="star", preset="person", method="SPEED", rho=7.0, templates="{} {}")[1].card
    assert card.surrogates == ("person",)
    assert (card.settings["tau"], card.settings["rho"], card.settings["prior_filter"]) == (1e-4, 0.05, False)
    assert "a portrait of {}" in card.settings["templates"]
    card = erase(node, demo, concepts="star -> circle\nheart ->", preset="style", preserve="ring")[1].card
    assert card.surrogates == ("circle", "") and card.settings["preserve_scale"] == 0.5


def test_speed_reads_the_layers_where_it_is_augmented(node, demo):
    words = {"concepts": "star -> circle", "replace_with": "", "preserve": "heart\nsquare\nmoon", "method": "SPEED"}
    plain, augmented = (
        node("MembraneErase", model=demo[0], clip=demo[1], strength=1.0, edition=edition, templates="{}", **words)[1]
        for edition in ("scripts of 2025", "scripts of 2025, augmented")
    )
    assert augmented.card.settings["edition"] == "scripts of 2025, augmented"
    one, other = (adapter.maps["text"].matrix() for adapter in (plain, augmented))
    assert torch.isfinite(other).all() and (other - one).norm() > 1e-3 * one.norm()


def test_no_preset_is_the_same_as_before(node, demo):
    plain = erase(node, demo)[1]
    assert plain.card == erase(node, demo, preset="custom", preserve_file="none")[1].card
    assert "penalty_on" not in plain.card.settings


def test_penalties_differ(node, demo):
    one, other = (erase(node, demo, method="RECE", penalty_on=kind)[1] for kind in ("length", "distance"))
    assert other.card.settings["penalty_on"] == "distance"
    assert (one.maps["text"].matrix() - other.maps["text"].matrix()).norm() > 1e-3 * one.maps["text"].matrix().norm()


@pytest.fixture
def kept_list():
    import folder_paths

    file = Path(folder_paths.get_input_directory()) / "kept.txt"
    file.write_text("\ufeffheart\n\nsquare\nheart\n", encoding="utf-8")
    yield file
    file.unlink(missing_ok=True)


def test_a_preserve_list_from_a_file(node, demo, kept_list, pack):
    cls = pack.NODE_CLASS_MAPPINGS["MembraneErase"]
    assert cls.INPUT_TYPES()["optional"]["preserve_file"][0] == ["none", "kept.txt"]
    assert cls.VALIDATE_INPUTS("kept.txt") is True and cls.VALIDATE_INPUTS() is True
    written = erase(node, demo, preserve="moon\nheart\nsquare")[1]
    read = erase(node, demo, preserve="moon", preserve_file="kept.txt")[1]
    assert read.card == written.card and torch.equal(read.maps["text"].a, written.maps["text"].a)
    before = cls.IS_CHANGED("kept.txt", model=None)
    assert before == cls.IS_CHANGED("kept.txt") != cls.IS_CHANGED()
    kept_list.write_text("ring", encoding="utf-8")
    assert before != cls.IS_CHANGED("kept.txt")


def test_a_preserve_list_that_cannot_be_read(node, demo, kept_list, pack):
    kept_list.write_bytes(b"caf\xe9")
    with pytest.raises(ErasureError, match="not UTF-8"):
        erase(node, demo, preserve_file="kept.txt")
    for name in ("gone.txt", "../kept.txt"):
        assert "was not found" in pack.NODE_CLASS_MAPPINGS["MembraneErase"].VALIDATE_INPUTS(name)
        with pytest.raises(ErasureError, match="was not found"):
            erase(node, demo, preserve_file=name)


@pytest.mark.parametrize("kind", ["keys", "values"])
def test_only_keys_or_only_values(node, demo, sample, kind):
    """Against the whole erasure on a model whose other layers are put back."""
    model, adapter = erase(node, demo, layers=kind)
    whole = erase(node, demo)[1]
    assert adapter.maps.get("text") is None and all(name.endswith(f"attn2_to_{kind[0]}") for name in adapter.low_rank)
    matrix = whole.maps["text"].matrix()
    delta = {
        key: layer.weight @ matrix if key.endswith(f"to_{kind[0]}.weight") else torch.zeros_like(layer.weight)
        for key, layer in text_readers(demo[0])
    }
    base = sample(demo[0])
    assert difference(sample(model), sample(edited_weights(demo[0], delta)), base) < 1e-3
    assert torch.equal(sample(demo[0]), base)


def test_a_model_without_a_pooled_vector_has_none_to_edit(node, demo):
    assert erase(node, demo, pooled="edit")[1].maps.get("pooled") is None
