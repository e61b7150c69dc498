"""Erases from each conditioning's text once, when the host prepares it, and sets the gates that travel with it."""

import contextlib
import logging
import weakref
from types import MappingProxyType

import comfy.conds
import comfy.utils
import torch

from ...adapters.gates import gate_values, meanings, of_negative, side_by_side, stronger
from ...adapters.patch import Patch
from ...errors import ErasureError
from ...text.similarity import opening_matches
from ..compat import module_at, patched_layers_called, undo_modules_first
from ..text.known_tokens import PROMPTS
from .boxes import Boxes
from .brought import COVERED, RAW, Raw

log = logging.getLogger("membrane")

EXTRA_CONDS, GATES = "extra_conds", "membrane_gates"
# called with (stack, its gates, {"positive", "negative": values (rows, K) or None} of a sampling, the side just set)
LISTENERS = []


class Runs:
    """What the samplings that are under way know of each other's conditionings.

    A sampling is told by its noise tensor, which the host hands to every conditioning and keeps until the end.
    """

    def __init__(self):
        self.under_way = []

    def of(self, noise):
        """{"positive", "negative": values or None, "active": numbers of gates, "boxes": Boxes} of a sampling."""
        self.under_way = [(ref, state) for ref, state in self.under_way if ref() is not None]
        found = next((state for ref, state in self.under_way if ref() is noise), None)
        if found is None:
            found = _nothing()
            if noise is not None:
                self.under_way.append((weakref.ref(noise), found))
        return found

    def begun(self, noise):
        """The same for a positive prompt, with which a sampling begins: after a negative one, the next one does, with a
        noise that somebody keeps."""
        found = self.of(noise)
        if found["negative"] is not None:
            found.update(_nothing())
        return found

    def positive(self):
        """Values of the positive prompt of the sampling that began last, for a negative one that nodes such as Perp-Neg
        prepare in the middle of a step, when the noise is another; or None."""
        found = [state["positive"] for ref, state in self.under_way if ref() is not None]
        return next((values for values in reversed(found) if values is not None), None)

    def knows(self, noise):
        """Whether a sampling is under way already."""
        return any(ref() is noise for ref, _ in self.under_way)

    def any(self):
        """Whether some sampling is under way."""
        return any(ref() is not None for ref, _ in self.under_way)

    def boxes(self):
        """Boxes of all samplings that are under way."""
        found = Boxes()
        for ref, state in self.under_way:
            if ref() is not None:
                for model, boxes in state["boxes"].known:
                    found.add(("position", model, boxes))
        return found

    def active(self, count):
        """Gates that some conditioning opens, in order; all of them when no sampling is known."""
        states = [state for ref, state in self.under_way if ref() is not None]
        return tuple(sorted(set().union(*(s["active"] for s in states)))) if states else tuple(range(count))


def _nothing():
    return {"positive": None, "negative": None, "active": set(), "boxes": Boxes()}


class Gates(comfy.conds.CONDRegular):
    """Values (rows, K) that travel with a conditioning on the processor: a step compares them with those of the step
    before, which on a graphics card it would have to wait for."""

    def process_cond(self, batch_size, **kwargs):
        """The values for a batch, as the host asks for them."""
        return self._copy_with(comfy.utils.repeat_to_batch_size(self.cond, batch_size))


class ErasedConditioning(Patch):
    """Stands in for the base model's `extra_conds`: erases from each conditioning's text once, and sets its gates.

    Clones may share it, and copies share what it learns, which belongs to one sampling. entries: the TextEntries whose
    maps act here, before `extra_conds` or, where it runs layers of the model, on what it gives. rows: the Rows of the
    gated layers. read: the entry whose text travels as it was before the map too, for calls in which the map acts
    where the text is read. texts: Texts of the entries that gates follow by meaning, None where none does.
    """

    function, erases = EXTRA_CONDS, True

    def __init__(self, base, stack, plan, entries, travels, previous, rows, read=None, texts=None):
        super().__init__(base, previous)
        self.texts = texts
        self.read, self.mapped, self.watches, self.told = read, [], None, False
        self.count = [0]  # of texts that were mapped
        self.layers = {}  # {path of a patch: the module it is on}
        self.rows, self.timed = rows, [k for k, gate in enumerate(plan.gates) if not gate.always]
        self.stack, self.plan, self.travels = stack, plan, travels
        self.early = [entry for entry in entries if not entry.prepared]
        self.late = [entry for entry in entries if entry.prepared]
        self.runs = Runs()
        rows.under_way = self.runs.any

    def __call__(self, **kwargs):
        text, original, noise = kwargs.get("cross_attn"), self.original, kwargs.get("noise")
        if noise is None or not self.runs.knows(noise):
            self._begin(noise)
        gates = self.gates(text, kwargs.get("prompt_type"), noise, kwargs) if self.plan.gates else None
        if "gligen" in kwargs:
            self._boxes(kwargs["gligen"], noise)
        for entry in self.early:
            vectors = kwargs.get(entry.argument)
            if vectors is not None:
                self._erase(entry, vectors, gates, kwargs)
        if self.read in self.early and kwargs.get("cross_attn") is not text:
            self.count[0] += 1
            self.mapped[:] = [ref for ref in self.mapped if ref() is not None]
            self.mapped.append(weakref.ref(kwargs["cross_attn"]))
        if self.previous is not None:
            kwargs["membrane_text"] = text  # whose tokens are known, unlike those of the erased text
        # the host runs the layers that prepare a text in inference mode only
        prepare = torch.inference_mode() if self.late else contextlib.nullcontext()
        with prepare, self._lent(gates, kwargs.get("device")):
            out = original(**kwargs)
        for entry in self.late:
            if entry.result in out:
                out[entry.result] = self._prepared(entry, out[entry.result], gates)
        if self.read is not None and text is not None:
            out[RAW] = Raw(text)
        if self.travels:
            out[GATES] = Gates(gates.cpu())
        return out

    def _begin(self, noise):
        """Sees to it, when a sampling begins, that what acts in the network is not past anybody's reach."""
        for name, module in self.layers.items():
            if module_at(self.owner, name.rpartition(".")[0]) is not module:
                undo_modules_first(self.owner)
                raise ErasureError(COVERED.format(name.removeprefix("diffusion_model.").rpartition(".")[0]))
        if self.watches is not None and noise is not None:
            self.runs.of(noise)
            self.watches.watch(noise)

    def _boxes(self, gligen, noise):
        """Notes GLIGEN's boxes, which a map of the text reaches, or says that nothing else does."""
        if self.read is not None and self.read.name in self.plan.maps:
            self.runs.of(noise)["boxes"].add(gligen)
        elif not self.told:
            self.told = True
            log.warning(
                "Membrane: a conditioning has GLIGEN boxes, whose words are read by layers of GLIGEN's own that only "
                "an erasure of the text reaches; leave what is erased out of them. This is said once."
            )

    @contextlib.contextmanager
    def _lent(self, gates, device):
        """Lends the gates to the layers that `extra_conds` runs, in families where it does."""
        with contextlib.ExitStack() as lent:
            lent.enter_context(patched_layers_called())
            if gates is not None:
                every = gates.to(device or "cpu")
                lent.enter_context(self.rows.lent(every, tuple(range(every.shape[1])), timed=self.timed))
            yield

    def _erase(self, entry, vectors, gates, kwargs):
        if vectors.shape[-1] != self.plan.maps[entry.name].width:
            return
        # a ControlNet reads the same text but is not part of what was edited
        if entry.argument == "cross_attn" and "control" in kwargs and kwargs.get("cross_attn_controlnet") is None:
            kwargs["cross_attn_controlnet"] = vectors
        kwargs[entry.argument] = self._mapped(entry, vectors, gates)

    def _prepared(self, entry, condition, gates):
        if condition.cond.shape[-1] != self.plan.maps[entry.name].width:
            return condition
        return type(condition)(self._mapped(entry, condition.cond, gates))

    def _mapped(self, entry, vectors, gates):
        part = self.plan.maps[entry.name]
        return entry.mapped(vectors, lambda rows: part.erased(rows, gates))

    def gates(self, text, prompt_type, noise, given=MappingProxyType({})):
        """Values (rows, K) of the plan's gates for a conditioning's text (rows, T, d) or None; given: all that the
        conditioning brings besides."""
        gates = self.plan.gates
        values = gate_values(gates, self._score(text, given))
        run = self.runs.begun(noise) if prompt_type == "positive" else self.runs.of(noise)
        side = "negative" if prompt_type == "negative" else "positive"
        if side == "negative":
            positive = self.runs.positive() if run["positive"] is None else run["positive"]
            values = of_negative(gates, values, positive)
        noted = values.detach()
        run[side] = noted if run[side] is None else stronger(run[side], noted)
        run["active"].update(values.ne(0).any(dim=0).nonzero().flatten().tolist())
        for listener in LISTENERS:
            listener(self.stack, gates, run, side)
        return values

    @property
    def generation(self):
        """A number that differs whenever other texts were mapped."""
        return self.count[0]

    def mapped_text(self, like):
        """All rows (n, T, d) that conditionings which are in use have after the map, as one text with the type and the
        place of another one, (rows, T, d)."""
        found = [text for text in (ref() for ref in self.mapped) if text is not None]
        if not found:
            return like.new_zeros(0, 1, like.shape[-1])
        length = max(text.shape[1] for text in found)
        return torch.cat([_longer(text, length).to(like) for text in found])

    def opening(self, text):
        """Values (rows, K) of the plan's gates for a text (rows, T, d) that no conditioning brings."""
        return gate_values(self.plan.gates, self._score(text, {}))

    def _score(self, text, given):
        """Matches (rows, C) of a text (rows, T, d) or None, in the order of columns(); None where nothing is read."""
        score, concepts = None, self.plan.concepts
        if concepts is not None:
            score = torch.zeros(1, len(concepts.names)) if text is None else self._match(text)
        if self.texts is None:
            return score
        closed = torch.zeros(1, len(self.plan.gates), device=given.get("device") or "cpu")
        with patched_layers_called(), self.rows.lent(closed, ()):  # of layers that stand before an entry
            texts = self.texts({**given, "cross_attn": text})
        return side_by_side(score, meanings(self.stack, texts))

    def _match(self, text):
        """(rows, C) matches of a text (rows, T, d) with the plan's concepts."""
        heard = PROMPTS.recall(text)
        return (
            self.plan.concepts.match(text, heard) if PROMPTS.off else opening_matches(self.plan.concepts, text, heard)
        )


def _longer(text, length):
    """A text (rows, T, d) with its first vectors again behind it, up to a length."""
    return torch.cat([text, text[:, :1].expand(-1, length - text.shape[1], -1)], dim=1)
