"""An evaluation in a sentence or four: what is gone, what stayed, what to look at."""

import numpy as np

from .record import EMPTY, ERASE, NEIGHBOUR, UNRELATED

# (integrity from which on, how much that is): 1 is untouched, 0 as different as another seed
DEGREES = ((0.9, "hardly changed"), (0.7, "changed a little"), (0.4, "changed visibly"), (0.15, "changed strongly"))
OTHER = "changed as much as by another seed"
WATCHED = 0.7  # kept prompts below this integrity are worth a look
SUBJECTS = {
    ERASE: "What was to be erased",
    NEIGHBOUR: "Neighbours",
    UNRELATED: "Unrelated prompts",
    EMPTY: "The empty prompt",
}


def verdict(record, summary):
    """Sentences, most important first, of a Record and its Summary; none of an empty one."""
    found = [] if record.finished else ["Not finished."]
    names = summary.distance_names()
    found += _seen(summary.classified)
    for stratum, values in summary.strata.items():
        moved = values.distances[names[0]]
        if stratum == ERASE and summary.classified is not None or moved.integrity is None:
            continue
        found.append(f"{SUBJECTS[stratum]} {degree(moved.integrity.value)}.")
    return [*found, *_watched(record, names)]


def degree(integrity):
    """How much a change of so much integrity is, in words."""
    return next((words for least, words in DEGREES if integrity >= least), OTHER)


def _seen(classified):
    """What the classifier saw: what is gone, and what is still right."""
    if classified is None:
        return
    scores, names = classified.scores, ", ".join(classified.erased_classes)
    for share, before, how in (
        (scores.erased, scores.erased_before, ""),
        (scores.synonym, scores.synonym_before, ", asked for in other words,"),
    ):
        if share:
            gone = f"gone in {share.of - share.right} of {share.of} pictures"
            yield f"{_capital(names)}{how or ':'} {gone} (seen in {before.right} before)."
    if scores.kept:
        yield f"Kept: {scores.kept.right} of {scores.kept.of} others right ({scores.kept_before.right} before)."


def _capital(text):
    return text[:1].upper() + text[1:]


def _watched(record, names):
    """The kept prompt that changed most, where it changed visibly."""
    prompts = {}
    for row in record.rows:
        if row["stratum"] != ERASE and names:
            pair = row["distance"][names[0]], row["ceiling"][names[0]]
            prompts.setdefault(row["prompt"], []).append(pair)
    kept = {prompt: _integrity(pairs) for prompt, pairs in prompts.items()}
    worst = min(kept, key=kept.get, default=None)
    if worst is not None and kept[worst] < WATCHED:
        yield f'Watch: "{worst or "(empty prompt)"}" {degree(kept[worst])}.'


def _integrity(pairs):
    moved, ceiling = np.mean(pairs, axis=0)
    return 1 - moved / ceiling if ceiling > 0 else 1.0
