"""Closed-form erasure as a node for experts: every setting of every method."""

from ..core.erasers.closed_form.daily import receipt
from ..core.erasers.closed_form.groups import EDITIONS, ROWS, TOKENS
from ..core.erasers.closed_form.job import PRESERVED, Job
from ..core.erasers.closed_form.presets import CUSTOM, KINDS, chosen, surrogate_of
from ..core.erasers.closed_form.rece import PENALTIES
from ..core.host.page.progress import Progress
from ..core.host.runs.erasing import TEXT, erasure_of, put_on
from ..core.text.captions import AUTOMATIC as CAPTIONS
from ..core.text.concepts import parse_preserved
from . import inputs
from .closed_form import (
    AUTOMATIC,
    BOTH,
    LAYERS,
    NONE,
    POOLED,
    apply_to,
    editions,
    method,
    more,
    numbers,
    preserve_stamp,
    preserve_text,
    scales,
    taken,
    validate_preserve_file,
)
from .labels import labelled
from .shown import part, shown

RARELY_USED = (
    "erase_scale", "preserve_scale", "anchor", "epochs", "penalty", "tau", "rho", "tokens", "preserve_file",
    "penalty_on", "layers", "pooled", "rows", "apply_to", "replacements", "edition",
    "lam", "prior_filter",
)  # fmt: skip


class MembraneErase:
    TITLE = "Erase Concepts (Expert)"
    DESCRIPTION = (
        "Removes concepts from the model in closed form, without any training, with the settings of every method. The "
        "result is an ordinary MODEL; nothing on disk changes, and the erasure itself comes out as an adapter that can "
        "be saved and stacked. For daily use there is Erase Concepts."
    )
    SEARCH_ALIASES = [
        "unlearn",
        "remove concept",
        "concept erasure",
        "UCE",
        "RECE",
        "forget",
        "negative prompt",
        "censor",
        "remove",
        "delete",
        "ban",
        "block",
        "nsfw",
        "closed form",
    ]
    CATEGORY = "membrane/erase"
    RETURN_TYPES = ("MODEL", "ERASURE_ADAPTER")
    RETURN_NAMES = ("model", "adapter")
    OUTPUT_TOOLTIPS = (
        "The model with the concepts erased. The one that came in is unchanged.",
        "The erasure by itself, to save or to put on other models with the same text encoder.",
    )
    FUNCTION = "erase"

    @classmethod
    def INPUT_TYPES(cls):
        required = {
            "model": inputs.model("The model to erase from."),
            "clip": inputs.CLIP,
            "concepts": inputs.text(
                "", "What to erase, one concept per line. 'concept -> replacement' says what comes instead for that "
                "line.", placeholder="What to erase, one per line: van gogh -> a painting",
            ),
            "replace_with": inputs.line(
                "", "What comes instead of concepts without a replacement of their own. Empty: nothing in "
                "particular.",
            ),
            "preserve": inputs.text(
                "", "Concepts or whole prompts that must keep their meaning, one per line. List close relatives of "
                "what you erase. The empty prompt is always kept.",
                placeholder="What to keep, one per line: claude monet",
            ),
            **method(),
            "strength": inputs.strength(
                "How much of the erasure to use. 0 changes nothing at all, 1 is the method as published, above 1 "
                "pushes further, below 0 brings more of the concept."
            ),
        }  # fmt: skip
        templates = inputs.text(
            CAPTIONS, "Captions in which the concept is erased, one per line, {} is its place; what you preserve is "
            "put into them too. automatic: 24 built-in ones. Captions like the ones you will write are best. {} alone "
            "is the bare word, as published.", placeholder="Captions, one per line, {} is the concept: a photo of {}",
        )  # fmt: skip
        preset = inputs.choice(
            KINDS, CUSTOM, "custom: the widgets count. object, style, person, nudity: the published numbers of the "
            "method for that kind count instead of the templates and all numbers here.",
        )  # fmt: skip
        optional = {
            "templates": templates,
            **scales(),
            **numbers(),
            "preset": preset,
            **more(),
            **apply_to(),
            **editions(),
        }
        return labelled({"required": required, "optional": optional}, RARELY_USED)

    @classmethod
    def VALIDATE_INPUTS(cls, preserve_file=NONE):
        return validate_preserve_file(preserve_file)

    @classmethod
    def IS_CHANGED(cls, preserve_file=NONE, **others):
        return preserve_stamp(preserve_file)

    def erase(
        self, model, clip, concepts, replace_with, preserve, method, strength,
        templates=CAPTIONS, erase_scale=1.0, preserve_scale=1.0, anchor=0.5, epochs=1, penalty=0.1,
        tau=0.1, rho=1.0, tokens=TOKENS[0], preset=CUSTOM, preserve_file=NONE, penalty_on=PENALTIES[0], layers=BOTH,
        pooled=AUTOMATIC, rows=ROWS[0], apply_to=TEXT, replacements=PRESERVED, edition=EDITIONS[0], lam=0.0,
        prior_filter=True,
    ):  # fmt: skip
        preserved = tuple(parse_preserved(f"{preserve}\n{preserve_text(preserve_file)}"))
        surrogate = replace_with.strip() or surrogate_of(preset, method)
        settings = chosen(preset, method, len(preserved), {
            "templates": templates, "erase_scale": erase_scale, "preserve_scale": preserve_scale, "anchor": anchor,
            "epochs": epochs, "penalty": penalty, "penalty_on": penalty_on, "tau": tau, "rho": rho, "tokens": tokens,
            "lam": lam, "prior_filter": prior_filter,
        })  # fmt: skip
        settings |= {"method": method, "rows": rows, "edition": edition, "replacements": replacements}
        job = Job.from_text(concepts, surrogate, preserved, **settings)
        adapter = erasure_of(job, model, clip, Progress, POOLED[pooled], LAYERS[layers])
        remarks = taken(job, clip)
        erased = put_on(model, adapter, strength, apply_to)
        return shown((erased, adapter), part(receipt(job), remarks, warning=bool(remarks)))


NODES = [MembraneErase]
