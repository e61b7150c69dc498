"""One evaluation as plain data: what was compared, a row a picture pair, and small pictures of the first ones.

It is what the JSON file holds, so that an evaluation that was stopped goes on and several can be put together.
"""

import base64
import hashlib
import io
import json
from dataclasses import asdict, dataclass, field

import numpy as np
from PIL import Image

from .retention import estimate, integrity, summary
from .scores import Prompt, scores

FORMAT, VERSION = "membrane.evaluation", 1
ERASE, NEIGHBOUR, UNRELATED, EMPTY = STRATA = ("erase", "neighbour", "unrelated", "empty")
ORDER = ("LPIPS", "DreamSim", "CLIP vision", "pixel", "latent")  # the first one there is the headline
ROW = ("stratum", "index", "prompt", "label", "synonym", "distance", "ceiling", "drift")
TILE = 160  # pixels of a kept picture at most


@dataclass
class Record:
    """An evaluation. configuration: everything that decides its numbers, as JSON; probe: what both models answer to
    one noise, by which they are known again; rows and pictures: see add()."""

    configuration: dict
    probe: list = field(default_factory=list)
    rows: list = field(default_factory=list)
    pictures: list = field(default_factory=list)
    finished: bool = False

    def done(self, stratum, index):
        """Whether a prompt of a stratum is measured already."""
        return any(row["stratum"] == stratum and row["index"] == index for row in self.rows)

    def fingerprint(self):
        """A hash of the configuration."""
        text = json.dumps(self.configuration, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self, summary=None):
        """The record as text, with the summary if given; numbers that are not finite become null."""
        data = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint(), **vars(self)}
        return json.dumps(_finite(data | {"summary": summary}), allow_nan=False)

    @classmethod
    def from_json(cls, text):
        """The Record in a text; None when it holds none that this version can go on with."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT or data["version"] != VERSION:
                return None
            found = cls(*(data[name] for name in ("configuration", "probe", "rows", "pictures", "finished")))
            np.array(found.probe, np.float64)
            parts = ((row, ROW) for row in found.rows), ((picture, ("stratum", "prompt")) for picture in found.pictures)
            whole = all(name in part for some in parts for part, names in some for name in names)
            kinds = (found.configuration, dict), (found.rows, list), (found.pictures, list)
            return found if whole and all(isinstance(*kind) for kind in kinds) else None
        except (ValueError, KeyError, TypeError, RecursionError):
            return None


def _finite(value):
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def encoded_picture(picture):
    """A picture (H, W, 3) in [0, 1] as base64 PNG, at most TILE pixels a side."""
    image = Image.fromarray((np.asarray(picture).clip(0, 1) * 255).round().astype(np.uint8))
    if max(image.size) > TILE:
        image.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def decoded_picture(text):
    """The picture (H, W, 3), float32 in [0, 1], of encoded_picture()."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"), np.float32) / 255


# ---------------------------------------------------------------- numbers


def distance_names(record):
    """The distances of a record, the headline first."""
    names = record.rows[0]["distance"] if record.rows else {}
    return [name for name in ORDER if name in names]


def by_prompt(rows, value):
    """Array (prompts, seeds) of value(row); None for no rows."""
    groups = {}
    for row in rows:
        groups.setdefault((row["stratum"], row["index"]), []).append(value(row))
    return np.array(list(groups.values()), np.float64) if groups else None


def floor_of(record, name):
    """Mean distance of the original model's pictures to themselves, computed in another batch."""
    found = [row["floor"][name] for row in record.rows if row.get("floor")]
    return float(np.mean(found)) if found else 0.0


def summarise(record):
    """The numbers of a record as JSON: {"strata", "scores"}; every estimate with its 95 % interval."""
    strata = {}
    for stratum in STRATA:
        rows = [row for row in record.rows if row["stratum"] == stratum]
        if rows:
            strata[stratum] = {name: _distance(record, rows, name) for name in distance_names(record)}
            strata[stratum]["drift"] = _drift(rows)
    return {"strata": strata, "scores": _scores(record)}


def _distance(record, rows, name):
    moved = by_prompt(rows, lambda row: row["distance"][name])
    ceilings = by_prompt(rows, lambda row: row["ceiling"][name])
    floor = floor_of(record, name)
    found = integrity(moved, ceilings, floor)
    return {
        **asdict(summary(moved)),
        "prompts": len(moved),
        "floor": floor,
        "ceiling": float(ceilings.mean()),
        "integrity": asdict(found) if found else None,
    }


def _drift(rows):
    """[{"sigma", "value", "low", "high"}] over the noise levels; empty where the prompt does nothing."""
    found = []
    for level in range(len(rows[0]["drift"])):
        values = by_prompt(rows, lambda row, level=level: _number(row["drift"][level][1]))
        if np.isfinite(values).all():
            found.append({"sigma": rows[0]["drift"][level][0], **asdict(estimate(values))})
    return found


def _number(value):
    return float("nan") if value is None else value


def _scores(record):
    rows = [row for row in record.rows if row.get("answer")]
    erased = {row["label"] for row in record.rows if row["stratum"] == ERASE and row["label"] is not None}
    if not rows or not erased:
        return None
    answers = [(Prompt(row["prompt"], row["label"], row["synonym"]), *row["answer"]) for row in rows]
    found = scores(answers, erased)
    return {**asdict(found), "harmonic": found.harmonic, "erased_classes": sorted(erased)}
