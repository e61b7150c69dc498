"""An evaluation's numbers as text."""

from .record import TITLES
from .verdict import verdict

SCORES = {
    "erased": "still recognised",
    "synonym": "still recognised, in other words",
    "kept": "others right",
}


def percent(share):
    """A Share as people read it, with its counts."""
    return f"{100 * share.value:.1f} % ({share.right} of {share.of})" if share else "-"


def number(found, digits=3):
    """An Estimate with its interval."""
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})" if found else "-"


def report(record, summary):
    """A Record and its Summary as text."""
    lines = [" ".join(verdict(record, summary)), ""] if record.rows else []
    for name in summary.distance_names():
        lines += _distance_lines(name, summary.strata)
    lines += _drift_lines(summary.strata)
    lines += _score_lines(summary.classified)
    if not record.finished:
        lines.append("Not finished: run it again with the same inputs, it goes on from here.")
    return "\n".join(lines)


def _distance_lines(name, strata):
    yield f"Distance {name}: what changed between both models, same prompts and noise"
    for stratum, values in strata.items():
        moved = values.distances[name]
        yield (
            f"  {TITLES[stratum]:24} integrity {number(moved.integrity)}  mean {number(moved.mean)}  "
            f"median {moved.median:.3f}  p95 {moved.p95:.3f}  another seed {moved.ceiling:.3f}  "
            f"{moved.prompts} prompts, {moved.count} pairs"
        )
    yield f"  numerical noise {next(iter(strata.values())).distances[name].floor:.2g}"


def _drift_lines(strata):
    yield "Teacher-forced drift (1: as much as the prompt itself does), mean over the noise levels"
    for stratum, values in strata.items():
        if values.drift:
            mean = sum(level.value for level in values.drift) / len(values.drift)
            each = ", ".join(f"{level.value:.2f} at {level.sigma:.2g}" for level in values.drift)
            yield f"  {TITLES[stratum]:24} {mean:.3f}: {each}"


def _score_lines(classified):
    if classified is None:
        return
    scores = vars(classified.scores)
    yield f"Classifier; erased: {', '.join(classified.erased_classes)}"
    for key, title in SCORES.items():
        if scores[key]:
            yield f"  {title:33} {percent(scores[key])}, before {percent(scores[f'{key}_before'])}"
    yield f"  {'harmonic mean':33} {100 * classified.scores.harmonic:.1f}"
