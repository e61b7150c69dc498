"""A replacement keeps its meaning: its own prompt does not draw what is erased, whatever else is preserved."""

from functools import partial

import pytest
from membrane.core.demo.judge import ANSWERS
from membrane.core.measures.compare import demo_judge

NAMES = {attribute: [name for name in names if name != "none"] for attribute, names in ANSWERS.items()}
TEMPLATES = {
    "shape": "{}\na red {} on snow\na blue {} on coal",
    "colour": "{}\na {} star on snow\na {} moon on coal",
    "texture": "{}\na {} red star on snow\na {} blue moon on coal",
}
PROMPTS = {
    "shape": ("a red {} on snow", "a blue {} on sand"),
    "colour": ("a {} circle on snow", "a {} heart on sand"),
    "texture": ("a {} green circle on snow", "a {} pink heart on sand"),
}


@pytest.fixture(scope="module")
def erase(node, demo):
    """erase(attribute, concept, replacement) -> (MODEL, adapter), everything else of the attribute preserved."""

    def run(attribute, concept, replacement, **settings):
        preserve = "\n".join(name for name in NAMES[attribute] if name not in (concept, replacement))
        settings = {"preserve": preserve, "templates": TEMPLATES[attribute], **settings}
        line = f"{concept} -> {replacement}"
        return node("MembraneErase", model=demo[0], clip=demo[1], concepts=line, **settings)

    return run


@pytest.fixture(scope="module")
def drawn(node, demo, text, sample):
    """drawn(model, attribute, word) -> what the judge sees in 4 pictures of each of two prompts of a word."""
    sample = partial(sample, steps=10, cfg=1.5, batch=4, size=128)

    def look(model, attribute, word):
        judge, found = demo_judge(NAMES[attribute]), []
        for prompt in PROMPTS[attribute]:
            latents = sample(model, text(prompt.format(word)), text(""))
            found += judge(node("VAEDecode", vae=demo[2], samples={"samples": latents})[0])
        return found

    return look


def test_the_receipt_tells_what_is_preserved_as_well(erase):
    found = erase("shape", "star", "circle")
    assert found[1].card.settings["preserve"] == ["square", "triangle", "heart", "cross", "moon", "ring", "circle"]
    assert "Kept: 6 and what comes instead (circle)." in str(found.ui)
    published = erase("shape", "star", "circle", replacements="as published")
    assert "circle" not in published[1].card.settings["preserve"] and "Kept: 6. " in str(published.ui)


def test_nothing_is_added_to_an_empty_list_or_twice(erase):
    assert erase("shape", "star", "circle", preserve="")[1].card.settings["preserve"] == []
    assert erase("shape", "star", "circle", preserve="Circle")[1].card.settings["preserve"] == ["Circle"]
    assert erase("shape", "star", "", preserve="moon")[1].card.settings["preserve"] == ["moon"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "tokens", "attribute", "concept", "replacement", "published"),
    [
        ("UCE", "subject", "colour", "red", "blue", 4),
        ("UCE", "subject", "colour", "green", "pink", 8),
        ("SPEED", "all", "texture", "striped", "dotted", 8),
        ("UCE", "subject", "shape", "star", "circle", 7),
    ],
)
def test_a_replacement_does_not_draw_what_is_erased(
    erase, drawn, method, tokens, attribute, concept, replacement, published
):
    """As published the two change places where nothing but neighbours is preserved, in up to 8 of 8 pictures."""
    settings = {"method": method, "tokens": tokens}
    swapped = erase(attribute, concept, replacement, replacements="as published", **settings)[0]
    assert drawn(swapped, attribute, replacement).count(concept) >= published
    kept = erase(attribute, concept, replacement, **settings)[0]
    assert drawn(kept, attribute, replacement).count(concept) == 0
    assert drawn(kept, attribute, concept).count(concept) <= 1
