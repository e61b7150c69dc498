"""Puts a plan on a clone of the host's MODEL.

The text part acts on each conditioning when the host prepares it (`extra_conds` of the base model), so it costs
nothing per step. The gates of each conditioning are computed there too and travel with it, so the host puts them
into the batch in whatever order it uses; `apply_model` receives them and publishes them to the gated layers for
the duration of one call. All are object patches, which every host from March 2024 on undoes by itself when it
switches to another clone. What is not gated goes to the host's own patch list.
"""

import logging
import weakref

import comfy.conds
import comfy.lora
import torch

from ...adapters.bypass import Bypass, Part, Pruning, Rows
from ...adapters.permeability import OFF, SAME, Concepts, gate_values
from ...adapters.plan import joined, make_plan, wanted_concepts
from ...adapters.stack import ErasureStack
from ...errors import ErasureError
from ..model.layers import context_width, layer_keys, layer_weight, modules, plain_key, require_fit
from ..page.live import publish
from ..text.encode import encode
from ..text.known_tokens import PROMPTS

log = logging.getLogger("membrane")
EXTRA_CONDS, APPLY_MODEL = "extra_conds", "apply_model"
GATES = "membrane_gates"


class Runs:
    """What the samplings that are under way know of each other's conditionings.

    A sampling is told by its noise tensor, which the host hands to every conditioning and keeps until the end.
    """

    def __init__(self):
        self.under_way = []

    def of(self, noise):
        """{"positive": gates or None, "active": set of channels} of a sampling."""
        self.under_way = [(ref, state) for ref, state in self.under_way if ref() is not None]
        found = next((state for ref, state in self.under_way if ref() is noise), None)
        if found is None:
            found = {"positive": None, "active": set()}
            if noise is not None:
                self.under_way.append((weakref.ref(noise), found))
        return found

    def active(self, count):
        """Channels that some conditioning opens, in order; all of them when no sampling is known."""
        states = [state for ref, state in self.under_way if ref() is not None]
        return tuple(sorted(set().union(*(s["active"] for s in states)))) if states else tuple(range(count))


class ErasedConditioning:
    """Stands in for the base model's `extra_conds`: erases from each conditioning's text once, and sets its gates.

    Clones may share it: what it learns belongs to one sampling. `previous` is what another pack had put there.
    """

    def __init__(self, base, stack, plan, previous):
        self.base, self.stack, self.plan, self.previous = base, stack, plan, previous
        self.runs = Runs()

    def __call__(self, **kwargs):
        original = self.previous or type(self.base).extra_conds.__get__(self.base)
        text, plan = kwargs.get("cross_attn"), self.plan
        gates = self.gates(text, kwargs.get("prompt_type"), kwargs.get("noise")) if plan.channels else None
        if text is not None and plan.text is not None and not plan.timed_text:
            # a ControlNet reads the same text but is not part of what was edited
            if "control" in kwargs and kwargs.get("cross_attn_controlnet") is None:
                kwargs["cross_attn_controlnet"] = text
            kwargs["cross_attn"] = (text.float() + plan.text.delta(text, gates)).to(text.dtype)
        pooled = kwargs.get("pooled_output")
        if pooled is not None and plan.pooled is not None and pooled.shape[-1] == plan.pooled.a.shape[0]:
            rows = pooled[:, None]
            kwargs["pooled_output"] = (rows.float() + plan.pooled.delta(rows, gates))[:, 0].to(pooled.dtype)
        if self.previous is not None:
            kwargs["membrane_text"] = text  # whose tokens are known, unlike those of the erased text
        out = original(**kwargs)
        if plan.in_steps:
            out[GATES] = comfy.conds.CONDRegular(gates.to(kwargs.get("device", "cpu")))
        return out

    def gates(self, text, prompt_type, noise):
        """Values (rows, K) of the plan's gates for a conditioning's text (rows, T, d) or None."""
        channels, concepts = self.plan.channels, self.plan.concepts
        score = None
        if concepts is not None:
            if text is None:
                score = torch.zeros(1, len(concepts.names))
            else:
                score = concepts.match(text, PROMPTS.recall(text))
        values = gate_values(channels, score)
        run = self.runs.of(noise)
        if prompt_type == "negative":
            values = _negative(channels, values, run["positive"])
        else:
            run["positive"] = values if run["positive"] is None else _stronger(run["positive"], values)
        run["active"].update(values.ne(0).any(dim=0).nonzero().flatten().tolist())
        publish(self.stack, concepts, score, prompt_type, run)
        return values

    def __deepcopy__(self, memo):
        return self


def _negative(channels, own, positive):
    """Gates of the negative prompt: as the positive prompt's, its own or none, as each channel says."""
    if positive is not None and len(positive) != len(own):
        rows = max(len(positive), len(own))
        positive, own = (x.repeat(-(-rows // len(x)), 1)[:rows] for x in (positive, own))
    values = own.clone()
    for k, channel in enumerate(channels):
        if channel.permeability.negative == OFF:
            values[:, k] = 0.0
        elif channel.permeability.negative == SAME and positive is not None:
            values[:, k] = positive[:, k]
    return values


def _stronger(x, y):
    """The value further from 0 of two gates (rows, K): of several positive prompts the one that opens most counts."""
    if len(x) != len(y):
        x, y = x[x.abs().argmax(dim=0), range(x.shape[1])][None], y[y.abs().argmax(dim=0), range(y.shape[1])][None]
    return torch.where(x.abs() >= y.abs(), x, y)


class ErasedSteps:
    """Stands in for the base model's `apply_model`: takes the gates of the rows in the batch off the call, closes
    those out of their time range, and lends them to the gated layers until the call is over."""

    def __init__(self, base, plan, conditioning, rows, parts, previous):
        self.base, self.plan, self.conditioning, self.previous = base, plan, conditioning, previous
        self.rows, self.parts = rows, parts
        self.text = plan.text if plan.timed_text else None
        self.timed = {}
        for k, channel in enumerate(plan.channels):
            if not channel.always:
                self.timed.setdefault((channel.start_percent, channel.end_percent), []).append(k)

    def __call__(self, x, t, c_concat=None, c_crossattn=None, *args, **kwargs):
        original = self.previous or type(self.base).apply_model.__get__(self.base)
        gates = kwargs.pop(GATES, None)
        if gates is None:  # not prepared by this model's extra_conds: only what needs no text can act
            gates = gate_values([c for c in self.plan.channels if not c.reads_text], None).to(x.device)
            gates = _spread(gates, [k for k, c in enumerate(self.plan.channels) if not c.reads_text], self.plan)
        if self.timed:
            gates = self._in_range(gates, t)
        if self.text is not None and c_crossattn is not None:
            self.text = self.text.to(c_crossattn.device)
            delta = self.text.delta(c_crossattn, gates)
            c_crossattn = (c_crossattn.float() + delta).to(c_crossattn.dtype)
        before = self.rows.gates, self.rows.active
        active = self.conditioning.runs.active(len(self.plan.channels))
        dtype = getattr(self.base, "manual_cast_dtype", None) or self.base.get_dtype()
        for part in self.parts:
            part.prepare(active, x.device, dtype)
        try:
            self.rows.active, self.rows.gates = active, gates[:, list(active)]
            return original(x, t, c_concat, c_crossattn, *args, **kwargs)
        finally:
            self.rows.gates, self.rows.active = before

    def _in_range(self, gates, t):
        sampling = self.base.model_sampling
        gates = gates.expand(max(len(gates), len(t)), -1).clone()
        for (start, end), columns in self.timed.items():
            on = (t <= sampling.percent_to_sigma(start)) & (t >= sampling.percent_to_sigma(end))  # stays on the device
            gates[:, columns] *= on.to(gates).view(-1, 1)
        return gates

    def __deepcopy__(self, memo):
        return self


def _spread(values, columns, plan):
    gates = values.new_zeros(1, len(plan.channels))
    gates[:, columns] = values
    return gates


def _foreign(model, name, ours):
    """What another pack has put in a place of the base model, below our own patch of class `ours`; or None."""
    patch = model.object_patches.get(name)
    return patch.previous if isinstance(patch, ours) else patch


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
    fresh = Concepts.of(encode(clip, (*missing, "")))
    if known is None:
        return fresh
    if known.vectors.shape[1:] != fresh.vectors.shape[1:]:
        raise ErasureError(
            f"The erasures already on this model compare texts of shape {tuple(known.vectors.shape[1:])}, the "
            f"connected CLIP gives {tuple(fresh.vectors.shape[1:])}; connect the CLIP that belongs to the model."
        )
    return Concepts(known.names + fresh.names, torch.cat([known.vectors, fresh.vectors]), known.tokens + fresh.tokens)


def apply_stack(model, stack, clip=None):
    """A clone of a MODEL with the stack added to what already acts on it; the model itself when nothing acts.

    clip: needed when permeability follows the text.
    """
    before = applied(model)
    whole = applied_stack(model) + stack
    has_text = any(entry.adapter.text_map is not None for entry in whole.entries)
    width = context_width(model) if has_text else None
    has_layers = any(entry.adapter.sites for entry in whole.entries)
    keys = layer_keys(model) if has_layers else {}
    missing = require_fit(model, stack, keys)
    plan = make_plan(whole, width, concepts_for(whole, clip, before and before.plan.concepts), keys)
    static = joined(stack, keys)
    if not plan and not static:
        return model
    patched = model.clone()
    if static:
        add_joined(patched, static)
    if plan:
        _put(patched, model, whole, plan)
    count = sum(entry.acts for entry in whole.entries)
    log.info("Membrane: %d erasure adapter(s) on %s", count, type(model.model).__name__)
    if missing:
        total = sum(len(entry.adapter.sites) for entry in stack.entries)
        log.warning("Membrane: %d of %d changes belong to layers this model does not have", missing, total)
    return patched


def _put(patched, model, whole, plan):
    base, rows = model.model, Rows()
    conditioning = ErasedConditioning(base, whole, plan, _foreign(model, EXTRA_CONDS, ErasedConditioning))
    patched.add_object_patch(EXTRA_CONDS, conditioning)
    layers, parts = modules(model), {}
    for key, layer in plan.layers.items():
        parts.setdefault(plain_key(key), []).append(Part(layer, _outputs(key)))
    if plan.in_steps:
        every = [part for of_layer in parts.values() for part in of_layer]
        steps = ErasedSteps(base, plan, conditioning, rows, every, _foreign(model, APPLY_MODEL, ErasedSteps))
        patched.add_object_patch(APPLY_MODEL, steps)
    for key in dict.fromkeys((*parts, *plan.masks)):
        name = key.removesuffix(".weight") + ".forward"
        pruning = Pruning(plan.masks[key], layer_weight) if key in plan.masks else None
        bypass = Bypass(layers[key], parts.get(key, ()), rows, _foreign(model, name, Bypass), pruning)
        patched.add_object_patch(name, bypass)


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


def add_joined(patched, changes):
    """Adds {key: Joined} to the host's own patch list, one low-rank entry a layer."""
    lora, keys, biases = {}, {}, {}
    for i, (key, change) in enumerate(changes.items()):
        lora[f"{i}.lora_up.weight"], lora[f"{i}.lora_down.weight"] = change.up, change.down
        keys[str(i)] = key
        if change.bias is not None:
            biases[plain_key(key).removesuffix("weight") + "bias"] = ("diff", (change.bias,))
    patched.add_patches(comfy.lora.load_lora(lora, keys) | biases, 1.0)


def without_stack(model):
    """A clone of a MODEL without the stack that acts on its text; another pack's patches stay."""
    clone = model.clone()
    for name, patch in list(clone.object_patches.items()):
        if isinstance(patch, ErasedConditioning | ErasedSteps | Bypass):
            if patch.previous is None:
                clone.object_patches.pop(name)
            else:
                clone.object_patches[name] = patch.previous
    return clone
