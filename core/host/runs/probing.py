"""Probes of adapters that change layers, computed from their concepts where a text encoder is at hand."""

import logging
from dataclasses import dataclass, replace

from ...adapters.permeability import MEANING
from ...erasers.closed_form.daily import probing_job
from ...erasers.closed_form.probes import probes_of
from ...errors import ErasureError
from ...text.everyday import everyday_captions
from ..text.entries import encode_entries
from ..text.kept import KEPT

log = logging.getLogger("membrane")


def probes_for(card, model, clip, begin):
    """{text entry: Probes} of the concepts of a Card as a MODEL reads them, fitted as those of a closed-form erasure.

    begin: function of a number of steps, gives a Progress of them. An entry at which no concept can be told from other
    texts is left out.
    """
    job, everyday = probing_job(card), everyday_captions()
    prompts = job.prompts()
    progress = begin(len(prompts) + len(everyday))
    encoded = encode_entries(model, clip, prompts, progress.at, pooled=None)
    progress.next_phase(len(prompts))
    others = encode_entries(model, clip, everyday, progress.at, pooled=None)
    found = {name: probes_of(job, encoded[name], others[name]) for name in encoded if name in others}
    return {name: probes for name, probes in found.items() if probes}


def probes_if_any(card, model, clip, begin):
    """The same; {} for concepts whose captions the text encoder does not take, as training needs no probes."""
    try:
        return probes_for(card, model, clip, begin)
    except ErasureError as error:
        log.warning("Membrane: the adapter will not be able to follow the meaning of texts: %s", error)
        return {}


@dataclass(frozen=True, eq=False)
class Probed:
    """What was fitted for an adapter: its probes by text entry."""

    probes: dict

    @property
    def size(self):
        """Bytes of the vectors."""
        return sum(probe.vector.nbytes for found in self.probes.values() for probe in found)


def probed(entry, model, clip, begin):
    """An Entry whose adapter can follow the meaning of texts, where that was asked for and its file has no probes.

    That of an adapter that changes layers alone: a text map brings its probes. Without a CLIP it stays as it is. What
    was computed lately is not computed again. Raises ErasureError where the texts of its concepts cannot be told from
    others.
    """
    adapter = entry.adapter
    if not entry.acts or entry.mode != MEANING or adapter.maps or adapter.probed or clip is None:
        return entry
    card = adapter.card
    key = ("probes", card.concepts, card.surrogates, repr(card.settings.get("preserve")), KEPT.key_of(model))
    found = KEPT.get(clip, key) or KEPT.keep(clip, key, Probed(probes_for(card, model, clip, begin)))
    adapter = replace(adapter, layer_probes=found.probes)
    if not adapter.probed:
        raise ErasureError(
            f"What this model reads of {', '.join(card.concepts)} cannot be told from other texts, so that the adapter "
            f'{adapter.describe()} cannot follow their meaning; set its permeability to "facilitated transport".'
        )
    return replace(entry, adapter=adapter)
