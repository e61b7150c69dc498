"""Permeability by meaning in the host: other prompts keep their pictures bit by bit, and synonyms open it."""

from dataclasses import replace

import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.adapters.permeability import Permeability
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.errors import ErasureError
from membrane.core.host.model.layers import text_entries
from membrane.core.host.patches.stack import applied, apply_stack
from membrane.core.host.runs import probing
from membrane.core.host.text import kept
from membrane.core.host.text.known_tokens import PROMPTS

STAR, SYNONYM = "a dotted red star on snow", "a striped blue pentagram on coal"
OTHERS = "a dotted red heart on snow", "a striped blue ring on coal", "a photo of a dog", "a small yellow disc on sand"
MEANING = Permeability("meaning")


@pytest.fixture(scope="module")
def demo(either):
    return either[0]


@pytest.fixture(scope="module", params=["", "heart\nring\nsquare"], ids=["no list", "list"])
def erased(request, demo, node):
    """What Erase Concepts gives, with a list of what to keep and without."""
    return node("MembraneForget", model=demo[0], clip=demo[1], remove="star -> circle", keep=request.param)


def gate_of(model, text, prompt, prompt_type="positive"):
    """The one gate's value for a prompt, as the sampler gets it."""
    vectors, more = text(prompt)[0]
    return applied(model).gates(vectors, prompt_type, None, more).item()


def test_texts_of_the_concept_open_it_and_no_others(erased, text):
    prompts = STAR, SYNONYM, "star, red, pixel art", "STAR", "a (star:1.3) on sand"
    assert [gate_of(erased[0], text, prompt) for prompt in prompts] == [1.0] * len(prompts)
    assert [gate_of(erased[0], text, prompt) for prompt in (*OTHERS, "")] == [0.0] * (len(OTHERS) + 1)


def test_pictures_of_other_prompts_are_bit_identical(demo, erased, sample):
    for prompt in OTHERS[:2]:
        assert torch.equal(sample(erased[0], prompt, STAR), sample(demo[0], prompt, STAR))
    fixed = apply_stack(demo[0], ErasureStack((Entry(erased[2]),)))
    for prompt in STAR, SYNONYM:
        assert torch.equal(sample(erased[0], prompt, ""), sample(fixed, prompt, ""))
        assert not torch.equal(sample(erased[0], prompt, ""), sample(demo[0], prompt, ""))


def test_it_needs_no_text_encoder_and_no_memory_of_words(demo, erased, text, monkeypatch):
    monkeypatch.setattr(PROMPTS, "recall", lambda vectors: pytest.fail("the words were asked for"))
    model = apply_stack(demo[0], ErasureStack((Entry(erased[2], permeability=MEANING),)), clip=None)
    strange = [[text(SYNONYM)[0][0].clone(), text(SYNONYM)[0][1]]]  # as another pack's node would give it
    assert gate_of(model, lambda prompt: strange, "") == 1.0


@pytest.mark.parametrize("negative, expected", [("same as positive", 1.0), ("own", 0.0), ("off", 0.0)])
def test_the_negative_prompt_has_the_rules_of_all_modes(demo, erased, text, negative, expected):
    entry = Entry(erased[2], permeability=Permeability("meaning", negative=negative))
    conditioning = applied(apply_stack(demo[0], ErasureStack((entry,))))
    noise = torch.zeros(1)
    (star, more), (other, of_other) = text(STAR)[0], text(OTHERS[0])[0]
    assert conditioning.gates(star, "positive", noise, more).item() == 1.0
    assert conditioning.gates(other, "negative", noise, of_other).item() == expected


def test_two_prompts_in_one_conditioning_have_their_own_gates(erased, text):
    (one, of_one), (two, of_two) = text(STAR)[0], text(OTHERS[0])[0]
    length = max(one.shape[1], two.shape[1])
    both = torch.cat([torch.nn.functional.pad(t, (0, 0, 0, length - t.shape[1])) for t in (one, two)])
    more = {k: torch.cat([of_one[k], of_two[k]]) for k in of_one if torch.is_tensor(of_one[k])}
    assert applied(erased[0]).gates(both, "positive", None, more).flatten().tolist() == [1.0, 0.0]


def test_a_file_keeps_it(node, demo, erased, text, sample):
    name = node("MembraneSaveAdapter", adapter=erased[2], filename_prefix="meaning").ui["text"][0]
    stack = node("MembraneStack", adapter=node("MembraneLoadAdapter", adapter_name=name)[0], permeability="meaning")[0]
    loaded = node("MembraneApply", model=demo[0], clip=demo[1], stack=stack)[0]
    assert gate_of(loaded, text, SYNONYM) == 1.0 and gate_of(loaded, text, OTHERS[0]) == 0.0
    assert torch.equal(sample(loaded, SYNONYM, ""), sample(erased[0], SYNONYM, ""))


@pytest.mark.parametrize("connected", [True, False])
def test_the_preview_shows_what_opens_it(node, demo, erased, connected):
    stack = node("MembraneStack", adapter=erased[2], permeability="meaning")[0]
    more = {"model": demo[0]} if connected else {}
    report = node("MembranePreview", clip=demo[1], stack=stack, prompts=f"{SYNONYM}\n{OTHERS[0]}", **more)[1]
    first, *rest = report.splitlines()
    assert first == SYNONYM and rest[0].split() == ["star", "1.000"] and rest[2].split() == ["star", "0.000"]
    lines = [line for line in rest if "star, text: r" in line]
    probe = erased[2].maps["text"].probes[0]
    assert len(lines) == 2 and all(f"low {probe.low:6.3f}  high {probe.high:6.3f}" in line for line in lines)


def test_an_adapter_without_probes_is_one_sentence(node, demo, random_adapter, random_map):
    """One on layers where no text encoder is connected that could tell them, a map of the text in any case."""
    for adapter, clip in ((random_adapter(1, "star"), None), (random_map(demo[0]), demo[1])):
        stack = node("MembraneStack", adapter=adapter, permeability="meaning")[0]
        with pytest.raises(ErasureError, match="^The adapter star has no probe for each of its concepts"):
            node("MembraneApply", model=demo[0], clip=clip, stack=stack)


@pytest.fixture
def random_map():
    """random_map(MODEL) -> a map of the text as files of before the probes hold it."""

    def make(model):
        (entry, width), *_ = text_entries(model).items()
        factors = torch.randn(width, 1), torch.randn(1, width)
        return ErasureAdapter(Card("UCE", ("star",)), {"map": {entry.name: TextMap(*factors, (0,), bool(entry.norm))}})

    return make


@pytest.fixture(scope="module")
def trained(node, demo):
    """An adapter of layers: trained in a single step, and then made strong enough to be seen."""
    found = node(
        "MembraneTrain", model=demo[0], clip=demo[1], concepts="star", surrogate="circle", steps=1, width=128,
        height=128, rollout_steps=2, preview_every=0, preserve="heart",
    )[0]  # fmt: skip
    louder = {
        kind: {site: replace(d, up=torch.ones_like(d.up) * 0.05) for site, d in sites.items()}
        for kind, sites in found.deltas.items()
    }
    return replace(found, deltas=louder, name="")


def test_a_trained_adapter_opens_by_meaning(node, demo, trained, text, sample):
    """Its file has the probes, so that no text encoder is needed; other pictures are bit-identical."""
    assert trained.probed and not trained.maps
    name = node("MembraneSaveAdapter", adapter=trained, filename_prefix="trained").ui["text"][0]
    stack = node("MembraneStack", adapter=node("MembraneLoadAdapter", adapter_name=name)[0], permeability="meaning")[0]
    model = node("MembraneApply", model=demo[0], clip=None, stack=stack)[0]
    assert [gate_of(model, text, prompt) for prompt in (STAR, SYNONYM, *OTHERS)] == [1.0, 1.0] + [0.0] * len(OTHERS)
    assert torch.equal(sample(model, OTHERS[0], STAR), sample(demo[0], OTHERS[0], STAR))
    assert not torch.equal(sample(model, SYNONYM, ""), sample(demo[0], SYNONYM, ""))
    report = node("MembranePreview", clip=demo[1], stack=stack, prompts=SYNONYM)[1]
    assert report.splitlines()[1].split() == [name, "1.000"] and "star, text: r" in report


def test_probes_of_a_foreign_adapter_are_computed_when_it_is_applied(node, demo, trained, text, monkeypatch):
    """Once for a text encoder and model; those in a file are not computed again."""
    foreign = replace(trained, layer_probes={}, card=replace(trained.card, method="LoRA", settings={}))
    fitted, probes_for = [], probing.probes_for
    monkeypatch.setattr(probing, "KEPT", kept.Kept())
    monkeypatch.setattr(probing, "probes_for", lambda *args: (fitted.append(1), probes_for(*args))[1])
    stack = node("MembraneStack", adapter=foreign, permeability="meaning")[0]
    for _ in range(2):
        model = node("MembraneApply", model=demo[0], clip=demo[1], stack=stack)[0]
    assert [gate_of(model, text, prompt) for prompt in (STAR, SYNONYM, *OTHERS)] == [1.0, 1.0] + [0.0] * len(OTHERS)
    report = node("MembranePreview", clip=demo[1], stack=stack, prompts=SYNONYM, model=demo[0])[1]
    assert report.splitlines()[1].split() == ["star", "1.000"] and len(fitted) == 1
    with pytest.raises(ErasureError, match="^The adapter star has no probe .* Preview Permeability"):
        node("MembranePreview", clip=demo[1], stack=stack, prompts=SYNONYM)
    by_words = node("MembraneStack", adapter=foreign, permeability="facilitated transport")[0]
    known = node("MembraneStack", adapter=trained, permeability="meaning")[0]
    for other in (by_words, known):
        node("MembraneApply", model=demo[0], clip=demo[1], stack=other)
    assert len(fitted) == 1


def test_concepts_that_nothing_tells_from_other_texts_are_one_sentence(node, demo, trained):
    vague = replace(trained, layer_probes={}, card=replace(trained.card, concepts=("a",), surrogates=()))
    stack = node("MembraneStack", adapter=vague, permeability="meaning")[0]
    with pytest.raises(ErasureError, match="^What this model reads of a cannot be told from other texts"):
        node("MembraneApply", model=demo[0], clip=demo[1], stack=stack)
