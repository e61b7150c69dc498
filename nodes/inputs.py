"""Inputs that several nodes share: what they look like on the page, and how their text is read."""

from functools import partial

from ..core.errors import ErasureError
from ..core.host.runs.sampling import SAMPLERS, SCHEDULERS
from ..core.host.text.vision import class_vectors, image_vectors
from ..core.text.concepts import parse_lines

LARGEST_SEED = 2**64 - 1


def text(default, tooltip, **options):
    """A text of several lines; options: of the page, such as placeholder, what an empty one shows."""
    # the page of March 2024 takes {} in such a box for a choice and removes what follows //, unless told not to
    lines = {"multiline": True, "dynamicPrompts": False}
    return "STRING", {**lines, "default": default, "tooltip": tooltip, **options}


def line(default, tooltip, **options):
    """A text of one line."""
    return "STRING", {"default": default, "tooltip": tooltip, **options}


def whole(default, low, high, tooltip, step=1, **options):
    """A whole number; step: None leaves it to the page."""
    steps = {} if step is None else {"step": step}
    return "INT", {"default": default, "min": low, "max": high, "tooltip": tooltip, **steps, **options}


def number(default, low, high, step, tooltip, **options):
    """A number; options: the host's, such as round (False: as it was written)."""
    return "FLOAT", {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip, **options}


def choice(values, default, tooltip, **options):
    """One of several values."""
    return list(values), {"default": default, "tooltip": tooltip, **options}


def switch(default, tooltip, **options):
    """On or off."""
    return "BOOLEAN", {"default": default, "tooltip": tooltip, **options}


def percent(default, tooltip):
    """A part of the sampling."""
    return number(default, 0.0, 1.0, 0.001, tooltip)


def strength(tooltip):
    """How much of an erasure to use."""
    return number(1.0, -10.0, 10.0, 0.05, tooltip)


def model(tooltip):
    return "MODEL", {"tooltip": tooltip}


def stack(tooltip):
    return "ERASURE_STACK", {"tooltip": tooltip}


CLIP = "CLIP", {"tooltip": "The text encoder whose words the model reads."}
BOTH_MODELS = {
    "original": model("The model before the erasure."),
    "erased": model("The same model with the erasure on it."),
    "clip": ("CLIP", {"tooltip": "The text encoder of both."}),
}


def sampling():
    """How both models are sampled; made anew each time, as other packs add samplers."""
    return {
        "seed": whole(0, 0, LARGEST_SEED, "Seed of the first picture; the others follow."),
        "steps": whole(20, 1, 1000, "Steps of the sampler."),
        "cfg": number(7.0, 0.0, 100.0, 0.1, "Guidance.", round=0.01),
        "sampler_name": choice(
            SAMPLERS,
            "euler",
            "Take one without _ancestral or sde: those add noise of their own, and small changes grow.",
        ),
        "scheduler_name": choice(SCHEDULERS, "normal", "As in KSampler."),
        "width": whole(512, 16, 16384, "Width of the pictures.", step=8),
        "height": whole(512, 16, 16384, "Height of the pictures.", step=8),
    }


PROMPTS = text(
    "",
    "Prompts to compare, one per line: with the concept, its relatives, and others.",
    placeholder="Prompts, one per line: with the concept, its relatives, and others",
)


def vision(clip_vision, class_clip):
    """(class_vectors(classes), image_vectors(pictures, width)) of a CLIP's two halves, None for one that is not
    connected."""
    names = None if class_clip is None else partial(class_vectors, class_clip)
    return names, None if clip_vision is None else partial(image_vectors, clip_vision)


def prompt_lines(prompts):
    """The prompts of a text, one per line; raises ErasureError when there is none."""
    lines = parse_lines(prompts)
    if not lines:
        raise ErasureError("No prompt to compare was given; write at least one, each on a line of its own.")
    return lines
