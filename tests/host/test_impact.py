"""The impact preview on a real host."""

import pytest
from membrane.core.errors import ErasureError

PROMPTS = "a red star on snow\na red heart on snow\na blue circle\na pentagram"


@pytest.fixture(scope="module")
def parts(node, demo):
    model, clip, _ = demo
    templates = "{}\na red {} on snow\na blue {} on coal"
    adapter = node(
        "MembraneErase",
        model=model,
        clip=clip,
        concepts="star -> circle",
        preserve="heart\ncircle",
        templates=templates,
    )[1]
    return model, clip, node("MembraneStack", adapter=adapter)[0]


def test_the_concept_is_hit_and_the_others_are_not(node, parts):
    model, clip, stack = parts
    chart, report = node("MembraneImpact", model=model, clip=clip, stack=stack, prompts=PROMPTS)
    changes = {line.rsplit(None, 1)[0].strip(): float(line.rsplit(None, 1)[1][:-1]) for line in report.splitlines()}
    assert list(changes)[:2] in (["a red star on snow", "a pentagram"], ["a pentagram", "a red star on snow"])
    assert changes["a red star on snow"] > 5 * changes["a red heart on snow"]
    assert chart.dim() == 4 and chart.shape[0] == 1 and chart.shape[3] == 3


def test_no_prompts(node, parts):
    model, clip, stack = parts
    with pytest.raises(ErasureError, match="No prompt to compare"):
        node("MembraneImpact", model=model, clip=clip, stack=stack, prompts=" \n")
