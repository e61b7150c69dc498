"""The host model's effective weights: what a layer multiplies with, LoRAs and merges included."""

import torch

from .patching import cross_attention_layers

try:  # a function of its own since August 2024, a method of the patcher before
    from comfy.lora import calculate_weight
except ImportError:
    calculate_weight = None


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


def cross_attention_gram(model, on_progress=None):
    """S = sum_l W_l^T W_l over the key and value layers that read the text: (d, d) float64."""
    total = None
    keys = [name for name, _ in cross_attention_layers(model)]
    patches = model.get_key_patches("diffusion_model.")
    for i, key in enumerate(keys):
        weight = effective_weight(model, key, patches[key]).double()
        product = weight.T @ weight
        total = product if total is None else total + product
        if on_progress:
            on_progress(i + 1)
    return total
