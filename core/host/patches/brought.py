"""Text that other packs bring into the network beside the conditioning, such as regions that join at the attention.

A map of the text acts on each conditioning when the host prepares it. Where other packs' patches can bring text of
their own, it acts on all text alike at the layers that read it, W (c + A B c), which equals the same erasure in the
weights: computed once for each text that comes, not for each layer. The conditioning's text goes in as it was before
the map then, so that nothing is mapped twice, and each row opens by its own words.
"""

import contextlib
import functools
import logging
import weakref

import comfy.conds
import comfy.utils
import torch

from ...adapters.beside import PAST
from ...adapters.gates import stronger
from ...errors import ErasureError
from ..compat import module_at
from ..text.known_tokens import PROMPTS

COVERED = (
    "Another node has put a module of its own over the layer {} (LayerDiffuse does so), in which an adapter on that "
    'layer would do nothing; leave one of the two out, or use an erasure of the text or apply_to "weights".'
)
log = logging.getLogger("membrane")

RAW = "membrane_raw"  # a conditioning's text before the map, which travels with it


class Raw(comfy.conds.CONDCrossAttn):
    """A conditioning's text before the map, which is batched like the text and stays where it is until it is wanted."""

    def process_cond(self, batch_size, **kwargs):
        """The text for a batch, as the host asks for it."""
        return self._copy_with(comfy.utils.repeat_to_batch_size(self.cond, batch_size))


HOSTS = "comfy", "comfy_extras", "comfy_api", "nodes"  # packages whose patches bring no text
SAME = 0.9999  # cosine of vectors that are one, but for scale and rounding; that to bfloat16 leaves 0.99999
KEPT = 64  # texts whose gates are kept from step to step


def brings_text(options):
    """Whether a call with these transformer options runs patches of other packs that can bring text of their own."""
    kinds = [patches for name, patches in options.get("patches", {}).items() if name.startswith("attn2")]
    kinds.append(options.get("patches_replace", {}).get("attn2", {}).values())
    wrappers = options.get("wrappers", {})
    kinds += [found for kind in ("diffusion_model", "apply_model") for found in wrappers.get(kind, {}).values()]
    return any(_foreign(patch) for patches in kinds for patch in patches)


def _foreign(patch):
    if isinstance(patch, functools.partial):
        return _foreign(patch.func)
    package = (getattr(patch, "__module__", None) or type(patch).__module__).split(".")
    return package[0] not in HOSTS and not getattr(patch, "keeps_text", False)


def waits_for_a_look(text):
    """Whether the processor would have to wait for a device to know what is in a tensor."""
    return text.device.type != "cpu"


def derived(text, known):
    """Which rows of a text (J, L, d) hold nothing but vectors of which rows of a known one (B, T, d): (J, B), bool.

    Repeated, cut, scaled, turned round and rounded ones count; so do zeros.
    """
    if text.shape[-1] != known.shape[-1]:
        return torch.zeros(len(text), len(known), dtype=torch.bool, device=text.device)
    known = torch.nn.functional.normalize(known.to(text.device).float(), dim=-1)
    empty = ~text.any(dim=-1)
    text = torch.nn.functional.normalize(text.float(), dim=-1)
    likeness = torch.einsum("jld,btd->jblt", text, known).abs().amax(dim=-1)
    return ((likeness > SAME) | empty[:, None]).all(dim=-1)


class Brought:
    """Maps one text entry of a network where it is read, for rows that may be anybody's.

    conditioning: the ErasedConditioning, which knows what was mapped and how gates open for a text; rows: the Rows of
    the gated layers; late: whether the map acts in each step, and the conditioning's text comes without it.
    """

    def __init__(self, base, plan, entry, conditioning, rows, late):
        self.base, self.late = base, late
        self.part, self.entry = plan.maps.get(entry.name), entry
        self.count = len(plan.gates)  # of the gates
        self.conditioning, self.rows = conditioning, rows
        self.opened, self.told = [], False
        self.readers = [name for name, _ in base.diffusion_model.named_modules() if entry.reads(name)]
        self.generation, self.known, self.trusted = 0, None, {}  # {size: a text of the sampling that was mapped}

    @contextlib.contextmanager
    def reading(self, text, gates, share):
        """While it lasts, the map acts on whatever the layers read.

        text: (B, T, d) of the call before the map; gates: (B or 1, K) of its rows; share: (K,) how far the gates are in
        their time range.
        """
        self._require_readers()
        call, handles = _Call(self, text, gates, share), []
        for name, module in self.base.diffusion_model.named_modules():
            if self.entry.reads(name):
                handles.append(module.register_forward_pre_hook(call.read))
                handles.append(module.register_forward_hook(call.leave, always_call=True))
            elif self.count and name.endswith("attn2"):
                handles.append(module.register_forward_pre_hook(call.enter, with_kwargs=True))
                handles.append(module.register_forward_hook(call.leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _require_readers(self):
        """Raises ErasureError where a module of another pack stands over a layer that reads the text."""
        for name in self.readers:
            if module_at(self.base.diffusion_model, name) is None:
                raise ErasureError(COVERED.format(name))

    def opening(self, row):
        """Gates (1, K) of one text (1, L, d) that no conditioning has, as of a positive prompt."""
        for known, gates in self.opened:
            if known.shape == row.shape and torch.equal(known, row):
                return gates
        gates = self.conditioning.opening(row).to(row.device)
        self.opened = [*self.opened[-KEPT:], (row.clone(), gates)]
        return gates

    def fits(self, text):
        """Whether a text (B, T, d) is one that the layers read."""
        return self.part is None or text.shape[-1] == self.part.width

    def mapped_rows(self, text):
        """Which rows of a text (B, T, d) of a call are the conditionings' with the map on them: (B,), bool, on its
        device, without waiting for it."""
        if self.conditioning.generation != self.generation:
            self.generation, self.known, self.trusted = self.conditioning.generation, None, {}
        if self.known is None or self.known.device != text.device or self.known.shape[-1] != text.shape[-1]:
            self.known = self.conditioning.mapped_text(text)
        return derived(text, self.known).any(dim=1)

    def is_mapped(self, text):
        """Whether a text (B, T, d) of a call is the conditionings' with the map on it, in all rows."""
        return bool(self.mapped_rows(text).all())

    def unmapped_text(self, text, raw):
        """The text (B, T, d) of a call as it was before the map, raw (B, T', d), in the rows that the map is on."""
        mapped, raw = self.mapped_rows(text), raw.to(text)
        if raw.shape == text.shape:
            return torch.where(mapped[:, None, None], raw, text)
        return raw if bool(mapped.all()) else text

    def checked_text(self, text, raw):
        """The text (B, T, d) of a call, with the map on those rows of it that another pack has put in place of the
        conditioning's; raw: (B, T', d) before the map, or None.

        On a graphics card a look at the rows has to wait, so it is taken once for each size in a sampling: after that,
        rows that are put in place of mapped ones are mapped with open gates, whatever they are.
        """
        if self.part is None:
            return text
        last = self.trusted.get(text.shape) if self.conditioning.generation == self.generation else None
        waits = waits_for_a_look(text)
        if last is not None and not waits and torch.equal(last, text):
            return text
        mapped = self.mapped_rows(text)
        if last is not None and waits:
            every = text.new_ones(1, self.count) if self.count else None
            self.part = self.part.to(text.device)  # kept there from step to step
            return torch.where(mapped[:, None, None], text, self.part.erased(text, every))
        if bool(mapped.all()):
            self.trusted[text.shape] = text
            return text
        strange, text, known = ~mapped, text.clone(), None if raw is None else derived(text, raw).any(dim=1)
        for place in strange.nonzero().flatten().tolist():
            row = text[place : place + 1]
            if (known is not None and known[place]) or PROMPTS.recall(row) != [None]:
                text[place : place + 1] = self.part.erased(row, self.opening(row) if self.count else None)
            else:
                self.say()
        return text

    def forget(self):
        """Gives back what is kept on a device."""
        self.known, self.trusted, self.opened = None, {}, []
        if self.part is not None:
            self.part = self.part.to(torch.device("cpu"))

    def watch(self, noise):
        """Sees to it for a sampling, told by its noise tensor, that no pack calls the network past the host's
        `apply_model`, where what changes from step to step acts."""
        names = self.base.diffusion_model.named_modules()
        reader = next((module for name, module in names if self.entry.reads(name)), None)
        if reader is not None:
            weakref.finalize(noise, reader.register_forward_pre_hook(self._past).remove)

    def _past(self, module, args):
        if torch.compiler.is_compiling() or self.rows.every is not None:
            return
        if self.late:
            raise ErasureError(PAST)
        if self.part is not None and args[0].dim() == 3 and not self.is_mapped(args[0]):
            self.say()

    def say(self):
        """Once, that a text came which may be one with the map on it or one without."""
        if not self.told:
            self.told = True
            log.warning(
                "Membrane: another node changes the text on its way into the network, and it cannot be told whether it "
                'was erased from; set apply_to of Apply Erasure to "weights" to be sure. This is said once.'
            )


class _Call:
    """One call of the network with the map where the text is read."""

    def __init__(self, brought, text, gates, share):
        self.brought, self.text, self.gates, self.share = brought, text, gates, share
        self.seen, self.lent = [], []

    def enter(self, module, args, kwargs):
        """Before a cross-attention: all its layers get the gates of the text that it reads."""
        context = kwargs.get("context", args[1] if len(args) > 1 else None)
        self._lend(None if context is None else self._found(context)[1])

    def read(self, module, args):
        """Before a layer that reads text: its input with the map on it."""
        mapped, gates = self._found(args[0])
        self._lend(gates)
        return (mapped, *args[1:])

    def leave(self, module, args, output):
        if self.lent:
            self.lent.pop().close()

    def _lend(self, gates):
        rows, stack = self.brought.rows, contextlib.ExitStack()
        if gates is not None and self.brought.count:
            every = tuple(range(self.brought.count))
            stack.enter_context(rows.lent(gates, every, rows.texts, rows.timed, count=len(gates)))
        self.lent.append(stack)

    def _found(self, text):
        """(the text with the map on it, gates (J, K) of its rows) for a text (J, L, d)."""
        for known, mapped, gates in reversed(self.seen):
            if known is text or (known.shape == text.shape and torch.equal(known, text)):
                return mapped, gates
        part, mapped = self.brought.part, text
        gates = self._gates(text) if self.brought.count and text.dim() == 3 else None
        if part is not None and text.shape[-1] == part.width:
            mapped = part.erased(text, gates) if text.dim() == 3 else part.erased(text[None], gates)[0]
        self.seen = [*self.seen[-7:], (text, mapped, gates)]
        return mapped, gates

    def _gates(self, text):
        gates = self.gates.expand(len(self.text), -1).to(text.device)
        fits, found = derived(text, self.text), []
        for place, own in enumerate(fits):
            if len(text) == len(gates) and own[place]:
                found.append(gates[place : place + 1])
            elif own.any():
                found.append(functools.reduce(stronger, gates[own].split(1)))
            else:
                share = self.share.to(text.device)
                found.append(self.brought.opening(text[place : place + 1].detach()).to(share) * share)
        return torch.cat(found)
