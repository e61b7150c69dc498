"""A text encoder that gives two vectors for each token, as NegPip's does: 154 for 77, keys and values side by side."""

import pytest
import torch
from membrane.core.errors import ErasureError
from membrane.core.host.text.encode import encode

PROMPTS = ("a red star on snow", "a blue heart", "")
METHODS = ("UCE", "RECE", "SPEED", "Double Projections")


def doubling(rows):
    return rows.repeat_interleave(2, dim=1)


@pytest.fixture
def given_as(demo, monkeypatch):
    """given_as(change): from here on the demo model's encoder gives change(rows (1, T, d))."""

    def change_rows(change):
        stage = demo[1].cond_stage_model
        own = type(stage).encode_token_weights

        def encode_token_weights(tokens):
            rows, *rest = own(stage, tokens)
            return (change(rows), *rest)

        monkeypatch.setattr(stage, "encode_token_weights", encode_token_weights, raising=False)

    return change_rows


def test_its_prompts_are_encoded_as_without_it(demo, given_as, caplog):
    plain = encode(demo[1], PROMPTS)
    given_as(doubling)
    with caplog.at_level("INFO", "membrane"):
        found = encode(demo[1], PROMPTS)
    for mine, right in zip(found, plain):
        assert torch.equal(mine.rows, right.rows) and mine.ids == right.ids
    assert caplog.text.count("as NegPip's does") == 1


@pytest.mark.parametrize("method", METHODS)
def test_what_is_erased_is_what_it_would_be_without_it(demo, node, given_as, method):
    asked = {"concepts": "star -> circle", "replace_with": "", "preserve": "heart", "strength": 1.0, "method": method}
    _, plain = node("MembraneErase", model=demo[0], clip=demo[1], **asked)
    given_as(doubling)
    _, found = node("MembraneErase", model=demo[0], clip=demo[1], **asked)
    ((right,), (mine,)) = (tuple(adapter.maps.values()) for adapter in (plain, found))
    wanted = right.a.double() @ right.b.double()
    assert (mine.a.double() @ mine.b.double() - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize(
    "change",
    [lambda rows: torch.cat([rows, -rows], dim=1), lambda rows: rows.repeat_interleave(3, dim=1)],
    ids=["others", "three"],
)
def test_vectors_that_belong_to_no_token_are_refused(demo, given_as, change):
    given_as(change)
    with pytest.raises(ErasureError, match=r"vectors for \d+ tokens, so that no vector belongs to a token"):
        encode(demo[1], PROMPTS)
