"""Calibrations of the memorisation detector, in models/erasure_adapters/calibration; found by what a model answers."""

import hashlib
import json
import os

import folder_paths

from ...errors import ErasureError
from ...files import write_whole
from ...measures.detection import FEWEST, Calibration
from ..model.layers import family_name
from ..runs.sampling import conditioning, probe, probe_point
from .folders import CATEGORY, not_saved

PROBED = ("", "a photo of a dog", "an oil painting of a city at night")
NUMBERS, DIGITS = 256, 6  # of each answer
LARGEST = 1 << 24  # bytes of a calibration


def model_probe(model, clip, settings):
    """Numbers of what a MODEL makes of one noise for some texts, by which it is known again."""
    point = probe_point(model, settings)
    found = [probe(model, conditioning(clip, text), point, NUMBERS, DIGITS) for text in PROBED]
    return tuple(sum(found, []))


def _folder():
    return os.path.join(folder_paths.get_folder_paths(CATEGORY)[0], "calibration")


def _stem(model, settings):
    digest = hashlib.sha256(json.dumps([family_name(model), settings], sort_keys=True).encode()).hexdigest()[:12]
    return f"{family_name(model)}_{digest}_"


def _files(model, settings):
    """Files of calibrations for these settings, of whatever model of the family."""
    stem, folder = _stem(model, settings), _folder()
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if name.startswith(stem) and name.endswith(".json"))


def _read(name):
    path = os.path.join(_folder(), name)
    if os.path.getsize(path) > LARGEST:
        raise ErasureError(
            f'The calibration file "{name}" is damaged ({os.path.getsize(path)} bytes); delete it and calibrate again '
            "with benign prompts."
        )
    with open(path, encoding="utf-8", errors="replace") as file:
        return Calibration.from_json(file.read(), name)


def find(model, settings, numbers):
    """(Calibration, file name) that fits a MODEL's probe best, or (None, None).

    Raises ErasureError when none fits and a file is damaged, since that may have been the one.
    """
    fitting, damage = [], None
    for name in _files(model, settings):
        try:
            found = _read(name)
        except ErasureError as error:
            damage = error
        else:
            fitting += [(found.distance(numbers), found, name)] if found.fits(numbers) else []
    if fitting:
        return min(fitting, key=lambda one: one[0])[1:]
    if damage is not None:
        raise damage
    return None, None


def calibrate(detector, prompts, on_evaluations=lambda done: None):
    """(Calibration, where it is) of benign prompts under a Detector's settings, stored for later."""
    ordinary = detector.measure(detector.texts(prompts), on_evaluations=on_evaluations)
    numbers = model_probe(detector.model, detector.clip, detector.settings)
    found = Calibration(detector.said, numbers, tuple(trace.score for trace in ordinary.traces))
    return found, f"stored as calibration/{store(detector.model, found)}"


def calibration_for(detector):
    """(Calibration, where it is) that fits a Detector's model and settings, or (None, what to do about it)."""
    numbers = model_probe(detector.model, detector.clip, detector.settings)
    found, name = find(detector.model, detector.said, numbers)
    if found is not None:
        return found, f"calibration/{name}"
    return None, (
        "this model has no calibration for these settings. Write ordinary prompts into benign_prompts once "
        f"({FEWEST} or more, better 100)."
    )


def store(model, calibration):
    """Writes a calibration and returns the file's name; an earlier one of the same model and settings makes way."""
    _, earlier = _earlier(model, calibration)
    name = earlier or f"{_stem(model, calibration.settings)}{_short(calibration.probe)}.json"
    try:
        os.makedirs(_folder(), exist_ok=True)
        write_whole(os.path.join(_folder(), name), calibration.to_json().encode("utf-8"))
    except OSError as error:
        raise not_saved(name, error) from error
    return name


def _earlier(model, calibration):
    try:
        return find(model, calibration.settings, calibration.probe)
    except ErasureError:  # a damaged file is no reason not to calibrate
        return None, None


def _short(probe):
    return hashlib.sha256(json.dumps(probe).encode()).hexdigest()[:8]
