"""Text that other packs bring into the network beside the conditioning is erased from too, or a sentence says why not.

The packs are stand-ins: nodes that put regions of a picture at the attention, wrappers around the network, and what
replaces a cross-attention. What they make of an erasure of the text is compared with the same erasure in the weights.
"""

from functools import partial

import pytest
import torch
from comfy.gligen import GatedSelfAttentionDense, Gligen, PositionNet
from comfy.model_patcher import ModelPatcher
from membrane.core.adapters.permeability import Permeability
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.errors import ErasureError
from membrane.core.host.patches import brought, conditioning
from membrane.core.host.patches.stack import applied, apply_stack
from membrane.core.measures.compare import demo_judge

STAR, HEART, MOON = "a red star on snow", "a blue heart on sand", "a green moon on stone"
RING = "a yellow ring on coal"
SHAPES = ["circle", "square", "triangle", "star", "heart", "cross", "moon", "ring"]
OUT = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_out.0.forward"
TRANSPORT = Permeability("facilitated transport")
SAME = 1e-4  # of the erasure's effect


@pytest.fixture(scope="module")
def sample(sample):
    return partial(sample, scheduler="simple")


@pytest.fixture(scope="module")
def words(node, demo):
    settings = {"preserve": "heart\nsquare\nmoon", "templates": "{}\na red {} on snow\na blue {} on coal"}
    return node("MembraneErase", model=demo[0], clip=demo[1], concepts="star -> circle", **settings)[1]


@pytest.fixture(scope="module")
def put(node, demo, words):
    """put(model, ...) -> the model with the erasure of the text on it."""

    def run(model, apply_to="text", adapter=words, **settings):
        stack = node("MembraneStack", adapter=adapter, **settings)[0]
        return node("MembraneApply", model=model, clip=demo[1], stack=stack, apply_to=apply_to)[0]

    return run


@pytest.fixture(scope="module")
def close(close):
    return lambda found, expected, base, bound=SAME: close(found, expected, base, bound, seen=0.01)


def attention_couple(model, *regions, weight=0.9, order="regions last"):
    """A clone of a MODEL on which the positive rows also read regions, (1, T, d) each, mixed in by a weight.

    order: how the rows of the attention lie: all rows, then all of each region; or each row with its regions.
    """
    patched = model.clone()
    shares = [1 - weight, *[weight / len(regions)] * len(regions)]

    def spread(x, others):
        if order == "regions last":
            return torch.cat([x, *others])
        return torch.stack([x, *others], dim=1).flatten(0, 1)

    def enter(n, context, value, options):
        texts = [region.to(context).expand(len(context), -1, -1) for region in regions]
        context = spread(context, texts)
        return spread(n, [n] * len(regions)), context, context

    def leave(n, options):
        count = len(regions) + 1
        parts = n.chunk(count) if order == "regions last" else n.unflatten(0, (-1, count)).unbind(1)
        return sum(share * part for share, part in zip(shares, parts))

    patched.set_model_attn2_patch(enter)
    patched.set_model_attn2_output_patch(leave)
    return patched


def replaced_couple(model, region, weight=0.9):
    """The same by replacing each cross-attention, with keys and values that it makes of the region by itself."""
    patched, network = model.clone(), model.model.diffusion_model
    layers = dict(network.named_modules())
    names = [name.removesuffix(".to_k") for name in layers if name.endswith("attn2.to_k")]

    def attention(q, k, v, heads):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    for name in names:

        def replaced(q, k, v, options, module=layers[name]):
            own = region.to(q).expand(len(q), -1, -1)
            other = attention(q, module.to_k(own), module.to_v(own), options["n_heads"])
            return (1 - weight) * attention(q, k, v, options["n_heads"]) + weight * other

        part, number = name.split(".")[0], name.split(".")[1]
        block = (part.split("_")[0], 0 if part == "middle_block" else int(number))
        patched.set_model_attn2_replace(replaced, *block)
    return patched


def swapped_text(model, region):
    """A clone of a MODEL whose wrapper gives the network another text than the conditioning's."""
    patched = model.clone()

    def wrapper(apply_model, args):
        c = dict(args["c"])
        c["c_crossattn"] = region.to(c["c_crossattn"]).expand(len(c["c_crossattn"]), -1, -1)
        return apply_model(args["input"], args["timestep"], **c)

    patched.set_model_unet_function_wrapper(wrapper)
    return patched


def calls_the_network(model):
    """A clone of a MODEL whose wrapper calls the network by itself, past `apply_model`."""
    patched, base = model.clone(), model.model

    def wrapper(apply_model, args):
        x, sigma, c = args["input"], args["timestep"], args["c"]
        options = c["transformer_options"]
        timestep = base.model_sampling.timestep(sigma).float()
        out = base.diffusion_model(
            base.model_sampling.calculate_input(sigma, x), timestep, context=c["c_crossattn"], control=None,
            transformer_options=options,
        )  # fmt: skip
        return base.model_sampling.calculate_denoised(sigma, out.float(), x)

    patched.set_model_unet_function_wrapper(wrapper)
    return patched


@pytest.fixture(scope="module")
def region(text):
    return text(STAR)[0][0]


@pytest.fixture(scope="module")
def other(text):
    return text(MOON)[0][0]


BRINGS = {
    "regions last": lambda model, *regions: attention_couple(model, *regions),
    "regions beside": lambda model, *regions: attention_couple(model, *regions, order="beside"),
    "replaced attention": lambda model, region, *_: replaced_couple(model, region),
}
FORMS = {"text": {}, "in the steps": {"end_percent": 0.95}}
GATED = {"permeability": "facilitated transport"}


@pytest.mark.parametrize("kind", BRINGS)
@pytest.mark.parametrize("form", FORMS)
def test_regions_at_the_attention(kind, form, demo, put, sample, close, region, other):
    """Erased as by the weights, with the pack's node before and after the erasure, one region and three."""
    for regions in ((region,), (other, region, other)):
        run = {"positive": HEART, "negative": "", "steps": 3}
        base = sample(BRINGS[kind](demo[0], *regions), **run)
        expected = sample(BRINGS[kind](put(demo[0], "weights"), *regions), **run)
        settings = FORMS[form]
        close(sample(BRINGS[kind](put(demo[0], **settings), *regions), **run), expected, base)
        close(sample(put(BRINGS[kind](demo[0], *regions), **settings), **run), expected, base)
    assert torch.equal(sample(BRINGS[kind](demo[0], *regions), **run), base)


@pytest.mark.parametrize("kind", BRINGS)
@pytest.mark.parametrize("times", [1.0, 1.05])
def test_each_region_opens_by_its_own_words(kind, times, demo, put, node, text, sample, close, region, other):
    """As if every text were erased from by hand with its own gates; times: 1.05 makes texts of unknown words."""
    model, parts = put(demo[0], **GATED), (region, other)
    erasure = applied(model)
    part = erasure.plan.maps["text"]

    def by_hand(vectors, gates=None):
        return part.erased(vectors, erasure.opening(vectors) if gates is None else gates)

    heart, empty = text(HEART)[0], text("")[0]
    gates = erasure.opening(heart[0])
    assert gates.max() < 0.5 and erasure.opening(region * times).item() == 1.0
    assert (erasure.opening(other * times).item() == 1.0) == (times != 1.0)
    parts = [vectors * times for vectors in parts]
    base = sample(BRINGS[kind](demo[0], *parts), HEART, "", steps=3)
    positive, negative = ([[by_hand(vectors, gates), more]] for vectors, more in (heart, empty))
    expected = sample(BRINGS[kind](demo[0], *map(by_hand, parts)), positive, negative, steps=3)
    close(sample(BRINGS[kind](model, *parts), HEART, "", steps=3), expected, base)
    close(sample(put(BRINGS[kind](demo[0], *parts), **GATED), HEART, "", steps=3), expected, base)


@pytest.mark.parametrize("order", ["regions last", "beside"])
@pytest.mark.parametrize("negative", ["same as positive", "own", "off"])
def test_gated_layers_follow_the_rows_that_are_there(
    order, negative, demo, text, sample, random_adapter, region, other
):
    """Changes of the cross-attention open for each row by the text that it reads: base prompt, region or negative."""
    adapter = random_adapter(1, "star", rank=2, size=0.15)
    attention = {name: change for name, change in adapter.low_rank.items() if "attn2" in name}
    adapter = type(adapter)(adapter.card, {"low_rank": attention})
    entry = Entry(adapter, permeability=Permeability("facilitated transport", negative=negative))
    model = attention_couple(apply_stack(demo[0], ErasureStack((entry,)), demo[1]), other, region, other, order=order)
    found = sample(model, HEART, RING, steps=1)

    gates = {prompt: applied(model).gates(text(prompt)[0][0], "positive", None) for prompt in (STAR, HEART, MOON, RING)}
    own = {"same as positive": gates[HEART], "own": gates[RING], "off": torch.zeros(1, 1)}[negative]
    assert gates[STAR].item() == pytest.approx(1.0) and max(gates[HEART], gates[MOON], gates[RING]).item() < 0.5
    base, seen = model.object_patches[OUT].original, []

    def watched(x):
        seen.append((len(x), rows.every.flatten().tolist()))
        return base(x)

    rows, before = model.object_patches[OUT].rows, model.object_patches[OUT].previous
    model.object_patches[OUT].previous = watched
    sample(model, HEART, RING, steps=1)
    model.object_patches[OUT].previous = before
    count, values = seen[0]
    # two rows of the batch with three regions each: two stars, four moons, the heart and the negative
    expected = [1.0] * 2 + [gates[MOON].item()] * 4 + [gates[HEART].item(), own.item()]
    assert count == 8 and sorted(values) == pytest.approx(sorted(expected), abs=1e-5)
    stars = values[4:6] if order == "regions last" else values[2::4]
    assert stars == pytest.approx([1.0, 1.0]) and found.isfinite().all()


def test_a_text_that_a_wrapper_brings(demo, put, sample, close, region):
    for settings in ({}, {"permeability": "facilitated transport"}, {"end_percent": 0.95}):
        base = sample(swapped_text(demo[0], region), HEART, "", steps=2)
        expected = sample(swapped_text(put(demo[0], "weights"), region), HEART, "", steps=2)
        close(sample(swapped_text(put(demo[0], **settings), region), HEART, "", steps=2), expected, base, 1e-3)


def swapped_later(model, region, at=1):
    """A clone of a MODEL whose wrapper gives the network another text from a step on, in rows of the same size."""
    patched, steps = model.clone(), []

    def wrapper(apply_model, args):
        c = dict(args["c"])
        steps.append(args["timestep"][0].item())
        if len(set(steps)) > at:
            c["c_crossattn"] = region.to(c["c_crossattn"]).expand(len(c["c_crossattn"]), -1, -1)
        return apply_model(args["input"], args["timestep"], **c)

    patched.set_model_unet_function_wrapper(wrapper)
    return patched


@pytest.mark.parametrize("card", [False, True], ids=["processor", "as on a graphics card"])
def test_a_text_that_is_swapped_in_a_later_step(card, demo, put, sample, close, region, monkeypatch):
    monkeypatch.setattr(brought, "waits_for_a_look", lambda text: card)
    run = {"positive": "a blue star on coal", "negative": "", "steps": 3}  # open as the region is
    for settings in ({}, {"permeability": "facilitated transport"}, {"end_percent": 0.95}):
        base = sample(swapped_later(demo[0], region), **run)
        expected = sample(swapped_later(put(demo[0], "weights"), region), **run)
        close(sample(swapped_later(put(demo[0], **settings), region), **run), expected, base, 1e-3)


def swapped_at_the_attention(model, region, at=1):
    """The same beside a patch of the attention, for which the text travels as it was."""
    patched = swapped_later(model, region, at)
    patched.set_model_attn2_patch(lambda n, context, value, options: (n, context, value))
    return patched


def test_a_swapped_text_beside_a_patch_of_the_attention(demo, put, sample, close, region):
    for settings in FORMS.values():
        base = sample(swapped_at_the_attention(demo[0], region), HEART, "", steps=3)
        expected = sample(swapped_at_the_attention(put(demo[0], "weights"), region), HEART, "", steps=3)
        close(sample(swapped_at_the_attention(put(demo[0], **settings), region), HEART, "", steps=3), expected, base)


def test_a_wrapper_that_calls_the_network(demo, put, sample, close, random_adapter):
    """Text that is erased from beforehand stays so; what acts in the steps or by the prompt stops with a sentence."""
    base = sample(calls_the_network(demo[0]))
    expected = sample(calls_the_network(put(demo[0], "weights")))
    close(sample(calls_the_network(put(demo[0]))), expected, base)
    close(sample(calls_the_network(put(demo[0], permeability="facilitated transport"))), expected, base, 1e-3)
    gated = apply_stack(demo[0], ErasureStack((Entry(random_adapter(1, STAR), permeability=TRANSPORT),)), demo[1])
    for model in (put(demo[0], end_percent=0.95), gated):
        with pytest.raises(ErasureError, match="calls the network by itself"):
            sample(calls_the_network(model))
        assert sample(model).isfinite().all()
    assert torch.equal(sample(calls_the_network(demo[0])), base)


def test_a_text_that_nobody_knows_is_said_once(demo, put, sample, region, caplog):
    """Noise on the text that a wrapper adds may be on an erased text or on another one."""

    def noisy(model):
        patched = model.clone()

        def wrapper(apply_model, args):
            c = dict(args["c"])
            c["c_crossattn"] = c["c_crossattn"] + 0.5 * torch.randn_like(c["c_crossattn"])
            return apply_model(args["input"], args["timestep"], **c)

        patched.set_model_unet_function_wrapper(wrapper)
        return patched

    with caplog.at_level("WARNING", logger="membrane"):
        sample(noisy(put(demo[0])), steps=3)
    assert caplog.text.count("cannot be told whether it was erased from") == 1


def test_an_ordinary_graph_is_as_ever(demo, put, sample, caplog):
    """No layer that reads the text is touched while no other pack can bring any, and nothing is said."""
    model = put(demo[0])
    readers = [m for n, m in demo[0].model.diffusion_model.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    hooks = []

    def wrapper(apply_model, args):
        def counted(x, t, **c):
            handle = readers[-1].register_forward_pre_hook(lambda *_: hooks.append(len(readers[-1]._forward_pre_hooks)))
            try:
                return apply_model(x, t, **c)
            finally:
                handle.remove()

        return counted(args["input"], args["timestep"], **args["c"])

    expected = sample(model)
    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    with caplog.at_level("WARNING", logger="membrane"):
        assert torch.equal(sample(model), expected)
    assert hooks and set(hooks) == {1}
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.fixture(scope="module")
def gligen(demo):
    """A GLIGEN of random weights for the demo model, as its loader gives it."""
    torch.manual_seed(0)
    network, width = demo[0].model.diffusion_model, len(demo[1].encode_from_tokens(demo[1].tokenize(""))[0, 0])
    blocks = [m for name, m in network.named_modules() if name.endswith("transformer_blocks.0")]
    layers = [GatedSelfAttentionDense(block.attn1.to_q.in_features, width, 2, 8) for block in blocks]
    model = Gligen(layers, PositionNet(width, width), width)
    for name, parameter in model.named_parameters():  # the host leaves them as they lie in memory
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            torch.nn.init.constant_(parameter, 1.0 if "alpha" in name or "norm" in name else 0.0)
    return ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


@pytest.fixture(scope="module")
def boxed(node, demo, text, gligen):
    """boxed(prompt, *words, by=None) -> CONDITIONING of a prompt with a box for each of the words, one over another;
    by: what changes a box's vector (1, d)."""

    def run(prompt, *words, by=lambda vector: vector):
        found = text(prompt)
        for i, word in enumerate(words):
            found = node(
                "GLIGENTextBoxApply", conditioning_to=found, clip=demo[1], gligen_textbox_model=gligen, text=word,
                width=64, height=32, x=0, y=32 * i,
            )[0]  # fmt: skip
        boxes = [(by(vector), *place) for vector, *place in found[0][1]["gligen"][2]]
        return [[found[0][0], {**found[0][1], "gligen": ("position", gligen, boxes)}]]

    return run


@pytest.mark.parametrize("form", ["text", "gated", "in the steps"])
def test_the_words_of_gligen_boxes_are_erased(form, demo, put, sample, close, boxed, monkeypatch):
    """Their vectors as if they were mapped by hand, those of two conditionings told from each other."""
    settings = {"text": {}, "gated": GATED, "in the steps": {"end_percent": 0.95}}[form]
    model, part = put(demo[0], **settings), applied(put(demo[0])).plan.maps["text"]

    def by_hand(vector):
        return part.erased(vector[None])[0]

    run = {"negative": "", "steps": 2, "cfg": 2.0}
    for words in (("star",), ("star", "red star")):
        base = sample(model, boxed(HEART, *words, by=lambda vector: vector.clone()), **run)
        with monkeypatch.context() as undone:
            undone.setattr(conditioning.Boxes, "add", lambda self, gligen: None)
            raw = sample(model, boxed(HEART, *words), **run)
            expected = sample(model, boxed(HEART, *words, by=by_hand), **run)
        close(base, expected, raw)
    assert torch.equal(sample(demo[0], boxed(HEART, "star"), **run), sample(demo[0], boxed(HEART, "star"), **run))
    both = boxed(HEART, "star") + boxed(MOON, "red star")
    with monkeypatch.context() as undone:
        undone.setattr(conditioning.Boxes, "add", lambda self, gligen: None)
        raw = sample(model, both, **run)
        expected = sample(model, boxed(HEART, "star", by=by_hand) + boxed(MOON, "red star", by=by_hand), **run)
    close(sample(model, both, **run), expected, raw)


def test_gligen_beside_adapters_of_layers_alone_is_said(demo, text, random_adapter, caplog):
    """Layers of another network read the words, before this one is called."""
    entry = Entry(random_adapter(1, STAR), permeability=TRANSPORT)
    erasure = applied(apply_stack(demo[0], ErasureStack((entry,)), demo[1]))
    with caplog.at_level("WARNING", logger="membrane"):
        for _ in range(2):
            erasure(cross_attn=text(HEART)[0][0], noise=None, device="cpu", gligen=("position", None, []))
    assert caplog.text.count("GLIGEN boxes") == 1


@pytest.mark.slow
def test_the_star_stays_away_from_its_region(demo, put, node, text, sample, region):
    """As the judge of the demo world sees it."""
    judge = demo_judge(SHAPES)

    def shapes(model):
        latents = sample(attention_couple(model, region), HEART, "", size=128, steps=10, cfg=1.5, batch=2)
        return judge(node("VAEDecode", vae=demo[2], samples={"samples": latents})[0])

    assert "star" in shapes(demo[0])
    for settings in (*FORMS.values(), GATED):
        assert "star" not in shapes(put(demo[0], **settings)), settings
