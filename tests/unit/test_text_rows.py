"""How many rows of a shared layer are the text's, and what happens where they cannot be told."""

import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.beside import Bypass, Rows
from membrane.core.adapters.deltas.delta import OPEN, Term
from membrane.core.adapters.deltas.low_rank import Part, beside
from membrane.core.adapters.deltas.text_rows import TextLowRank
from membrane.core.adapters.permeability import FIXED, Permeability
from membrane.core.adapters.plan import make_plan
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.errors import ErasureError
from membrane.core.families import joint
from membrane.core.families.family import FIRST, LAST, TextRows
from membrane.core.families.joint import mixed


def rows(*count):
    return torch.zeros(*count, 4)


FLUX, Z_IMAGE, LUMINA, HIDREAM, AURAFLOW = (
    getattr(joint, name)[-1] for name in ("FLUX", "Z_IMAGE", "LUMINA", "HIDREAM", "AURAFLOW")
)


@pytest.mark.parametrize(
    ("found", "call", "expected"),
    [
        (FLUX, {"c_crossattn": rows(2, 256)}, 256),
        (FLUX, {"c_crossattn": None}, 0),
        (LUMINA, {"c_crossattn": rows(1, 33)}, 33),
        (Z_IMAGE, {"c_crossattn": rows(1, 32)}, 32),
        (Z_IMAGE, {"c_crossattn": rows(1, 33)}, 64),
        # each text is filled up by itself, and a reference picture without a text has 32 rows of padding
        (Z_IMAGE, {"c_crossattn": rows(1, 5), "ref_contexts": [rows(1, 40), rows(1, 3)]}, 32 + 64 + 32),
        (Z_IMAGE, {"c_crossattn": rows(1, 5), "ref_contexts": [rows(1, 40)], "ref_latents": [0, 0, 0]}, 32 + 64 + 64),
        (Z_IMAGE, {"c_crossattn": rows(1, 5), "ref_latents": [0]}, 64),
        (HIDREAM, {"c_crossattn": rows(1, 128), "encoder_hidden_states_llama3": rows(1, 32, 127)}, 128 + 2 * 127),
        (AURAFLOW, {"c_crossattn": rows(1, 256)}, 264),
    ],
)
def test_number_of_the_texts_rows(found, call, expected):
    assert found.count(call) == expected


def change(seed=0, bias=False):
    g = torch.Generator().manual_seed(seed)
    up, down = torch.randn(5, 2, generator=g), torch.randn(2, 4, generator=g)
    return TextLowRank(up, down, 2.0, torch.randn(5, generator=g) if bias else None)


@pytest.mark.parametrize("place", [FIRST, LAST])
@pytest.mark.parametrize("previous", [None, "another pack"])
def test_only_the_texts_rows_are_changed(place, previous):
    module, found, delta = torch.nn.Linear(4, 5), TextRows("x", place), change(bias=True)
    plain, lent = module.forward, Rows()
    part = Part(beside([Term(delta, 0.5, OPEN)], "x"), None, found)
    x = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), lent.lent(torch.zeros(1, 0), (), {found: 3}):
        y = Bypass(module, [part], lent, plain if previous else None)(x)
    expected = plain(x).clone()
    own = slice(0, 3) if place == FIRST else slice(4, 7)
    expected[:, own] += 0.5 * (x[:, own] @ delta.down.T @ delta.up.T + delta.bias)
    assert torch.allclose(y, expected, atol=1e-5)
    other = slice(3, 7) if place == FIRST else slice(0, 4)
    assert torch.equal(y[:, other], plain(x)[:, other])


def test_fewer_rows_than_the_text_has():
    module, found, lent = torch.nn.Linear(4, 5), TextRows("x", FIRST), Rows()
    part = Part(beside([Term(change(), 1.0, OPEN)], "x"), None, found)
    with (
        lent.lent(torch.zeros(1, 0), (), {found: 9}),
        pytest.raises(ErasureError, match="got 7 rows, but the text alone"),
    ):
        Bypass(module, [part], lent)(torch.zeros(2, 7, 4))


@pytest.mark.parametrize("known", [True, False])
def test_a_plan_needs_to_know_the_rows(known):
    adapter = ErasureAdapter(Card("Z-Erase", ()), {"text_rows": {"x": change()}})
    stack = ErasureStack((Entry(adapter, permeability=Permeability(FIXED)),))
    found = TextRows("x", FIRST) if known else None
    if not known:
        with pytest.raises(ErasureError, match="which rows of that layer are the text's is not known"):
            make_plan(stack, keys={"x": "X"}, text_rows=lambda key: found)
        return
    plan = make_plan(stack, keys={"x": "X"}, text_rows=lambda key: found)
    assert plan.tells_rows and not plan.static and not plan.follows and plan.layers["X"].beside_text is not None


def test_a_layer_that_sees_the_text_alone_is_changed_like_any_other():
    adapter = ErasureAdapter(Card("Z-Erase", ()), {"text_rows": {"x": change()}})
    stack = ErasureStack((Entry(adapter, permeability=Permeability(FIXED)),))
    plan = make_plan(stack, keys={"x": "X"}, text_rows=lambda key: TextRows("x", "all"))
    assert plan.static.keys() == {"X"} and not plan.tells_rows and not plan.running


def test_factors_of_convolutions_are_none():
    with pytest.raises(ErasureError, match=r"expected \(rank, in\) of a linear layer"):
        TextLowRank(torch.zeros(5, 2), torch.zeros(2, 4, 3, 3), 1.0)


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ("double_stream_blocks_0_block_ff_i_experts_3_w1", True),
        ("double_stream_blocks_0_block_ff_i_shared_experts_w1", False),
        ("blocks_0_cross_attn_kv_linear", True),
        ("blocks_block0_blocks_1_block_attn_to_k_0", True),
        ("blocks_block0_blocks_1_adaLN_modulation_1", False),
        ("single_blocks_3_linear1", False),
    ],
)
def test_layers_that_get_the_batch_in_another_order(site, expected):
    assert mixed(site) == expected
