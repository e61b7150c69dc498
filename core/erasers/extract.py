"""From whole weights to an adapter: what an edit changed in each layer, as factors of low rank.

Closed-form edits (UCE, RECE, SPEED) are of low rank by construction; for others the truncated singular value
decomposition is the closest change of its rank (Eckart and Young 1936). Weights that were set to 0 become masks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..adapters.adapter import Card, ErasureAdapter
from ..errors import ErasureError
from .difference import CHANGED, OTHER, OneMap, compare
from .extract_report import report, some


@dataclass(frozen=True)
class BaseLayer:
    """A layer of the base model.

    site: its name in the adapter; read(): (weight, bias or None) on the CPU, called at most once.
    """

    site: str
    read: Callable[[], tuple[torch.Tensor, torch.Tensor | None]]


def extract(base, edited, concepts=(), family="", energy=0.999, max_rank=128, on_progress=None):
    """(ErasureAdapter that turns a base model's layers into edited ones at strength 1, report in words).

    base: {site: BaseLayer} with every spelling of a layer's site leading to the same BaseLayer; edited:
    EditedWeights. energy: share of each difference's squared norm to keep, up to max_rank; what rounding to the
    stored number types explains is not kept. concepts, family: for the card. on_progress(layers done).
    Raises ErasureError when no layer is in the base model, a shape differs, or nothing was changed.
    """
    layers = edited.layers()
    known = [layer for layer in layers if layer in base]
    if not known:
        raise ErasureError(
            f'"{edited.name}" holds {len(layers)} layers ({some(layers)}), none of which the connected model has '
            f"(its {len({layer.site for layer in base.values()})} layers are {some(base)}); connect the base model "
            "it was made from."
        )
    found, text = [], OneMap()
    for i, layer in enumerate(known):
        found.append(compare(base[layer], edited, layer, energy, max_rank, text))
        if on_progress:
            on_progress(i + 1)
    changed = [d for d in found if d.state == CHANGED]
    if not changed:
        raise ErasureError(
            f'"{edited.name}" has no change that an adapter can hold: of the {len(found)} layers compared with the '
            f"connected model, {sum(d.state == OTHER for d in found)} differ by more than rounding; connect the "
            "base model from before the edit, and the edited weights."
        )
    settings = {"extracted_from": edited.name, "energy": energy, "max_rank": max_rank}
    card = Card(edited.source, tuple(concepts), family=family, settings=settings)
    unknown = [layer for layer in layers if layer not in base]
    deltas = {kind: {d.site: d.change for d in changed if d.change.kind == kind} for kind in ("low_rank", "mask")}
    return ErasureAdapter(card, deltas), report(edited, found, unknown, max_rank, text)
