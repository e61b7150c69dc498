"""The host model's effective weights, what a layer multiplies with, and the erasure put on them."""

import logging

import comfy.lora
import comfy.model_patcher
import comfy.utils
import torch

from ..errors import ErasureError
from ..low_rank import compact, layer_factors
from ..plan import make_plan
from .patching import applied_stack, context_width, cross_attention_layers, without_stack

try:  # a function of its own since August 2024, a method of the patcher before
    from comfy.lora import calculate_weight
except ImportError:
    calculate_weight = None

log = logging.getLogger("membrane")


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


def cross_attention_weights(model):
    """(key, effective weight (out, d)) of the key and value layers that read the text, one at a time."""
    layers = dict(cross_attention_layers(model))
    if hasattr(comfy.model_patcher, "get_key_weight"):
        patches = model.get_key_patches("diffusion_model.")
    else:
        # get_key_patches of older hosts breaks a model whose own patches are in place: it takes the patched
        # weights for plain ones and leaves them behind, so that the next load patches them once more
        backups = {key: model.backup.get(key, layer.weight) for key, layer in layers.items()}
        patches = {
            key: [getattr(backup, "weight", backup), *model.patches.get(key, ())] for key, backup in backups.items()
        }
    for key in layers:
        yield key, effective_weight(model, key, patches[key])


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
    """{key: kohya's LoRA name} of the key and value layers, by the host's table of diffusers names."""
    table = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    diffusers = {f"diffusion_model.{ours}": theirs for theirs, ours in table.items()}
    keys = [key for key, _ in cross_attention_layers(model)]
    # a network outside the table keeps the host's own path, which the host's LoRA loader knows as well
    paths = {key: diffusers.get(key, key.removeprefix("diffusion_model.")) for key in keys}
    return {key: "lora_unet_" + path.removesuffix(".weight").replace(".", "_") for key, path in paths.items()}


def apply_to_weights(model, stack):
    """A clone of a MODEL with a stack on its weights, W -> W (I + A B) in every layer that reads the text.

    Equal to apply_stack(), but saving, merging, low-VRAM and LoRAs see it: one low-rank entry a layer in the
    host's own patch list. W is the layer's effective weight, so what comes before counts, and what acts on
    the text already moves to the weights with it. The model itself when nothing acts.

    Raises ErasureError when an adapter has a time range, which weights cannot have.
    """
    width = context_width(model)
    whole = applied_stack(model) + stack
    plan = make_plan(whole, width)
    if not any(entry.acts for entry in stack.entries):
        return model
    for entry in whole.entries:
        if entry.acts and not entry.always:
            raise ErasureError(
                f"The adapter {entry.adapter.describe()} acts from {entry.start_percent:g} to {entry.end_percent:g} of "
                'the sampling, but weights are the same in every step; set apply_to to "text", or its range to 0 and 1.'
            )
    a, b = compact(plan.constant.a, plan.constant.b)
    shared = b.float().contiguous()
    lora, keys = {}, {}
    for key, weight in cross_attention_weights(model):
        name = key.removesuffix(".weight")
        up, down = layer_factors(weight, a, b)
        lora[f"{name}.lora_up.weight"] = up.float()
        lora[f"{name}.lora_down.weight"] = shared if down is b else down.float()
        keys[name] = key
    patched = without_stack(model)
    patched.add_patches(comfy.lora.load_lora(lora, keys), 1.0)
    log.info(
        "Membrane: %d erasure adapter(s) on %d weights of %s", len(whole.entries), len(keys), type(model.model).__name__
    )
    return patched
