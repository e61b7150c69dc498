"""Who gets hurt: how much an erasure changes what the model's layers receive, before any sampling."""

from dataclasses import dataclass

import torch

from ..plan import make_plan


@dataclass(frozen=True)
class Impact:
    """One prompt and the relative change of what the key and value layers make of it; 0 is untouched."""

    prompt: str
    change: float


def relative_change(delta, vectors, weight_gram):
    """||W E c|| / ||W c|| over all layers and the given rows, from S = sum_l W_l^T W_l.

    delta: E c and vectors: c, (T, d); weight_gram: (d, d) float64. As SPEED's prior shift (Li et al.,
    ICLR 2026, eq. 8), relative: sum_l ||W_l x||^2 = x^T S x.
    """
    delta, vectors = delta.to(weight_gram), vectors.to(weight_gram)
    changed = ((delta @ weight_gram) * delta).sum()
    whole = ((vectors @ weight_gram) * vectors).sum()
    return torch.sqrt(changed.clamp(min=0) / whole).item()


def impacts(stack, encoded, weight_gram):
    """Impact of a stack on each encoded prompt, the most changed first.

    Counted are the rows from the first word to the first end token: the start token is the same for
    every prompt, and padding repeats the end token. Time ranges do not count, every entry is taken to act.
    """
    plan = make_plan(stack, encoded.vectors.shape[-1])
    parts = [plan.constant] if plan.constant else plan.timed
    found = []
    for prompt in encoded.prompts:
        end = encoded.id_row(prompt).index(encoded.end, 1)
        rows = encoded.row(prompt)[1 : end + 1]
        delta = sum((part.delta(rows) for part in parts), torch.zeros_like(rows))
        found.append(Impact(prompt, relative_change(delta, rows, weight_gram)))
    return sorted(found, key=lambda impact: -impact.change)


def report(found):
    """The impacts as text, a line each."""
    width = max(len(impact.prompt) for impact in found)
    return "\n".join(f"{impact.prompt:{width}}  {impact.change:7.1%}" for impact in found)
