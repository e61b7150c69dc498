"""The names that LoRA files of other programs have for the layers of a MODEL."""

from dataclasses import replace

import comfy.utils
from torch.nn import functional

from ...adapters.deltas.delta import Term
from ...adapters.deltas.low_rank import join, turned
from ...families.sites import site
from .layers import NETWORK, WEIGHT, layer_keys, modules, plain_key

PREFIX = "lora_unet_"


def kohya_names(model, original=False):
    """{key: kohya's LoRA name} of the denoiser's layers, by the host's table of diffusers names.

    original: by the names of the checkpoint instead (lora_unet_input_blocks_4_1_...), which are those of kohya's own
    scripts for SDXL; for Stable Diffusion 1 and 2 these have diffusers' names.
    """
    table = {} if original else comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    diffusers = {f"{NETWORK}{ours}": site(theirs) for theirs, ours in table.items()}
    # a network outside the table keeps the host's own path as it is, which the host's LoRA loader knows as well
    return {key: PREFIX + diffusers.get(key, _flat(key)) for key in modules(model)}


def _flat(key):
    return key.removeprefix(NETWORK).removesuffix(WEIGHT).replace(".", "_")


def whole_layers(model, adapter):
    """An adapter whose changes of low rank are all of whole layers of the host: those of parts of a fused layer become
    one change of it, with zeros for the rest, as kohya's trainers have such layers."""
    keys, layers, found = layer_keys(model), modules(model), {}
    for name, change in adapter.low_rank.items():
        found.setdefault(plain_key(keys.get(name, name)), []).append((name, change))
    changes = {}
    for plain, named in found.items():
        if all(isinstance(keys.get(name, name), str) for name, _ in named):
            changes |= dict(named)
            continue
        turns = [turned(keys[name], change) for name, change in named]
        whole = [c if key == plain else _padded(c, key[1][1], layers[plain].out_features) for key, c in turns]
        changes[site(plain)] = whole[0] if len(whole) == 1 else join([Term(change) for change in whole])
    return replace(adapter, deltas={**adapter.deltas, "low_rank": changes})


def _padded(change, start, out):
    """A change of the outputs of a layer from `start` on as one of all its `out` outputs."""
    after = out - start - len(change.up)
    bias = None if change.bias is None else functional.pad(change.bias, (start, after))
    return replace(change, up=functional.pad(change.up, (0, 0, start, after)), bias=bias)


def kohya_sites(model, original=False):
    """({site: kohya's LoRA name}, the sites that are convolutions), with every spelling of a site; original: see
    kohya_names."""
    names, layers = kohya_names(model, original), modules(model)
    keys = {site(key): key for key in layers} | {name: k for name, k in layer_keys(model).items() if k in layers}
    convolutions = {name for name, key in keys.items() if hasattr(layers[key], "kernel_size")}
    return {name: names[key] for name, key in keys.items()}, convolutions
