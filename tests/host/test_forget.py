"""The small node for daily use on a real host, and what is said of words and of files that lack the erasure."""

import inspect
import logging
import types
from pathlib import Path

import folder_paths
import pytest
import torch
from membrane.core.errors import ErasureError
from membrane.core.host.page import saving
from membrane.core.host.patches.stack import applied, applied_stack
from membrane.core.text.captions import KINDS, captions_of
from safetensors.torch import save_file

CIRCLE = {"remove": "star -> circle", "keep": "heart\nsquare", "kind": "object"}


@pytest.fixture
def forget(node, demo):
    def run(**given):
        return node("MembraneForget", model=demo[0], clip=demo[1], **{**CIRCLE, **given})

    return run


def changed(sample, base, model, prompt):
    """Relative difference of a prompt's latents between two models."""
    before, after = (sample(m, positive=prompt, negative="", steps=4) for m in (base, model))
    return ((after - before).norm() / before.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_run_of_the_node_for_experts(node, demo, forget, kind):
    captions = captions_of(kind)
    found = forget(kind=kind, only_where_asked=False)
    settings = {"concepts": CIRCLE["remove"], "preserve": CIRCLE["keep"], "templates": "\n".join(captions.templates)}
    settings["anchor"] = 0.5 * len(captions.templates)  # which counts for each built-in caption
    expected = node("MembraneErase", model=demo[0], clip=demo[1], **settings)[1]
    assert found[1] is demo[1]
    assert found[2].card == expected.card and set(found[2].maps) == set(expected.maps)
    for name, text_map in expected.maps.items():
        assert torch.equal(found[2].maps[name].a, text_map.a) and torch.equal(found[2].maps[name].b, text_map.b)


def test_only_where_the_prompt_asks_for_it(demo, sample, forget):
    always, asked = forget(only_where_asked=False)[0], forget()[0]
    star, ring = "a plain red star on snow", "a dotted blue ring on coal"
    assert changed(sample, demo[0], asked, star) > 0.5 * changed(sample, demo[0], always, star) > 0.02
    assert changed(sample, demo[0], asked, ring) < 0.3 * changed(sample, demo[0], always, ring)


def test_strength_nought_is_the_model_itself(demo, forget):
    assert forget(strength=0.0)[0] is demo[0]


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("name", ["MembraneForget", "MembraneErase"])
def test_another_strength_encodes_no_text_again(node, demo, encodes, name):
    words = CIRCLE if name == "MembraneForget" else {"concepts": "star -> circle", "preserve": "heart"}
    first = node(name, model=demo[0], clip=demo[1], **words, strength=1.0)
    before = len(encodes)
    assert before > 0
    second = node(name, model=demo[0], clip=demo[1], **words, strength=0.9)
    assert len(encodes) == before
    assert [applied_stack(found[0]).entries[0].strength for found in (first, second)] == [1.0, 0.9]
    node(name, model=demo[0], clip=demo[1], **{**words, next(iter(words)): "heart -> circle"}, strength=0.9)
    assert len(encodes) > before


@pytest.mark.usefixtures("nothing_kept")
def test_another_strength_of_what_opens_by_words_encodes_no_text_again(node, demo, encodes, forget):
    adapter = forget()[2]
    before = len(encodes)
    for strength in (1.0, 0.9, 0.8):
        stack = node("MembraneStack", adapter=adapter, strength=strength, permeability="facilitated transport")[0]
        node("MembraneApply", model=demo[0], clip=demo[1], stack=stack)
        assert len(encodes) == before + 1  # the concept and the empty prompt


def test_nothing_to_remove_is_one_sentence(forget):
    with pytest.raises(ErasureError, match="^No concept to erase was given; write at least one"):
        forget(remove=" \n")


def test_it_says_what_it_did_and_how_words_were_taken(forget):
    found = forget()
    title = f"Erased: star -> circle. Kept: 2. Captions: {len(captions_of('object').templates)}."
    title += " Kept as well, as it comes instead: circle."
    assert found.ui == {"membrane": [{"title": title, "level": "info", "lines": [], "links": []}]} and found[3] == title
    told = forget(remove="* star => circle\nmoon, ring\ndragon", keep="- star\n- heart").ui["membrane"][0]
    assert told["title"].startswith("Erased: star -> circle, moon, ring, dragon. Kept: 1.")
    assert told["level"] == "warning" and [line.split(";")[0] for line in told["lines"]] == [
        '"star" is also to be kept',
        '"moon, ring" was taken as one concept',
        '"dragon" is no word of the text encoder, which spells it',
    ]


def test_settings_take_the_place_of_what_the_kind_says(node, forget):
    given = {"method": "SPEED", "replace_with": "circle", "templates": "{}\na red {}", "tau": 0.5, "layers": "values"}
    settings = node("MembraneForgetSettings", **given)[0]
    found = forget(remove="star", settings=settings)[2]
    assert found.card.method == "SPEED" and found.card.surrogates == ("circle",)
    assert found.card.settings["templates"] == ["{}", "a red {}"] and found.card.settings["tau"] == 0.5
    assert set(found.deltas) == {"low_rank"}


def test_settings_as_they_come_change_nothing(node, forget):
    settings = node("MembraneForgetSettings")[0]
    found, expected = forget(settings=settings)[2], forget()[2]
    assert found.card == expected.card and torch.equal(found.maps["text"].a, expected.maps["text"].a)


def test_the_weights_of_the_rounds_reach_the_method(node, forget):
    words = {"method": "RECE", "epochs": 1}
    plain, own = (
        forget(remove="star", settings=node("MembraneForgetSettings", **words, **given)[0])[2]
        for given in ({}, {"edit_erase_scale": 3.0, "edit_preserve_scale": 0.5, "edit_anchor": 0.7})
    )
    names = ("edit_erase_scale", "edit_preserve_scale", "edit_anchor")
    assert [own.card.settings[name] for name in names] == [3.0, 0.5, 0.7]
    assert not torch.equal(own.maps["text"].matrix(), plain.maps["text"].matrix())


def test_an_embedding_that_is_not_there_is_said(demo, forget):
    folder = Path(folder_paths.get_folder_paths("embeddings")[0])
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"emb_params": torch.ones(1, 128)}, folder / "there.safetensors")
    report = forget(remove="embedding:gone star -> embedding:there, red")[3]
    assert 'There is no embedding "gone", so it was read as nothing;' in report and '"there"' not in report
    assert "no embedding" not in forget(remove="star")[3]


def test_every_setting_has_its_input(pack):
    types_of = pack.NODE_CLASS_MAPPINGS["MembraneForgetSettings"].INPUT_TYPES()
    names = [name for group in types_of.values() for name in group]
    expert = pack.NODE_CLASS_MAPPINGS["MembraneErase"]
    others = {"model", "clip", "concepts", "preserve", "strength", "preset", "apply_to"}
    only_here = {"edit_erase_scale", "edit_preserve_scale", "edit_anchor"}  # of RECE's rounds
    assert only_here <= set(names)
    assert set(names) - only_here == set(inspect.signature(expert.erase).parameters) - {"self"} - others


@pytest.mark.parametrize("name", ["MembraneForget", "MembraneErase"])
def test_on_the_weights_it_gives_the_pictures_of_the_text(node, demo, sample, name):
    words = CIRCLE | {"only_where_asked": False} if name == "MembraneForget" else {"concepts": "star -> circle"}
    text, weights = (node(name, model=demo[0], clip=demo[1], **words, apply_to=place) for place in ("text", "weights"))
    assert applied(text[0]) is not None and applied(weights[0]) is None
    prompt = {"positive": "a plain red star on snow", "negative": "a blue heart", "steps": 4}
    base, one, other = (sample(model, **prompt) for model in (demo[0], text[0], weights[0]))
    assert (one - other).norm() < 1e-3 * (one - base).norm()


def test_on_the_weights_it_acts_on_every_prompt_and_says_so(forget):
    said = forget(apply_to="weights").ui["membrane"][0]
    assert said["lines"] == [
        "The erasure is on the weights, which are the same for every prompt: it acts on prompts that do not ask for it "
        "too."
    ]
    assert said["level"] == "info"


class Page:
    """A server that keeps what it is told to send."""

    last_node_id, client_id = "7", "page"

    def __init__(self):
        self.sent = []

    def send_sync(self, event, data, sid=None):
        self.sent.append((event, data, sid))


@pytest.fixture
def page(monkeypatch):
    found = Page()
    monkeypatch.setattr(saving, "PromptServer", types.SimpleNamespace(instance=found))
    return found


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if "beside the weights" in record.getMessage()]


def save(node, model, demo):
    node("CheckpointSave", model=model, clip=demo[1], vae=demo[2], filename_prefix="forget")


def test_saving_without_the_erasure_warns(node, demo, forget, page, caplog):
    erased = forget()[0]
    with caplog.at_level(logging.WARNING, "membrane"):
        save(node, erased, demo)
    sentence = (
        'This file does not have the erasure of star, which acts beside the weights; set apply_to to "weights" on the '
        "node that erases (Erase Concepts or Apply Erasure) to have it there."
    )
    assert warnings(caplog) == [f"Membrane: {sentence}"]
    assert page.sent == [("membrane.warning", {"node": "7", "title": "Not in the weights", "text": sentence}, "page")]


def test_merging_weights_without_the_erasure_warns(node, demo, forget, page, caplog):
    with caplog.at_level(logging.WARNING, "membrane"):
        merged = node("ModelMergeSimple", model1=demo[0], model2=forget()[0], ratio=0.5)[0]
    assert len(warnings(caplog)) == 1 and "The merged model does not get the erasure of star" in warnings(caplog)[0]
    assert applied(merged) is None


def test_what_is_in_the_weights_is_saved_without_a_word(node, demo, forget, page, caplog):
    erased = forget(apply_to="weights")[0]
    with caplog.at_level(logging.WARNING, "membrane"):
        save(node, erased, demo)
        save(node, demo[0], demo)
        node("ModelMergeSimple", model1=forget()[0], model2=demo[0], ratio=0.5)  # keeps it
    assert not warnings(caplog) and not page.sent


def test_the_packs_own_reading_of_weights_is_silent(node, demo, forget, page, caplog):
    stack = node("MembraneStack", adapter=forget()[2])[0]
    with caplog.at_level(logging.WARNING, "membrane"):
        node("MembraneImpact", model=forget()[0], clip=demo[1], stack=stack, prompts="a star\na heart")
        always = forget(only_where_asked=False)[0]
        node("MembraneErase", model=always, clip=demo[1], concepts="heart", method="RECE", apply_to="weights")
    assert not warnings(caplog) and not page.sent
