"""A layer of the host with deltas: beside it where they are of low rank, else inside a copy of its weight.

SPM, Lyu et al. 2024, eq. 9: y = W x + sum_c g_c (v_reg_c^T x) v_sig_c, for all adapters of a layer at once, with its
own g for every row of the batch. What acts on the weight comes after that: of W, LoRAs and all gated changes, masks
damp the marked entries.
"""

import contextlib

import torch
from torch.nn import functional

from ..errors import ErasureError
from ..families.family import FIRST
from .deltas.delta import OPEN
from .patch import Patch

PAST = (
    "Another node calls the network by itself, past the function in which erasures that follow the text, the step or "
    "the side of the guidance act (DeepCache does so), so that they would do nothing; take that node away, or set the "
    'permeability to "fixed", start_percent to 0 and end_percent to 1.'
)
CPU = torch.device("cpu")
TILED, WHOLE, PICTURES, MIXED = "tiled", "whole", "pictures", "mixed"  # order of what a layer gets


class Rows:
    """What is known of the rows that are going through the network now.

    every: (rows, all gates). gates: (rows, active gates and, last, a 1 for what is not gated), with `active`, the
    numbers of the active ones. texts: {TextRows: number of the text's rows}. timed: numbers of gates that change from
    step to step, while the call is one for all steps. count: of the rows of the network's input, 0 where one row of
    gates may be for all. None while no call is under way. under_way: a function, whether some sampling is.
    """

    def __init__(self):
        self.every, self.gates, self.active, self.texts, self.timed = None, None, (), {}, frozenset()
        self.lending, self.places = None, None
        self.count, self.under_way = 0, lambda: False

    def forget(self):
        """Gives back what is kept on the device from call to call."""
        self.lending, self.places = None, None

    @contextlib.contextmanager
    def lent(self, every, active, texts=None, timed=(), told=None, parts=(), count=0):
        """While it lasts, the rows are those of a call with these gates, (rows, all gates).

        told: the same gates on the processor, None where they are not known there. parts: Parts that get the gates of
        their rows, each once for all layers.
        """
        before = self.every, self.gates, self.active, self.texts, self.timed, self.count
        lending = self._lending(every, active, told)
        self.every, self.gates, self.active, self.texts, self.timed = (
            every,
            lending.gates,
            active,
            texts or {},
            frozenset(timed),
        )
        self.count = count
        lending.spread(parts)
        try:
            yield
        finally:
            self.every, self.gates, self.active, self.texts, self.timed, self.count = before
            for part in parts:
                part.columns = None

    def alike(self, gates):
        """Whether a call's gates, `every` or `gates`, are the same in all rows; waits for the device only where the
        gates are not known on the processor."""
        known = self.lending
        if known is not None and (gates is known.every or gates is known.gates):
            return known.alike(gates is known.every)
        return _alike(gates)

    def _lending(self, every, active, told):
        known = self.lending
        if known is None or known.every is not every or known.active != active:
            if self.places is None or self.places[0] != (active, every.device):
                places = torch.tensor(active, dtype=torch.long, device=every.device)
                self.places = (active, every.device), places
            known = self.lending = _Lending(every, active, self.places[1], told)
        return known


class _Lending:
    """The gates of a call as layers use them, kept for as many calls as have the same."""

    def __init__(self, every, active, places, told):
        self.every, self.active, self.told = every, active, told
        self.gates = torch.cat([every.index_select(1, places), every.new_ones(len(every), 1)], dim=1)
        self.columns, self.found = {}, {}

    def spread(self, parts):
        """Gives Parts the gates of their rows, (rows, K), of the type of their factors."""
        for part in parts:
            if part.ready is None:
                continue
            dtype = part.wanted[2]
            if (part.numbers, dtype) not in self.columns:
                self.columns[part.numbers, dtype] = self.gates[:, part.ready.gate].to(dtype)
            part.columns = self.columns[part.numbers, dtype]

    def alike(self, of_all):
        """Whether all rows of `every`, or of `gates`, are the same."""
        if of_all not in self.found:
            if self.told is None:
                self.found[of_all] = _alike(self.every if of_all else self.gates)
            else:
                self.found[of_all] = _alike(self.told if of_all else self.told[:, list(self.active)])
        return self.found[of_all]


def _alike(rows):
    return bool((rows == rows[:1]).all())


class Changes:
    """The Terms of a layer that act on its weight, in their order, as its forward uses them.

    read(module, like): (weight, bias) of a linear layer as it multiplies with them, for an input like this.
    """

    def __init__(self, terms, read):
        self.terms, self.read = terms, read
        self.gated = any(term.gate != OPEN for term in terms)
        self.device, self.ready = None, None

    def __call__(self, weight, gates=None, active=()):
        """A weight (out, in) with the changes; gates: (active gates,) of one row, None where none is known."""
        changed = weight
        for term, delta in self._on(weight.device):
            if term.gate == OPEN:
                changed = delta.changed(changed, term.factor)
            elif gates is not None and term.gate in active:
                changed = delta.changed(changed, gates[active.index(term.gate)])
        return changed

    def forget(self):
        """Gives back what it keeps on the device."""
        self.device, self.ready = None, None

    def _on(self, device):
        if self.device != device:
            self.ready = [(term, term.delta.on(device)) for term in self.terms]
            self.device = device
        return self.ready


class Bypass(Patch):
    """Stands in for a layer's `forward`: maps of the text on its input, the class's own forward (or what another pack
    put there), then the parts, then the changes of the weight; or the same with the changed weight inside, where
    nothing else stands there.

    parts: of low rank; text: TextPart of an entry that the layer reads behind a norm; changes: Changes of the weight.
    order: of what the layer gets: "tiled", picture by picture or each cut into equally many neighbours, as HyperTile
    does; "whole", picture by picture, or rows that another pack adds; "pictures", picture by picture only; "mixed",
    otherwise. name: of the layer, for messages.
    """

    function, erases, lends = "forward", True, True

    def __init__(self, module, parts, rows, previous=None, changes=None, text=None, order=TILED, name="a layer"):
        super().__init__(module, previous)
        self.order, self.name = order, name
        self.parts, self.rows = parts, rows
        self.changes, self.text = changes, text
        self.follows = text is not None and bool((text.gate != OPEN).any())
        self.needs_rows = bool(parts) or self.follows or (changes is not None and changes.gated)

    def __call__(self, x, *args, **kwargs):
        if self.text is not None:
            x = self._erased(x)
        if self.rows.timed:
            self._require_untimed()
        if self.rows.every is None and self.needs_rows and self.rows.under_way():
            raise ErasureError(PAST)
        ready = []
        if self.rows.gates is not None:
            found = ((part.factors(self.rows.active, x), part) for part in self.parts)
            ready = [(factors, part, self._of(part, x)) for factors, part in found if factors is not None]
        if self.changes is not None and self.previous is None:
            return self._changed(x, ready)
        y = self.original(x, *args, **kwargs)
        for factors, part, where in ready:
            y = self._added(x, y, factors, part, where)
        if self.changes is not None:  # what another pack does beside the weight stays
            y = y - self._changed(x, ready, removed=True).to(y.dtype)
        return y

    def forget(self):
        """See Patch."""
        for part in self.parts:
            part.forget()
        if self.changes is not None:
            self.changes.forget()
        if self.text is not None:
            self.text = self.text.to(CPU)
        self.rows.forget()

    def _require_untimed(self):
        gates = {gate for part in self.parts for gate in part.every.gate.tolist()}
        gates |= {term.gate for term in (self.changes.terms if self.changes else ())}
        if gates & self.rows.timed:
            raise ErasureError(
                f"The layer {self.name} prepares the text once for all steps, so that an adapter on it cannot begin or "
                "end with a step; set its start_percent to 0 and its end_percent to 1."
            )

    def _of(self, part, x):
        """The rows of an input that a part acts on, as a slice of its second dimension; None for all of them."""
        found = part.text_rows
        if found is None:
            return None
        count, rows = self.rows.texts.get(found, 0), x.shape[1]
        if x.dim() < 3 or count > rows:
            raise ErasureError(
                f"A layer got {rows} rows, but the text alone has {count}; another node changes the text inside the "
                "network, apply it to another model, or leave out the adapters that change the text's rows alone."
            )
        return slice(0, count) if found.place == FIRST else slice(rows - count, rows)

    def _erased(self, x):
        self.text = self.text.to(x.device)
        gates = None if self.rows.every is None else self._for_rows(self.rows.every, x)
        if gates is None and self.follows:  # called outside a sampling: no gate is known
            return x
        return self.text.erased(x[:, None], gates)[:, 0] if x.dim() == 2 else self.text.erased(x, gates)

    def _changed(self, x, ready, removed=False):
        """Output of the layer with its weight changed, or what the changes take from it, with the low-rank changes that
        run beside it inside the weight."""
        where = next((where for _, _, where in ready if where is not None), None)
        everywhere = [(factors, part.outputs) for factors, part, where in ready if where is None]
        y = self._through_changed(x, everywhere, removed)
        if where is None:
            return y
        on_text = [(factors, part.outputs) for factors, part, _ in ready]
        return torch.cat([y[:, : where.start], self._through_changed(x[:, where], on_text, removed),
                          y[:, where.stop :]], dim=1)  # fmt: skip

    def _through_changed(self, x, ready, removed):
        """The same for rows that all get the same low-rank changes; ready: (Factors, outputs)."""
        weight, bias = self.changes.read(self.owner, x)
        gates, active = self.rows.gates, self.rows.active
        if removed:
            bias = None
        if not ready and (gates is None or not self.changes.gated):
            changed = self.changes(weight)
            return functional.linear(x, weight - changed if removed else changed, bias)
        rows = []
        for row, own in zip(x, self._for_rows(gates, x).expand(len(x), -1)):
            full, shift = weight, bias
            for factors, outputs in ready:
                full, moved = factors.inside(full, shift, own, outputs)
                shift = shift if removed else moved
            changed = self.changes(full, own, active)
            rows.append(functional.linear(row, full - changed if removed else changed, shift))
        return torch.stack(rows)

    def _added(self, x, y, factors, part, where):
        """y with a part's changes; row by row where the memory is too small for all rows at once."""
        gates, columns = self._for_rows(self.rows.gates, x), part.columns
        if columns is None or columns.dtype != x.dtype:
            columns = gates[:, factors.gate].to(x.dtype)
        elif len(gates) != len(columns):
            columns = columns[:1] if len(gates) == 1 else columns.repeat_interleave(len(gates) // len(columns), dim=0)
        try:
            return self._add(x, y, factors, part.outputs, where, gates, columns)[0]
        except torch.cuda.OutOfMemoryError:  # nothing was written yet
            rows = (each.expand(len(x), -1).split(1) for each in (gates, columns))
        try:
            found = [
                self._add(*row, factors, part.outputs, where, *own)
                for *row, own in zip(x.split(1), y.split(1), zip(*rows))
            ]
        except torch.cuda.OutOfMemoryError as error:
            # the host knows this kind of error and makes room
            raise torch.cuda.OutOfMemoryError(
                f"There is not enough memory for the {len(factors.gate)} columns of adapters beside a layer, even one "
                'picture at a time; make smaller pictures, stack fewer adapters, or set their permeability to "fixed".'
            ) from error
        return y if found[0][1] else torch.cat([row for row, _ in found])

    def _add(self, x, y, factors, outputs, where, gates, columns):
        """(output, whether it was written in place)."""
        whole = outputs is None and where is None
        x = x if where is None else x[:, where]
        delta, in_place = factors.added(x, y, gates, columns, self.owner, self.previous is None and whole)
        if in_place:
            return y, True
        if whole:
            return y + delta, False
        start, length = outputs or (0, y.shape[-1])
        if delta.requires_grad:  # while it is trained
            rows = () if where is None else (where.start, y.shape[1] - where.stop)
            return y + functional.pad(delta, (start, y.shape[-1] - start - length, *rows)), False
        y = y if self.previous is None else y.clone()
        (y if where is None else y[:, where])[..., start : start + length] += delta
        return y, False

    def _for_rows(self, gates, x):
        """Gates (batch, K) or (1, K) of what the layer gets; one row for all where the gates of all are equal."""
        rows, found = len(gates), len(x)
        added = self.order == WHOLE and self.rows.count and found != self.rows.count
        if (rows == 1 and not added) or (rows == found and self.order != MIXED):
            return gates
        if self.order == TILED and found % rows == 0:
            return gates.repeat_interleave(found // rows, dim=0)
        if not added and self.rows.alike(gates):
            return gates[:1]
        if self.order in (TILED, WHOLE):
            raise ErasureError(
                f"A layer got a batch of {found} for {rows} rows of gates; another node splits the batch inside the "
                'network, apply it to another model or set the permeability to "fixed".'
            )
        raise ErasureError(
            f"The layer {self.name} gets the {rows} pictures of a batch in an order of its own, so that it cannot open "
            "for some of them and not for others; set the negative of the permeability to "
            '"same as positive" and make one prompt at a time, or set the permeability to "fixed".'
        )
