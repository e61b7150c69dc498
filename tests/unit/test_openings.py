"""How far adapters open, without a host."""

import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.adapters.gates import openings, openings_report
from membrane.core.adapters.permeability import Permeability
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.errors import ErasureError
from membrane.core.text.encoded import Encoded
from membrane.core.text.similarity import Concepts

END = 9
TRANSPORT = Permeability("facilitated transport")


def encoded(*words):
    g = torch.Generator().manual_seed(2)
    ids = tuple([8, *w, *[END] * (5 - len(w))] for w in words)
    return Encoded.of_contexts(
        tuple(" ".join(map(str, w)) for w in words), ids, torch.rand(len(words), 6, 4, generator=g), END
    )


def lora(concepts):
    change = LowRank(torch.ones(4, 1), torch.ones(1, 4), 1.0)
    return ErasureAdapter(Card("SPM", concepts), {"low_rank": {"mid": change}}, "spm.safetensors")


def words(concepts):
    return ErasureAdapter(
        Card("UCE", concepts), {"map": {"text": TextMap(torch.ones(4, 2), torch.ones(2, 4), (0, 1))}}, "uce"
    )


CONCEPTS = Concepts.of(encoded((1,), (2, 3), ()))
PROMPTS = encoded((1, 4), (5,))


def matched():
    return CONCEPTS.match(PROMPTS.vectors, [frozenset(prompt.ids) for prompt in PROMPTS])


def test_one_bar_for_an_adapter_and_one_for_each_concept_of_a_map():
    stack = ErasureStack(
        (
            Entry(lora(("1", "2 3")), 0.5),
            Entry(words(("1", "2 3")), permeability=TRANSPORT),
            Entry(words(("x", "y")), 2.0, 0.3, 0.5, Permeability("fixed", 3.0)),
            Entry(lora(("z",)), enabled=False),
        )
    )
    found = openings(stack, PROMPTS.prompts, matched(), CONCEPTS.names)
    score = CONCEPTS.match(PROMPTS.vectors, [frozenset({1, 4}), frozenset({5})])
    assert score[0, 0] == 1.0  # its only token is in the prompt
    for i, prompt in enumerate(PROMPTS.prompts):
        rows = {opening.adapter: opening.value for opening in found if opening.prompt == prompt}
        assert rows == {
            "spm.safetensors": pytest.approx(0.5 * score[i].max().item()),
            "uce (1)": pytest.approx(score[i, 0].item()),
            "uce (2 3)": pytest.approx(score[i, 1].item()),
            "uce": 6.0,
        }


def test_nothing_that_follows_the_text():
    stack = ErasureStack((Entry(words(("x", "y")), 0.25),))
    assert [(o.prompt, o.value) for o in openings(stack, PROMPTS.prompts, None)] == [("1 4", 0.25), ("5", 0.25)]


def test_report():
    stack = ErasureStack((Entry(words(("x", "y")), 0.25), Entry(lora(("z",)), permeability=Permeability("fixed"))))
    text = openings_report(openings(stack, PROMPTS.prompts, None))
    assert text.splitlines() == ["1 4", "  uce               0.250", "  spm.safetensors   1.000", "5"] + [
        "  uce               0.250", "  spm.safetensors   1.000"]  # fmt: skip


def test_a_stack_in_which_nothing_acts():
    with pytest.raises(ErasureError, match="No adapter of the stack acts"):
        openings(ErasureStack((Entry(lora(("z",)), 0.0),)), PROMPTS, None)
