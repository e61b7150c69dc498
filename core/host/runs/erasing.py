"""One closed-form erasure on a MODEL: its texts encoded, the method solved, the adapter put in place."""

from dataclasses import dataclass, replace

from ...adapters.adapter import ErasureAdapter
from ...adapters.permeability import MEANING, TRANSPORT, Permeability
from ...adapters.stack import Entry, ErasureStack
from ...adapters.written import Written
from ...erasers.closed_form.daily import daily_job
from ...erasers.closed_form.job import METHODS, Job, erase
from ...errors import ErasureError
from ...text.concepts import parse_preserved
from ...text.everyday import everyday_captions
from ..model.layers import family_name, text_readers
from ..model.weights import text_gram
from ..patches.on_weights import apply_to_weights, on_layers
from ..patches.stack import apply_stack
from ..text.encode import fingerprint
from ..text.entries import encode_entries
from ..text.kept import KEPT
from .probing import probed

TEXT, WEIGHTS = "text", "weights"  # what an erasure is put on
PLACES = (TEXT, WEIGHTS)
FOLLOWS = Permeability(MEANING)


def erasure_of(job, model, clip, begin, pooled=None, role=""):
    """ErasureAdapter of a Job for a MODEL and its CLIP.

    begin: function of a number of steps, gives a Progress of them. pooled: whether the pooled vector is erased from
    too, None as the family needs it. role: ".key" or ".value" for only those layers, as changes of this MODEL's; "" for
    the text itself.
    """
    prompts, needs_gram = job.prompts(), METHODS[job.method].needs_gram(job)
    count = len(list(text_readers(model))) if needs_gram else 0
    everyday = everyday_captions()
    progress = begin(len(prompts) + len(everyday) + count + job.rounds)
    entries = encode_entries(model, clip, prompts, progress.at, pooled)
    progress.next_phase(len(prompts))
    others = encode_entries(model, clip, everyday, progress.at, pooled)
    progress.next_phase(len(everyday))
    gram = text_gram(model, progress.at) if needs_gram else None
    progress.next_phase(count)
    adapter = erase(job, entries, family_name(model), fingerprint(clip), gram, progress.at, others)
    progress.next_phase(job.rounds)
    return on_layers(model, adapter, role) if role else adapter


def put_on(model, adapter, strength, place=TEXT, permeability=None, clip=None):
    """A clone of a MODEL with an adapter on one of PLACES; permeability: when it opens, None for always (fixed)."""
    entry = Entry(adapter, strength, permeability=permeability or Permeability())
    stack = ErasureStack((entry,))
    return apply_to_weights(model, stack) if place == WEIGHTS else apply_stack(model, stack, clip)


@dataclass(frozen=True, eq=False)
class Solved:
    """What words came to: the Job they stand for, and its adapter."""

    job: Job
    adapter: ErasureAdapter

    @property
    def size(self):
        """Bytes of the adapter's maps."""
        return sum(part.nbytes for found in self.adapter.maps.values() for part in (found.a, found.b))


def following(adapter, wanted=FOLLOWS):
    """`wanted`, with Facilitated Transport in the place of "meaning" for an adapter whose probes tell nothing."""
    return replace(wanted, mode=TRANSPORT) if wanted.mode == MEANING and not adapter.probed else wanted


def computed(stack, model, clip, begin):
    """(A stack with its words computed for a MODEL and its CLIP, the Jobs of those that act).

    begin: as erasure_of() takes it. Words that were computed lately for the same two are not computed again. Adapters
    that change layers get the probes that they need, see probed().
    """
    entries, jobs = [], []
    for entry in stack.entries:
        if entry.acts and isinstance(entry.adapter, Written):
            solved = _solved(entry.adapter, model, clip, begin)
            opens = following(solved.adapter, entry.permeability)
            entry = replace(entry, adapter=entry.adapter.computed(solved.adapter), permeability=opens)
            jobs.append(solved.job)
        entries.append(probed(entry, model, clip, begin))
    return ErasureStack(tuple(entries)), jobs


def _solved(written, model, clip, begin):
    if clip is None:
        raise ErasureError(
            f'The row "{written.describe()}" of the stack is words, which a text encoder has to read; connect clip, '
            "that of the same checkpoint."
        )
    key = ("written", written.words, written.keep, written.kind, KEPT.key_of(model))
    found = KEPT.get(clip, key)
    if found is None:
        job = daily_job(written.words, tuple(parse_preserved(written.keep)), written.kind)
        found = KEPT.keep(clip, key, Solved(job, erasure_of(job, model, clip, begin)))
    return found
