"""Moving a prompt's text so that it no longer draws a memorised picture, by gradient."""

from ..core.erasers.mitigation import Softening
from ..core.errors import ErasureError
from ..core.host.page.progress import Progress
from ..core.host.runs.sampling import SAMPLERS, SCHEDULERS, Sampling, conditioning
from ..core.host.runs.softening import Softener
from ..core.text.concepts import parse_lines
from . import inputs
from .labels import labelled
from .shown import part, shown

SCHEDULE, MEASURED = 10, 5  # a short schedule and its first steps, at which memorised prompts show on every family


class MembraneSoftenPrompt:
    TITLE = "Soften a Memorised Prompt"
    DESCRIPTION = (
        "Moves the text of a prompt a little, so that it no longer draws a memorised picture: until it pulls only a "
        "share of what it did, or as ordinary prompts do. No weight changes, and only this prompt is touched."
    )
    SEARCH_ALIASES = ["memorised pictures", "memorization mitigation", "replication", "copied training images",
                      "prompt embedding optimisation", "Wen"]  # fmt: skip
    CATEGORY = "membrane/memorisation"
    RETURN_TYPES = ("CONDITIONING", "STRING")
    RETURN_NAMES = ("positive", "report")
    OUTPUT_TOOLTIPS = (
        "The prompt to sample with; the one that came in, where it did not pull too much.",
        "How far the text pulled before and after.",
    )
    FUNCTION = "soften"

    @classmethod
    def INPUT_TYPES(cls):
        return labelled({
            "required": {
                "model": inputs.model("The model you sample with, with its LoRAs and erasures; it stays as it is."),
                "positive": ("CONDITIONING", {"tooltip": "The prompt that draws a memorised picture."}),
                "negative": ("CONDITIONING", {"tooltip": "The empty prompt, which the pull is measured against."}),
                "share": inputs.number(
                    0.5, 0.05, 1.0, 0.05, "Without ordinary prompts: the share of its own pull that is left to the "
                    "prompt. 1 leaves it as it is.", round=0.01,
                ),
                "steps": inputs.whole(20, 1, 200, "Steps at most; more where the report says that the target was not "
                    "reached. Published: 10."),
                "seeds": inputs.whole(1, 1, 16, "Noises that the text is moved with."),
                "seed": inputs.whole(0, 0, inputs.LARGEST_SEED, "Seed of the first noise; the others follow."),
                "cfg": inputs.number(7.5, 0.0, 100.0, 0.1, "Guidance, as you sample with it.", round=0.01),
                "sampler_name": inputs.choice(SAMPLERS, "euler", "As in KSampler."),
                "scheduler": inputs.choice(SCHEDULERS, "normal", "As in KSampler."),
                "width": inputs.whole(512, 16, 16384, "Width of the pictures.", 8),
                "height": inputs.whole(512, 16, 16384, "Height of the pictures.", 8),
            },
            "optional": {
                "clip": ("CLIP", {"tooltip": "The text encoder, for the ordinary prompts."}),
                "ordinary_prompts": inputs.text(
                    "", "Ordinary prompts like yours, one per line, 5 or more. A prompt that pulls no more than the "
                    "strongest of them is left exactly as it is; any other is softened until it does the same."
                ),
            },
        }, positive="Prompt", negative="Empty prompt", share="Share of its pull left", seeds="Noises",
           ordinary_prompts="Ordinary prompts")  # fmt: skip

    def soften(
        self, model, positive, negative, share, steps, seeds, seed, cfg, sampler_name, scheduler, width, height,
        clip=None, ordinary_prompts="",
    ):  # fmt: skip
        lines = parse_lines(ordinary_prompts)
        require_softenable(positive, negative, lines, clip)
        settings = Sampling(SCHEDULE, cfg, sampler_name, scheduler, width, height)
        each = [(seed + i) % 2**64 for i in range(seeds)]
        softener = Softener(model, negative, each, settings, MEASURED)
        rows = sum(len(vectors) for vectors, _ in positive)
        progress = Progress(len(lines) + rows * steps)
        pulls = []
        for line in lines:
            pulls.append(softener.pull(conditioning(clip, line)))
            progress.at(len(pulls))
        progress.next_phase(len(lines))
        target = max(pulls) if pulls else None
        found, report = softener.soften(positive, Softening(target, share, steps), progress.at)
        progress.at(rows * steps)
        text = "\n".join(map(said, report))
        short = any(row.after > row.target for row in report)
        return shown((found, text), part("Prompt softened", text, warning=short), text=(text,))


def require_softenable(positive, negative, lines, clip):
    """Raises ErasureError for an empty conditioning, or ordinary prompts that cannot be encoded."""
    for name, found in (("positive", positive), ("negative", negative)):
        if not found:
            raise ErasureError(f"The {name} conditioning is empty; connect what CLIP Text Encode gives.")
    if lines and clip is None:
        raise ErasureError("Ordinary prompts were given without a CLIP; connect the text encoder of the model.")


def said(row):
    """One line of the report on a Softened."""
    if not row.steps:
        return f"Left exactly as it is: the text pulls {row.before:.2f}, at most {row.target:.2f} is wanted."
    line = f"The text pulled {row.before:.2f} and pulls {row.after:.2f} after {row.steps} steps"
    if row.after <= row.target:
        return f"{line}; {row.target:.2f} was wanted."
    return f"{line}; {row.target:.2f} was wanted and not reached, raise steps."


NODES = [MembraneSoftenPrompt]
