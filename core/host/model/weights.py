"""The host model's effective weights, what a layer multiplies with, and the erasure put on them."""

import logging
from collections.abc import Mapping
from dataclasses import replace

import comfy.lora
import comfy.model_patcher
import comfy.utils
import torch

from ...adapters.adapter import LowRank
from ...adapters.low_rank import compact, layer_factors
from ...adapters.plan import Joined, first_gated, joined, make_plan
from ...erasers.extract import BaseLayer
from ...errors import ErasureError
from ...families.sites import site
from ...formats.weights import EditedWeights
from ..patches.stack import add_joined, applied_stack, without_stack
from .layers import context_width, cross_attention_layers, denoiser, layer_keys, modules, require_fit

try:  # a function of its own since August 2024, a method of the patcher before
    from comfy.lora import calculate_weight
except ImportError:
    calculate_weight = None

log = logging.getLogger("membrane")
POOLED = "diffusion_model.label_emb.0.0.weight"  # key of the layer that reads SDXL's pooled vector


def effective_weight(model, key, patches):
    """Weight of one layer with its patches applied, float32 on the CPU; patches: get_key_patches()[key]."""
    weight, *rest = patches
    if isinstance(weight, tuple):  # newer hosts: the stored weight and how to turn it into numbers
        stored, convert = weight
        weight = convert(stored, inplace=False) if callable(convert) else stored
    weight = weight.detach().to("cpu", torch.float32, copy=True)
    if not rest:
        return weight
    if calculate_weight is None:
        return model.calculate_weight(rest, weight, key)
    return calculate_weight(rest, weight, key)


def _key_patches(model):
    """{key: stored weight and its patches} of the denoiser's weights and biases, as get_key_patches() means it."""
    network = denoiser(model)
    if hasattr(comfy.model_patcher, "get_key_weight"):
        return model.get_key_patches("diffusion_model.")
    # get_key_patches of older hosts breaks a model whose own patches are in place: it takes the patched
    # weights for plain ones and leaves them behind, so that the next load patches them once more
    stored = {f"diffusion_model.{name}": p for name, p in network.named_parameters()}
    backups = {key: model.backup.get(key, parameter) for key, parameter in stored.items()}
    return {key: [getattr(backup, "weight", backup), *model.patches.get(key, ())] for key, backup in backups.items()}


def cross_attention_weights(model):
    """(key, effective weight (out, d)) of the key and value layers that read the text, one at a time."""
    patches = _key_patches(model)
    for key, _ in cross_attention_layers(model):
        yield key, effective_weight(model, key, patches[key])


def base_layers(model):
    """{site: BaseLayer} of a MODEL's denoiser with its effective weights, every spelling of a site leading to one."""
    patches, layers = _key_patches(model), {}

    def layer(key):
        def read():
            found = [key, key.removesuffix("weight") + "bias"]
            return tuple(effective_weight(model, k, patches[k]) if k in patches else None for k in found)

        return BaseLayer(site(key), read)

    for key in patches:
        if key.endswith(".weight"):
            layers[site(key)] = layer(key)
    spellings = {name: site(key) for name, key in layer_keys(model).items() if isinstance(key, str)}
    return layers | {name: layers[own] for name, own in spellings.items() if own in layers}


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


def cross_attention_gram(model, on_progress=None):
    """S = sum_l W_l^T W_l over the key and value layers that read the text: (d, d) float64."""
    total = None
    for i, (_, weight) in enumerate(cross_attention_weights(model)):
        weight = weight.double()
        product = weight.T @ weight
        total = product if total is None else total + product
        if on_progress:
            on_progress(i + 1)
    return total


def kohya_names(model):
    """{key: kohya's LoRA name} of the denoiser's layers, by the host's table of diffusers names."""
    table = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    diffusers = {f"diffusion_model.{ours}": theirs for theirs, ours in table.items()}
    # a network outside the table keeps the host's own path, which the host's LoRA loader knows as well
    return {key: "lora_unet_" + site(diffusers.get(key, key)) for key in modules(model)}


def kohya_sites(model):
    """({site: kohya's LoRA name}, the sites that are convolutions), with every spelling of a site."""
    names, layers = kohya_names(model), modules(model)
    keys = {site(key): key for key in layers} | {name: k for name, k in layer_keys(model).items() if k in layers}
    convolutions = {name for name, key in keys.items() if hasattr(layers[key], "kernel_size")}
    return {name: names[key] for name, key in keys.items()}, convolutions


def _of_the_text(model, text):
    """{key: Joined} of what a TextPart adds to the effective weights that read the text."""
    a, b = compact(text.a, text.b)
    shared, found = b.float().contiguous(), {}
    for key, weight in cross_attention_weights(model):
        up, down = layer_factors(weight, a, b)
        found[key] = Joined(up.float(), shared if down is b else down.float())
    return found


def on_layers(model, adapter, names):
    """An adapter of the text as changes W + W A B of those layers of a MODEL whose keys end with one of the names."""
    a, b = compact(adapter.text_map.a, adapter.text_map.b)
    changes = {}
    for key, weight in cross_attention_weights(model):
        if key.endswith(names):
            up, down = layer_factors(weight, a, b)
            changes[site(key)] = LowRank(up.float(), down.float(), float(len(down)))
    return replace(adapter, text_map=None, low_rank=changes)


def _of_the_pooled(model, pooled):
    """The same for the layer that reads the pooled vector, the first inputs of SDXL's label embedding."""
    patches = _key_patches(model)
    if POOLED not in patches:
        return {}
    weight, width = effective_weight(model, POOLED, patches[POOLED]).double(), pooled.a.shape[0]
    up = weight[:, :width] @ pooled.a.double()
    rest = torch.zeros(len(pooled.b), weight.shape[1] - width)
    return {POOLED: Joined(up.float(), torch.cat([pooled.b.float(), rest], dim=1))}


def apply_to_weights(model, stack):
    """A clone of a MODEL with a stack on its weights, W -> W (I + A B) in every layer that reads the text.

    Equal to apply_stack(), but saving, merging, low-VRAM and LoRAs see it: one low-rank entry a layer in the
    host's own patch list. W is the layer's effective weight, so what comes before counts, and what acts on
    the text already moves to the weights with it. The model itself when nothing acts.

    Raises ErasureError when an adapter has a time range or follows the text, which weights cannot do.
    """
    whole = applied_stack(model) + stack
    if not any(entry.acts for entry in stack.entries):
        return model
    gated = first_gated(whole)
    if gated:
        raise ErasureError(
            f"The adapter {gated.adapter.describe()} acts from {gated.start_percent:g} to {gated.end_percent:g} of the "
            f'sampling with the permeability "{gated.mode}" (negative: {gated.permeability.negative}), but weights are '
            'the same for every step and prompt; set apply_to to "text", or the range to 0 and 1, the permeability '
            'to "fixed" and its negative to "same as positive".'
        )
    keys = layer_keys(model) if any(entry.adapter.sites for entry in whole.entries) else {}
    require_fit(model, stack, keys)
    changes = joined(stack, keys)
    patched = without_stack(model)
    if changes:
        add_joined(patched, changes)
    if any(entry.adapter.text_map is not None for entry in whole.entries):
        plan = make_plan(whole, context_width(model))
        if plan.text is not None:
            add_joined(patched, _of_the_text(patched, plan.text))
        if plan.pooled is not None:
            add_joined(patched, _of_the_pooled(patched, plan.pooled))
    masks = [(entry, keys[name], mask) for entry in whole.entries if entry.acts
             for name, mask in entry.adapter.masks.items() if name in keys]  # fmt: skip
    for entry, key, mask in masks:  # last, and one after the other, as they multiply
        weight = effective_weight(patched, key, _key_patches(patched)[key])
        difference = mask.difference(weight, entry.strength * entry.permeability.factor)
        patched.add_patches({key: ("diff", (difference,))})
    log.info("Membrane: %d erasure adapter(s) on the weights of %s", len(whole.entries), type(model.model).__name__)
    return patched
