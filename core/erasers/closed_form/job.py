"""One closed-form erasure from words to adapter; what it needs of the host comes in as functions."""

from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from ...adapters.adapter import Card, ErasureAdapter
from ...text.captions import fitting
from ...text.concepts import Concept, fill, mentions, parse_concepts, same, up_to
from .double_projection import DOUBLE_PROJECTIONS
from .groups import FIRST, NEEDED, SUBJECT
from .method import METHODS, register
from .probes import probes_of
from .rece import RECE, REGULARISED
from .speed import SPEED
from .uce import UCE, Scales

PRESERVED, ONLY_LISTED = REPLACEMENTS = ("preserve", "as published")

for _method in (UCE, RECE, SPEED, DOUBLE_PROJECTIONS, REGULARISED):
    register(_method)


@dataclass(frozen=True)
class Job:
    """What to erase and how.

    preserve: prompts or concepts whose meaning must stay; each also in every template. The empty prompt
    is always preserved. method: name of one of METHODS; settings: of its own kind. rows: one of ROWS, which of a
    prompt's rows are taken where the encoder spreads words over others. edition: one of EDITIONS, for UCE and SPEED.
    added: what of preserve nobody listed.
    """

    concepts: tuple[Concept, ...]
    preserve: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("{}",)
    method: str = "UCE"
    settings: Any = None
    rows: str = NEEDED
    edition: str = FIRST
    added: tuple[str, ...] = ()

    @classmethod
    def of(cls, concepts, preserve=(), templates=("{}",), method="UCE", rows=NEEDED, edition=FIRST, **given):
        """A job with settings by name; those that the method does not have are for others and left out."""
        kind = METHODS[method].settings
        known = {field.name for field in fields(kind)}
        settings = kind(**{name: value for name, value in given.items() if name in known})
        return cls(tuple(concepts), tuple(preserve), tuple(templates), method, settings, rows, edition)

    @classmethod
    def from_text(
        cls, concepts, surrogate, preserve, replacements=PRESERVED, templates=("{}",), built_in=False, **given
    ):
        """A job from the lines of a text: see parse_concepts(); given: as of() takes them.

        built_in: whether the templates are this pack's own. Those that name a concept are left out then, and the
        weights are those of one concept in one caption, for which they are published: the anchor weight counts for
        each pair of prompts, and the preserve scale for each concept.

        Where nothing replaces a concept, Double Projections looks for a safe anchor itself, as published. replacements:
        one of REPLACEMENTS, whether those that no line preserves are preserved as well, see unlisted().
        """
        parsed = parse_concepts(concepts, surrogate)
        added = unlisted(parsed, preserve) if replacements == PRESERVED else ()
        safe_anchor = not any(concept.surrogate for concept in parsed)
        templates = fitting(templates, [concept.text for concept in parsed]) if built_in else templates
        job = cls.of(parsed, (*preserve, *added), templates, safe_anchor=safe_anchor, **given)
        return replace(job, added=added, settings=job.evened_settings() if built_in else job.settings)

    def evened_settings(self):
        """Its settings with the weights of UCE, which are for one concept in one caption, for all of them."""
        if not isinstance(self.settings, Scales):
            return self.settings
        anchor, kept = self.settings.anchor * len(self.pairs()), self.settings.preserve_scale * len(self.concepts)
        return replace(self.settings, anchor=anchor, preserve_scale=kept)

    @property
    def rounds(self):
        """How often its method says that it is a step further."""
        return METHODS[self.method].rounds(self.settings)

    def erases(self, text):
        """Whether a text is one of the concepts."""
        return any(same(text, concept.text) for concept in self.concepts)

    @cached_property
    def heads(self):
        """{(prompt, its subject): the prompt up to the subject's end} where that has to be encoded, see up_to()."""
        words = [w for c in self.concepts for w in (c.text, c.surrogate)]
        words += [word for word in self.captions().values() if word]
        found = {(fill(t, word), word): up_to(t, word) for t in self.templates for word in words}
        return {place: head for place, head in found.items() if head}

    def pairs(self):
        """(concept's index, prompt with the concept, the same prompt with its surrogate)."""
        return [
            (i, fill(template, c.text), fill(template, c.surrogate))
            for i, c in enumerate(self.concepts)
            for template in self.templates
        ]

    def captions(self):
        """{prompt to preserve: what it is about}, the empty prompt first, without what is to be erased."""
        found = {"": ""}
        lines = [line for line in self.preserve if not self.erases(line)]  # else the two wishes cancel
        for line in lines:
            found.setdefault(line, line)
        for line in lines:
            for template in self.templates:
                found.setdefault(fill(template, line), line)
        return found

    def preserved(self):
        """The prompts to preserve, without repeats."""
        return list(self.captions())

    def retained_captions(self):
        """The captions that SPEED retains: those that name no concept, as published.

        Without the empty prompt where only subject tokens count: its start token is a constraint of its own.
        """
        names = [c.text for c in self.concepts]
        kept = {p: word for p, word in self.captions().items() if not any(mentions(p, name) for name in names)}
        if self.settings.tokens == SUBJECT:
            kept.pop("", None)
        return kept

    def prompts(self):
        """Every prompt that has to be encoded, without repeats."""
        words = [w for c in self.concepts for w in (c.text, c.surrogate)]
        pairs = [prompt for _, *both in self.pairs() for prompt in both]
        return list(dict.fromkeys([*words, *pairs, *self.preserved(), *self.heads.values()]))


def unlisted(concepts, preserve):
    """What takes the place of Concepts and is not preserved yet, where other things are.

    To keep only its neighbours leaves one direction in which a replacement may go, and that is the way from it to the
    concept: its prompt then draws what is erased.
    """
    words = dict.fromkeys(concept.surrogate for concept in concepts if concept.surrogate)
    known = [*preserve, *(concept.text for concept in concepts)]
    return tuple(word for word in words if preserve and not any(same(word, line) for line in known))


def solve(job, encoded, weight_gram=None, on_round=None):
    """TextMap of a job at one text entry. encoded: its prompts there; weight_gram, on_round: see Method."""
    return METHODS[job.method].solve(job, encoded, weight_gram, on_round)


def erase(job, entries, family, text_encoder, weight_gram=None, on_round=None, others=MappingProxyType({})):
    """ErasureAdapter of a job.

    entries: {name of a text entry: Encoded of the job's prompts there}, the main one first, whose layers weight_gram is
    of; family and text_encoder go on the card. others: the same of everyday_captions(), which the probes need; maps of
    entries that are not among them get none.
    """
    settings = {"preserve": list(job.preserve), "templates": list(job.templates), **asdict(job.settings)}
    if job.edition != FIRST:
        settings["edition"] = job.edition
    names, surrogates = (tuple(getattr(c, part) for c in job.concepts) for part in ("text", "surrogate"))
    card = Card(job.method, names, surrogates, family, text_encoder, settings)
    maps = {}
    for name, encoded in entries.items():
        main = not maps
        found = solve(job, encoded, weight_gram if main else None, on_round if main else None)
        probes = probes_of(job, encoded, others[name]) if name in others else ()
        maps[name] = replace(found, normed=encoded.behind_norm, probes=probes)
    return ErasureAdapter(card, {"map": maps})
