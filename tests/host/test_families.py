"""Every family that the host knows, as a tiny network of its own class with random weights, through the pack's nodes.

What is right is said by a second network of the same class, whose weights are edited by hand in float64: W (I + A B) in
every layer that reads the text (UCE, Gandikota et al. 2024, eq. 7), or W + up down for an adapter on layers. Compared
are the conditional and the unconditional prediction of one step, through the host's whole sampler.
"""

import re

import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.errors import ErasureError
from membrane.core.host.model.layers import layer_keys, plain_key, readers, text_entries
from membrane.tools.tiny import networks

BOUND = 1e-5  # of the effect, in float32
STAR, HOUSE = "a red star", "a small old house"
NO_TEXT = {"t5xxl_weights"}  # numbers of a conditioning that say nothing of the prompt


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Subject:
    """A tiny model of a family, and a second one of the same weights to edit by hand."""

    def __init__(self, name, node):
        self.name, self.node = name, node
        self.model, self.clip = networks.build(name), networks.text_encoder(name)
        self.other = networks.build(name)
        self.layers = dict(self.other.model.diffusion_model.named_modules())
        self.entries = text_entries(self.model)
        self.texts = {}
        self.base = self.predict(self.model)

    def text(self, prompt):
        """CONDITIONING of a prompt."""
        if prompt not in self.texts:
            self.texts[prompt] = self.node("CLIPTextEncode", clip=self.clip, text=prompt)[0]
        return self.texts[prompt]

    def predict(self, model, positive=STAR, negative=HOUSE, **options):
        """Predictions (cond, uncond) of a step; prompts may be texts or CONDITIONINGs."""
        sides = (self.text(prompt) if isinstance(prompt, str) else prompt for prompt in (positive, negative))
        with torch.inference_mode():
            return networks.predict(model, *sides, self.name, **options)

    # ------------------------------------------------ what is right

    def edits(self, maps, strength=1.0):
        """{layer: change of its weight} of {entry: TextMap}, W A B; a pooled vector fills a layer's first inputs."""
        found = {}
        for entry, change in maps.items():
            matrix = strength * change.a.double() @ change.b.double()
            for key, _ in readers(self.model, entry):
                layer = key.removeprefix("diffusion_model.").removesuffix(".weight")
                weight = self.layers[layer].weight.detach().double()
                difference = torch.zeros_like(weight)
                difference[:, : len(matrix)] = weight[:, : len(matrix)] @ matrix
                found[layer] = found.get(layer, 0.0) + difference
        return found

    def with_weights(self, edits, *sides, **options):
        """Predictions of the second network with {layer: change of its weight} for as long as it takes."""
        before = {layer: self.layers[layer].weight.detach().clone() for layer in edits}
        with torch.no_grad():
            for layer, difference in edits.items():
                self.layers[layer].weight.copy_((before[layer].double() + difference).float())
            try:
                return self.predict(self.other, *sides, **options)
            finally:
                for layer, weight in before.items():
                    self.layers[layer].weight.copy_(weight)

    def with_text(self, maps, strength, text):
        """A CONDITIONING with c + A B c in place of each vector c."""
        changed = []
        for vectors, more in text:
            tensors = {"cross_attn": vectors, **more}
            for entry, change in maps.items():
                matrix = strength * change.a.double() @ change.b.double()
                tensor = tensors[entry.argument].double()
                tensors[entry.argument] = (tensor + tensor @ matrix.T).float()
            changed.append([tensors.pop("cross_attn"), tensors])
        return changed

    def expected(self, maps, strength=1.0, positive=STAR, negative=HOUSE, **options):
        """Predictions that {entry: TextMap} have to give: of edited weights, or of an edited conditioning where no edit
        of weights is the same."""
        rest = {entry: change for entry, change in maps.items() if not entry.readers}
        sides = (self.text(prompt) if isinstance(prompt, str) else prompt for prompt in (positive, negative))
        sides = [self.with_text(rest, strength, text) if rest else text for text in sides]
        return self.with_weights(self.edits(maps, strength), *sides, **options)

    # ------------------------------------------------ what the pack makes of it

    def random_map(self, entry, seed=0, rank=3):
        """A TextMap of the width of an entry, larger than the text itself."""
        width = self.entries[entry] or self.tensor(entry).shape[-1]
        a, b = 3 * numbers(seed, width, rank) * rank**-0.5, numbers(seed + 1, rank, width) * width**-0.5
        return TextMap(a, b, (0,) * rank, normed=bool(entry.norm))

    def tensor(self, entry):
        vectors, more = self.text(STAR)[0]
        return {"cross_attn": vectors, **more}[entry.argument]

    def maps(self):
        """A random map for every entry."""
        return {entry: self.random_map(entry, seed) for seed, entry in enumerate(self.entries)}

    def adapter(self, maps, concept=STAR):
        return ErasureAdapter(Card("UCE", (concept,)), {"map": {entry.name: m for entry, m in maps.items()}})

    def applied(self, adapter, apply_to="text", gate=None, **settings):
        """The model with an adapter in a stack; gate: what MembranePermeability gets."""
        stack = self.node("MembraneStack", adapter=adapter, **settings)[0]
        if gate:
            usual = {"factor": 1.0, "threshold": 1.0, "negative": "same as positive", "top_k": 1}
            stack = self.node("MembranePermeability", stack=stack, **{**usual, **gate})[0]
        return self.node("MembraneApply", model=self.model, clip=self.clip, stack=stack, apply_to=apply_to)[0]


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
    assert same(subject.predict(subject.model), subject.base)


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
    once, prompts of different length."""
    maps = subject.maps()
    gate = {"mode": "facilitated transport", "factor": 0.5, "negative": negative}
    model = subject.applied(subject.adapter(maps), gate=gate)
    for positive, other in ((STAR, HOUSE), (HOUSE, STAR)):
        base = subject.predict(subject.model, positive, other, rows=2)
        edited = subject.expected(maps, 0.5, positive, other, rows=2)
        found = subject.predict(model, positive, other, rows=2)
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
    assert same(early, subject.base)


# ---------------------------------------------------------------- distilled models


def test_a_zeroed_negative(subject):
    """What the host's ConditioningZeroOut leaves of the text is mapped, what it zeroes stays zero."""
    zeroed = subject.node("ConditioningZeroOut", conditioning=subject.text(STAR))[0]
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
    erased, adapter = subject.node(
        "MembraneErase", model=subject.model, clip=subject.clip, concepts="star -> circle", replace_with="",
        preserve="heart\na house", method=method, strength=1.0, templates="{}\na red {}", tau=20.0,
    )  # fmt: skip
    names = {entry.name: entry for entry in subject.entries}
    maps = {names[name]: change for name, change in adapter.maps.items()}
    assert maps and all(change.normed == bool(entry.norm) for entry, change in maps.items())
    near(subject.predict(erased)[0], subject.expected(maps)[0], subject.base[0], 1e-4)


# ---------------------------------------------------------------- adapters on layers


# run where no rows are told apart: the experts of a mixture get tokens of all of them, Anima's adapter runs before
NO_ROWS = re.compile(r"\.experts\.\d+\.|^diffusion_model\.llm_adapter\.")


def some_layers(model):
    """{site: key} of a few linear layers of a MODEL: the first, the middle and the last one, and the parts of one that
    the host knows as several fused ones."""
    linear = {
        f"diffusion_model.{name}.weight"
        for name, module in model.model.diffusion_model.named_modules()
        if hasattr(module, "in_features")
    }
    keys = {site: key for site, key in layer_keys(model).items() if plain_key(key) in linear}
    parts = {site: key for site, key in keys.items() if not isinstance(key, str) and len(key) == 2}
    fused = [plain_key(key) for key in parts.values()]
    whole = {key: site for site, key in keys.items() if isinstance(key, str) and not NO_ROWS.search(key)}
    plain = [key for key in whole if key not in fused]
    chosen = {whole[plain[i]]: plain[i] for i in (0, len(plain) // 2, -1)}
    return chosen | {site: key for site, key in parts.items() if key[0] == fused[0]}


def low_rank(weight, seed, rank=2):
    """LowRank of the shape of a weight, about as large."""
    up, down = numbers(seed, len(weight), rank), numbers(seed + 50, rank, weight.shape[1]) * weight.shape[1] ** -0.5
    return LowRank(up, down, float(rank))


def layer_of(key):
    """The path in the network of the layer that a key is of."""
    return plain_key(key).removeprefix("diffusion_model.").removesuffix(".weight")


def on_layers(changes):
    return ErasureAdapter(Card("SPM", (STAR,)), {"low_rank": changes})


def test_an_adapter_on_layers(subject):
    """Fixed, and beside the layers with an open gate, it is W + up down of the weights, of parts of fused ones too."""
    changes, edits = {}, {}
    for seed, (site, key) in enumerate(some_layers(subject.model).items()):
        weight = subject.layers[layer_of(key)].weight.detach()
        start, length = (0, len(weight)) if isinstance(key, str) else key[1][1:]
        change = changes[site] = low_rank(weight[start : start + length], seed)
        edit = edits.setdefault(layer_of(key), torch.zeros_like(weight, dtype=torch.float64))
        edit[start : start + length] += change.up.double() @ change.down.double()
    expected = subject.with_weights(edits)
    for mode in ("fixed", "facilitated transport"):
        close(subject.predict(subject.applied(on_layers(changes), permeability=mode)), expected, subject.base)
    assert same(subject.predict(subject.model), subject.base)


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
def test_layers_that_cannot_follow_the_prompt(made, name, layer):
    """They take a fixed change; a gate, which they could not follow, is refused."""
    subject = made(name)
    change = low_rank(subject.layers[layer].weight, 1)
    site = layer.replace(".", "_")
    expected = subject.with_weights({layer: (change.up @ change.down).double()})
    close(subject.predict(subject.applied(on_layers({site: change}), permeability="fixed")), expected, subject.base)
    with pytest.raises(ErasureError, match="cannot follow"):
        subject.applied(on_layers({site: change}), permeability="facilitated transport")
