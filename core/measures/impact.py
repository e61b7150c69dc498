"""Who gets hurt: how much an erasure changes what the model's layers receive, before any sampling."""

from dataclasses import dataclass

import torch

from ..adapters.gates import gate_values, meanings, side_by_side
from ..adapters.plan import make_plan
from ..errors import ErasureError
from ..families.unet import TEXT
from ..text.rows import counted
from ..text.similarity import matches


@dataclass(frozen=True)
class Impact:
    """One prompt and the relative change of what the key and value layers make of it; 0 is untouched."""

    prompt: str
    change: float


def relative_change(delta, vectors, weight_gram):
    """||W E c|| / ||W c|| over all layers and the given rows, from S = sum_l W_l^T W_l.

    delta: E c and vectors: c, (T, d); weight_gram: (d, d) float64 or, for wide text, what stands for S and gives the
    loudness sum_l ||W_l x||^2 of rows x. As SPEED's prior shift (Li et al., ICLR 2026, eq. 8), relative:
    sum_l ||W_l x||^2 = x^T S x.
    """
    if not isinstance(weight_gram, torch.Tensor):
        changed, whole = weight_gram.loudness(delta).sum(), weight_gram.loudness(vectors).sum()
        return torch.sqrt(changed / whole).item()
    delta, vectors = delta.to(weight_gram), vectors.to(weight_gram)
    changed = ((delta @ weight_gram) * delta).sum()
    whole = ((vectors @ weight_gram) * vectors).sum()
    return torch.sqrt(changed.clamp(min=0) / whole).item()


def impacts(stack, encoded, weight_gram, concepts=None, entry=TEXT, heard=None):
    """Impact of a stack's maps of a text entry on each encoded prompt, the most changed first.

    Counted are the rows from the first word to the first end token: the start token is the same for every prompt,
    and padding repeats the end token. Time ranges do not count, every entry is taken to act. concepts: what gates
    that follow the text need; heard: the Encoded prompts as the text encoder gives them, which gates compare, where the
    entry reads other rows. Raises ErasureError when an adapter changes layers, which the text does not show.
    """
    other = next((e.adapter for e in stack.entries if e.acts and entry.name not in e.adapter.maps), None)
    if other is not None:
        raise ErasureError(
            f"The adapter {other.describe()} changes layers inside the model, not the text, so its impact cannot be "
            "seen before sampling; take it out of the stack that goes into the preview."
        )
    plan = make_plan(stack, {entry: encoded.width}, concepts)
    part = plan.maps.get(entry.name)
    found = []
    for prompt in encoded:
        rows = counted(prompt)
        gates = None
        if plan.gates:
            text = (heard or encoded)[prompt.prompt]
            score = side_by_side(matches(concepts, [text]), meanings(stack, {entry.name: prompt.rows[None]}))
            gates = gate_values(plan.gates, score)
        delta = part.delta(rows[None], gates)[0] if part else torch.zeros_like(rows)
        found.append(Impact(prompt.prompt, relative_change(delta, rows, weight_gram)))
    return sorted(found, key=lambda impact: -impact.change)


def report(found):
    """The impacts as text, a line each."""
    width = max(len(impact.prompt) for impact in found)
    return "\n".join(f"{impact.prompt:{width}}  {impact.change:7.1%}" for impact in found)
