"""Changes that act on the text's rows alone, in layers that text and picture share, on every network that has such.

Which rows are the text's is found without the pack: in the first shared layer they are those that another noise leaves
as they are, as nothing has mixed the two yet. What is right is said by a second network whose layers add the term to
those rows by hand.
"""

import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.adapters.deltas.mask import Mask
from membrane.core.adapters.deltas.text_rows import TextLowRank
from membrane.core.adapters.permeability import FIXED, OFF, TRANSPORT, Permeability
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.errors import ErasureError
from membrane.core.families import joint, table
from membrane.core.families.family import Family
from membrane.core.formats import native, registry
from membrane.core.host.patches.on_weights import apply_to_weights
from membrane.core.host.patches.stack import apply_stack
from membrane.tools.tiny import networks
from torch.nn import functional

BOUND = 1e-5  # of the effect, in float32
STAR, HOUSE = "a red star", "a small old house on a big tree"
LONG = "a " * 40 + "star"  # more than 32 words, which Z-Image rounds up to
# network: (rows of the family, sizes without double blocks, shared layer that comes first, another shared layer)
SHARED = {
    "flux_dev": (joint.FLUX, {"depth": 0}, "single_blocks.0.linear1", "single_blocks.1.linear2"),
    "flux2": (joint.FLUX, {"depth": 0}, "single_blocks.0.linear1", "single_blocks.1.linear2"),
    "chroma": (joint.FLUX, {"depth": 0}, "single_blocks.0.linear1", "single_blocks.1.linear2"),
    "hunyuan_video": (joint.HUNYUAN, {"depth": 0}, "single_blocks.0.linear1", "single_blocks.0.linear2"),
    "hunyuan_image": (joint.HUNYUAN, {"depth": 0}, "single_blocks.0.linear1", "single_blocks.0.linear2"),
    "lumina2": (joint.LUMINA, {}, "layers.0.attention.qkv", "layers.1.feed_forward.w2"),
    "z_image": (joint.Z_IMAGE, {}, "layers.0.attention.qkv", "layers.1.feed_forward.w2"),
    "krea2": (joint.KREA2, {}, "blocks.0.attn.wq", "blocks.1.mlp.down"),
    "auraflow": (joint.AURAFLOW, {"n_double_layers": 0}, "single_layers.0.attn.w1k", "single_layers.1.attn.w1v"),
    "hidream": (
        joint.HIDREAM, {"num_layers": 0, "num_single_layers": 2, "llama_layers": [0, 31]},
        "single_stream_blocks.0.block.attn1.to_q", "single_stream_blocks.1.block.attn1.to_v",
    ),
    "omnigen2": (joint.OMNIGEN2, {}, "layers.0.attn.to_k", "layers.1.attn.to_v"),
    "boogu": (joint.BOOGU, {"num_double_stream_layers": 0}, "single_stream_layers.0.attn.to_q",
              "single_stream_layers.1.attn.to_v"),
    "ernie": (joint.ERNIE, {}, "layers.0.self_attention.to_k", "layers.1.self_attention.to_v"),
    "cogvideox": (joint.COGVIDEOX, {}, "blocks.0.k", "blocks.1.v"),
    "ideogram4": (joint.IDEOGRAM4, {}, "layers.0.attention.qkv", "layers.1.feed_forward.w2"),
}  # fmt: skip


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Subject:
    """A tiny network, a second one of the same weights, and what is known of the rows of the shared layers."""

    def __init__(self, name, known, sizes, *layers):
        self.name, self.layers = name, layers
        self.model, self.other = networks.build(name, **sizes), networks.build(name, **sizes)
        self.clip = networks.text_encoder(name)
        config = type(self.model.model.model_config).__name__.lstrip("_")
        self.family = Family(name, name, (config,), (), joint=known)

    def text(self, prompt):
        """CONDITIONING of a prompt, made anew: the words of one from before a gate was wanted are not known."""
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))

    def predict(self, model, positive=STAR, negative=HOUSE, **options):
        with torch.inference_mode():
            return networks.predict(model, self.text(positive), self.text(negative), self.name, **options)

    def module(self, model, layer):
        return model.model.diffusion_model.get_submodule(layer)

    def seen(self, prompt, seed):
        """What the first shared layer gets for a prompt."""
        inputs, module = [], self.module(self.other, self.layers[0])
        handle = module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().clone()))
        try:
            self.predict(self.other, prompt, prompt, seed=seed)
        finally:
            handle.remove()
        return inputs[0][0]

    def rows(self, prompt):
        """(rows,) bool: which rows of the shared layers are the text's."""
        first, second = (self.seen(prompt, seed) for seed in (0, 1))
        return (first == second).all(dim=-1)

    def change(self, layer, seed=0, rank=2, size=2.0, bias=False):
        module = self.module(self.model, layer)
        up = numbers(seed, module.out_features, rank) * size
        down = numbers(seed + 1, rank, module.in_features) * module.in_features**-0.5
        return TextLowRank(up, down, 1.0 * rank, numbers(seed + 2, len(up)) * 0.3 if bias else None)

    def adapter(self, method="Z-Erase", **options):
        changes = {layer.replace(".", "_"): self.change(layer, 7 * i, **options) for i, layer in enumerate(self.layers)}
        return ErasureAdapter(Card(method, (STAR,)), {"text_rows": changes})

    def by_hand(self, adapter, positive, negative, gates=(1.0, 1.0), strength=1.0, **options):
        """Predictions of the second network with the term added to the text's rows by hand; gates: of the two."""
        known = {len(mask): (mask, gate) for prompt, gate in zip((negative, positive), gates[::-1])
                 for mask in [self.rows(prompt)]}  # fmt: skip
        for layer in self.layers:
            module, delta = self.module(self.other, layer), adapter.deltas["text_rows"][layer.replace(".", "_")]

            def forward(x, module=module, delta=delta):
                mask, gate = known[x.shape[1]]
                term = x.double() @ delta.down.double().T @ delta.up.double().T * delta.scale
                term = term if delta.bias is None else term + delta.bias.double()
                y = type(module).forward(module, x)
                return (y.double() + strength * gate * mask[None, :, None] * term).to(y.dtype)

            module.forward = forward
        try:
            return self.predict(self.other, positive, negative, **options)
        finally:
            for layer in self.layers:
                del self.module(self.other, layer).forward


@pytest.fixture(scope="module", params=SHARED)
def subject(request):
    try:
        return Subject(request.param, *SHARED[request.param])
    except networks.NotInThisHost as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def known(subject, monkeypatch):
    monkeypatch.setattr(table, "FAMILIES", [subject.family, *table.FAMILIES])


def stacked(adapter, strength=1.0, mode=FIXED, negative="same as positive", **more):
    return ErasureStack((Entry(adapter, strength, permeability=Permeability(mode, negative=negative), **more),))


def close(found, expected, base):
    for mine, right, plain in zip(found, expected, base):
        effect = (right - plain).double().norm()
        assert effect > 1e-3 * plain.double().norm(), "the adapter does nothing here"
        assert (mine - right).double().norm() <= BOUND * effect


@pytest.mark.parametrize("prompts", [(STAR, HOUSE), (LONG, STAR)], ids=["short", "long"])
def test_equals_the_term_on_the_texts_rows(subject, prompts):
    adapter, base = subject.adapter(), subject.predict(subject.model, *prompts)
    erased = apply_stack(subject.model, stacked(adapter, 0.8))
    close(subject.predict(erased, *prompts), subject.by_hand(adapter, *prompts, strength=0.8), base)
    for mine, plain in zip(subject.predict(subject.model, *prompts), base):
        assert torch.equal(mine, plain)


def test_the_rows_are_some_but_not_all(subject):
    rows = subject.rows(STAR)
    assert 0 < int(rows.sum()) < len(rows)


def test_biases_and_batches(subject):
    adapter, base = subject.adapter(bias=True), subject.predict(subject.model, rows=2)
    found = subject.predict(apply_stack(subject.model, stacked(adapter)), rows=2)
    close(found, subject.by_hand(adapter, STAR, HOUSE, rows=2), base)


def test_a_range_of_the_sampling(subject):
    """The step is at 0.4 of the sampling."""
    adapter, base = subject.adapter(), subject.predict(subject.model)
    acts = apply_stack(subject.model, stacked(adapter, start_percent=0.2, end_percent=0.6))
    close(subject.predict(acts), subject.by_hand(adapter, STAR, HOUSE), base)
    late = apply_stack(subject.model, stacked(adapter, start_percent=0.6))
    for mine, plain in zip(subject.predict(late), base):
        assert torch.equal(mine, plain)


def test_on_the_weights_it_is_refused(subject):
    with pytest.raises(ErasureError, match="the text's rows of .* alone, but weights are the same for every row"):
        apply_to_weights(subject.model, stacked(subject.adapter()))


def test_a_network_of_unknown_rows_refuses_it(subject, monkeypatch):
    monkeypatch.setattr(table, "FAMILIES", table.FAMILIES[1:])
    monkeypatch.setattr(type(subject.family), "text_rows", lambda self, site: None)
    with pytest.raises(ErasureError, match="which rows of that layer are the text's is not known"):
        apply_stack(subject.model, stacked(subject.adapter()))


def test_follows_the_prompt(subject):
    """The prompt is the concept, so its gate is 1; the negative prompt gets none."""
    adapter, base = subject.adapter(), subject.predict(subject.model)
    stack = stacked(adapter, mode=TRANSPORT, negative=OFF)
    erased = apply_stack(subject.model, stack, subject.clip)
    cond, uncond = subject.predict(erased)
    expected = subject.by_hand(adapter, STAR, HOUSE, gates=(1.0, 0.0))
    close([cond], expected[:1], base[:1])
    assert torch.equal(uncond, base[1])


def test_a_file_keeps_it(subject, tmp_path):
    adapter, path = subject.adapter(bias=True), str(tmp_path / "rows.safetensors")
    native.save(adapter, path)
    again = registry.load(path)
    assert again.card == adapter.card and not again.low_rank
    base, expected = subject.predict(subject.model), subject.predict(apply_stack(subject.model, stacked(adapter)))
    assert not torch.equal(expected[0], base[0])
    for mine, right in zip(subject.predict(apply_stack(subject.model, stacked(again))), expected):
        assert torch.equal(mine, right)


def test_beside_what_acts_on_all_rows_and_masks(subject):
    """Masks come last: on W with all changes for the text's rows, on W with those of all rows for the picture's."""
    layer = subject.layers[0]
    site, module = layer.replace(".", "_"), subject.module(subject.other, layer)
    on_text, everywhere = subject.change(layer, 0), subject.change(layer, 50)
    everywhere = LowRank(everywhere.up, everywhere.down, everywhere.alpha)
    mask = Mask.of(numbers(9, *module.weight.shape) > 0.5)
    kinds = {"low_rank": {site: everywhere}, "text_rows": {site: on_text}, "mask": {site: mask}}
    rows = {prompt: subject.rows(prompt) for prompt in (STAR, HOUSE)}
    known = {len(mask): mask for mask in rows.values()}
    product = [(c.up.double() @ c.down.double()) * c.scale for c in (everywhere, on_text)]
    kept = ~mask.marks()

    def forward(x):
        weight = module.weight.double()
        whole = functional.linear(x.double(), (weight + product[0]) * kept)
        text = functional.linear(x.double(), (weight + product[0] + product[1]) * kept)
        y = torch.where(known[x.shape[1]][None, :, None], text, whole)
        return (y if module.bias is None else y + module.bias.double()).to(x.dtype)

    base = subject.predict(subject.model)
    module.forward = forward
    try:
        expected = subject.predict(subject.other)
    finally:
        del module.forward
    for mode in (FIXED, TRANSPORT):
        stack = stacked(ErasureAdapter(Card("Z-Erase", (STAR,)), kinds), mode=mode)
        found = subject.predict(apply_stack(subject.model, stack, subject.clip))
        close(found, expected, base)
