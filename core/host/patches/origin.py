"""Whether adapters were made with the text encoder and on the checkpoint that they are applied to."""

import logging

import torch

from ..model.weights import base_layers
from ..text.encode import fingerprint

log = logging.getLogger("membrane")

SAMPLED = 64  # weights of a layer
OTHER = 0.1  # relative distance of weights; rounding to fp8 makes 0.03, training on with few pictures 0.05


def weight_sample(layer):
    """Some effective weights of a BaseLayer, evenly spread: what tells its checkpoint from others."""
    weight = layer.read()[0].reshape(-1)
    return [float(f"{v:.5g}") for v in weight[:: max(1, len(weight) // SAMPLED)][:SAMPLED]]


def distance_of_weights(model, adapter):
    """(site, distance of its weights in a MODEL from those that a located adapter was made on, relative to these).

    (None, 0.0) when the adapter does not say, or the layer is not one that can be compared.
    """
    sample = adapter.card.settings.get("weight_sample")
    name, values = next(iter(sample.items()), (None, None)) if isinstance(sample, dict) else (None, None)
    numbers = isinstance(values, list) and values and all(type(v) in (int, float) for v in values)
    layer = base_layers(model).get(name) if numbers else None
    if layer is None:
        return None, 0.0
    found, expected = torch.tensor(weight_sample(layer)), torch.tensor(values, dtype=torch.float32)
    if found.shape != expected.shape or not expected.norm() > 0:
        return None, 0.0
    return name, ((found - expected).norm() / expected.norm()).item()


def origin_warnings(model, clip, stack):
    """One sentence for each adapter of a stack that was made with another text encoder or on another checkpoint than
    those it is applied to; also written to the log."""
    encoder, found = fingerprint(clip), []
    for adapter in (entry.adapter for entry in stack.entries):
        made_with = adapter.card.text_encoder
        if made_with and made_with != encoder:
            found.append(
                f"the adapter {adapter.describe()} was made with another text encoder ({made_with}, this one is "
                f"{encoder}); it still applies, but may erase less or damage more"
            )
        layer, distance = distance_of_weights(model, adapter)
        if distance > OTHER:
            found.append(
                f"the adapter {adapter.describe()} was located on another checkpoint (the weights of {layer} differ by "
                f"{100 * distance:.0f} %); it prunes the same places here, which may hold something else; locate it "
                "on this one"
            )
    for sentence in found:
        log.warning("Membrane: %s", sentence)
    return found
