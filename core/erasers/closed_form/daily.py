"""The erasure that a few words ask for: what is not said is chosen by the kind of concept.

UCE with captions is the choice for every kind and family: of all in benchmarks/results/erasure_quality.md only it
leaves nothing of any concept and nearly all others right, with the numbers that it was published with. What differs
between families, which rows of a prompt carry a concept and whether the pooled vector is read, the methods ask the
family themselves.
"""

from ...text.captions import AUTOMATIC, captions_of, is_automatic, templates_of
from ...text.concepts import Concept, parse_templates
from .job import Job, unlisted

METHOD = "UCE"
MOST_NAMED = 5  # concepts in a receipt


def daily_job(remove, preserved, kind, method=METHOD, replace_with="", templates="", **settings):
    """Job to remove what a text names, one concept per line, and to keep the prompts in `preserved`.

    kind: one of the captions' KINDS, whose captions and replacement count where templates and replace_with are empty;
    so do its captions for the templates "automatic".
    """
    captions = captions_of(kind)
    built_in = is_automatic(templates) or not templates.strip()
    shapes = captions.templates if built_in else parse_templates(templates)
    surrogate = replace_with.strip() or captions.surrogate
    return Job.from_text(remove, surrogate, preserved, method=method, templates=shapes, built_in=built_in, **settings)


def probing_job(card):
    """Job whose texts tell the concepts of a Card, of an adapter that was made in another way, from what it keeps."""
    surrogates = (*card.surrogates, *[""] * len(card.concepts))
    concepts = tuple(Concept(text, surrogate) for text, surrogate in zip(card.concepts, surrogates))
    listed = card.settings.get("preserve")
    kept = tuple(line for line in listed if isinstance(line, str)) if isinstance(listed, list) else ()
    return Job.of(concepts, (*kept, *unlisted(concepts, kept)), templates_of(AUTOMATIC))


def receipt(job):
    """One line on what a job erases and keeps: "Erased: star -> circle. Kept: 7. Captions: 16.".

    What nobody listed is named at the end: "Kept as well, as it comes instead: circle.".
    """
    names = [f"{c.text} -> {c.surrogate}" if c.surrogate else c.text for c in job.concepts]
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    kept = sum(not job.erases(line) for line in job.preserve) - len(job.added)
    added = f" Kept as well, as it comes instead: {', '.join(job.added[:MOST_NAMED])}." if job.added else ""
    return f"Erased: {', '.join(names[:MOST_NAMED])}{more}. Kept: {kept}. Captions: {len(job.templates)}.{added}"
