"""What the other nodes make of transformers: they work where their method has a meaning, else they say in one sentence
that it has none, and name the model."""

import json

import pytest
import torch
from membrane.core.errors import ErasureError
from membrane.core.families import table
from membrane.core.formats import registry
from membrane.tools.tiny import networks

SAMPLING = {"steps": 2, "cfg": 2.0, "sampler_name": "euler", "seed": 0, "width": 64, "height": 64}
STAR, HOUSE = "a red star", "a big house"
# a norm before the text, none, CLIP's and T5's rows in one, several entries, layers of the model before the text
NAMES = ("z_image", "flux_dev", "sd3", "hidream", "anima", "wan21")
TITLES = {"z_image": "Z-Image", "flux_dev": r"Flux\.1", "sd3": "Stable Diffusion 3", "hidream": "HiDream-I1",
          "anima": "Anima", "wan21": r"Wan 2\.1 and 2\.2"}  # fmt: skip


class Subject:
    """A tiny network with its text encoder, and an erasure of it."""

    def __init__(self, name, node):
        self.name, self.title, self.node = name, TITLES[name], node
        self.model, self.clip = networks.build(name), networks.text_encoder(name)
        self.both = {"model": self.model, "clip": self.clip}
        self.erased, self.adapter = self.erase()

    def erase(self, **settings):
        return self.node("MembraneErase", **{
            "concepts": "star -> circle", "replace_with": "", "preserve": "", "method": "UCE", "strength": 1.0,
            "templates": "{}\na red {}", **self.both, **settings,
        })  # fmt: skip

    def stack(self, **settings):
        return self.node("MembraneStack", adapter=self.adapter, strength=1.0, **settings)[0]


@pytest.fixture(scope="module", params=NAMES)
def subject(request, node):
    try:
        return Subject(request.param, node)
    except networks.NotInThisHost as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("permeability", ["fixed", "facilitated transport"])
def test_impact_is_seen_before_sampling(subject, permeability):
    stack = subject.stack(permeability=permeability)
    report = subject.node("MembraneImpact", stack=stack, prompts=f"{STAR}\n{HOUSE}", **subject.both)[1]
    star, house = (
        float(next(line for line in report.splitlines() if line.startswith(text)).split()[-1].rstrip("%"))
        for text in (STAR, HOUSE)
    )
    assert star > 0 and (permeability == "fixed" or house < star)


def test_the_pull_of_texts_is_told(subject):
    """Two prompts each with a score, on every family; what needs cross-attention says so."""

    def detected(**more):
        return subject.node("MembraneDetectMemorization", prompts=f"{STAR}\n{HOUSE}", seeds=2, first_steps=1,
                            scheduler="normal", **SAMPLING, **subject.both, **more)  # fmt: skip

    found = detected()
    scores = [row["score"] for row in json.loads(found[4])["prompts"]]
    assert all(0 < score < float("inf") for score in scores) and scores[0] != scores[1]
    assert "which words it depends on is told on Stable Diffusion 1 and 2 only" in found[0]
    with pytest.raises(ErasureError, match="has no cross-attention on the way down"):
        detected(bright_ending=True)


def test_pictures_with_sound_are_not_painted_here(node):
    try:
        both = {"model": networks.build("minimax_h3"), "clip": networks.text_encoder("minimax_h3")}
    except networks.NotInThisHost as error:
        pytest.skip(str(error))
    with pytest.raises(ErasureError, match="MiniMax H3 makes its pictures together with their sound"):
        node("MembraneDetectMemorization", prompts=STAR, seeds=1, first_steps=1, scheduler="normal", **SAMPLING, **both)


def test_training_works_or_says_what_else_to_do(subject):
    def train():
        return subject.node("MembraneTrain", concepts="star", surrogate="circle", preset="custom", steps=2, eta=1.0,
                            rank=1, learning_rate=1e-3, anchoring=1.0, width=64, height=64, seed=0, layers="all",
                            save_every=5, filename_prefix="families/none", **subject.both)  # fmt: skip

    if subject.name == "hidream":
        with pytest.raises(ErasureError, match=f"Which layers of {subject.title} models .*erase in closed form"):
            train()
    elif subject.name != "anima":  # test_train_families.py knows on which hosts that one has a gradient
        assert train()[0].sites


def test_mitigation(subject):
    def mitigated(method):
        return subject.node("MembraneMitigateMemorization", model=subject.model, method=method, strength=1.0,
                            scale_before=1.0, until=0.5, start_token=1.0)[0]  # fmt: skip

    assert mitigated("dynamic guidance") is not subject.model
    with pytest.raises(ErasureError, match=f"this is {subject.title} .*choose dynamic"):
        mitigated("token re-weighting")


def locate(subject, method="Wanda (ConceptPrune)"):
    return subject.node("MembraneLocateMemorization", prompts=STAR, base_prompts=HOUSE, method=method, sparsity=0.1,
                        first_steps=1, scheduler="normal", **SAMPLING, **subject.both)  # fmt: skip


def test_feed_forward_layers_are_pruned(subject):
    """Masks on the layers of the network's own names; with all gates open the picture changes, at strength 0 not."""
    if subject.name == "hidream":  # its feed-forward layers are experts, each of which sees some of the rows
        with pytest.raises(ErasureError, match="has no feed_forward.down layers that Membrane knows"):
            locate(subject)
        return
    adapter = locate(subject)[0]
    assert adapter.masks and all("txt" not in site for site in adapter.masks)
    stack = subject.node("MembraneStack", adapter=adapter, strength=1.0, permeability="fixed")[0]
    pruned = subject.node("MembraneApply", stack=stack, apply_to="text", **subject.both)[0]
    sides = (subject.node("CLIPTextEncode", clip=subject.clip, text=text)[0] for text in (STAR, HOUSE))
    sides = tuple(sides)
    base, changed = (networks.predict(m, *sides, subject.name)[0] for m in (subject.model, pruned))
    assert (changed - base).norm() > 1e-4 * base.norm()
    assert torch.equal(networks.predict(subject.model, *sides, subject.name)[0], base)


def test_dampening_needs_gradients(subject):
    if subject.name != "hidream":
        with pytest.raises(ErasureError, match=f"this is {subject.title} .*choose Wanda"):
            locate(subject, "dampening: feed-forward (experimental)")


def test_derived_vectors(subject):
    """An attack with vectors needs layers that read them as they are."""
    if subject.name in ("z_image", "anima"):
        with pytest.raises(ErasureError, match=f'The text of {subject.title} passes .* set attacks to "words"'):
            stress(subject)
    else:
        assert "star" in stress(subject)[1]


def stress(subject):
    return subject.node("MembraneStressTest", original=subject.model, erased=subject.erased, clip=subject.clip,
                        concept="star", captions="a red {}", pictures=1, scheduler_name="normal",
                        attacks="derived vectors", **SAMPLING)  # fmt: skip


def test_a_model_of_no_known_family_is_tried_and_said_to_be_unknown(node, caplog, monkeypatch):
    try:
        subject = Subject("flux_dev", node)
    except networks.NotInThisHost as error:
        pytest.skip(str(error))
    monkeypatch.setattr(table, "FAMILIES", [f for f in table.FAMILIES if "Flux" not in f.configs])
    caplog.clear()
    erased, adapter = subject.erase()
    assert "no model that Membrane knows" in caplog.text and set(adapter.maps) == {"text"}
    sides = tuple(subject.node("CLIPTextEncode", clip=subject.clip, text=text)[0] for text in (STAR, HOUSE))
    base, found, before = (networks.predict(m, *sides, "flux_dev")[0] for m in (subject.model, erased, subject.erased))
    assert (found - base).norm() > 1e-3 * base.norm() and not torch.equal(found, before)


def test_two_models_are_said_to_be_two(node, caplog):
    try:
        Subject("wan21", node)
    except networks.NotInThisHost as error:
        pytest.skip(str(error))
    assert "erase from both" in caplog.text


def test_keys_or_values_alone(subject):
    if subject.name == "anima":  # reads its text by keys and values of cross-attention, as U-Nets do
        keys, values = (subject.erase(layers=layers)[1].low_rank for layers in ("keys", "values"))
        assert keys and all(site.endswith("k_proj") for site in keys)
        assert values and all(site.endswith("v_proj") for site in values)
    else:
        with pytest.raises(ErasureError, match=f"{subject.title} is not read by keys and values of its own"):
            subject.erase(layers="keys")


def test_a_lora_of_all_entries(subject):
    """Saved at the layers that read the text, one LoRA does what the maps do."""
    name = subject.node("MembraneSaveAdapter", adapter=subject.adapter, filename_prefix="families/erase",
                        format="LoRA (kohya)", model=subject.model).ui["text"][0]  # fmt: skip
    loaded = registry.load(next(path for path in _loras() if path.endswith(name)))
    stack = subject.node("MembraneStack", adapter=loaded, strength=1.0, permeability="fixed")[0]
    applied = subject.node("MembraneApply", stack=stack, apply_to="text", **subject.both)[0]
    sides = tuple(subject.node("CLIPTextEncode", clip=subject.clip, text=text)[0] for text in (STAR, HOUSE))
    base, erased, lora = (
        networks.predict(m, *sides, subject.name)[0] for m in (subject.model, subject.erased, applied)
    )
    assert (lora - erased).norm() < 2e-3 * (erased - base).norm()  # the file holds half precision


def _loras():
    import folder_paths

    return [folder_paths.get_full_path("loras", name) for name in folder_paths.get_filename_list("loras")]
