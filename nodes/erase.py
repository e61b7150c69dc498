"""Closed-form erasure as a node."""

import hashlib

from ..core.adapters.stack import Entry, ErasureStack
from ..core.erasers.closed_form.groups import EDITIONS, ROWS, TOKENS
from ..core.erasers.closed_form.job import METHODS, Job, erase, unlisted_replacements
from ..core.erasers.closed_form.presets import CUSTOM, KINDS, chosen, surrogate_of
from ..core.erasers.closed_form.rece import PENALTIES
from ..core.errors import ErasureError
from ..core.host.files.folders import input_text_file, input_text_files
from ..core.host.model.layers import family_name, text_readers
from ..core.host.model.weights import text_gram
from ..core.host.page.progress import Progress
from ..core.host.patches.on_weights import on_layers
from ..core.host.patches.stack import apply_stack
from ..core.host.text.encode import fingerprint
from ..core.host.text.entries import encode_entries
from ..core.text.concepts import parse_concepts, parse_lines
from . import inputs

NONE = "none"
PRESERVED, ONLY_LISTED = REPLACEMENTS = ("preserve", "as published")
BOTH, LEAVE, EDIT, AUTOMATIC = "keys and values", "leave", "edit", "as the model needs"
POOLED = {LEAVE: False, EDIT: True, AUTOMATIC: None}
LAYERS = {BOTH: "", "keys": ".key", "values": ".value"}  # role of the layers


class MembraneErase:
    TITLE = "Erase Concepts (Closed Form)"
    DESCRIPTION = (
        "Removes concepts from the model without any training, in a second or less. The result is an ordinary MODEL; "
        "nothing on disk changes, and the erasure itself comes out as an adapter that can be saved and stacked."
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
    ]
    CATEGORY = "membrane"
    RETURN_TYPES = ("MODEL", "ERASURE_ADAPTER")
    RETURN_NAMES = ("model", "adapter")
    OUTPUT_TOOLTIPS = (
        "The model with the concepts erased. The one that came in is unchanged.",
        "The erasure by itself, to save or to put on other models with the same text encoder.",
    )
    FUNCTION = "erase"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": inputs.model("The model to erase from."),
                "clip": inputs.CLIP,
                "concepts": inputs.text(
                    "star -> circle", "What to erase, one concept per line. 'concept -> replacement' says what comes "
                    "instead for that line.",
                ),
                "replace_with": inputs.line(
                    "", "What comes instead of concepts without a replacement of their own. Empty: nothing in "
                    "particular.",
                ),
                "preserve": inputs.text(
                    "", "Concepts or whole prompts that must keep their meaning, one per line. List close relatives of "
                    "what you erase. The empty prompt is always kept.",
                ),
                "method": inputs.choice(
                    METHODS, "UCE", "UCE: one edit, gentle. RECE: adds rounds that look for text vectors which "
                    "still bring the concept back and erases those too; harder on the rest. SPEED, Double Projections: "
                    "protect what you preserve and edit in the space beside it.",
                ),
                "strength": inputs.strength(
                    "How much of the erasure to use. 0 changes nothing at all, 1 is the method as published, above 1 "
                    "pushes further, below 0 brings more of the concept."
                ),
            },
            "optional": {
                "templates": inputs.text(
                    "{}\na photo of {}\na picture of a {}", "Captions in which the concept is erased, one per line, {} "
                    "is its place. Captions like the ones you will write make the erasure much more thorough.",
                ),
                "erase_scale": inputs.number(
                    1.0, 0.0, 100.0, 0.01, "Weight of the erased concepts in the solution. Higher erases more "
                    "thoroughly.", round=False,
                ),
                "preserve_scale": inputs.number(
                    1.0, 0.0, 100.0, 0.01, "Weight of the preserved prompts. Higher protects them better against side "
                    "effects.", round=False,
                ),
                "anchor": inputs.number(
                    0.5, 0.0001, 100.0, 0.0001, "Weight of changing nothing. Lower erases more thoroughly, higher is "
                    "gentler. The published value is 0.5.", round=False,
                ),
                "epochs": inputs.whole(1, 1, 20, "Rounds of RECE; 3 for nudity. UCE ignores it.", step=None),
                "penalty": inputs.number(
                    0.1, 0.0001, 100.0, 0.0001, "RECE: 0.1 for easy concepts, 0.001 for hard ones. UCE ignores it.",
                    round=False,
                ),
                "tau": inputs.number(
                    0.1, 0.0, 100.0, 0.0001, "SPEED: how weak a direction of the preserved prompts may be and still be "
                    "protected. 0 protects all of them exactly, higher leaves more room to erase.", round=False,
                ),
                "rho": inputs.number(
                    1.0, 0.0001, 100.0, 0.0001, "SPEED: weight of changing nothing. Lower erases harder: 1 for objects "
                    "and styles, 0.05 for many people at once.", round=False,
                ),
                "tokens": inputs.choice(
                    TOKENS, TOKENS[0], "SPEED and Double Projections: which tokens of a prompt are erased and "
                    "protected. subject: the last one of the concept. all: every one.",
                ),
                "preset": inputs.choice(
                    KINDS, CUSTOM, "custom: the widgets count. object, style, person, nudity: the published numbers of "
                    "the method for that kind count instead of the templates and all numbers here.",
                ),
                "preserve_file": inputs.choice(
                    [NONE, *input_text_files()], NONE, "A text file in ComfyUI's input folder with more to preserve, "
                    "one concept or prompt per line.",
                ),
                "penalty_on": inputs.choice(
                    PENALTIES, PENALTIES[0], "RECE: what the penalty keeps small of the vectors it finds. length: "
                    "their size, as in all published runs. The others are the variants of the published code.",
                ),
                "layers": inputs.choice(
                    LAYERS, BOTH, "Which layers hear the erased text. keys and values: all, at the text itself. keys "
                    "or values: only those, as changes of this model's layers (SPEED is published for values).",
                ),
                "pooled": inputs.choice(
                    POOLED, AUTOMATIC, "The pooled vector that SDXL, Flux.1, SD3 and others read beside the text. "
                    "leave: it stays as it is. edit: erased from by the same formulas; erases more, damages more. "
                    "as the model needs: edit on transformers, leave on SDXL as published.",
                ),
                "rows": inputs.choice(
                    ROWS, ROWS[0], "Models with T5 or a language model only: which of a prompt's vectors carry a "
                    "concept. as the encoder needs: all that the words reach. as published: from the concept's last "
                    "word on (UCE), that word alone (SPEED), as for CLIP.",
                ),
                "replacements": inputs.choice(
                    REPLACEMENTS, PRESERVED, "Where you preserve something: whether replacements are preserved, too. "
                    "preserve: yes, else their own prompts may draw what is erased. as published: only what you list.",
                ),
                "edition": inputs.choice(
                    EDITIONS, EDITIONS[0], "UCE and SPEED. first: as before. scripts of 2025: UCE edits and preserves "
                    "the last token of the concept alone, and no empty prompt; SPEED sums over all tokens and keeps "
                    "the best of 20 clusterings of the empty prompt.",
                ),
                "lam": inputs.number(
                    0.0, 0.0, 100.0, 0.0001, "SPEED: slack of what the start token and the empty prompt keep. 0 keeps "
                    "them exactly; 0.5 is published for nudity.", round=False,
                ),
                "prior_filter": inputs.switch(
                    True, "SPEED: protect only preserved prompts that the erasure would disturb more than the mean, as "
                    "published. Off: protect all of them.",
                ),
            },
        }  # fmt: skip

    @classmethod
    def VALIDATE_INPUTS(cls, preserve_file=NONE):
        # named here so that a missing file gives a sentence; the host then skips its own list check
        try:
            preserve_text(preserve_file)
        except ErasureError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, preserve_file=NONE, **others):
        return hashlib.sha256(preserve_text(preserve_file).encode()).hexdigest()

    def erase(
        self, model, clip, concepts, replace_with, preserve, method, strength,
        templates="{}", erase_scale=1.0, preserve_scale=1.0, anchor=0.5, epochs=1, penalty=0.1,
        tau=0.1, rho=1.0, tokens=TOKENS[0], preset=CUSTOM, preserve_file=NONE, penalty_on=PENALTIES[0], layers=BOTH,
        pooled=AUTOMATIC, rows=ROWS[0], replacements=PRESERVED, edition=EDITIONS[0], lam=0.0, prior_filter=True,
    ):  # fmt: skip
        preserved = tuple(parse_lines(f"{preserve}\n{preserve_text(preserve_file)}"))
        parsed = tuple(parse_concepts(concepts, replace_with.strip() or surrogate_of(preset, method)))
        settings = chosen(preset, method, len(preserved), {
            "templates": templates, "erase_scale": erase_scale, "preserve_scale": preserve_scale, "anchor": anchor,
            "epochs": epochs, "penalty": penalty, "penalty_on": penalty_on, "tau": tau, "rho": rho, "tokens": tokens,
            "lam": lam, "prior_filter": prior_filter,
        })  # fmt: skip
        if replacements == PRESERVED:
            preserved += unlisted_replacements(parsed, preserved)
        safe_anchor = not any(concept.surrogate for concept in parsed)
        job = Job.of(parsed, preserved, method=method, rows=rows, edition=edition, safe_anchor=safe_anchor, **settings)
        prompts, needs_gram = job.prompts(), METHODS[method].needs_gram
        count = len(list(text_readers(model))) if needs_gram else 0
        progress = Progress(len(prompts) + count + job.rounds)
        entries = encode_entries(model, clip, prompts, progress.at, POOLED[pooled])
        progress.next_phase(len(prompts))
        gram = text_gram(model, progress.at) if needs_gram else None
        progress.next_phase(count)
        adapter = erase(job, entries, family_name(model), fingerprint(clip), gram, progress.at)
        progress.next_phase(job.rounds)
        if layers != BOTH:
            adapter = on_layers(model, adapter, LAYERS[layers])
        return apply_stack(model, ErasureStack((Entry(adapter, strength),))), adapter


def preserve_text(name):
    """Content of a file in the input folder, nothing for none."""
    return "" if name == NONE else input_text_file(name)


NODES = [MembraneErase]
