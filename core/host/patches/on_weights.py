"""Puts a stack on the weights of a clone of the host's MODEL, where saving, merging, low-VRAM and LoRAs see it."""

import logging
from dataclasses import replace

from ...adapters.deltas.text_map import on_weights
from ...adapters.plan import first_gated, require_entries
from ...errors import ErasureError
from ...families.sites import site
from ..model.layers import family, plain_key, require_fit, text_entries
from ..model.weights import entry_weights, require_readers, text_weights, weight_of
from .places import without_stack
from .stack import add_low_rank, applied_stack, keys_for, plan_for, static_changes

log = logging.getLogger("membrane")


def on_layers(model, adapter, kind):
    """An adapter of the text as changes W + W A B of those layers of a MODEL that read
    the text in a kind of role, ".key" or ".value"."""
    require_entries(adapter, text_entries(model))
    entry, roles = family(model).text, family(model).role
    weights = ((key, weight) for key, weight in text_weights(model) if roles(site(key)).endswith(kind))
    changes = {site(key): change for key, change in on_weights(adapter.maps[entry.name], weights)}
    if not changes:
        raise ErasureError(
            f"The text of {family(model).title} is not read by keys and values of its own; set layers to "
            '"keys and values", which erases at the text itself.'
        )
    return replace(adapter, deltas={"low_rank": changes})


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
    keys = keys_for(model, whole)
    require_fit(model, stack, keys)
    plan, static = plan_for(model, whole, keys), static_changes(model, stack, keys)
    _require_all_rows(plan)
    patched = without_stack(model)
    if static:
        add_low_rank(patched, static)
    for entry in text_entries(model) if plan.maps else ():
        if entry.name in plan.maps:
            require_readers(model, entry)
            add_low_rank(patched, dict(on_weights(plan.maps[entry.name], entry_weights(patched, entry))))
    for key, layer in plan.running.items():  # last, and one after the other, as masks multiply
        for term in layer.on_weight:
            difference = term.delta.difference(weight_of(patched, key), term.factor)
            patched.add_patches({key: ("diff", (difference,))})
    log.info("Membrane: %d erasure adapter(s) on the weights of %s", len(whole.entries), type(model.model).__name__)
    return patched


def _require_all_rows(plan):
    layer = next((layer for layer in plan.layers.values() if layer.tells_rows), None)
    if layer is not None:
        raise ErasureError(
            f"The stack changes the text's rows of {site(plain_key(layer.key))} alone, but weights are the same for "
            'every row, those of the picture too; set apply_to to "text".'
        )
