"""What the published scripts set for each kind of concept."""

from dataclasses import dataclass, field

CUSTOM = "custom"


@dataclass(frozen=True)
class Preset:
    """Defaults of one kind. surrogate: what replaces a concept that names no replacement; settings: by method."""

    surrogate: str
    templates: tuple[str, ...]
    settings: dict[str, dict] = field(default_factory=dict)


_UCE = {"erase_scale": 1.0, "anchor": 0.5}
_SPEED = {"tau": 0.1, "rho": 1.0, "lam": 0.0, "prior_filter": True, "tokens": "subject"}
_PROJECTIONS = {"tau": 0.1, "tokens": "subject"}  # no kinds are published for these


def _settings(rece, speed):
    return {
        "UCE": _UCE,
        "RECE": _UCE | {"penalty_on": "length"} | rece,
        "SPEED": _SPEED | speed,
        "Double Projections": _PROJECTIONS,
    }


# Surrogates and numbers: the scripts of RECE (train_uce.py, train*.py) and SPEED. Templates of objects and styles: what
# UCE's script of 2025 adds with --expand_prompts; of people ours, in the same manner.
PRESETS = {
    "object": Preset(
        "",
        ("{}", "image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
        _settings({"epochs": 1, "penalty": 0.1}, {}),
    ),
    "style": Preset(
        "art",
        ("{}", "painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
        _settings({"epochs": 1, "penalty": 0.001}, {}),
    ),
    "person": Preset(
        "person",
        ("{}", "image of {}", "photo of {}", "a portrait of {}", "a picture of {}", "a painting of {}"),
        _settings({"epochs": 1, "penalty": 0.1}, {"tau": 1e-4, "rho": 0.05, "prior_filter": False}),
    ),
    "nudity": Preset("", ("{}",), _settings({"epochs": 3, "penalty": 0.1}, {"rho": 0.7, "lam": 0.5, "tokens": "all"})),
}
KINDS = (CUSTOM, *PRESETS)


def published(kind, method, preserved):
    """Settings of a job for one of PRESETS and a method; preserved: number of lines on the preserve list.

    UCE and RECE weigh a preserved prompt by 1 / the number of them, the empty one included, and at least 0.1.
    """
    settings = dict(PRESETS[kind].settings[method])
    if method in ("UCE", "RECE"):
        settings["preserve_scale"] = round(max(0.1, 1 / (preserved + 1)), 3)
    return settings


def surrogate_of(kind, method):
    """What replaces a concept that names no replacement; Double Projections finds that itself, as published."""
    return "" if method == "Double Projections" else PRESETS[kind].surrogate
