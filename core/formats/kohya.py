"""LoRA files with kohya's key names: SPM, LECO, sd-scripts, Concept Sliders, and our export for any program.

<layer>.lora_up.weight (out, r), <layer>.lora_down.weight (r, in), <layer>.alpha; the layer with prefix and underscores.
SPM and LECO are told apart by what their metadata says, not by their keys.
"""

import json
import logging
import re

import torch

from ..adapters.adapter import Card, ErasureAdapter
from ..adapters.deltas.text_map import on_weights
from ..errors import ErasureError
from ..families.table import architecture
from ..files import save_whole
from .card import card_metadata, read_card, require_bounded, title
from .factors import balanced, gather, low_rank
from .format import Format

log = logging.getLogger("membrane")

PARTS = {
    ".lora_up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".scalar": "scalar",
    ".diff_b": "bias",
}
FLUX_SLIDER = re.compile(r"lora_unet_(single_)?transformer_blocks_\d+_attn_")
MARK = "lora"  # membrane.format of our exports
SPM_METADATA = ("prompts", "rank", "alpha")


def recognises(contents):
    """Whether a file has kohya's keys."""
    return any(key.endswith((".lora_up.weight", ".lora_down.weight")) for key in contents.tensors)


def parse(contents):
    """Adapter of such a file; raises ErasureError for a damaged one."""
    layers = gather(contents, _split)
    changes = {layer: low_rank(contents.name, layer, parts) for layer, parts in layers.items()}
    return ErasureAdapter(card(contents), {"low_rank": changes}, contents.name)


def card(contents):
    """Card of such a file: as our export says it, by SPM's or LECO's metadata, or of a LoRA that names no concepts.

    Raises ErasureError where that is damaged.
    """
    metadata = contents.metadata
    if metadata.get("membrane.format") == MARK:
        return read_card(contents.name, metadata)
    if all(key in metadata for key in SPM_METADATA):
        concepts = tuple(piece.strip() for piece in metadata["prompts"].split(",") if piece.strip())
        if not concepts:
            raise ErasureError(
                f'"{contents.name}" is an SPM file that names no concept (its "prompts" are '
                f'"{metadata["prompts"]}"), so its permeability cannot be computed; save it again with its concepts.'
            )
        require_bounded(contents.name, concepts)
        return Card("SPM", concepts)
    if "ss_leco_prompt_count" in metadata:
        concepts, surrogates = _leco_prompts(metadata)
        require_bounded(contents.name, concepts)
        return Card("LECO", concepts, surrogates)
    return Card("Concept Sliders" if _is_flux_slider(contents.tensors) else "LoRA", ())


def _is_flux_slider(keys):
    """Whether the layers are the attentions of Flux by diffusers' names, which only Concept Sliders give kohya's
    prefix."""
    layers = {key.partition(".")[0] for key in keys}
    return any("single" in layer for layer in layers) and all(map(FLUX_SLIDER.match, layers))


FORMAT = Format("LoRA (kohya)", recognises, parse, card)  # the exports below need the model they are for


def save(adapter, weights, path, names):
    """Writes W -> W + W A B of an adapter at strength 1 as a LoRA; the file appears whole or not at all.

    weights: {text entry: (key, W (out, d)) pairs of the layers that read it, as the model uses them; may be a
    generator}. names: {key: lora_unet_... name}. Each layer gets lora_up (out, k), lora_down (k, d) and
    alpha = k, so that a loader's scale alpha / k is 1; the loader's strength scales the erasure linearly.
    """
    tensors, rank = {}, 1
    for entry, text_map in adapter.maps.items():
        for key, change in on_weights(text_map, weights[entry]):
            up, down = balanced(change.up, change.down)
            rank = max(rank, len(down))
            tensors |= _layer(names[key], up, down, len(down))
    comment = f"closed-form concept erasure ({adapter.card.method}), computed, not trained"
    save_whole(tensors, path, _metadata(adapter.card, rank, rank, comment))


def save_low_rank(adapter, path, names, convolutions=(), biases=True):
    """Writes an adapter's changes of layers as a LoRA, factors as they are; the file appears whole or not at all.

    names: {site: lora_unet_... name} of a model's layers; convolutions: the sites that are convolutions there,
    whose factors get four dimensions; biases: whether changes of biases are written too. Where all layers have one
    rank and alpha, the file also has SPM's metadata, so that the published SPM code reads it. Returns how many biases
    were left out. Raises ErasureError when the model lacks a layer.
    """
    require_layers(adapter, adapter.low_rank, names)
    tensors, with_bias = {}, sum(change.bias is not None for change in adapter.low_rank.values())
    for layer, change in adapter.low_rank.items():
        up, down = change.up, change.down
        if layer in convolutions and down.dim() == 2:
            down = down[:, :, None, None]
        up = up.reshape(*up.shape, *[1] * (down.dim() - 2))
        tensors |= _layer(names[layer], up, down, change.alpha, change.bias if biases else None)
    if biases:
        _tell_limits(adapter, with_bias, "biases (.diff_b)")
    ranks = {change.rank for change in adapter.low_rank.values()}
    alphas = {change.alpha for change in adapter.low_rank.values()}
    metadata = _metadata(adapter.card, max(ranks), max(alphas), f"concept erasure ({adapter.card.method})")
    if len(ranks) == len(alphas) == 1:
        metadata |= _spm_metadata(adapter.card, max(ranks), max(alphas))
    save_whole(tensors, path, metadata)
    return 0 if biases else with_bias


def save_masks(adapter, weights, path, names):
    """Writes what an adapter's masks take from a model's weights as differences, W -> W + diff, for any LoRA loader.

    weights: function from a site to W (out, in) of that model; names: {site: lora_unet_... name}. Files are as large
    as the layers in float16. Raises ErasureError when the model lacks a layer.
    """
    require_layers(adapter, adapter.masks, names)
    tensors = {}
    for layer, mask in adapter.masks.items():
        tensors[f"{names[layer]}.diff"] = mask.difference(weights(layer)).half()
    _tell_limits(adapter, len(tensors), "whole differences (.diff)")
    comment = f"pruned weights ({adapter.card.method}), exact on the model they were taken from"
    save_whole(tensors, path, _metadata(adapter.card, 1, 1, comment))


def _tell_limits(adapter, count, what):
    """Logs which programs do not read what a file holds beside factors."""
    if count:
        log.warning(
            "Membrane: the LoRA of %s has %s of %d layers, which ComfyUI, A1111 and Forge read; diffusers refuses such "
            "a file, and kohya's scripts ignore them",
            adapter.describe(),
            what,
            count,
        )


def require_layers(adapter, layers, names):
    """Raises ErasureError when a model with these names lacks one of the layers that an adapter changes."""
    missing = [layer for layer in layers if layer not in names]
    if missing:
        raise ErasureError(
            f"The model lacks {len(missing)} of the {len(layers)} layers that {adapter.describe()} changes "
            f"({', '.join(missing[:3])}); connect a model of the family it was made for."
        )


def _split(key):
    return next(((key.removesuffix(end), part) for end, part in PARTS.items() if key.endswith(end)), None)


def _layer(name, up, down, alpha, bias=None):
    tensors = {
        f"{name}.lora_up.weight": up,
        f"{name}.lora_down.weight": down,
        f"{name}.alpha": torch.tensor(float(alpha)),
    }
    if bias is not None:
        tensors[f"{name}.diff_b"] = bias
    return tensors


def _leco_prompts(metadata):
    """What sd-scripts' LECO erased and what it put there; () and () where it does not say."""
    try:
        prompts = json.loads(metadata["ss_leco_preview"])
        pairs = {p["target"] or p["positive"]: p["neutral"] for p in prompts if p["action"] == "erase"}
        pairs = {str(target): str(neutral) for target, neutral in pairs.items() if target}
        "".join((*pairs, *pairs.values())).encode()  # half characters cannot be shown or encoded
    except (KeyError, TypeError, ValueError, RecursionError):
        return (), ()
    return tuple(pairs), tuple(pairs.values())


def _spm_metadata(card, rank, alpha):
    """What the published SPM code reads; it takes the prompts apart at commas."""
    with_comma = [concept for concept in card.concepts if "," in concept]
    if with_comma:
        log.info(
            'Membrane: the file has no "prompts" for the published SPM code, which would split "%s" at the comma',
            with_comma[0],
        )
    if with_comma or not card.concepts:
        return {"rank": str(rank), "alpha": str(alpha)}
    return {"prompts": ",".join(card.concepts), "rank": str(rank), "alpha": str(alpha)}


def _metadata(card, rank, alpha, comment):
    concepts = ", ".join(card.concepts)
    version, kind = architecture(card.family)
    return card_metadata(card) | {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_base_model_version": version,
        "ss_output_name": title(card),
        "ss_training_comment": comment,
        "modelspec.architecture": f"{kind}/lora",
        "modelspec.description": f"Erases ({card.method}): {concepts}" if concepts else title(card),
        "modelspec.usage_hint": "No trigger words; strength 1 is the erasure as computed on the model it is for.",
        "modelspec.license": card.licence,
        "membrane.format": MARK,
    }
