"""Masks in the host: exact zeros, last of all changes, gated or not, on the weights or beside them."""

from functools import partial

import comfy.utils
import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.adapters.deltas.mask import Mask
from membrane.core.adapters.permeability import Permeability
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.errors import ErasureError
from membrane.core.host.model.layers import modules
from membrane.core.host.model.weights import base_layers
from membrane.core.host.patches.on_weights import apply_to_weights
from membrane.core.host.patches.stack import apply_stack
from membrane.core.host.runs.locating import linear_layers

PROMPT = "a red star on snow"


@pytest.fixture(scope="module")
def sample(sample):
    return partial(sample, steps=3)


def masked(model, seed=0, share=0.3, kept=False, concept="star"):
    g, masks = torch.Generator().manual_seed(seed), {}
    for name, module in linear_layers(model).items():
        shape = (module.out_features, module.in_features)
        marks = torch.rand(shape, generator=g) < share
        masks[name] = Mask.of(marks, torch.rand(shape, generator=g) if kept else None)
    return ErasureAdapter(Card("ConceptPrune", (concept,)), {"mask": masks})


def low_rank(model, seed=1, size=0.3):
    g, changes = torch.Generator().manual_seed(seed), {}
    for name, module in linear_layers(model).items():
        up = torch.randn(module.out_features, 2, generator=g) * size
        down = torch.randn(2, module.in_features, generator=g) * module.in_features**-0.5
        changes[name] = LowRank(up, down, 2.0)
    return ErasureAdapter(Card("LECO", (PROMPT,)), {"low_rank": changes})


def lora_of(adapter, model):
    keys = {name: f"lora_unet_{name}" for name in adapter.low_rank}
    lora = {}
    for name, change in adapter.low_rank.items():
        lora |= {f"{keys[name]}.lora_up.weight": change.up, f"{keys[name]}.lora_down.weight": change.down,
                 f"{keys[name]}.alpha": torch.tensor(change.alpha)}  # fmt: skip
    return lora


def with_lora(model, adapter):
    """The MODEL with an adapter as a LoRA, by the host's own loader."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora_of(adapter, model), 1.0, 0)[0]


def edited(model, sample, change):
    """Latents with weights that were changed by hand: the independent expectation. change(site, weight) -> weight."""
    layers, before = linear_layers(model), {}
    sample(model, steps=1)  # else the weights of another clone may be in place
    try:
        for name, module in layers.items():
            before[name] = module.weight.data.clone()
            module.weight.data.copy_(change(name, before[name]))
        return sample(model)
    finally:
        for name, module in layers.items():
            module.weight.data.copy_(before[name])


def difference(found, expected):
    """Largest difference, relative to the largest latent."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def product(adapter, name):
    change = adapter.low_rank[name]
    return change.up @ change.down * change.scale


@pytest.mark.parametrize("apply", [apply_stack, apply_to_weights])
@pytest.mark.parametrize("strength, kept", [(1.0, False), (0.6, False), (1.0, True)])
def test_equals_weights_pruned_by_hand(demo, sample, apply, strength, kept):
    adapter = masked(demo[0], kept=kept)
    found = sample(apply(demo[0], ErasureStack((Entry(adapter, strength),))))
    expected = edited(
demo[0], sample, lambda name, w: w + adapter.masks[name].difference(w, strength)
    )  # fmt: skip
    base = sample(demo[0])
    assert difference(found, expected) < 2e-5 < 0.01 < difference(found, base)
    assert torch.equal(sample(demo[0]), base)


def test_strength_0_is_the_model_itself(demo):
    assert apply_stack(demo[0], ErasureStack((Entry(masked(demo[0]), 0.0),))) is demo[0]


def test_marked_weights_are_exactly_zero_on_the_weights(demo):
    adapter = masked(demo[0])
    patched = apply_to_weights(with_lora(demo[0], low_rank(demo[0])), ErasureStack((Entry(adapter),)))
    layers = base_layers(patched)
    for name, mask in adapter.masks.items():
        weight = layers[name].read()[0]
        assert weight[mask.marks()].eq(0).all() and weight[~mask.marks()].ne(0).any()


@pytest.mark.parametrize("order", ["before", "after", "both"])
def test_a_lora_before_or_after_is_pruned_as_well(demo, sample, order):
    adapter, lora = masked(demo[0]), low_rank(demo[0])
    model = with_lora(demo[0], lora) if order in ("before", "both") else demo[0]
    model = apply_stack(model, ErasureStack((Entry(adapter),)))
    model = with_lora(model, lora) if order in ("after", "both") else model
    times = 2 if order == "both" else 1
    expected = edited(demo[0], sample, lambda name, w: (w + times * product(lora, name)) * ~adapter.masks[name].marks())
    assert difference(sample(model), expected) < 2e-5


def test_gated_changes_of_the_same_layer_are_pruned_as_well(demo, sample):
    adapter, change = masked(demo[0]), low_rank(demo[0])
    gated = Entry(change, 0.7, permeability=Permeability("facilitated transport"))  # open: its concept is the prompt
    model = apply_stack(demo[0], ErasureStack((gated, Entry(adapter))), demo[1])
    expected = edited(demo[0], sample, lambda name, w: (w + 0.7 * product(change, name)) * ~adapter.masks[name].marks())
    base = sample(demo[0])
    assert difference(sample(model), expected) < 1e-4 < 0.01 < difference(expected, base)


def test_each_row_has_its_own_gate(demo, sample):
    adapter = masked(demo[0])
    only = Entry(adapter, permeability=Permeability("fixed", negative="off"))
    model = apply_stack(demo[0], ErasureStack((only,)), demo[1])
    both = apply_stack(demo[0], ErasureStack((Entry(adapter),)))
    found, whole, base = sample(model, steps=1), sample(both, steps=1), sample(demo[0], steps=1)
    assert min((found - whole).abs().max(), (found - base).abs().max()) > 1e-3
    # one step of guidance is linear in its two sides: the pruned model's on the prompt, the plain one's on the negative
    positive, negative = (
        sample(both, steps=1, negative=PROMPT),
        sample(demo[0], steps=1, positive="a blue heart on sand"),
    )
    assert difference(found, negative + 3.0 * (positive - negative)) < 2e-5


def test_time_range_ends(demo, sample):
    late = Entry(masked(demo[0]), start_percent=1.0)
    assert (sample(apply_stack(demo[0], ErasureStack((late,)), demo[1])) - sample(demo[0])).abs().max() < 1e-5


def test_two_masks_are_their_union(demo, sample):
    one, other = masked(demo[0], 0), masked(demo[0], 9)
    model = apply_stack(apply_stack(demo[0], ErasureStack((Entry(one),))), ErasureStack((Entry(other),)))
    expected = edited(demo[0], sample, lambda name, w: w * ~(one.masks[name].marks() | other.masks[name].marks()))
    assert difference(sample(model), expected) < 2e-5


def test_another_packs_forward_stays(demo, sample):
    """A layer whose forward another node replaced keeps what that adds; only the host's weight is pruned."""
    adapter, model = masked(demo[0]), demo[0].clone()
    name, module = next(iter(linear_layers(model).items()))
    key = next(k for k, m in modules(model).items() if m is module)

    def doubled(x):
        return 2 * type(module).forward(module, x)

    model.add_object_patch(key.removesuffix(".weight") + ".forward", doubled)
    found = sample(apply_stack(model, ErasureStack((Entry(adapter),))))

    def by_hand(n, w):
        return w * ~adapter.masks[n].marks() + (w if n == name else 0)

    bias = module.bias.data.clone()
    try:
        module.bias.data.mul_(2)
        expected = edited(demo[0], sample, by_hand)
    finally:
        module.bias.data.copy_(bias)
    assert difference(found, expected) < 2e-5


def test_a_mask_of_another_shape_is_refused(demo):
    name = next(iter(linear_layers(demo[0])))
    wrong = ErasureAdapter(Card("x", ()), {"mask": {name: Mask.of(torch.ones(8, 8, dtype=torch.bool))}})
    with pytest.raises(ErasureError, match=r"as a layer of shape \(8, 8\)"):
        apply_stack(demo[0], ErasureStack((Entry(wrong),)))
    foreign = ErasureAdapter(Card("x", ()), {"mask": {"nowhere_ff_net_2": Mask.of(torch.ones(8, 8, dtype=torch.bool))}})
    with pytest.raises(ErasureError, match="None of the 1 layers"):
        apply_stack(demo[0], ErasureStack((Entry(foreign),)))


def test_export_loads_as_a_lora_of_the_host(demo, sample, node, host):
    adapter = masked(demo[0])
    saved = node("MembraneSaveAdapter", adapter=adapter, filename_prefix="mask", format="LoRA (kohya)", model=demo[0])
    path = host.work / "models" / "loras" / saved.ui["text"][0]
    model = node("LoraLoader", model=demo[0], clip=demo[1], lora_name=path.name, strength_model=1.0, strength_clip=0.0)[
        0
    ]
    expected = edited(demo[0], sample, lambda name, w: w * ~adapter.masks[name].marks())
    assert difference(sample(model), expected) < 1e-3  # differences are stored as float16
    assert "diff" in " ".join(comfy.utils.load_torch_file(str(path)))
