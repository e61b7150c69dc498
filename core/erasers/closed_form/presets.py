"""What the published scripts set for each kind of concept; the numbers of each method are in its own file."""

from dataclasses import dataclass

from ...text.captions import is_automatic, templates_of
from .method import METHODS

CUSTOM = "custom"


@dataclass(frozen=True)
class Preset:
    """One kind of concept. surrogate: what replaces a concept that names no replacement; templates: of captions."""

    surrogate: str
    templates: tuple[str, ...]


# Surrogates: the scripts of RECE (train_uce.py, train*.py) and SPEED. Templates of objects and styles: what UCE's
# script of 2025 adds with --expand_prompts; of people ours, in the same manner.
PRESETS = {
    "object": Preset("", ("{}", "image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}")),
    "style": Preset("art", ("{}", "painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}")),
    "person": Preset(
        "person", ("{}", "image of {}", "photo of {}", "a portrait of {}", "a picture of {}", "a painting of {}")
    ),
    "nudity": Preset("", ("{}",)),
}
KINDS = (CUSTOM, *PRESETS)


def published(kind, method, preserved):
    """Settings of a job for one of PRESETS and a method; preserved: number of lines on the preserve list.

    UCE and RECE weigh a preserved prompt by 1 / the number of them, the empty one included, and at least 0.1.
    """
    settings = dict(METHODS[method].presets.get(kind, {}))
    if METHODS[method].by_preserved:
        settings["preserve_scale"] = round(max(0.1, 1 / (preserved + 1)), 3)
    return settings


def chosen(kind, method, preserved, given):
    """Settings and templates of a job, as Job.from_text() takes them: for "custom" the given ones, whose templates are
    lines, else those published."""
    if kind == CUSTOM:
        lines = given["templates"]
        return given | {"templates": tuple(templates_of(lines)), "built_in": is_automatic(lines)}
    return {"templates": PRESETS[kind].templates, **published(kind, method, preserved)}


def surrogate_of(kind, method):
    """What replaces a concept that names no replacement; Double Projections finds that itself, as published, and
    "custom" has none."""
    if kind == CUSTOM:
        return ""
    return "" if METHODS[method].finds_surrogate else PRESETS[kind].surrogate
