"""The names that LoRA files of other programs have for the layers of a MODEL."""

import comfy.utils

from ...families.sites import site
from .layers import NETWORK, layer_keys, modules


def kohya_names(model):
    """{key: kohya's LoRA name} of the denoiser's layers, by the host's table of diffusers names."""
    table = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    diffusers = {f"{NETWORK}{ours}": theirs for theirs, ours in table.items()}
    # a network outside the table keeps the host's own path, which the host's LoRA loader knows as well
    return {key: "lora_unet_" + site(diffusers.get(key, key)) for key in modules(model)}


def kohya_sites(model):
    """({site: kohya's LoRA name}, the sites that are convolutions), with every spelling of a site."""
    names, layers = kohya_names(model), modules(model)
    keys = {site(key): key for key in layers} | {name: k for name, k in layer_keys(model).items() if k in layers}
    convolutions = {name for name, key in keys.items() if hasattr(layers[key], "kernel_size")}
    return {name: names[key] for name, key in keys.items()}, convolutions
