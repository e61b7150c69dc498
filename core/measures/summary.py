"""The numbers of one evaluation: how far each kind of prompt moved, and what a classifier still sees."""

from dataclasses import asdict, dataclass

import numpy as np

from . import retention
from .record import ERASE, STRATA
from .retention import Estimate, estimate, integrity
from .scores import Prompt, Scores, scores

ORDER = ("LPIPS", "DreamSim", "CLIP vision", "pixel", "latent")  # the first one there is the headline


@dataclass(frozen=True)
class Moved(retention.Summary):
    """How far one kind of prompt moved, by one distance.

    prompts: how many; floor: mean distance of the original to itself, computed in another batch; ceiling: to itself
    with another seed; integrity: 1 is untouched, 0 as different as another seed, None where floor and ceiling meet.
    """

    prompts: int
    floor: float
    ceiling: float
    integrity: Estimate | None


@dataclass(frozen=True)
class Drift:
    """Teacher-forced drift at one noise level, with its interval; see retention.relative_drift()."""

    sigma: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Stratum:
    """One kind of prompt.

    distances: {name: Moved}, the headline first; drift: at each noise level, without those where the prompt does
    nothing.
    """

    distances: dict[str, Moved]
    drift: list[Drift]


@dataclass(frozen=True)
class Classified:
    """What a classifier saw. erased_classes: the classes that were to be erased, sorted."""

    scores: Scores
    erased_classes: list[str]


@dataclass(frozen=True)
class Summary:
    """The numbers of a Record, every estimate with its 95 % interval.

    strata: {kind of prompt: Stratum}, in their order; classified: None without a classifier or an erased class.
    """

    strata: dict[str, Stratum]
    classified: Classified | None

    def distance_names(self):
        """The distances, the headline first."""
        return list(next(iter(self.strata.values())).distances) if self.strata else []

    def as_json(self):
        """The same as the record's file holds it; a stratum's drift stands there among its distances."""
        strata = {
            name: {**{name: asdict(moved) for name, moved in stratum.distances.items()},
                   "drift": [asdict(level) for level in stratum.drift]}
            for name, stratum in self.strata.items()
        }  # fmt: skip
        return {"strata": strata, "scores": _scores_as_json(self.classified)}


def _scores_as_json(found):
    if found is None:
        return None
    harmonic = found.scores.harmonic
    return {**asdict(found.scores), "harmonic": harmonic, "erased_classes": found.erased_classes}


def summarise(record):
    """Summary of a Record."""
    names, strata = _distance_names(record), {}
    for stratum in STRATA:
        rows = [row for row in record.rows if row["stratum"] == stratum]
        if rows:
            strata[stratum] = Stratum({name: _moved(record, rows, name) for name in names}, _drift(rows))
    return Summary(strata, _classified(record))


def _distance_names(record):
    names = record.rows[0]["distance"] if record.rows else {}
    return [name for name in ORDER if name in names]


def _moved(record, rows, name):
    moved = _by_prompt(rows, lambda row: row["distance"][name])
    ceilings = _by_prompt(rows, lambda row: row["ceiling"][name])
    floor = _floor_of(record, name)
    return Moved(
        **vars(retention.summary(moved)),
        prompts=len(moved),
        floor=floor,
        ceiling=float(ceilings.mean()),
        integrity=integrity(moved, ceilings, floor),
    )


def _by_prompt(rows, value):
    """Array (prompts, seeds) of value(row)."""
    groups = {}
    for row in rows:
        groups.setdefault((row["stratum"], row["index"]), []).append(value(row))
    return np.array(list(groups.values()), np.float64)


def _floor_of(record, name):
    """Mean distance of the original model's pictures to themselves, computed in another batch."""
    found = [row["floor"][name] for row in record.rows if row.get("floor")]
    return float(np.mean(found)) if found else 0.0


def _drift(rows):
    """[Drift] over the noise levels, without those where the prompt does nothing."""
    found = []
    for level, (sigma, _) in enumerate(rows[0]["drift"]):
        values = _by_prompt(rows, lambda row, level=level: _number(row["drift"][level][1]))
        if np.isfinite(values).all():
            found.append(Drift(sigma, **vars(estimate(values))))
    return found


def _number(value):
    return float("nan") if value is None else value


def _classified(record):
    rows = [row for row in record.rows if row.get("answer")]
    erased = {row["label"] for row in record.rows if row["stratum"] == ERASE and row["label"] is not None}
    if not rows or not erased:
        return None
    answers = [(Prompt(row["prompt"], row["label"], row["synonym"]), *row["answer"]) for row in rows]
    return Classified(scores(answers, erased), sorted(erased))
