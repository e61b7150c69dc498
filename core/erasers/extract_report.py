"""What an extraction compared, kept and left out, in words, and whether its base model looks like the right one."""

from statistics import median

from ..adapters.deltas.mask import Mask
from .difference import CHANGED, EQUAL, MOST, OTHER, ROUNDED, ROUNDING

FULL_RANK = 0.3  # share of the possible rank that holds MOST of a difference; above, it is of no low rank
KEPT = 0.3  # share of numbers that training in low precision leaves as they were, at least
SAME_LAYERS = 0.5  # share of a whole U-Net's layers that an edit leaves as they were, at least


def report(edited, found, unknown, max_rank, text):
    """The lines, as one text.

    edited: EditedWeights; found: Difference of each layer compared, at least one of them CHANGED; unknown: layers that
    the base model does not have; max_rank: the largest rank allowed; text: OneMap of all differences.
    """
    of = {state: [d for d in found if d.state == state] for state in (CHANGED, EQUAL, ROUNDED, OTHER)}
    changed = of[CHANGED]
    lines = [
        f"{edited.name} ({edited.source}): {len(found)} layers compared, {len(changed)} changed, "
        f"{len(of[EQUAL])} equal, {len(of[ROUNDED])} different by rounding only (below {ROUNDING:g}).",
        *_sizes(changed),
    ]
    cut = sum(d.truncated for d in changed)
    if cut:
        lines.append(f"{cut} layers need more than max_rank {max_rank} for the energy asked for.")
    if of[OTHER]:
        names = [d.site for d in of[OTHER]]
        lines.append(f"Left out, as low-rank factors cannot express them: {len(names)} layers ({some(names)}).")
    if unknown:
        lines.append(f"Left out, as the connected model does not have them: {len(unknown)} layers ({some(unknown)}).")
    lines += _of_whole(found, changed) if edited.whole else _of_some(changed, text)
    return "\n".join(lines)


def _sizes(changed):
    """Ranks, what they leave out, and how large the factors are; shares of the weights that were set to 0."""
    masks = [d for d in changed if isinstance(d.change, Mask)]
    if masks:
        shares = [d.change.density for d in masks]
        yield f"{len(masks)} layers have {min(shares):.2%} to {max(shares):.2%} of their weights set to 0: a mask each."
    factored = [d for d in changed if d not in masks]
    if not factored:
        return
    ranks, energy = [d.change.rank for d in factored], sum(d.energy for d in factored)
    worst = max(factored, key=lambda d: d.discarded / d.energy if d.energy else 0.0)
    lost = sum(d.discarded for d in factored) / energy if energy else 0.0
    factors = [t for d in factored for t in (d.change.up, d.change.down, d.change.bias) if t is not None]
    yield (
        f"Rank {min(ranks)} to {max(ranks)}; discarded {lost:.3%} of the squared change, at most "
        f"{worst.discarded / (worst.energy or 1):.3%} ({worst.site})."
    )
    yield f"Size of the factors: {sum(t.nbytes for t in factors) / 1e6:.2f} MB."


def _by(changed):
    sizes = [d.size for d in changed]
    return f"by {min(sizes):.2%} to {max(sizes):.2%} of their weights"


def _of_whole(found, changed):
    """How the layers of a whole network speak for or against the base model."""
    equal = sum(d.state in (EQUAL, ROUNDED) for d in found)
    share = f"{equal} of {len(found)} layers equal the connected model's ({equal / len(found):.0%})"
    if equal >= SAME_LAYERS * len(found):
        yield f"Base model: {share}, as of an edit of this very model."
    else:
        yield (
            f"WARNING: only {share}, the others differ {_by(changed)}; either all layers were trained, or these "
            "weights were made from another base model and the adapter carries the difference of the two as well."
        )


def _of_some(changed, text):
    """The same for a file of the changed layers only; no line where nothing speaks for or against it."""
    spread, kept = median(d.spread for d in changed), median(d.kept for d in changed)
    low = median(d.rank for d in changed) <= FULL_RANK
    if text.explains(roughly=low):
        yield (
            f"Base model: the differences of all {text.layers} layers are one map of the text, as of an edit of this "
            "very model."
        )
    elif kept >= KEPT:
        yield f"Base model: {kept:.0%} of the numbers are unchanged (median), as of training from this very model."
    elif text.others and spread <= FULL_RANK:
        yield (
            f"Base model: {MOST:.0%} of the difference lies in {spread:.0%} of the possible rank (median), "
            "as of an edit of this very model."
        )
    elif len(changed) > 1:
        yield (
            f"WARNING: all of the {len(changed)} layers differ {_by(changed)}, neither in few directions nor by one "
            "map of the text; these weights were probably made from another base model, and the adapter carries the "
            "difference of the two as well."
        )


def some(names):
    """The first names, for messages."""
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
