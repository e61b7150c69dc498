"""Words as a row of a stack, on a real host: the erasure of the node for daily use, computed when applied."""

import json

import pytest
import torch
from membrane.core.errors import ErasureError
from membrane.core.host.patches.stack import applied_stack
from membrane.core.host.runs import erasing

pytestmark = pytest.mark.usefixtures("nothing_kept")

MEANING = {"mode": "meaning"}


def stack_of(*rows):
    return json.dumps({"membrane_stack": 1, "entries": list(rows)})


def row(words="star -> circle", **fields):
    return {"words": words, "keep": "heart\nsquare", "kind": "object", "permeability": MEANING, **fields}


@pytest.fixture
def edited(node, demo):
    """The outputs of the stack editor with a model and its text encoder; those without say only a stack."""

    def run(*rows, **given):
        given = {"model": demo[0], "clip": demo[1], **given}
        return node("MembraneStackEditor", stack_json=stack_of(*rows), unique_id="5", **given)

    return run


def latents(sample, model, prompt="a plain red star on snow"):
    return sample(model, positive=prompt, negative="", steps=3)


def test_a_row_of_words_is_the_node_for_daily_use(node, demo, edited, sample):
    forget = node(
        "MembraneForget", model=demo[0], clip=demo[1], remove="star -> circle", keep="heart\nsquare", kind="object"
    )
    found = edited(row())
    assert torch.equal(latents(sample, found[2]), latents(sample, forget[0]))
    assert not torch.equal(latents(sample, found[2]), latents(sample, demo[0]))
    assert found[1] == "star" and found[3] is demo[1]
    assert found.ui["membrane"] == forget.ui["membrane"]


def test_apply_computes_words_that_the_editor_has_no_model_for(node, demo, edited, sample):
    stack = edited(row(), model=None, clip=None)[0]
    assert [entry.adapter.pending for entry in stack.entries] == [True]
    applied = node("MembraneApply", model=demo[0], clip=demo[1], stack=stack)
    assert torch.equal(latents(sample, applied[0]), latents(sample, edited(row())[2]))
    assert applied.ui["membrane"][0]["title"].startswith("Erased: star -> circle. Kept: 2.")
    always = edited(row(permeability={}), model=None, clip=None)[0]
    weights = node("MembraneApply", model=demo[0], clip=demo[1], stack=always, apply_to="weights")[0]
    text = node("MembraneApply", model=demo[0], clip=demo[1], stack=always)[0]
    torch.testing.assert_close(latents(sample, weights), latents(sample, text), rtol=1e-3, atol=1e-4)
    assert node("MembraneImpact", model=demo[0], clip=demo[1], stack=stack, prompts="a star\na heart")[1]
    assert "star" in node("MembranePreview", clip=demo[1], stack=stack, prompts="a star")[1]


def test_another_strength_encodes_and_solves_nothing_again(edited, encodes, monkeypatch):
    solved, erase = [], erasing.erase
    monkeypatch.setattr(erasing, "erase", lambda *args: (solved.append(1), erase(*args))[1])
    edited(row(permeability={}))
    first = len(encodes), len(solved)
    assert first[0] > 0 and first[1] == 1
    found = edited(row(permeability={}, strength=0.5))[2]
    edited(row(permeability={}, strength=0.25), row("heart -> square", enabled=False))
    assert (len(encodes), len(solved)) == first
    assert [entry.strength for entry in applied_stack(found).entries] == [0.5]
    edited(row(permeability={}, keep="heart"))
    assert len(solved) == 2


def test_several_rows_erase_each_for_itself(edited, demo, sample):
    both = edited(row(), row("heart -> square", keep=""))[2]
    one = edited(row(), row("heart -> square", keep="", enabled=False))[2]
    heart = "a blue heart on sand"
    assert not torch.equal(latents(sample, both, heart), latents(sample, one, heart))
    assert [entry.index for entry in applied_stack(both).entries] == [0, 1]


def test_rows_that_do_not_act_are_not_computed(edited, demo, encodes):
    assert edited(row(enabled=False), row(strength=0.0))[2] is demo[0]
    assert not encodes


def test_words_without_a_text_encoder_are_one_sentence(edited):
    with pytest.raises(ErasureError, match='^The row "star -> circle" of the stack is words, .* connect clip'):
        edited(row(), clip=None)


def test_how_words_were_taken_is_said_on_the_node(edited):
    (said,) = edited(row("star, moon, heart", keep="")).ui["membrane"]
    assert said["level"] == "warning" and "write one per line to erase all three" in said["lines"][0]
