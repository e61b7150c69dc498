"""Modules that other packs put over an attention, as object patches, and that have no layers of the names that were
there: an erasure acts, or a sentence says that it cannot, and nothing is left broken."""

from functools import partial

import pytest
import torch
from membrane.core.adapters.permeability import Permeability
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.errors import ErasureError
from membrane.core.host.patches.stack import apply_stack

PATH = "diffusion_model.middle_block.1.transformer_blocks.0.attn2"
STAR = "a red star on snow"
TRANSPORT = Permeability("facilitated transport")


@pytest.fixture(scope="module")
def sample(sample):
    return partial(sample, scheduler="simple", steps=2)


class Shared(torch.nn.Module):
    """An attention of its own, with the weights of another and none of its layers."""

    def __init__(self, attention):
        super().__init__()
        self.heads, self.scale, self.before = attention.heads, 0.8, [attention]  # in a list, so it is no part of this

    def forward(self, x, context=None, value=None, **options):
        context, own = x if context is None else context, self.before[0]
        found = ((x, own.to_q), (context, own.to_k), (context, own.to_v))
        q, k, v = (torch.nn.functional.linear(rows, layer.weight.to(rows)) for rows, layer in found)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        last = own.to_out[0]
        return self.scale * torch.nn.functional.linear(found, last.weight.to(found), last.bias.to(found))


def put_over(model, path=PATH):
    patched = model.clone()
    own = model.model.get_submodule(path)
    patched.add_object_patch(path, Shared(own.before[0] if isinstance(own, Shared) else own))
    return patched


@pytest.fixture
def own(demo, sample):
    """The attention as it is without anybody's module; afterwards it is there again."""
    base, attention = sample(demo[0]), demo[0].model.get_submodule(PATH)
    assert not isinstance(attention, Shared)
    yield base
    assert torch.equal(sample(demo[0]), base) and demo[0].model.get_submodule(PATH) is attention


@pytest.fixture(scope="module")
def words(node, demo):
    settings = {"preserve": "heart\nmoon", "templates": "{}\na red {} on snow"}
    return node("MembraneErase", model=demo[0], clip=demo[1], concepts="star -> circle", **settings)[1]


def put(node, demo, model, words, apply_to="text"):
    stack = node("MembraneStack", adapter=words)[0]
    return node("MembraneApply", model=model, clip=demo[1], stack=stack, apply_to=apply_to)[0]


def test_an_erasure_of_the_text_before_and_after(demo, node, words, sample, own, text):
    shared = sample(put_over(demo[0]))
    assert not torch.equal(shared, own)
    found = sample(put_over(put(node, demo, demo[0], words)))
    assert torch.equal(sample(put(node, demo, put_over(demo[0]), words)), found)
    assert (found - shared).norm() > 0.05 * shared.norm()


def test_the_models_own_layers_are_read_while_the_module_is_loaded(demo, node, words, sample, own, random_adapter):
    """As when a graph is queued a second time, with another concept."""
    weights = sample(put(node, demo, demo[0], words, "weights"))
    gated = apply_stack(demo[0], ErasureStack((Entry(random_adapter(1), permeability=TRANSPORT),)), demo[1])
    beside = sample(gated)
    for do in (
        lambda: node("MembraneErase", model=demo[0], clip=demo[1], concepts="star -> circle", preserve="heart\nmoon",
                     templates="{}\na red {} on snow")[0],
        lambda: put(node, demo, demo[0], words, "weights"),
        lambda: apply_stack(demo[0], ErasureStack((Entry(random_adapter(1), permeability=TRANSPORT),)), demo[1]),
    ):  # fmt: skip
        sample(put_over(demo[0]))
        assert isinstance(demo[0].model.get_submodule(PATH), Shared)
        found = do()
        assert not isinstance(demo[0].model.get_submodule(PATH), Shared)
        sample(found)
    assert torch.equal(sample(found), beside)
    sample(put_over(demo[0]))
    assert torch.equal(sample(put(node, demo, demo[0], words, "weights")), weights)


@pytest.mark.parametrize("place", ["before", "after"])
def test_adapters_on_its_layers_are_refused_and_nothing_is_stuck(place, demo, sample, own, random_adapter):
    stack = ErasureStack((Entry(random_adapter(1), permeability=TRANSPORT),))
    for _ in range(2):  # a second queue finds everything as the first did
        with pytest.raises(ErasureError, match="a module of its own over the layer middle_block.1.*attn2.to_[kqvo]"):
            if place == "before":
                sample(put_over(apply_stack(demo[0], stack, demo[1])))
            else:
                sample(apply_stack(put_over(demo[0]), stack, demo[1]))
        assert torch.equal(sample(demo[0]), own)
    assert sample(apply_stack(demo[0], stack, demo[1])).isfinite().all()


def test_a_patch_of_the_attention_beside_it_is_refused(demo, node, words, sample, own):
    """Text that the patch may bring could not be erased where the module reads it."""
    model = put_over(put(node, demo, demo[0], words))
    model.set_model_attn2_patch(lambda n, context, value, options: (n, context, value))
    with pytest.raises(ErasureError, match="a module of its own"):
        sample(model)


def test_other_layers_than_its_own_go_on(demo, sample, own, random_adapter):
    whole = random_adapter(1)
    other = {name: change for name, change in whole.low_rank.items() if "middle_block" not in name}
    stack = ErasureStack((Entry(type(whole)(whole.card, {"low_rank": other}), permeability=TRANSPORT),))
    before = sample(put_over(apply_stack(demo[0], stack, demo[1])))
    assert torch.equal(sample(apply_stack(put_over(demo[0]), stack, demo[1])), before)
    assert not torch.equal(before, sample(put_over(demo[0])))
