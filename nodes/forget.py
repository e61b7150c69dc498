"""Erasing concepts with a few words, and the settings that are left out there."""

from ..core.erasers.closed_form.daily import daily_job, receipt
from ..core.host.page.progress import Progress
from ..core.host.runs.erasing import TEXT, erasure_of, following, put_on
from ..core.text.captions import KINDS
from ..core.text.concepts import parse_preserved
from . import closed_form, inputs
from .closed_form import LAYERS, NONE, POOLED, preserve_stamp, preserve_text, validate_preserve_file
from .labels import labelled
from .shown import part, shown

SETTINGS = "ERASURE_SETTINGS"  # {"job": settings of a job, "run": of erasure_of(), "preserve": more lines to keep}


class MembraneForget:
    TITLE = "Erase Concepts"
    DESCRIPTION = (
        "Removes what you name from the model, in a second or so and without training. Nothing on disk changes. Works "
        "with Stable Diffusion 1, 2 and XL and with the transformers that docs/families.md lists."
    )
    SEARCH_ALIASES = [
        "forget", "remove", "delete", "ban", "block", "nsfw", "censor", "unlearn", "remove concept", "remove object",
        "remove style", "concept erasure", "negative prompt", "eraser",
    ]  # fmt: skip
    CATEGORY = "membrane/erase"
    RETURN_TYPES = ("MODEL", "CLIP", "ERASURE_ADAPTER", "STRING")
    RETURN_NAMES = ("model", "clip", "adapter", "report")
    OUTPUT_TOOLTIPS = (
        "The model without it. The one that came in is unchanged.",
        "The text encoder as it came in, so that the node fits between a loader and the prompts.",
        "The erasure by itself, to save or to stack.",
        "What was erased, and how your words were taken.",
    )
    FUNCTION = "forget"

    @classmethod
    def INPUT_TYPES(cls):
        required = {
            "model": inputs.model("The model to erase from."),
            "clip": inputs.CLIP,
            "remove": inputs.text(
                "", "What to remove, one concept per line. 'concept -> replacement' says what comes instead.",
                placeholder="What to remove, one per line: van gogh -> a painting",
            ),
            "keep": inputs.text(
                "", "What must stay as it is, one concept or prompt per line. Close relatives of what you remove help "
                "most.", placeholder="What to keep, one per line: claude monet",
            ),
            "kind": inputs.choice(
                KINDS, next(iter(KINDS)), "What kind of thing it is: decides in which captions it is erased, and what "
                "comes instead where you do not say it.",
            ),
            "strength": inputs.strength(
                "How much to remove. 0 changes nothing at all, 1 is all of it, above 1 pushes further."
            ),
            "only_where_asked": inputs.switch(
                True, "Acts as far as a prompt asks for it, so that all other prompts give the same picture as before. "
                "Off: acts on every prompt.",
            ),
        }  # fmt: skip
        settings = SETTINGS, {"tooltip": "From Erase Concepts Settings. Without it all is chosen by the kind."}
        optional = {"settings": settings, **closed_form.apply_to()}
        return labelled({"required": required, "optional": optional})

    def forget(self, model, clip, remove, keep, kind, strength, only_where_asked, settings=None, apply_to=TEXT):
        settings = settings or {"job": {}, "run": {}, "preserve": ""}
        preserved = tuple(parse_preserved(f"{keep}\n{settings['preserve']}"))
        job = daily_job(remove, preserved, kind, **settings["job"])
        adapter = erasure_of(job, model, clip, Progress, **settings["run"])
        follows = only_where_asked and apply_to == TEXT
        opens = following(adapter) if follows else None
        erased = put_on(model, adapter, strength, apply_to, opens, clip)
        title, remarks = receipt(job), closed_form.taken(job, clip)
        title += closed_form.BY_WORDS if follows and not adapter.probed else ""
        more = [closed_form.EVERY_PROMPT] if only_where_asked and not follows else []
        report = part(title, [*remarks, *more], warning=bool(remarks))
        return shown((erased, clip, adapter, "\n".join([title, *report["lines"]])), report)


class MembraneForgetSettings:
    TITLE = "Erase Concepts Settings"
    DESCRIPTION = (
        "What Erase Concepts otherwise chooses by itself: the method, its captions and numbers, and which of a model's "
        "layers and vectors are erased from."
    )
    SEARCH_ALIASES = ["forget settings", "erase options", "UCE", "RECE", "SPEED", "captions", "templates"]
    CATEGORY = "membrane/erase"
    RETURN_TYPES = (SETTINGS,)
    RETURN_NAMES = ("settings",)
    OUTPUT_TOOLTIPS = ("For the settings of Erase Concepts.",)
    FUNCTION = "settings"

    @classmethod
    def INPUT_TYPES(cls):
        replace_with = inputs.line(
            "", "What comes instead of concepts without a replacement of their own. Empty: as the kind needs."
        )
        templates = inputs.text(
            "", "Captions in which the concept is erased, one per line, {} is its place. Empty: those of the kind. "
            "Captions like the prompts you write are best.",
            placeholder="Captions, one per line, {} is the concept. Empty: those of the kind",
        )  # fmt: skip
        required = {**closed_form.method(), "replace_with": replace_with}
        optional = {"templates": templates, **closed_form.scales(), **closed_form.numbers(), **closed_form.more()}
        optional |= {**closed_form.editions(), **closed_form.rounds()}
        advanced = [name for name in optional if name != "templates"]
        return labelled({"required": required, "optional": optional}, advanced)

    @classmethod
    def VALIDATE_INPUTS(cls, preserve_file=NONE):
        return validate_preserve_file(preserve_file)

    @classmethod
    def IS_CHANGED(cls, preserve_file=NONE, **others):
        return preserve_stamp(preserve_file)

    def settings(self, method, replace_with, preserve_file=NONE, layers=None, pooled=None, **numbers):
        run = {"role": LAYERS.get(layers, ""), "pooled": POOLED.get(pooled)}
        job = {"method": method, "replace_with": replace_with, **numbers}
        return ({"job": job, "run": run, "preserve": preserve_text(preserve_file)},)


NODES = [MembraneForget, MembraneForgetSettings]
