"""A model with an erasure on it, all gates open: what an attack that knows the weights works with."""

import torch

from ...adapters.gates import follow_meaning, gate_values
from ...errors import ErasureError
from ..model.layers import family, plain_key, text_width
from ..model.weights import text_weights
from .stack import applied

WIDEST = 5120


def attack_grams(original, edited, on_layer=lambda done: None):
    """(S', X), each (d, d) float64: sum_l W'_l^T W'_l and sum_l W'_l^T W_l over the layers that read the text.

    W: of the original MODEL, W': of the edited one with everything on it, gates fully open. Of adapters that are
    combined as the published SPM code does, the cross terms are left out.
    """
    width = text_width(original)
    _require_derivable(original, width)
    if text_width(edited) != width:
        raise ErasureError(
            f"The original model reads text vectors of width {width}, the erased one of width "
            f"{text_width(edited)}; compare two models of the same family."
        )
    square, cross = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
    text, layers = _opened(edited, width)
    before, after = text_weights(original), text_weights(edited)
    for i, ((_, plain), (key, weight)) in enumerate(zip(before, after)):
        weight = weight.double()
        for up, down in layers.get(key, ()):
            weight = weight + up @ down
        weight = weight @ text
        square += weight.T @ weight
        cross += weight.T @ plain.double()
        on_layer(i + 1)
    return square, cross


def _require_derivable(model, width):
    """Raises ErasureError where a derived vector cannot stand for a text, or would take matrices too large."""
    title, entry = family(model).title, family(model).text
    if not entry.direct or width is None:
        raise ErasureError(
            f"The text of {title} passes {entry.norm or 'layers'} before it is read, which no derived vector "
            'could have come through; set attacks to "words", or look at the pictures (Evaluate Erasure).'
        )
    if width > WIDEST:
        raise ErasureError(
            f"The text of {title} is {width} wide, for which deriving vectors would take more than a computer "
            f'has (up to {WIDEST} works); set attacks to "words", or look at the pictures (Evaluate Erasure).'
        )


def _opened(model, width):
    """(P (d, d), {key: [(up, down)]}) of what a stack does to text and layers while the model runs, in float64."""
    text, layers = torch.eye(width, dtype=torch.float64), {}
    found = applied(model)
    if found is None:
        return text, layers
    plan = found.plan
    score = torch.ones(1, len(plan.concepts.names if plan.concepts else ()) + len(follow_meaning(found.stack)))
    gates = torch.cat([gate_values(plan.gates, score)[0], torch.ones(1)]).double()  # the last one is for OPEN
    part = plan.maps.get(family(model).text.name)
    if part is not None:
        text = text + (part.a.double() * gates[part.gate]) @ part.b.double()
    for key, layer in plan.running.items():
        factors = layer.beside
        if factors is not None and factors.down.dim() == 2 and isinstance(key, str):
            up = factors.up.T.double() * gates[factors.gate]
            layers.setdefault(plain_key(key), []).append((up, factors.down.double()))
    return text, layers
