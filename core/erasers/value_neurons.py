"""Which neurons of the value layers answer to a memorised prompt alone.

NeMo: Hintersdorf et al. 2024, "Finding NeMo: Localizing Neurons Responsible For Memorization in Diffusion Models"
(NeurIPS 2024, arXiv 2406.02366). A neuron is one output of a value layer of the cross-attention. Those whose activation
for the memorised prompt is far out of what ordinary prompts give are candidates; they are switched off, and those
that do not matter to the memorisation are switched on again. The paper looks at one prompt at a time and asks how alike
the pictures of several noises begin; here several prompts share one set of neurons, and the memorisation is the pull of
the text (Wen et al. 2024), which is told in more steps than the first. The steps of the threshold are ours.
"""

import torch

from ..adapters.deltas.mask import Mask
from ..errors import ErasureError

FEWEST = 20  # ordinary prompts, whose mean and deviation say what is normal
HIGHEST, LOWEST, STEP = 5.0, 1.0, 0.25  # thresholds that are tried one after the other, in standard deviations


def activation(values):
    """Activation (B, out) float64 of each neuron for values (B, T, out) of T tokens: the mean of their absolutes."""
    return values.double().abs().mean(dim=1)


def deviations(targets, ordinary):
    """How far the activations of prompts (m, out) lie from those of ordinary prompts (n, out), in their standard
    deviations: the largest of each neuron, (out,)."""
    spread = ordinary.std(dim=0).clamp_min(torch.finfo(ordinary.dtype).tiny)
    return ((targets - ordinary.mean(dim=0)) / spread).abs().amax(dim=0)


def outside(z, threshold, top):
    """{layer: (out,) bool} of neurons whose deviation is beyond a threshold, and of the `top` largest of each layer.

    z: {layer: deviations (out,)}.
    """
    found = {}
    for layer, values in z.items():
        found[layer] = values > threshold
        found[layer][values.topk(min(top, len(values))).indices] = True
    return found


def select(z, score, goal):
    """({layer: (out,) bool}, score) of the first candidates without which the memorisation falls to a goal: the
    threshold falls step by step, and with each step one neuron more of each layer is taken whatever its deviation is.

    score(off): the memorisation with these neurons switched off, the larger the more. Where the goal is never reached,
    the candidates with the smallest score.
    """
    best = None
    for k in range(round((HIGHEST - LOWEST) / STEP) + 1):
        off = outside(z, HIGHEST - k * STEP, k)
        if not any(chosen.any() for chosen in off.values()):
            continue
        found = score(off)
        if best is None or found < best[1]:
            best = off, found
        if found <= goal:
            break
    return best


def refine(z, off, score, limit):
    """{layer: (out,) bool} of those neurons that matter: layer by layer the neurons, then halves of them down to single
    ones, are switched on again wherever the memorisation stays within a limit without them.

    Each neuron that is left was found to matter by itself. Halves save questions where few neurons matter.
    """
    for layer in [layer for layer, chosen in off.items() if chosen.any()]:
        order = z[layer].argsort()  # the least deviating first
        groups = [order[off[layer][order]]]
        while groups:
            group = groups.pop(0)
            fewer = {**off, layer: off[layer].clone()}
            fewer[layer][group] = False
            if score(fewer) <= limit:
                off = fewer
            elif len(group) > 1:
                groups[:0] = group.tensor_split(2)
    return off


def goal_of(scores):
    """The memorisation score that counts as none: mean and one standard deviation of ordinary prompts' scores (n,)."""
    return float(scores.mean() + scores.std())


def masks_of(off, widths):
    """{layer: Mask} that take the rows of some neurons out of the value layers; {layer: (out,) bool}, {layer: in}."""
    return {layer: Mask.of(chosen[:, None].expand(-1, widths[layer])) for layer, chosen in off.items() if chosen.any()}


def require_ordinary(prompts):
    """Raises ErasureError for a number of ordinary prompts that says nothing of what is normal."""
    if prompts < FEWEST:
        raise ErasureError(
            f"NeMo needs at least {FEWEST} different base prompts, one per line, to know what is normal, but there are "
            f"{prompts}; add ordinary captions."
        )
