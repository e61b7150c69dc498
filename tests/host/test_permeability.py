"""Gated adapters in the host: each row of a batch gets its own gate, and nothing else changes."""

import copy
from functools import partial

import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.adapters.permeability import Permeability
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.errors import ErasureError
from membrane.core.host.model.layers import layer_keys, plain_key
from membrane.core.host.patches.conditioning import EXTRA_CONDS, GATES
from membrane.core.host.patches.stack import applied, apply_stack
from membrane.core.host.patches.steps import APPLY_MODEL
from membrane.core.host.text.known_tokens import PROMPTS

TRANSPORT, FIXED = Permeability("facilitated transport"), Permeability("fixed")
STAR, HEART = "a red star on snow", "a blue heart on sand"


@pytest.fixture(scope="module")
def sample(sample):
    return partial(sample, steps=3)


def stack(*entries):
    return ErasureStack(entries)


def applied_to(demo, *entries, model=None):
    return apply_stack(model or demo[0], stack(*entries), demo[1])


@pytest.fixture(scope="module")
def close(close):
    return lambda found, expected, base, bound=2e-5: close(found, expected, base, bound, floor=1.0)


def gate_of(demo, adapter, prompt, text, **settings):
    """The value of the one gate for a prompt, as the sampler gets it."""
    model = applied_to(demo, Entry(adapter, permeability=Permeability("facilitated transport", **settings)))
    return applied(model).gates(text(prompt)[0][0], "positive", None)


def test_gates_at_one_equal_the_weights_of_the_host(demo, sample, close, random_adapter):
    """The same adapter as patches of the host and as a bypass; the prompt is its concept, so its gate is 1."""
    adapter = random_adapter(1, STAR, rank=2, bias=True)
    base = sample(demo[0])
    patched = applied_to(demo, Entry(adapter, 0.7, permeability=FIXED))
    bypass = applied_to(demo, Entry(adapter, 0.7, permeability=TRANSPORT))
    assert patched.patches and EXTRA_CONDS not in patched.object_patches
    assert bypass.patches == demo[0].patches
    close(sample(bypass), sample(patched), base)
    assert torch.equal(sample(demo[0]), base)


def test_a_map_of_the_text_follows_the_prompt_too(demo, sample, node, close):
    """A closed-form adapter with gates is the same as without where its gate is 1, and does nothing where it is 0."""
    adapter = node("MembraneErase", model=demo[0], clip=demo[1], concepts=f"{STAR} -> circle", preserve="heart")[1]
    fixed = sample(applied_to(demo, Entry(adapter, permeability=FIXED)))
    gated = sample(applied_to(demo, Entry(adapter, permeability=TRANSPORT)))
    base = sample(demo[0])
    close(gated, fixed, base, 1e-4)
    closed = applied_to(demo, Entry(adapter, permeability=Permeability("facilitated transport", threshold=0.999)))
    other = sample(demo[0], HEART, "")
    assert torch.equal(sample(closed, HEART, ""), other)


def static(demo, adapter, strength):
    return applied_to(demo, Entry(adapter, strength, permeability=FIXED)) if strength else demo[0]


def test_one_batch_of_two_gates_equals_two_runs(demo, sample, text, close, random_adapter):
    """One euler step is affine in the two predictions, so guidance can be put together from runs without it."""
    adapter = random_adapter(1, STAR)
    own = Permeability("facilitated transport", negative="own")
    model = applied_to(demo, Entry(adapter, permeability=own))
    gates = [applied(model).gates(text(p)[0][0], "positive", None).item() for p in (STAR, HEART)]
    assert gates[0] == pytest.approx(1.0, abs=1e-5) and 0.05 < gates[1] < 0.95
    positive, negative = (
        sample(static(demo, adapter, g), prompt, prompt, cfg=1.0, steps=1) for g, prompt in zip(gates, (STAR, HEART))
    )
    base = sample(demo[0], steps=1)
    close(sample(model, steps=1), negative + 3.0 * (positive - negative), base)


def test_the_negative_prompt_as_published(demo, sample, text, close, random_adapter):
    """Its gate is that of the positive prompt, whatever its own words are."""
    adapter = random_adapter(1, STAR)
    base = sample(demo[0])
    model = applied_to(demo, Entry(adapter, permeability=TRANSPORT))
    close(sample(model), sample(static(demo, adapter, 1.0)), base)
    off = applied_to(demo, Entry(adapter, permeability=Permeability("facilitated transport", negative="off")))
    positive = sample(static(demo, adapter, 1.0), STAR, STAR, cfg=1.0, steps=1)
    negative = sample(demo[0], HEART, HEART, cfg=1.0, steps=1)
    close(sample(off, steps=1), negative + 3.0 * (positive - negative), sample(demo[0], steps=1))


def test_two_prompts_in_one_picture(demo, sample, text, node, close, random_adapter):
    """Combined prompts are averaged; each has its own gate."""
    adapter = random_adapter(1, STAR)
    model = applied_to(demo, Entry(adapter, permeability=TRANSPORT))
    both = node("ConditioningCombine", conditioning_1=text(STAR), conditioning_2=text(HEART))[0]
    gate = gate_of(demo, adapter, HEART, text).item()
    star = sample(static(demo, adapter, 1.0), STAR, "", cfg=1.0, steps=1)
    heart = sample(static(demo, adapter, gate), HEART, "", cfg=1.0, steps=1)
    base = sample(demo[0], both, "", cfg=1.0, steps=1)
    close(sample(model, both, "", cfg=1.0, steps=1), (star + heart) / 2, base)


def test_regions(demo, sample, text, node, close, random_adapter):
    """A region's gate acts in the region: left of the border of two areas the picture is as if it stood alone."""
    adapter = random_adapter(1, STAR)
    model = applied_to(demo, Entry(adapter, permeability=TRANSPORT))

    def area(prompt, x):
        where = {"width": 64, "height": 128, "x": x, "y": 0, "strength": 1.0}
        return node("ConditioningSetArea", conditioning=text(prompt), **where)[0]

    def regions(star, heart):
        return node("ConditioningCombine", conditioning_1=area(star, 0), conditioning_2=area(heart, 64))[0]

    base = sample(demo[0], regions(STAR, HEART), "", cfg=1.0, steps=1, size=128)
    found = sample(model, regions(STAR, HEART), "", cfg=1.0, steps=1, size=128)
    gate = gate_of(demo, adapter, HEART, text).item()
    star = sample(static(demo, adapter, 1.0), regions(STAR, HEART), "", cfg=1.0, steps=1, size=128)
    heart = sample(static(demo, adapter, gate), regions(STAR, HEART), "", cfg=1.0, steps=1, size=128)
    near = found.shape[-1] // 2 - 2  # the border is feathered
    close(found[..., :near], star[..., :near], base[..., :near])
    close(found[..., -near:], heart[..., -near:], base[..., -near:])


def test_a_batch_of_prompts_has_a_gate_each(demo, sample, text, close, random_adapter):
    adapter = random_adapter(1, STAR)
    model = applied_to(demo, Entry(adapter, permeability=TRANSPORT))
    (star, options), (heart, _) = text(STAR)[0], text(HEART)[0]
    found = sample(model, [[torch.cat([star, heart]), options]], "", cfg=1.0, steps=2, batch=2)
    gates = applied(model).gates(torch.cat([star, heart]), "positive", None)
    assert gates.shape == (2, 1)
    for i, (prompt, gate) in enumerate(zip((STAR, HEART), gates.flatten().tolist())):
        expected = sample(static(demo, adapter, gate), prompt, "", cfg=1.0, steps=2, batch=2)
        close(found[i], expected[i], sample(demo[0], prompt, "", cfg=1.0, steps=2, batch=2)[i])


def test_tokens_are_known_from_the_hosts_own_encoding(demo, text, random_adapter):
    """A concept inside a longer prompt has all its tokens, so its gate is 1 though the texts differ."""
    adapter = random_adapter(1, "star")
    assert gate_of(demo, adapter, STAR, text).item() == pytest.approx(1.0)
    without = gate_of(demo, adapter, HEART, text).item()
    assert 0 < without < 0.99
    unknown = text(STAR)[0][0] * 1.001  # what another node changed
    assert PROMPTS.recall(unknown) == [None]
    long = text(STAR + ", a cow" * 60)
    assert long[0][0].shape[1] > 77
    assert gate_of(demo, adapter, STAR + ", a cow" * 60, text).item() == pytest.approx(1.0)


def test_a_weighted_prompt_is_known(demo, text, random_adapter):
    adapter = random_adapter(1, "star")
    assert gate_of(demo, adapter, "a red (star:1.3) on snow", text).item() == pytest.approx(1.0)


def test_route_opens_one_of_many(demo, sample, text, close, random_adapter):
    route = Permeability("route")
    star, heart = random_adapter(1, "star"), random_adapter(2, "heart")
    model = applied_to(demo, Entry(star, permeability=route), Entry(heart, permeability=route))
    base = sample(demo[0])
    close(sample(model), sample(static(demo, star, 1.0)), base)
    close(sample(model, HEART, STAR), sample(static(demo, heart, 1.0), HEART, STAR), sample(demo[0], HEART, STAR))


def test_reference_is_squared_and_crossed(demo, sample, text, close, random_adapter):
    """Two adapters as the published code adds them: (g1 U1 + g2 U2)(g1 D1 + g2 D2), on the weights."""
    star, heart = random_adapter(1, "star"), random_adapter(2, "heart")
    reference = Permeability("reference")
    model = applied_to(demo, Entry(star, permeability=reference), Entry(heart, 0.8, permeability=reference))
    g = applied(model).gates(text(STAR)[0][0], "positive", None)[0]
    assert g[0].item() == pytest.approx(1.0) and 0 < g[1] < 0.8
    merged = {
        name: LowRank(
            g[0] * change.up + g[1] * heart.low_rank[name].up,
            g[0] * change.down + g[1] * heart.low_rank[name].down,
            1.0,
        )
        for name, change in star.low_rank.items()
    }
    whole = ErasureAdapter(Card("LoRA", ()), {"low_rank": merged})
    close(sample(model), sample(static(demo, whole, 1.0)), sample(demo[0]))


def test_time_ranges_of_layers(demo, sample, node, text, close, random_adapter):
    adapter = random_adapter(1, STAR)
    base = sample(demo[0], steps=4)
    whole = sample(static(demo, adapter, 1.0), steps=4)
    for permeability in (FIXED, TRANSPORT):
        early = sample(applied_to(demo, Entry(adapter, 1.0, 0.0, 0.5, permeability)), steps=4)
        late = sample(applied_to(demo, Entry(adapter, 1.0, 0.5, 1.0, permeability)), steps=4)
        assert all((x - y).norm() > 0.001 * base.norm() for x, y in ((early, base), (early, whole), (late, early)))
        halves = applied_to(
            demo, Entry(adapter, 1.0, 0.0, 0.6, permeability), Entry(adapter, 1.0, 0.61, 1.0, permeability)
        )
        close(sample(halves, steps=4), whole, base, 1e-4)


def test_orders_agree_and_chains_add(demo, sample, close, random_adapter):
    star, heart = random_adapter(1, "star"), random_adapter(2, "heart")
    entries = Entry(star, 0.5, permeability=TRANSPORT), Entry(heart, 1.5, permeability=FIXED), Entry(
        heart, -0.5, permeability=TRANSPORT)  # fmt: skip
    base = sample(demo[0])
    both = sample(applied_to(demo, *entries))
    close(sample(applied_to(demo, *reversed(entries))), both, base)
    chained = demo[0]
    for entry in entries:
        chained = applied_to(demo, entry, model=chained)
    close(sample(chained), both, base)


def test_a_lora_before_and_after(demo, sample, node, close, random_adapter):
    """On the same layers as the gates."""
    import comfy.sd

    lora = random_adapter(5, "x", rank=2, size=0.1)
    tensors = {}
    for name, change in lora.low_rank.items():
        tensors[f"lora_unet_{name}.lora_up.weight"] = change.up
        tensors[f"lora_unet_{name}.lora_down.weight"] = change.down
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(change.alpha)

    def with_lora(model):
        return comfy.sd.load_lora_for_models(model, None, dict(tensors), 1.0, 0.0)[0]

    star = random_adapter(1, STAR)
    expected = sample(applied_to(demo, Entry(star, permeability=FIXED), Entry(lora, permeability=FIXED)))
    base = sample(demo[0])
    close(sample(with_lora(applied_to(demo, Entry(star, permeability=TRANSPORT)))), expected, base)
    close(sample(applied_to(demo, Entry(star, permeability=TRANSPORT), model=with_lora(demo[0]))), expected, base)


def test_clones_alternate(demo, sample, random_adapter):
    base = sample(demo[0])
    models = [applied_to(demo, Entry(random_adapter(i, "star"), permeability=TRANSPORT)) for i in (1, 2)]
    first = [sample(model) for model in models]
    for _ in range(2):
        assert all(torch.equal(sample(model), before) for model, before in zip(models, first))
        assert torch.equal(sample(demo[0]), base)
    clone = copy.copy(models[0].clone())
    assert torch.equal(sample(clone), first[0])


def test_strength_zero_and_switched_off_are_no_node(demo, sample, random_adapter):
    adapter = random_adapter(1, "star")
    for entry in (Entry(adapter, 0.0), Entry(adapter, enabled=False), Entry(adapter, 0.0, permeability=FIXED)):
        assert applied_to(demo, entry) is demo[0]
    closed = Permeability("facilitated transport", threshold=0.9999)
    base = sample(demo[0], HEART, "")
    assert torch.equal(sample(applied_to(demo, Entry(adapter, permeability=closed)), HEART, ""), base)


def test_an_error_in_the_middle_of_sampling_leaves_nothing_behind(demo, sample, random_adapter, transformer_layers):
    base = sample(demo[0])
    model = applied_to(demo, Entry(random_adapter(1, STAR), permeability=TRANSPORT))
    expected = sample(model)
    broken = model.clone()
    steps = model.object_patches[APPLY_MODEL]
    calls = []

    def fail(apply_model, args):
        calls.append(None)
        if len(calls) == 2:
            assert steps.rows.gates is None  # lent for the call of the network only
            raise RuntimeError("in the middle")
        return apply_model(args["input"], args["timestep"], **args["c"])

    broken.set_model_unet_function_wrapper(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        sample(broken)
    assert steps.rows.gates is None
    assert torch.equal(sample(demo[0]), base) and torch.equal(sample(model), expected)

    layer = next(iter(transformer_layers.values()))

    def inside(module, args):
        raise RuntimeError("inside a layer")

    hook = layer.register_forward_pre_hook(inside)
    try:
        with pytest.raises(RuntimeError, match="inside a layer"):
            sample(model)
    finally:
        hook.remove()
    assert steps.rows.gates is None and torch.equal(sample(model), expected)


def test_somebodys_wrapper_and_attention_patch(demo, sample, close, random_adapter):
    """Other packs' patches of the same model see the same calls as ever."""
    seen = []

    def wrapper(apply_model, args):
        seen.append(sorted(args["c"]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    adapter = random_adapter(1, STAR)
    base = sample(demo[0])
    expected = sample(static(demo, adapter, 1.0))
    model = applied_to(demo, Entry(adapter, permeability=TRANSPORT))
    model.set_model_unet_function_wrapper(wrapper)
    close(sample(model), expected, base)
    assert seen and GATES in seen[0]

    def output_patch(n, options):
        return n * 1.0

    model = applied_to(demo, Entry(adapter, permeability=TRANSPORT))
    model.set_model_attn2_output_patch(output_patch)
    close(sample(model), expected, base)


def test_a_batch_multiplied_inside_the_network(demo, sample, node, close, random_adapter):
    """HyperTile cuts the picture into tiles that become rows."""
    try:
        cut = node("HyperTile", model=demo[0], tile_size=1, swap_size=1, max_depth=0, scale_depth=False)[0]
    except Exception as error:
        pytest.skip(f"this host's HyperTile does not run here: {error}")
    adapter = random_adapter(1, STAR)
    base = sample(cut, size=128, seed=3)
    fixed = applied_to(demo, Entry(adapter, permeability=FIXED), model=cut)
    gated = applied_to(
        demo, Entry(adapter, permeability=Permeability("facilitated transport", negative="own")), model=cut
    )
    expected = sample(fixed, STAR, STAR, size=128, seed=3)
    close(sample(gated, STAR, STAR, size=128, seed=3), expected, base)


def test_the_weights_stay_as_they_are(demo, sample, random_adapter):
    before = {key: value.clone() for key, value in demo[0].model.state_dict().items()}
    model = applied_to(demo, Entry(random_adapter(1, STAR), permeability=TRANSPORT))
    sample(model)
    after = model.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], value) for key, value in before.items())
    assert plain_key(next(iter(layer_keys(model).values())))


def test_unknown_layers(demo, caplog, random_adapter):
    adapter = random_adapter(1, "star")
    strange = ErasureAdapter(
        adapter.card, {"low_rank": {"single_blocks_3_linear1": LowRank(torch.ones(4, 1), torch.ones(1, 4), 1.0)}}
    )
    with pytest.raises(ErasureError, match=r"None of the 1 layers .* exists in this .* model \(the first is single"):
        applied_to(demo, Entry(strange))
    some = ErasureAdapter(adapter.card, {"low_rank": {**adapter.low_rank, **strange.low_rank}})
    with caplog.at_level("WARNING", logger="membrane"):
        applied_to(demo, Entry(some))
    assert f"1 of {len(some.low_rank)} changes" in caplog.text


def test_layers_of_another_size(demo, transformer_layers):
    name = next(name for name in transformer_layers if name.endswith("to_q"))
    wrong = ErasureAdapter(
        Card("SPM", ("star",), family="SDXL"), {"low_rank": {name: LowRank(torch.ones(7, 1), torch.ones(1, 9), 1.0)}}
    )
    for permeability in (FIXED, TRANSPORT):
        with pytest.raises(ErasureError, match=rf"{name} as a layer of shape \(7, 9\)"):
            applied_to(demo, Entry(wrong, permeability=permeability))


def test_layers_and_text_in_one_stack(demo, sample, node, close, random_adapter):
    """A text map and gated layers that read the same text: the layers see the edited text, in either form."""
    words = node("MembraneErase", model=demo[0], clip=demo[1], concepts="star -> circle", preserve="heart")[1]
    layers = random_adapter(1, STAR)
    base = sample(demo[0])
    fixed = sample(applied_to(demo, Entry(words, permeability=FIXED), Entry(layers, permeability=FIXED)))
    gated = applied_to(demo, Entry(words, permeability=FIXED), Entry(layers, permeability=TRANSPORT))
    close(sample(gated), fixed, base, 1e-4)
    weights = node("MembraneApply", model=demo[0], clip=demo[1], apply_to="weights", stack=stack(
        Entry(words, permeability=FIXED), Entry(layers, permeability=FIXED)))[0]  # fmt: skip
    close(sample(weights), fixed, base, 1e-4)
    with pytest.raises(ErasureError, match='permeability "facilitated transport" .*, but weights are the same'):
        node("MembraneApply", model=demo[0], clip=demo[1], apply_to="weights", stack=stack(Entry(layers)))


def test_half_precision_factors_and_text(demo, sample, close, random_adapter):
    adapter = random_adapter(1, STAR)
    half = ErasureAdapter(
        adapter.card,
        {"low_rank": {n: LowRank(c.up.half(), c.down.half(), c.alpha) for n, c in adapter.low_rank.items()}},
    )
    base = sample(demo[0])
    close(sample(applied_to(demo, Entry(half))), sample(applied_to(demo, Entry(adapter))), base, 1e-3)
