"""Locating in the host: the published recipe done naively on the same network, and what must not change the mask."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from membrane.core.errors import ErasureError
from membrane.core.host.runs.locating import linear_layers

PROMPTS = "portrait of captain bolt\nposter of the galaxy derby\nlogo of the marble bakery"
SETTINGS = {
    "prompts": PROMPTS, "base_prompts": "", "sparsity": 0.02, "first_steps": 3, "steps": 12, "cfg": 1.5,
    "width": 128, "height": 128, "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def located(node, demo):
    def run(model=None, **changes):
        return node("MembraneLocateMemorization", model=model or demo[0], clip=demo[1], **{**SETTINGS, **changes})

    return run


@pytest.fixture(scope="module")
def plain(located):
    return located()


def same(one, other):
    return list(one.masks) == list(other.masks) and all(
        torch.equal(one.masks[name].bits, other.masks[name].bits) for name in one.masks
    )


def naive(node, demo, prompts, steps, cfg, only_prompt):
    """{(layer, call): [rows of length 1]} of whole runs, one prompt at a time, as the published code gathers them."""
    layers, seen = linear_layers(demo[0]), {}
    empty = node("CLIPTextEncode", clip=demo[1], text="")[0]
    latent = node("EmptyLatentImage", width=128, height=128, batch_size=1)[0]
    for prompt in prompts:
        calls = dict.fromkeys(layers, 0)

        def look(name, module, inputs, calls=calls):
            hidden, call = inputs[0].double(), calls[name]
            calls[name] += 1
            if only_prompt and len(hidden) > 1:
                hidden = hidden[POSITIVE[0]]
            rows = hidden.reshape(-1, hidden.shape[-1])
            seen.setdefault((name, call), []).append(rows / rows.norm(dim=1, keepdim=True))

        hooks = [module.register_forward_pre_hook(partial(look, name)) for name, module in layers.items()]
        try:
            node(
                "KSampler", model=demo[0], seed=3, steps=steps, cfg=cfg, sampler_name="euler", scheduler="normal",
                positive=node("CLIPTextEncode", clip=demo[1], text=prompt)[0], negative=empty, latent_image=latent,
                denoise=1.0,
            )  # fmt: skip
        finally:
            for hook in hooks:
                hook.remove()
    return seen


POSITIVE = [1]  # the place of the prompt's row where the host puts the empty prompt first; see prompt_row()


@pytest.fixture(scope="module", autouse=True)
def prompt_row(node, demo):
    """Which row of a guided call is the prompt's, asked of the host."""
    model, found = demo[0].clone(), []

    def wrapper(apply, args):
        found.append(args["cond_or_uncond"])
        return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    texts = [node("CLIPTextEncode", clip=demo[1], text=t)[0] for t in ("a star", "")]
    latent = node("EmptyLatentImage", width=128, height=128, batch_size=1)[0]
    node(
        "KSampler", model=model, seed=3, steps=1, cfg=1.5, sampler_name="euler", scheduler="normal",
        positive=texts[0], negative=texts[1], latent_image=latent, denoise=1.0,
    )  # fmt: skip
    POSITIVE[0] = found[0].index(0)


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["prompt and empty prompt", "prompt only"])
def test_masks_are_those_of_the_published_recipe(node, demo, located, rows):
    adapter, _ = located(rows=rows)
    only = rows == "prompt only"
    target = naive(node, demo, PROMPTS.splitlines(), 12, 1.5, only)
    base = naive(node, demo, [""] * 3, 12, 1.0 if only else 1.5, only)
    for name, module in linear_layers(demo[0]).items():
        weight, found = module.weight.detach().double().abs(), adapter.masks[name].marks()
        expected = torch.zeros(weight.shape, dtype=torch.bool)
        for call in range(3):
            scores, other = (weight * torch.cat(seen[name, call]).square().sum(dim=0).sqrt() for seen in (target, base))
            count = int(0.02 * weight.shape[1])
            largest = torch.zeros_like(expected).scatter_(1, scores.topk(count, dim=1).indices, True)
            expected |= largest & (scores > other)
        wrong = (found != expected).sum().item()
        assert expected.any() and wrong <= 0.002 * expected.sum() + 2  # scores that tie in float32


def test_same_seed_same_mask_and_another_seed_another(located, plain):
    assert same(located()[0], plain[0])
    assert not same(located(seed=4)[0], plain[0])


@pytest.mark.parametrize("batch", [1, 3])
def test_batches_make_no_difference(located, plain, batch):
    found = located(batch_size=batch)[0]
    for name, mask in plain[0].masks.items():
        a, b = mask.marks(), found.masks[name].marks()
        assert (a != b).sum() <= 0.005 * a.sum() + 2  # rounding differs between batch sizes


def test_the_model_and_its_layers_are_left_alone(demo, located):
    before = {name: dict(m._forward_pre_hooks) for name, m in linear_layers(demo[0]).items()}
    patches = dict(demo[0].object_patches)
    located()
    assert demo[0].object_patches == patches
    assert {name: dict(m._forward_pre_hooks) for name, m in linear_layers(demo[0]).items()} == before


def test_only_the_first_steps_are_run(located, plain):
    # three prompts with guidance, and the empty prompt once without
    assert plain[1].splitlines()[-1] == f"evaluations of the network: {3 * (3 * 2 + 1)}"


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral"])
def test_other_samplers(located, sampler):
    adapter, _ = located(sampler_name=sampler)
    assert all(mask.marked for mask in adapter.masks.values())


def test_a_sampler_without_a_fixed_schedule_is_refused(located):
    with pytest.raises(ErasureError, match="choose a sampler with a fixed schedule"):
        located(sampler_name="dpm_adaptive")


def test_a_host_that_turns_the_batch_around(demo, located):
    """The order of prompt and empty prompt in a batch is the host's affair."""
    model = demo[0].clone()

    def turned(apply, args):
        x, t, c, kinds = args["input"], args["timestep"], dict(args["c"]), args["cond_or_uncond"]
        back = torch.arange(len(x)).flip(0)
        options = {**c.get("transformer_options", {}), "cond_or_uncond": kinds[::-1]}
        c = {k: v[back] if isinstance(v, torch.Tensor) and len(v) == len(x) else v for k, v in c.items()}
        return apply(x[back], t[back], **{**c, "transformer_options": options})[back]

    model.set_model_unet_function_wrapper(turned)
    expected, found = (located(m, rows="prompt only")[0].masks for m in (demo[0], model))
    for name, mask in expected.items():
        a, b = mask.marks(), found[name].marks()
        assert (a != b).sum() <= 0.005 * a.sum() + 2


def test_a_node_that_hides_which_rows_are_the_prompts_is_named(demo, located):
    model = demo[0].clone()

    def hidden(apply, args):
        options = {k: v for k, v in args["c"].get("transformer_options", {}).items() if k != "cond_or_uncond"}
        return apply(args["input"], args["timestep"], **{**args["c"], "transformer_options": options})

    model.set_model_unet_function_wrapper(hidden)
    with pytest.raises(ErasureError, match="without saying which belong to the prompt"):
        located(model)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"prompts": " \n"}, "No prompt was given"),
        ({"base_prompts": "a\nb"}, "3 prompts and 2 base prompts"),
        ({"first_steps": 13}, "first_steps is 13"),
        ({"sparsity": 0.0001}, "marks no weight"),
    ],
)
def test_bad_input_is_one_sentence(located, changes, says):
    with pytest.raises(ErasureError, match=says):
        located(**changes)


def test_dampening_finds_some_weights_and_keeps_some_of_each(demo, located, node):
    base = "\n".join(f"a {c} {s} on sand" for c in ("red", "blue") for s in ("star", "ring", "moon"))
    for method in ("dampening: feed-forward (experimental)", "dampening: text keys and values (experimental)"):
        adapter, text = located(method=method, base_prompts=base, sparsity=0.001, first_steps=1, width=64, height=64)
        assert adapter.masks and all(
            m.marked and m.kept.min() >= 0 and m.kept.max() <= 1 for m in adapter.masks.values()
        )
        assert "alpha: " in text
        stack = node("MembraneStack", adapter=adapter)[0]
        assert node("MembraneApply", model=demo[0], clip=demo[1], stack=stack)[0] is not demo[0]
    with pytest.raises(ErasureError, match="base prompts change nothing"):
        located(method="dampening: feed-forward (experimental)", first_steps=1)


def test_saved_and_loaded_again_it_is_the_same(node, plain):
    saved = node("MembraneSaveAdapter", adapter=plain[0], filename_prefix="located")
    loaded = node("MembraneLoadAdapter", adapter_name=saved.ui["text"][0])[0]
    assert same(loaded, plain[0]) and loaded.card == plain[0].card


def with_sample(adapter, sample):
    return replace(adapter, card=replace(adapter.card, settings={**adapter.card.settings, "weight_sample": sample}))


@pytest.mark.parametrize("apply_to", ["text", "weights"])
def test_another_checkpoint_gets_a_warning(node, demo, plain, caplog, apply_to):
    """Not a relative of the one it was located on: night is day trained on, its weights are 5 % away."""
    ((name, values),) = plain[0].card.settings["weight_sample"].items()
    weight = linear_layers(demo[0])[name].weight.detach().float().flatten()
    assert values == pytest.approx(weight[:: len(weight) // len(values)][: len(values)].tolist(), rel=1e-4)
    foreign = with_sample(plain[0], {name: values[::-1]})
    for adapter, variant, expected in ((plain[0], "day", False), (plain[0], "night", False), (foreign, "day", True)):
        model, stack = node("MembraneDemoModel", variant=variant)[0], node("MembraneStack", adapter=adapter)[0]
        caplog.clear()
        with caplog.at_level("WARNING", logger="membrane"):
            found = node("MembraneApply", model=model, clip=demo[1], stack=stack, apply_to=apply_to)
        assert ("located on another checkpoint" in caplog.text) == expected
        assert len(found) == 1
        said = found.ui["text"] if found.ui else []
        assert [sentence in caplog.text for sentence in said] == [True] * expected


@pytest.mark.parametrize("sample", [None, 3, {}, {"nothing": [1.0]}, {"": []}, {"x": ["y"]}])
def test_a_sample_that_says_nothing_is_no_mistake(node, demo, plain, caplog, sample):
    adapter = with_sample(plain[0], sample)
    with caplog.at_level("WARNING", logger="membrane"):
        node("MembraneApply", model=demo[0], clip=demo[1], stack=node("MembraneStack", adapter=adapter)[0])
    assert not caplog.text


# ---------------------------------------------------------------- neurons

NEMO = "neurons (NeMo)"
ORDINARY = "\n".join(f"a plain {c} {s} on sand" for c in ("red", "blue", "green", "white", "black")
                     for s in ("star", "ring", "moon", "heart"))  # fmt: skip


@pytest.fixture(scope="module")
def neurons(located):
    return located(
        method=NEMO, base_prompts=ORDINARY, prompts=PROMPTS.splitlines()[0], first_steps=2, steps=4, batch_size=40
    )


def test_neurons_are_rows_of_value_layers_and_lower_the_pull(neurons):
    adapter, text = neurons
    assert adapter.masks and all(name.endswith("attn2_to_v") for name in adapter.masks)
    for mask in adapter.masks.values():
        rows = mask.marks()
        assert torch.equal(rows, rows[:, :1].expand_as(rows)) and not rows.all()
    lines = text.splitlines()
    goal = float(next(line for line in lines if line.startswith("pull of the text")).split(", ")[1].split()[0])
    before, after = next(line for line in lines if line.startswith("portrait")).split(": ")[1].split(" -> ")
    assert float(after) <= goal < float(before)


def test_the_adapter_does_what_was_measured(node, demo, neurons):
    """The score of the pruned model is the one that was found with the neurons switched off by hooks."""
    from membrane.core.host.runs.sampling import Sampling
    from membrane.core.host.runs.value_neurons import ValueNeurons

    stack = node("MembraneStack", adapter=neurons[0], permeability="fixed")[0]
    model = node("MembraneApply", model=demo[0], clip=demo[1], stack=stack)[0]
    settings = Sampling(4, 1.5, "euler", "normal", 128, 128)
    prompt = PROMPTS.splitlines()[0]
    with torch.inference_mode():
        found = ValueNeurons(model, demo[1], settings, 2, 3)._scores([prompt])[0]
    said = next(line for line in neurons[1].splitlines() if line.startswith(prompt))
    assert found == pytest.approx(float(said.split(" -> ")[1]), abs=0.01)


def test_neurons_leave_the_model_alone(demo, neurons):
    assert not any(module._forward_hooks for module in linear_layers(demo[0], ("cross_attention.value",)).values())


def test_neurons_need_ordinary_prompts(located):
    with pytest.raises(ErasureError, match="NeMo needs at least 20 different base prompts"):
        located(method=NEMO, base_prompts="a red star\n" * 25)
