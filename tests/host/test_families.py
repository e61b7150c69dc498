"""Every family that the host knows, as a tiny network of its own class with random weights, through the pack's nodes.

What is right is said by a second network of the same class, whose weights are edited by hand in float64: W (I + A B) in
every layer that reads the text (UCE, Gandikota et al. 2024, eq. 7), or W + up down for an adapter on layers. Compared
are the conditional and the unconditional prediction of one step, through the host's whole sampler.
"""

import pytest
import torch
from membrane.core.errors import ErasureError
from membrane.core.host.model.layers import readers
from membrane.tools.tiny import networks
from membrane.tools.tiny.subject import HOUSE, STAR, Subject, low_rank, on_layers

BOUND = 1e-5  # of the effect, in float32
NO_TEXT = {"t5xxl_weights"}  # numbers of a conditioning that say nothing of the prompt


@pytest.fixture(scope="module", params=networks.NETWORKS)
def subject(request, node):
    try:
        return Subject(request.param, node)
    except networks.NotInThisHost as error:
        pytest.skip(str(error))


def near(found, expected, base, bound=BOUND):
    """One prediction is as it has to be, up to a bound relative to what the edit does at all."""
    effect, error = (expected - base).double().norm(), (found - expected).double().norm()
    assert effect > 1e-3 * base.double().norm(), "the edit does nothing here"
    assert error <= bound * effect, f"off by {error / effect:.1e} of the effect"


def close(found, expected, base, bound=BOUND):
    """Both predictions are."""
    for side in range(2):
        near(found[side], expected[side], base[side], bound)


def same(found, base):
    return all(torch.equal(one, other) for one, other in zip(found, base))


# ---------------------------------------------------------------- maps of the text


def test_every_text_of_a_conditioning_has_an_entry(subject):
    vectors, more = subject.text(STAR)[0]
    texts = {name for name, value in more.items() if torch.is_tensor(value) and value.is_floating_point()}
    assert {entry.argument for entry in subject.entries} == {"cross_attn", *texts} - NO_TEXT


def test_every_layer_that_reads_text_is_an_entrys(subject):
    found = {key for entry in subject.entries for key, _ in readers(subject.model, entry)}
    assert found == {f"diffusion_model.{name}.weight" for name in networks.reading(subject.model, subject.name)}


@pytest.mark.parametrize("apply_to", ["text", "weights"])
def test_a_map_is_the_edit_of_the_weights(subject, apply_to):
    """Of each entry by itself, the first and the last where many are of one tensor; then of all at once."""
    maps = subject.maps()
    if apply_to == "weights" and not all(entry.readers for entry in maps):
        with pytest.raises(ErasureError, match="weights"):
            subject.applied(subject.adapter(maps), apply_to)
        return
    sides = {entry.argument: entry for entry in maps}, {entry.argument: entry for entry in reversed([*maps])}
    each = dict.fromkeys(entry for side in sides for entry in side.values())
    for chosen in [*({entry: maps[entry]} for entry in each), maps]:
        found = subject.predict(subject.applied(subject.adapter(chosen), apply_to, strength=-0.7))
        close(found, subject.expected(chosen, -0.7), subject.base)
    assert subject.is_as_it_was()


def test_strength_zero_is_the_same_model(subject):
    assert subject.applied(subject.adapter(subject.maps()), strength=0.0) is subject.model


def test_a_saved_map_is_loaded_as_it_was(subject):
    adapter = subject.adapter(subject.maps())
    name = subject.node("MembraneSaveAdapter", adapter=adapter, filename_prefix=f"families/{subject.name}").ui["text"]
    loaded = subject.node("MembraneLoadAdapter", adapter_name=name[0])[0]
    assert loaded.maps.keys() == adapter.maps.keys()
    assert same(subject.predict(subject.applied(loaded)), subject.predict(subject.applied(adapter)))


# ---------------------------------------------------------------- gates


@pytest.mark.parametrize("negative", ["same as positive", "own", "off"])
def test_each_row_has_its_gate(subject, negative):
    """The prompt that is the concept opens the gate, which lets half of the map through; no other does. Two pictures at
    once where the host takes them, prompts of different length."""
    maps = subject.maps()
    gate = {"mode": "facilitated transport", "factor": 0.5, "negative": negative}
    model = subject.applied(subject.adapter(maps), gate=gate)
    rows = networks.NETWORKS[subject.name].rows
    for positive, other in ((STAR, HOUSE), (HOUSE, STAR)):
        base = subject.predict(subject.model, positive, other, rows=rows)
        edited = subject.expected(maps, 0.5, positive, other, rows=rows)
        found = subject.predict(model, positive, other, rows=rows)
        opens = positive == STAR, {"same as positive": positive, "own": other, "off": ""}[negative] == STAR
        for side, open_ in enumerate(opens):
            if open_:
                near(found[side], edited[side], base[side])
            else:
                near(found[side], base[side], edited[side])


def test_a_fixed_gate_closes_the_negative(subject):
    maps = subject.maps()
    model = subject.applied(subject.adapter(maps), gate={"mode": "fixed", "negative": "off"})
    found, edited = subject.predict(model), subject.expected(maps)
    near(found[0], edited[0], subject.base[0])
    near(found[1], subject.base[1], edited[1])


def test_each_of_two_prompts_has_its_gate(subject):
    """Two positive prompts of different length, whose predictions the host averages, and a longer negative."""
    maps = subject.maps()
    model = subject.applied(subject.adapter(maps), gate={"mode": "facilitated transport", "negative": "own"})
    longer = "a picture of a big blue house and a small cat on the sea"
    both = subject.node("ConditioningCombine", conditioning_1=subject.text(STAR), conditioning_2=subject.text(HOUSE))[0]
    base, other = (subject.predict(subject.model, prompt, longer) for prompt in (STAR, HOUSE))
    edited = subject.expected(maps, 1.0, STAR, longer)
    found = subject.predict(model, both, longer)
    near(found[0], (edited[0] + other[0]) / 2, (base[0] + other[0]) / 2)
    near(found[1], base[1], edited[1])


def test_a_part_of_the_sampling(subject):
    """The step is at 0.4 of the sampling; what a model reads once for all steps is left alone."""
    maps = {entry: change for entry, change in subject.maps().items() if not entry.pooled}
    early, late = (
        subject.predict(subject.applied(subject.adapter(maps), start_percent=start, end_percent=end))
        for start, end in ((0.0, 0.3), (0.3, 1.0))
    )
    close(late, subject.expected(maps), subject.base)
    assert same(early, subject.predict(subject.model))


# ---------------------------------------------------------------- distilled models


def test_a_zeroed_negative(subject):
    """What the host's ConditioningZeroOut leaves of the text is mapped, what it zeroes stays zero."""
    text = subject.text(STAR)
    # March 2024 cannot zero a pooled vector that is None, and some networks ask for one that is
    absent = [{k: v for k, v in more.items() if v is None} for _, more in text]
    given = [[vectors, {k: v for k, v in more.items() if v is not None}] for vectors, more in text]
    zeroed = subject.node("ConditioningZeroOut", conditioning=given)[0]
    zeroed = [[vectors, {**none, **more}] for none, (vectors, more) in zip(absent, zeroed, strict=True)]
    maps = subject.maps()
    base = subject.predict(subject.model, STAR, zeroed, cfg=1.0)
    expected = subject.expected(maps, 1.0, STAR, zeroed, cfg=1.0)
    found = subject.predict(subject.applied(subject.adapter(maps)), STAR, zeroed, cfg=1.0)
    near(found[0], expected[0], base[0])
    if torch.equal(expected[1], base[1]):
        assert torch.equal(found[1], base[1])
    else:
        near(found[1], expected[1], base[1])


# ---------------------------------------------------------------- closed form


@pytest.mark.parametrize("method", ["UCE", "SPEED"])
def test_a_closed_form_erasure_is_the_edit_of_the_weights(subject, method):
    erased, adapter = subject.erase(method)
    names = {entry.name: entry for entry in subject.entries}
    maps = {names[name]: change for name, change in adapter.maps.items()}
    assert maps and all(change.normed == bool(entry.norm) for entry, change in maps.items())
    near(subject.predict(erased)[0], subject.expected(maps)[0], subject.base[0], 1e-4)


# ---------------------------------------------------------------- adapters on layers


def test_an_adapter_on_layers(subject):
    """Fixed, and beside the layers with an open gate, it is W + up down of the weights, of parts of fused ones too."""
    adapter, edits = subject.layer_adapter()
    expected = subject.with_weights(edits)
    for mode in ("fixed", "facilitated transport"):
        close(subject.predict(subject.applied(adapter, permeability=mode)), expected, subject.base)
    assert subject.is_as_it_was()


@pytest.fixture(scope="module")
def made(node):
    """made(name) -> Subject, for tests of one family."""

    def make(name):
        try:
            return Subject(name, node)
        except networks.NotInThisHost as error:
            pytest.skip(str(error))

    return make


@pytest.mark.parametrize("name", ["flux_dev", "sd3"])
def test_a_layer_whose_halves_other_programs_store_the_other_way(made, name):
    """Scale and shift of the last norm: the host turns the change over when it loads it, and so does a gate."""
    subject = made(name)
    change = low_rank(subject.layers["final_layer.adaLN_modulation.1"].weight, 1)
    first, second = (change.up @ change.down).double().chunk(2)
    expected = subject.with_weights({"final_layer.adaLN_modulation.1": torch.cat([second, first])})
    for mode in ("fixed", "facilitated transport"):
        adapter = on_layers({"norm_out_linear": change})
        close(subject.predict(subject.applied(adapter, permeability=mode)), expected, subject.base)


@pytest.mark.parametrize(
    "name, layer",
    [
        ("anima", "llm_adapter.blocks.0.cross_attn.q_proj"),
        ("hidream", "double_stream_blocks.0.block.ff_i.experts.0.w1"),
    ],
)
def test_layers_that_prepare_the_text_and_experts(made, name, layer):
    """They follow the prompt where all pictures of a batch open alike, as they do unless the negative prompt is told
    apart; see test_layer_faults.py for those that do not."""
    subject = made(name)
    change = low_rank(subject.layers[layer].weight, 1)
    site = layer.replace(".", "_")
    expected = subject.with_weights({layer: (change.up @ change.down).double()})
    for mode in ("fixed", "facilitated transport"):
        close(subject.predict(subject.applied(on_layers({site: change}), permeability=mode)), expected, subject.base)


# ---------------------------------------------------------------- stored in other numbers


# storage: bound, of the effect; int8 rounds what a layer reads to 8 bits too, so there it is of the prediction
STORED = {kind: BOUND for kind in ("fp8", *networks.LAYOUTS)} | {"int8_tensorwise": 0.06}


def stored(name, kind, node):
    """Subject whose model is stored in other numbers, and whose second network has these numbers in float32."""
    other = networks.build(name)
    weights = other.model.diffusion_model.state_dict()
    if kind == "fp8":
        model = networks.build(name, dtype=torch.float8_e4m3fn, manual_cast=torch.float32)
        numbers_of = model.model.diffusion_model.state_dict()
    else:
        with torch.inference_mode():  # as the host's loaders do
            model, quantised = networks.quantised(name, kind)
        numbers_of = {key.removeprefix("diffusion_model."): value for key, value in quantised.items()}
    with torch.no_grad():
        for key, value in numbers_of.items():
            weights[key].copy_(value.float())
    return Subject(name, node, model, other)


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("name", ["flux_dev", "z_image", "qwen_image", "wan21", "sd3"])
def test_a_map_on_a_model_that_is_stored_in_other_numbers(node, name, kind):
    """It is what it is on the numbers that the stored weights stand for."""
    try:
        subject = stored(name, kind, node)
    except networks.NotInThisHost as error:
        pytest.skip(str(error))
    plain, maps, bound = subject.predict(subject.other), subject.maps(), STORED[kind]
    zero = [torch.zeros_like(side) for side in plain]
    close(subject.base, plain, zero, bound)
    edited = subject.expected(maps)
    gate = {"mode": "facilitated transport", "negative": "off"}
    gated = subject.predict(subject.applied(subject.adapter(maps), gate=gate))
    close(subject.predict(subject.applied(subject.adapter(maps))), edited, plain if bound == BOUND else zero, bound)
    near(gated[0], edited[0], plain[0] if bound == BOUND else zero[0], bound)
    near(gated[1], plain[1], edited[1] if bound == BOUND else zero[1], bound)
