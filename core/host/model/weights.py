"""The effective weights of the host's model, with everything that is patched onto it."""

from collections.abc import Mapping
from functools import partial

import torch

from ...adapters.plan import require_entries
from ...erasers.closed_form.layers import layer_gram
from ...erasers.extract import BaseLayer
from ...errors import ErasureError
from ...families.sites import site
from ...formats.weights import EditedWeights
from ..compat import calculate_weight, ensure_own_network, key_patches, stored_weight
from .layers import NETWORK, WEIGHT, family, layer_keys, plain_key, readers, text_entries, text_readers


def effective_weight(model, key, patches):
    """Weight of one layer with its patches applied, float32 on the CPU; patches: get_key_patches()[key]."""
    weight, *rest = patches
    layer = model.model.get_submodule(key.rpartition(".")[0])
    weight = stored_weight(weight, layer).detach().to("cpu", torch.float32, copy=True)
    return calculate_weight(model, rest, weight, key) if rest else weight


def _key_patches(model):
    """{key: stored weight and its patches} of the denoiser's weights and biases, as get_key_patches() means it."""
    ensure_own_network(model)
    return key_patches(model, NETWORK)


def weight_of(model, key):
    """Effective weight of one layer, float32 on the CPU."""
    return effective_weight(model, key, _key_patches(model)[key])


def entry_weights(model, entry):
    """(key, effective weight) of the layers that read a TextEntry first, one at a time."""
    patches = _key_patches(model)
    for key, _ in readers(model, entry):
        yield key, effective_weight(model, key, patches[key])


def map_weights(model, adapter):
    """{name of a text entry: (key, effective weight) of the layers that read it} for the maps of an adapter.

    Raises ErasureError when the adapter does not fit, or no edit of weights equals one of its maps.
    """
    known = text_entries(model)
    require_entries(adapter, known)
    entries = [entry for entry in known if entry.name in adapter.maps]
    for entry in entries:
        require_readers(model, entry)
    if missing := adapter.maps.keys() - {entry.name for entry in entries}:
        raise ErasureError(
            f"The adapter {adapter.describe()} also maps the text at {', '.join(sorted(missing))}, which this "
            f"{family(model).title} model does not have; use a model of the family it was made for."
        )
    return {entry.name: entry_weights(model, entry) for entry in entries}


def require_readers(model, entry):
    """Raises ErasureError for a TextEntry whose map no edit of a MODEL's weights equals."""
    if next(readers(model, entry), None) is None:
        raise ErasureError(
            f"No edit of weights equals the erasure at the text entry {entry.name} of {family(model).title}, "
            'whose layers read other rows too; apply it to the text ("apply_to": "text"), or save it in the format '
            '"membrane".'
        )


def text_weights(model):
    """(key, effective weight (out, d)) of the layers that read the main text entry, one at a time."""
    return entry_weights(model, family(model).text)


def base_layers(model):
    """{site: BaseLayer} of a MODEL's denoiser with its effective weights, every spelling of a site leading to one; of a
    fused layer also the parts that other programs have as layers, and their order of its outputs."""
    patches, found = _key_patches(model), {}

    def read(key):
        both = [plain_key(key), plain_key(key).removesuffix("weight") + "bias"]
        return tuple(_part(key, effective_weight(model, k, patches[k])) if k in patches else None for k in both)

    def layer(key, name):
        return found.setdefault(key, BaseLayer(name, partial(read, key)))

    layers = {site(key): layer(key, site(key)) for key in patches if key.endswith(WEIGHT)}
    spellings = {name: key for name, key in layer_keys(model).items() if plain_key(key) in patches}
    return layers | {name: layer(key, name) for name, key in spellings.items()}


def _part(key, tensor):
    """What a key of layer_keys() stands for in the weight or bias of its layer."""
    if isinstance(key, str):
        return tensor
    part, turn = key[1], key[2] if len(key) > 2 else None
    tensor = tensor if part is None else tensor.narrow(*part)
    return tensor if turn is None else turn(tensor)


class _Tensors(Mapping):
    """{(site, "weight" or "bias"): effective tensor} of a MODEL's denoiser, made as it is asked."""

    def __init__(self, model):
        self.model, self.patches = model, _key_patches(model)
        self.keys_of = {(site(key), key.rpartition(".")[2]): key for key in self.patches}

    def __getitem__(self, name):
        key = self.keys_of[name]
        return effective_weight(self.model, key, self.patches[key])

    def __iter__(self):
        return iter(self.keys_of)

    def __len__(self):
        return len(self.keys_of)


def edited_weights(model):
    """EditedWeights of a MODEL with everything that is patched onto it."""
    return EditedWeights(_Tensors(model), "the edited model", whole=True)


def text_gram(model, on_progress=None):
    """S = sum_l W_l^T W_l over the key and value layers that read the text: (d, d) float64, or a LayerGram where the
    text is wide and the layers have fewer outputs."""
    outputs = sum(module.out_features for _, module in text_readers(model))
    if not outputs:
        raise ErasureError(
            f"The layers of {family(model).title} that read its text read other rows too, so that what they make of it "
            "cannot be told before sampling; compare pictures (Evaluate Erasure), or choose the method UCE."
        )
    return layer_gram((weight for _, weight in text_weights(model)), outputs, on_progress)
