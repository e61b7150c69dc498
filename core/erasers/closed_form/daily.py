"""The erasure that a few words ask for: what is not said is chosen by the kind of concept.

UCE with captions is the choice for every kind and family: of all in benchmarks/results/erasure_quality.md only it
leaves nothing of any concept and nearly all others right, with the numbers that it was published with. What differs
between families, which rows of a prompt carry a concept and whether the pooled vector is read, the methods ask the
family themselves.
"""

from ...text.captions import captions_of
from ...text.concepts import parse_templates
from .job import Job

METHOD = "UCE"
MOST_NAMED = 5  # concepts in a receipt


def daily_job(remove, preserved, kind, method=METHOD, replace_with="", templates="", **settings):
    """Job to remove what a text names, one concept per line, and to keep the prompts in `preserved`.

    kind: one of the captions' KINDS, whose captions and replacement count where templates and replace_with are empty.
    """
    captions = captions_of(kind)
    shapes = parse_templates(templates) if templates.strip() else captions.templates
    surrogate = replace_with.strip() or captions.surrogate
    return Job.from_text(remove, surrogate, preserved, method=method, templates=shapes, **settings)


def receipt(job):
    """One line on what a job erases and keeps: "Erased: star -> circle. Kept: 7. Captions: 16.".

    What nobody listed is named: "Kept: 7 and what comes instead (circle).".
    """
    names = [f"{c.text} -> {c.surrogate}" if c.surrogate else c.text for c in job.concepts]
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    kept = str(sum(not job.erases(line) for line in job.preserve) - len(job.added))
    if job.added:
        kept += f" and what comes instead ({', '.join(job.added[:MOST_NAMED])})"
    return f"Erased: {', '.join(names[:MOST_NAMED])}{more}. Kept: {kept}. Captions: {len(job.templates)}."
