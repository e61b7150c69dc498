"""Every family that the host knows, as a tiny network of its own class with random weights, through the pack's nodes.

What is right is said by a second network of the same class, whose weights are edited by hand in float64: W (I + A B) in
every layer that reads the text (UCE, Gandikota et al. 2024, eq. 7), or W + up down for an adapter on layers. Compared
are the conditional and the unconditional prediction of one step, through the host's whole sampler.
"""

import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.host.model.layers import readers, text_entries
from membrane.tools.tiny import networks

BOUND = 1e-5  # of the effect, in float32
STAR, HOUSE = "a red star", "a small old house"


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

    def random_map(self, entry, seed=0, rank=3):
        """A TextMap of the width of an entry, larger than the text itself."""
        width = self.entries[entry] or self.text(STAR)[0][1][entry.argument].shape[-1]
        a, b = 3 * numbers(seed, width, rank) * rank**-0.5, numbers(seed + 1, rank, width) * width**-0.5
        return TextMap(a, b, (0,) * rank, normed=bool(entry.norm))

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

    def expected(self, edits, *sides, **options):
        """Predictions of the second network with weights that are changed for as long as it takes."""
        before = {layer: self.layers[layer].weight.detach().clone() for layer in edits}
        with torch.no_grad():
            for layer, difference in edits.items():
                self.layers[layer].weight.copy_((before[layer].double() + difference).float())
            try:
                return self.predict(self.other, *sides, **options)
            finally:
                for layer, weight in before.items():
                    self.layers[layer].weight.copy_(weight)

    def adapter(self, maps, concepts=(STAR,)):
        return ErasureAdapter(Card("UCE", concepts), {"map": {entry.name: change for entry, change in maps.items()}})

    def applied(self, adapter, apply_to="text", model=None, **settings):
        stack = self.node("MembraneStack", adapter=adapter, **settings)[0]
        return self.node("MembraneApply", model=model or self.model, clip=self.clip, stack=stack, apply_to=apply_to)[0]


@pytest.fixture(scope="module", params=networks.NETWORKS)
def subject(request, node):
    try:
        return Subject(request.param, node)
    except networks.NotInThisHost as error:
        pytest.skip(str(error))


def close(found, expected, base, bound=BOUND):
    """Both predictions are as they have to be, up to a bound relative to what the edit does at all."""
    for side, one, other, unedited in zip(("cond", "uncond"), found, expected, base):
        effect, error = (other - unedited).double().norm(), (one - other).double().norm()
        assert effect > 1e-3 * unedited.double().norm(), f"{side}: the edit does nothing here"
        assert error <= bound * effect, f"{side}: off by {error / effect:.1e} of the effect"


def same(found, base):
    return all(torch.equal(one, other) for one, other in zip(found, base))


# ---------------------------------------------------------------- maps of the text


def test_every_layer_that_reads_text_is_an_entrys(subject):
    found = {key for entry in subject.entries for key, _ in readers(subject.model, entry)}
    expected = networks.reading(subject.model, subject.name)
    assert expected and found == {f"diffusion_model.{name}.weight" for name in expected}


@pytest.mark.parametrize("apply_to", ["text", "weights"])
def test_a_map_is_the_edit_of_the_weights(subject, apply_to):
    """Of each entry by itself, the first and the last where many are of one tensor; then of all at once."""
    base = subject.predict(subject.model)
    maps = {entry: subject.random_map(entry, seed) for seed, entry in enumerate(subject.entries)}
    sides = {entry.argument: entry for entry in subject.entries}, {e.argument: e for e in reversed([*subject.entries])}
    each = dict.fromkeys(entry for side in sides for entry in side.values())
    for chosen in [*({entry: maps[entry]} for entry in each), maps]:
        expected = subject.expected(subject.edits(chosen, -0.7))
        found = subject.predict(subject.applied(subject.adapter(chosen), apply_to, strength=-0.7))
        close(found, expected, base)
    assert same(subject.predict(subject.model), base)


def test_strength_zero_is_the_same_model(subject):
    maps = {entry: subject.random_map(entry) for entry in subject.entries}
    assert subject.applied(subject.adapter(maps), strength=0.0) is subject.model
