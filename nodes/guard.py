"""Keeping a concept out of what a model samples, by looking at the pictures."""

from ..core.erasers.guard import BACK, BALANCED, DEVIATIONS, START
from ..core.errors import ErasureError
from ..core.host.model.layers import require_unet
from ..core.host.page.progress import Progress
from ..core.host.patches.guard import guard
from ..core.host.runs.guarding import Examples, example_latents, fitted_guard
from ..core.host.runs.sampling import Sampling, conditioning
from ..core.host.runs.steps import require_text_encoder
from ..core.text.concepts import parse_preserved, same
from ..core.text.examples import named_captions, other_captions
from . import inputs
from .labels import labelled
from .shown import part, shown


class MembraneGuard:
    TITLE = "Guard a Concept"
    DESCRIPTION = (
        "Keeps a concept out of what a model samples by looking at the pictures instead of the text: a picture that "
        "begins to show it is drawn anew with another text. All other pictures stay exactly as they were. No weight "
        "changes; for Stable Diffusion 1, 2 and XL."
    )
    SEARCH_ALIASES = ["guard", "safety checker", "moderation", "robust erasure", "adversarial prompt", "jailbreak",
                      "classifier", "visual permeability"]  # fmt: skip
    CATEGORY = "membrane/erase"
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = (
        "The model to sample with; the one that came in stays as it is.",
        "What the guard was fitted on, and how well it tells pictures that it was not fitted on.",
    )
    FUNCTION = "fit"

    @classmethod
    def INPUT_TYPES(cls):
        return labelled({
            "required": {
                "model": inputs.model("The model as you sample with it; erasures may come before or after."),
                "clip": inputs.CLIP,
                "concept": inputs.line("", "What must not be drawn, in a word or a few."),
                "instead": inputs.line("", "What is drawn in its place. Empty: what the negative prompt alone draws."),
                "keep": inputs.text(
                    "", "What the guard must tell it from, one per line: close relatives above all. Everyday things "
                    "are always among them.", placeholder="What must not fire it, one per line",
                ),
                "sensitivity": inputs.choice(
                    DEVIATIONS, BALANCED, "How far a picture must stand out from the others, in their standard "
                    "deviations, to be drawn anew. careful: 5, other pictures are safest. balanced: 4. strict: 3.2, "
                    "the concept is least likely to pass.",
                ),
                "drawn_from": inputs.choice(
                    BACK, START, "Where a picture is drawn anew from. the first noise: nothing of it is left. a fifth "
                    "of the way: its ground and some of its colours stay; only with something to draw instead.",
                ),
                "examples": inputs.whole(
                    48, 8, 1000, "Pictures of the concept that the guard is fitted on, and twice as many others, all "
                    "drawn by the model itself.",
                ),
                **inputs.sampling(),
            },
            "optional": {
                "pictures": ("IMAGE", {"tooltip": "Pictures of the concept in place of drawn ones, 8 or more; needs "
                                       "the VAE. For a model that no longer draws it."}),
                "latents": ("LATENT", {"tooltip": "The same as latents of this model, of the size that you sample."}),
                "vae": ("VAE", {"tooltip": "The VAE that belongs to the model, for pictures."}),
            },
        }, concept="What must not be drawn", instead="What is drawn instead", keep="What must not fire it",
           sensitivity="How sensitive", drawn_from="Drawn anew from", examples="Pictures it is fitted on",
           pictures="Pictures of the concept", latents="Latents of the concept")  # fmt: skip

    def fit(
        self, model, clip, concept, instead, keep, sensitivity, drawn_from, examples, seed, steps, cfg, sampler_name,
        scheduler_name, width, height, pictures=None, latents=None, vae=None,
    ):  # fmt: skip
        concept, instead, kept = concept.strip(), instead.strip(), parse_preserved(keep)
        require_words(concept, instead, kept)
        require_unet(model, "A guard", "erase the concept from its text (Erase Concepts), which every family takes")
        require_text_encoder(model, clip)
        settings = Sampling(steps, cfg, sampler_name, scheduler_name, width, height)
        given = example_latents(model, vae, pictures, latents, settings)
        named = named_captions([*kept, *([instead] if instead else [])], examples)
        neutral = other_captions(concept, 2 * examples - len(named))
        wanted = [] if given is not None else named_captions([concept], examples)
        progress = Progress(2 * (len(wanted) + len(named) + len(neutral)) + (0 if given is None else len(given)))
        source = Examples(model, clip, settings, seed, progress.at)
        given = source.drawn(wanted) if given is None else given
        others = source.drawn([*named, *neutral])
        fitted = fitted_guard(source, given, others, len(named), DEVIATIONS[sensitivity])
        if not fitted.used:
            raise not_told(concept, fitted)
        empty, other = conditioning(clip, ""), conditioning(clip, instead) if instead else None
        patched = guard(model, fitted, empty, other, BACK[drawn_from] if instead else 0.0)
        text = said(concept, fitted)
        return shown((patched, text), part(f"Guard on {concept}", text, warning=in_part(fitted)), text=(text,))


def require_words(concept, instead, kept):
    """Raises ErasureError for a concept that is missing, or that other words repeat."""
    if not concept:
        raise ErasureError("No concept was given; write what must not be drawn, in a word or a few.")
    if instead and same(concept, instead):
        raise ErasureError(f'"{concept}" would be drawn in place of itself; write something else, or nothing.')
    if again := next((word for word in kept if same(concept, word)), None):
        raise ErasureError(f'"{again}" is both what must not be drawn and what must not fire the guard; take one away.')


def not_told(concept, fitted):
    """The ErasureError on a guard that tells too little."""
    seen = max(int((level.concept > fitted.threshold).sum()) for level in fitted.levels)
    return ErasureError(
        f'The guard cannot tell pictures of "{concept}" from others: at no noise level more than {seen} of '
        f"{len(fitted.levels[0].concept)} stand out by {fitted.threshold:g} standard deviations; see that the model "
        "draws the concept, ask for more example pictures, or choose a stricter guard."
    )


def in_part(fitted):
    """Whether a guard misses some pictures of the concept, or fires for others."""
    (seen, of), (wrong, _) = fitted.fired()
    return wrong > 0 or seen < 0.9 * of


def said(concept, fitted):
    """The report."""
    (seen, of), (wrong, others) = fitted.fired()
    lines = [
        f"Fitted on {of} pictures of {concept} and {others} others; used at {len(fitted.used)} of "
        f"{len(fitted.levels)} noise levels.",
        f"Left out of the fit in turn, {seen} of {of} pictures of {concept} fire it, and {wrong} of {others} others.",
    ]
    if fitted.left_out:
        lines.append(f"{fitted.left_out} neutral pictures look like {concept} and are not among the others.")
    if in_part(fitted):
        lines.append("It does not tell all of them: more example pictures help, and close relatives as what must not "
                     "fire it.")  # fmt: skip
    return "\n".join([*lines, "It is kept in memory with this model; a saved checkpoint does not have it."])


NODES = [MembraneGuard]
