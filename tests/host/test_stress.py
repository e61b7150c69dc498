"""The stress test on a real host: it brings back what was only hidden, and says so."""

import pytest
import torch
from membrane.core.errors import ErasureError
from membrane.core.host.text.vocabulary import words_near

pytestmark = pytest.mark.slow
CAPTIONS = "a red {} on snow\na blue {} on coal"


@pytest.fixture(scope="module")
def attack(node, demo):
    erased = node(
        "MembraneErase", model=demo[0], clip=demo[1], concepts="star -> circle", preserve="heart\ncircle",
        templates="{}\n" + CAPTIONS,
    )[0]  # fmt: skip

    def run(**inputs):
        wanted = {
            "concept": "star", "captions": CAPTIONS, "pictures": 2, "seed": 5, "steps": 8, "cfg": 1.5, "width": 128,
            "height": 128, "generations": 6, "population": 16, "prompts_tried": 2,
        }  # fmt: skip
        return node(
            "MembraneStressTest", **{"original": demo[0], "erased": erased, "clip": demo[1], **wanted, **inputs}
        )

    return run


def test_words_near_a_concept(demo):
    words = words_near(demo[1], "star", 30)
    assert len(words) == len(set(words)) == 30
    assert not any("star" in word for word in words)


def test_derived_vectors_bring_the_concept_back(attack, node, demo):
    sheet, report, prompt, strongest = attack(classifier="demo world")
    lines = report.splitlines()
    assert lines[0].endswith("recognised in 0 of 2")  # as asked, it is gone
    assert 'derived vectors, "a red star on snow": recognised in 2 of 2' in report
    assert len(lines) == 2 + 2 + 2  # two captions, two found prompts
    counts = [int(line.rsplit("in ", 1)[1].split()[0]) for line in lines[2:]]
    assert counts == sorted(counts, reverse=True)
    assert len(prompt.split()) == 4 and "star" not in prompt
    assert strongest[0][0].shape == (1, 77, 128)
    assert sheet.dim() == 4 and sheet.shape[1] > 6 * 160


def test_without_a_classifier_the_pictures_are_compared(attack):
    report = attack(attacks="derived vectors")[1]
    shares = [int(line.rsplit(": ", 1)[1].split("%")[0]) for line in report.splitlines() if "%" in line]
    assert shares[0] == 0 and shares[1] > 30


def test_other_wording_stands_beside_the_attacks(attack):
    found = attack(
        attacks="words", prompts_tried=1, generations=1, population=4, classifier="demo world",
        wording="({}:1.3)\na red {}, on snow",
    )  # fmt: skip
    report = found[1]
    lines = report.splitlines()
    assert lines[1] == "In other wording, the worst first:" and lines[4] == "Attacks, the strongest first:"
    assert {line.split('"')[1] for line in lines[2:4]} == {"(star:1.3)", "a red star, on snow"}
    assert all(line.startswith("  other wording, ") and "recognised in" in line for line in lines[2:4])


def test_mistakes(attack):
    with pytest.raises(ErasureError, match="No concept to look for"):
        attack(concept=" ")
    with pytest.raises(ErasureError, match='"star" is not among the class names'):
        attack(classifier="demo world", class_names="heart\nmoon")


def test_strongest_conditioning_is_for_any_sampler(attack, node, demo):
    strongest = attack(attacks="derived vectors")[3]
    latent = node("EmptyLatentImage", width=128, height=128, batch_size=1)[0]
    found = node(
        "KSampler", model=demo[0], positive=strongest, negative=strongest, latent_image=latent, steps=2, cfg=1.0
    )[0]["samples"]
    assert torch.isfinite(found).all()


def test_searches_by_gradient_bring_back_what_a_text_map_hides(attack):
    """From every start; the worst stands before all others."""
    _, report, _, strongest = attack(attacks="gradient", classifier="demo world", search_steps=50)
    lines = report.splitlines()
    assert lines[0].endswith("recognised in 0 of 2")
    assert lines[1].startswith("The worst of 4 searches by gradient began at ") and lines[1].endswith("in 2 of 2")
    named = {line.split(" from ")[1].split(",")[0] for line in lines[3:]}
    assert named == {"the concept", "a kept caption", "the empty prompt", "noise"} and len(lines) == 3 + 4
    assert strongest[0][0].shape == (1, 77, 128) and not strongest[0][0].requires_grad


def test_searches_have_a_seed_and_begin_where_they_are_told(attack):
    def vectors(**inputs):
        return attack(attacks="gradient", search_steps=2, pictures=1, steps=2, **inputs)

    first, again, more = vectors(kept="heart"), vectors(kept="heart"), vectors(kept="heart", search_seeds=2)
    assert first[1] == again[1] and '"a red heart on snow"' in first[1]
    assert len(more[1].splitlines()) == len(first[1].splitlines()) + 4
    assert "The worst of 8 searches" in more[1]


@pytest.mark.parametrize("permeability", ["facilitated transport", "fixed"])
def test_searches_by_gradient_go_through_adapters_of_layers(attack, node, demo, random_adapter, permeability):
    with torch.inference_mode():  # as the host runs its nodes
        adapter = random_adapter(3, "star")
        stack = node("MembraneStack", adapter=adapter, strength=0.5, permeability=permeability)[0]
        erased = node("MembraneApply", model=demo[0], clip=demo[1], stack=stack)[0]
    found = attack(erased=erased, attacks="gradient", search_steps=2, pictures=1, steps=2)
    assert "The worst of 4 searches by gradient" in found[1]


def test_searches_by_gradient_go_through_permeability_by_meaning(attack, node, demo):
    with torch.inference_mode():
        erased = node("MembraneForget", model=demo[0], clip=demo[1], remove="star -> circle")[0]
    assert "The worst of 4 searches" in attack(erased=erased, attacks="gradient", search_steps=2, pictures=1)[1]
