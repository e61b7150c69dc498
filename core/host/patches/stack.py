"""Puts a stack on a clone of the host's MODEL.

A map of the text acts on each conditioning when the host prepares it (`extra_conds` of the base model), so it costs
nothing per step; behind a norm it acts on the input of the layers that read the text. The gates of each conditioning
are computed there too and travel with it, so the host puts them into the batch in whatever order it uses;
`apply_model` receives them and lends them to the gated layers for the duration of one call. All are object patches,
which every host from March 2024 on undoes by itself when it switches to another clone. What is not gated goes to the
host's own patch list.
"""

import functools
import logging
from dataclasses import replace

import comfy.lora

from ...adapters.beside import Bypass, Changes, Rows
from ...adapters.deltas.delta import KINDS, OPEN
from ...adapters.deltas.low_rank import Part
from ...adapters.gates import follow_meaning, gated, wanted_concepts
from ...adapters.plan import make_plan
from ...adapters.stack import ErasureStack
from ...errors import ErasureError
from ...families import unet
from ..compat import folds_activations
from ..model.layers import (
    NETWORK,
    WEIGHT,
    family,
    layer_keys,
    layer_weight,
    modules,
    plain_key,
    readers,
    require_fit,
    rows_order,
    text_entries,
    text_rows,
)
from ..text.calibration import compared_with
from ..text.entries import Texts
from ..text.known_tokens import PROMPTS
from .brought import COVERED
from .conditioning import EXTRA_CONDS, ErasedConditioning
from .kept import keep
from .places import foreign
from .steps import APPLY_MODEL, ErasedSteps

log = logging.getLogger("membrane")


def applied(model):
    """The ErasedConditioning of a MODEL, or None."""
    patch = model.object_patches.get(EXTRA_CONDS)
    return patch if isinstance(patch, ErasedConditioning) else None


def applied_stack(model):
    """The stack that already acts on a MODEL, empty when none does."""
    return applied(model).stack if applied(model) else ErasureStack()


def concepts_for(stack, clip, known=None):
    """The Concepts that a stack's gates need, as a CLIP encodes them; those in `known` stay as they are."""
    names = wanted_concepts(stack)
    missing = [name for name in names if known is None or name not in known.names]
    if not missing:
        return known
    PROMPTS.want()
    fresh = compared_with(clip, missing)
    if known is None:
        return fresh
    if known.shape != fresh.shape:
        raise ErasureError(
            f"The erasures already on this model compare texts of shape {known.shape}, the "
            f"connected CLIP gives {fresh.shape}; connect the CLIP that belongs to the model."
        )
    return known + fresh


def keys_for(model, stack):
    """{site: key} of a MODEL's layers, nothing for a stack that changes none."""
    return layer_keys(model) if any(entry.adapter.sites for entry in stack.entries) else {}


def plan_for(model, stack, keys, concepts=None):
    """Plan of a stack on a MODEL; keys: keys_for() them. Raises ErasureError when they do not fit."""
    of_text = any(entry.adapter.maps for entry in stack.entries)
    entries = text_entries(model) if of_text else {}
    return make_plan(stack, entries, concepts, keys, functools.cache(lambda key: text_rows(model, key)))


def static_changes(model, stack, keys):
    """{key: LowRank} of what in a stack is the same for every text and step, for the host's own patch list.

    Of the stack that is added only: what was on the model before is in the list already.
    """
    always = (entry for entry in stack.entries if not gated(entry) and entry.adapter.sites)
    stack = ErasureStack(tuple(replace(e, adapter=replace(e.adapter, deltas=_of_layers(e.adapter))) for e in always))
    return plan_for(model, stack, keys).static


def _of_layers(adapter):
    return {kind: places for kind, places in adapter.deltas.items() if not KINDS[kind].of_text}


def apply_stack(model, stack, clip=None):
    """A clone of a MODEL with the stack added to what already acts on it; the model itself when nothing acts.

    clip: needed when permeability follows the text.
    """
    before, whole = applied(model), applied_stack(model) + stack
    keys = keys_for(model, whole)
    missing = require_fit(model, stack, keys)
    plan = plan_for(model, whole, keys, concepts_for(whole, clip, before and before.plan.concepts))
    static = static_changes(model, stack, keys)
    if not (plan.maps or plan.running or static):
        return model
    patched = model.clone()
    if static:
        add_low_rank(patched, static)
    if plan.maps or plan.running:
        _put(patched, model, whole, plan)
    count = sum(entry.acts for entry in whole.entries)
    log.info("Membrane: %d erasure adapter(s) on %s", count, type(model.model).__name__)
    if plan.maps:
        _say_of_text(model)
    if missing:
        total = sum(len(entry.adapter.sites) for entry in stack.entries)
        log.warning("Membrane: %d of %d changes belong to layers this model does not have", missing, total)
    return patched


def _say_of_text(model):
    """Writes to the log what a user should know when the text of a MODEL is erased."""
    known = family(model)
    if not known.name:
        log.warning(
            "Membrane: %s is no model that Membrane knows; its text is erased as most models read it, which may do "
            "nothing here: compare pictures with and without",
            type(model.model).__name__,
        )
    elif known.note:
        log.warning("Membrane: %s", known.note)


def _put(patched, model, whole, plan):
    base, rows = model.model, Rows()
    entries = [entry for entry in text_entries(model) if entry.name in plan.maps] if plan.maps else []
    inside = [entry for entry in entries if entry.norm]
    timed = [entry for entry in entries if not entry.norm and plan.timed(entry.name)]
    early = [entry for entry in entries if entry not in inside and entry not in timed]
    follows = plan.follows or any((plan.maps[entry.name].gate != OPEN).any() for entry in inside)
    read = unet.TEXT if unet.TEXT in family(model).entries and (unet.TEXT in entries or plan.follows) else None
    travels = bool(timed) or follows or (read is not None and bool(plan.gates))
    previous = foreign(model, EXTRA_CONDS)
    conditioning = ErasedConditioning(base, whole, plan, early, travels, previous, rows, read, _texts(model, whole))
    require_uncovered(model, plan, inside)
    patched.add_object_patch(EXTRA_CONDS, conditioning)
    if (inside or plan.running) and family(model).cache:
        options = patched.model_options["transformer_options"] = dict(patched.model_options["transformer_options"])
        options[family(model).cache] = {"device": "off"}  # else rows of before the erasure may come back
    parts = _put_on_layers(patched, model, plan, inside, rows)
    on_layers = {name: patch for name, patch in patched.object_patches.items() if isinstance(patch, Bypass)}
    conditioning.layers = {name: patch.owner for name, patch in on_layers.items()}
    if read is not None or travels or plan.tells_rows or (plan.running and folds_activations(base.diffusion_model)):
        steps = ErasedSteps(base, plan, conditioning, timed, rows, parts, foreign(model, APPLY_MODEL))
        patched.add_object_patch(APPLY_MODEL, steps)
    keep(patched)


def require_uncovered(model, plan, inside):
    """Raises ErasureError where another pack's module stands over a layer that gets a patch."""
    keys = [plain_key(key) for key in plan.running]
    keys += [key for entry in inside for key, _ in readers(model, entry)]
    covers = [name for name in model.object_patches if name.startswith(NETWORK)]
    for key in keys:
        path = key.removesuffix(WEIGHT)
        if any(path == name or path.startswith(f"{name}.") for name in covers):
            raise ErasureError(COVERED.format(path.removeprefix(NETWORK)))


def _texts(model, stack):
    """Texts of the entries of a MODEL that gates of a stack follow by meaning, None where none does."""
    adapters = [stack.entries[number].adapter for number, _ in follow_meaning(stack)]
    wanted = {name for adapter in adapters for name in adapter.probes}
    return Texts(model, [entry for entry in text_entries(model) if entry.name in wanted]) if wanted else None


def _put_on_layers(patched, model, plan, inside, rows):
    """Puts a Bypass on every layer that needs one; returns all their Parts. inside: entries behind a norm."""
    layers, parts = modules(model), {}
    changes = {plain_key(key): layer.on_weight for key, layer in plan.running.items() if layer.on_weight}
    for key, layer in plan.running.items():
        found = parts.setdefault(plain_key(key), [])
        if layer.beside is not None:
            found.append(Part(layer.beside, _outputs(key)))
        if layer.beside_text is not None:
            found.append(Part(layer.beside_text, _outputs(key), layer.text_rows))
    texts = {key: plan.maps[entry.name] for entry in inside for key, _ in readers(model, entry)}
    for key in dict.fromkeys((*parts, *changes, *texts)):
        name = key.removesuffix(WEIGHT) + ".forward"
        on_weight = Changes(changes[key], layer_weight) if key in changes else None
        bypass = Bypass(
            layers[key], parts.get(key, ()), rows, foreign(model, name), on_weight, texts.get(key),
            rows_order(model, key), key.removesuffix(WEIGHT).removeprefix(NETWORK),
        )  # fmt: skip
        patched.add_object_patch(name, bypass)
    return [part for of_layer in parts.values() for part in of_layer]


def _outputs(key):
    """(start, length) of the outputs that a key of layer_keys() stands for, None for all of them."""
    if isinstance(key, str):
        return None
    if len(key) > 2 or key[1][0] != 0:
        raise ErasureError(
            f"The layer {key[0]} is stored by the host in a way that permeability cannot follow; "
            'set the permeability to "fixed".'
        )
    return key[1][1:]


def add_low_rank(patched, changes):
    """Adds {key: LowRank} to the host's own patch list, one entry a layer.

    They go through the host's reader of LoRA files, which is the one form that all hosts since March 2024 take.
    """
    lora, keys, biases = {}, {}, {}
    for i, (key, change) in enumerate(changes.items()):
        lora[f"{i}.lora_up.weight"], lora[f"{i}.lora_down.weight"] = change.up, change.down
        keys[str(i)] = key
        if change.bias is not None:
            bias = plain_key(key).removesuffix("weight") + "bias"
            biases[bias if isinstance(key, str) else (bias, key[1])] = ("diff", (change.bias,))
    patched.add_patches(comfy.lora.load_lora(lora, keys) | biases, 1.0)
