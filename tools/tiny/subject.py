"""A tiny model beside what it has to predict: a second one of the same class, whose weights are edited by hand.

In float64, W (I + A B) in every layer that reads the text (UCE, Gandikota et al. 2024, eq. 7), or W + up down for an
adapter on layers.
"""

import math
import re

import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.host.model.layers import layer_keys, plain_key, readers, text_entries

from . import networks

STAR, HOUSE = "a red star", "a small old house"


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Subject:
    """A tiny model of a family, and a second one of the same weights to edit by hand."""

    def __init__(self, name, node, model=None, other=None):
        self.name, self.node = name, node
        self.model, self.clip = model or networks.build(name), networks.text_encoder(name)
        self.other = other or networks.build(name)
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

    def is_as_it_was(self):
        """Whether the model predicts what it did, and by bit-identical weights. Weights that a host has patched and put
        back lie elsewhere, and it may round otherwise."""
        zero = [torch.zeros_like(side) for side in self.base]
        found = self.predict(self.model)  # before the weights are looked at, which an applied clone may have patched
        weights, others = (model.model.diffusion_model.state_dict() for model in (self.model, self.other))
        same = all(torch.equal(weights[name], other) for name, other in others.items())
        return same and error(found, self.base, zero) < 1e-5

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
        """A CONDITIONING with c + A B c in place of each vector c, as the network's own layers prepare it."""
        changed = []
        for vectors, more in text:
            tensors = {"cross_attn": vectors, **more}
            for entry, change in maps.items():
                matrix = strength * change.a.double() @ change.b.double()
                tensor = self.prepared(entry, tensors[entry.argument]).double()
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
        width = self.entries[entry] or self.prepared(entry, self.tensor(entry)).shape[-1]
        a, b = 3 * numbers(seed, width, rank) * rank**-0.5, numbers(seed + 1, rank, width) * width**-0.5
        return TextMap(a, b, (0,) * rank, normed=bool(entry.norm))

    def tensor(self, entry):
        vectors, more = self.text(STAR)[0]
        return {"cross_attn": vectors, **more}[entry.argument]

    @torch.no_grad()
    def prepared(self, entry, tensor):
        """What the network's own layers make of a text tensor before it is mapped; what they made it takes as it is."""
        if not entry.prepared or entry.readers:
            return tensor
        return self.other.model.diffusion_model.preprocess_text_embeds(tensor)

    def maps(self):
        """A random map for every entry."""
        return {entry: self.random_map(entry, seed) for seed, entry in enumerate(self.entries)}

    def adapter(self, maps, concept=STAR):
        return ErasureAdapter(Card("UCE", (concept,)), {"map": {entry.name: m for entry, m in maps.items()}})

    def stack(self, adapter, gate=None, **settings):
        """An adapter in a stack; gate: what MembranePermeability gets."""
        stack = self.node("MembraneStack", adapter=adapter, **settings)[0]
        if gate:
            usual = {"factor": 1.0, "threshold": 1.0, "negative": "same as positive", "top_k": 1}
            stack = self.node("MembranePermeability", stack=stack, **{**usual, **gate})[0]
        return stack

    def applied(self, adapter, apply_to="text", **settings):
        """The model with an adapter on it; settings: of stack()."""
        stack = self.stack(adapter, **settings)
        return self.node("MembraneApply", model=self.model, clip=self.clip, stack=stack, apply_to=apply_to)[0]

    def erase(self, method):
        """(MODEL, adapter) of a closed-form erasure of a star."""
        return self.node(
            "MembraneErase", model=self.model, clip=self.clip, concepts="star -> circle", replace_with="",
            preserve="", method=method, strength=1.0, templates="{}",
        )  # fmt: skip

    def layer_adapter(self):
        """(adapter on some_layers(), {layer: change of its weight})."""
        changes, edits = {}, {}
        for seed, (site, key) in enumerate(some_layers(self.model).items()):
            weight = self.layers[layer_of(key)].weight.detach()
            start, length = (0, len(weight)) if isinstance(key, str) else key[1][1:]
            change = changes[site] = low_rank(weight[start : start + length], seed)
            edit = edits.setdefault(layer_of(key), torch.zeros_like(weight, dtype=torch.float64))
            edit[start : start + length] += change.up.double() @ change.down.double()
        return on_layers(changes), edits


def error(found, expected, base):
    """The larger error of some predictions, relative to what the edit does at all; inf where it does nothing."""
    worst = 0.0
    for one, other, unedited in zip(found, expected, base):
        effect = (other - unedited).double().norm().item()
        off = (one - other).double().norm().item()
        worst = max(worst, off / effect if effect > 1e-3 * unedited.double().norm().item() else math.inf)
    return worst


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
