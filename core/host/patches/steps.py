"""Lends what is known of the rows in a batch to the layers, for the duration of one call of the network.

What a step needs on the device is kept there from the step before: nothing is copied to it, and nothing waits for it.
"""

import math
from contextlib import nullcontext
from functools import cached_property

import torch

from ...adapters.gates import gate_values
from ...adapters.patch import Patch
from ...errors import ErasureError
from ..compat import patched_layers_called
from .boxes import erased_boxes, open_gates
from .brought import RAW, Brought, brings_text
from .conditioning import GATES

APPLY_MODEL, CPU = "apply_model", torch.device("cpu")


class ErasedSteps(Patch):
    """Stands in for the base model's `apply_model`: takes the gates of the rows in the batch off the call, closes
    those out of their time range, and lends them to the layers until the call is over, with the number of the text's
    rows where a layer asks for it.

    entries: the TextEntries whose maps change from step to step, and so act here.
    """

    function, erases, lends = APPLY_MODEL, True, True

    def __init__(self, base, plan, conditioning, entries, rows, parts, previous):
        super().__init__(base, previous)
        read = conditioning.read
        self.late = read in entries
        self.brought = None if read is None else Brought(base, plan, read, conditioning, rows, self.late)
        conditioning.watches = self.brought
        self.plan, self.conditioning, self.rows, self.parts = plan, conditioning, rows, parts
        self.text_rows = {part.text_rows for part in parts if part.text_rows is not None}
        self.texts = {}
        for entry in entries:
            self.texts.setdefault(entry.result, []).append(entry)
        self.maps = {entry.name: plan.maps[entry.name] for entry in entries}
        self.timed = not all(gate.always for gate in plan.gates)
        self.lent, self.bounds, self.active = None, None, ()

    def __call__(self, x, t, c_concat=None, c_crossattn=None, *args, **kwargs):
        original, gates = self.original, kwargs.pop(GATES, None)
        if gates is None:  # not prepared by this model's extra_conds: only what needs no text can act
            gates = self._without_text
        told, gates = self._on(gates, x.device)
        if self.timed:
            told, gates = None, self._in_range(gates, t)
        raw = kwargs.pop(RAW, None)
        self._boxes(kwargs, x, t)
        reading, c_crossattn = self._text(c_crossattn, raw, gates, t, kwargs.get("transformer_options") or {})
        kwargs |= {name: self._erased(name, kwargs[name], gates) for name in self.texts if name in kwargs}
        active = tuple(range(len(self.plan.gates))) if reading else self._active()
        dtype = getattr(self.owner, "manual_cast_dtype", None) or self.owner.get_dtype()
        for part in self.parts:
            part.prepare(active, x.device, dtype)
        texts = self._lengths({"c_crossattn": c_crossattn, **kwargs})
        parts = () if reading else self.parts  # else they would have the gates of rows that are not there
        lent = self.rows.lent(gates, active, texts, told=told, parts=parts, count=len(x))
        with patched_layers_called(), lent, reading or nullcontext():
            return original(x, t, c_concat, c_crossattn, *args, **kwargs)

    def _boxes(self, call, x, t):
        """Puts the map on the boxes of GLIGEN in a call."""
        known = self.conditioning.runs.boxes()
        if not known.known:
            return
        gates = open_gates(self.plan)
        if gates is not None and self.timed:
            gates = self._in_range(gates.to(t.device), t[:1]).cpu()
        options, part = call.get("transformer_options") or {}, self.plan.maps[self.conditioning.read.name]
        call["transformer_options"] = erased_boxes(options, known, part, gates, x)

    def forget(self):
        """See Patch."""
        self.lent, self.bounds = None, None
        self.maps = {name: part.to(CPU) for name, part in self.maps.items()}
        self.rows.forget()
        if self.brought is not None:
            self.brought.forget()

    def _text(self, text, raw, gates, t, options):
        """(context manager or None, the text of a call): the map acts while the context manager lasts where patches of
        other packs can bring text of their own, and has acted on the text where it is None."""
        brought, maps = self.brought, "c_crossattn" in self.texts
        if brought is None or text is None or not brought.fits(text):
            return None, self._erased("c_crossattn", text, gates) if maps else text
        brings = brings_text(options)
        if brings and raw is None and not self.late:
            brought.say()
        elif brings:
            text = text if raw is None or brought.part is None else brought.unmapped_text(text, raw)
            share = gates.new_ones(1, gates.shape[1])
            share = self._in_range(share, t) if self.timed else share
            return brought.reading(text, gates, share.amax(dim=0)), text
        return None, self._erased("c_crossattn", text, gates) if maps else brought.checked_text(text, raw)

    def _lengths(self, call):
        """{TextRows: number of the text's rows} of a call."""
        for found in self.text_rows:
            if call.get(found.splits):
                raise ErasureError(
                    "This conditioning puts reference pictures between the words, and adapters that change the text's "
                    "rows alone cannot tell the two apart; leave out the reference pictures or these adapters."
                )
        return {found: found.count(call) for found in self.text_rows}

    def _on(self, gates, device):
        """(gates on the processor, or None; the same on a device)."""
        if gates.device.type != "cpu" or gates.requires_grad:  # somebody has moved them, or goes back through them
            return None, gates.to(device)
        known = self.lent
        if known is None or known[1].device != device or not torch.equal(known[0], gates):
            known = self.lent = gates, gates.to(device)
        return known

    def _active(self):
        """Numbers of the active gates; the same object while they are the same, so that parts need not compare them."""
        found = self.conditioning.runs.active(len(self.plan.gates))
        if found != self.active:
            self.active = found
        return self.active

    @cached_property
    def _without_text(self):
        columns = [k for k, gate in enumerate(self.plan.gates) if not gate.reads_text]
        values = gate_values([self.plan.gates[k] for k in columns], None)
        gates = values.new_zeros(1, len(self.plan.gates))
        gates[:, columns] = values
        return gates

    def _erased(self, name, text, gates):
        if text is None:
            return None
        for entry in self.texts[name]:
            part = self.maps[entry.name] = self.maps[entry.name].to(text.device)
            if text.shape[-1] == part.width:
                text = entry.mapped(text, lambda rows, part=part: part.erased(rows, gates))
        return text

    def _in_range(self, gates, t):
        """Gates (rows, K) with a 0 where the noise levels t (rows,) are out of the gate's range."""
        first, last = self._bounds(t)
        t = t.view(-1, 1)
        return gates * ((t <= first) & (t >= last)).to(gates)

    def _bounds(self, t):
        """(first, last) noise level (K,) of each gate's range, on the device and of the type of t."""
        sampling, wanted = self.owner.model_sampling, (t.device, t.dtype)
        if self.bounds is None or self.bounds[0] is not sampling or self.bounds[1] != wanted:
            ranges = [
                (math.inf, -math.inf)
                if gate.always
                else [float(sampling.percent_to_sigma(p)) for p in (gate.start_percent, gate.end_percent)]
                for gate in self.plan.gates
            ]
            first, last = (torch.tensor(levels, device=t.device, dtype=t.dtype) for levels in zip(*ranges))
            self.bounds = sampling, wanted, (first, last)
        return self.bounds[2]
