"""One evaluation as plain data: what was compared, one row for each pair of pictures, and some small pictures.

This is what the JSON file holds, so that an evaluation that was stopped goes on and several can be put together.
"""

import base64
import hashlib
import io
import json
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
from PIL import Image

FORMAT, VERSION = "membrane.evaluation", 1
ERASE, NEIGHBOUR, UNRELATED, EMPTY = STRATA = ("erase", "neighbour", "unrelated", "empty")
TITLES = {
    ERASE: "to be erased",
    NEIGHBOUR: "neighbours, to be kept",
    UNRELATED: "unrelated, to be kept",
    EMPTY: "empty prompt",
}
TILE = 160  # pixels of a kept picture at most


class Measured(TypedDict):
    """What every row says of a pair of pictures of one prompt and one noise.

    stratum, index: which prompt it is; label: the class it asks for, or None; synonym: whether in other words;
    distance: {name: of the pair}; ceiling: {name: of the original to its picture of the next seed}; drift: [[sigma,
    relative drift or None]].
    """

    stratum: str
    index: int
    prompt: str
    label: str | None
    synonym: bool
    distance: dict[str, float]
    ceiling: dict[str, float]
    drift: list[list]


class Row(Measured, total=False):
    """A row, with what not every one has.

    floor: {name: of the original to itself, computed in another batch}; answer: the classes seen in the original's
    and in the erased model's picture.
    """

    seed: int
    floor: dict[str, float]
    answer: list[str]


class Shown(TypedDict):
    """A pair that is kept as pictures; original, erased: see encoded_picture()."""

    stratum: str
    prompt: str
    seed: int
    original: str
    erased: str


@dataclass
class Record:
    """An evaluation.

    configuration: everything that decides its numbers, as JSON; probe: what both models answer to one noise, by which
    they are known again; rows: one for each pair of pictures; pictures: the pairs that are kept to look at.
    """

    configuration: dict
    probe: list = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    pictures: list[Shown] = field(default_factory=list)
    finished: bool = False

    def done(self, stratum, index):
        """Whether a prompt of a stratum is measured already."""
        return any(row["stratum"] == stratum and row["index"] == index for row in self.rows)

    def fingerprint(self):
        """A hash of the configuration."""
        text = json.dumps(self.configuration, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self, summary=None):
        """The record as text, with its Summary if given; numbers that are not finite become null."""
        data = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint(), **vars(self)}
        return json.dumps(_finite(data | {"summary": summary and summary.as_json()}), allow_nan=False)

    @classmethod
    def from_json(cls, text):
        """The Record in a text; None when it holds none that this version can go on with."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT or data["version"] != VERSION:
                return None
            found = cls(*(data[name] for name in ("configuration", "probe", "rows", "pictures", "finished")))
            np.array(found.probe, np.float64)
            whole = all(name in row for row in found.rows for name in Measured.__annotations__)
            whole = whole and all(name in picture for picture in found.pictures for name in ("stratum", "prompt"))
            kinds = (found.configuration, dict), (found.rows, list), (found.pictures, list)
            return found if whole and all(isinstance(*kind) for kind in kinds) else None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
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
