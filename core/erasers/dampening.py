"""Selective Synaptic Dampening (Foster et al., AAAI 2024) as masks: what matters for the prompts to forget more than
for those to retain is scaled down, not pruned. Foster et al. wrote it for classifiers; on diffusion it is experimental.
"""

import torch

from ..adapters.deltas.mask import Mask
from ..errors import ErasureError

LARGEST_SHARE = 0.05  # of one layer's weights; more empties it


def importance(denoiser, weights, samples, on_sample=lambda: None):
    """{name: mean of (dL / dw)^2} over samples, the diagonal of the Fisher information as SSD takes it (section 3.1).

    L is the concept contrast ||eps(x_t, c) - sg eps(x_t, empty)||^2: its gradient is what the prompt adds. One sample
    at a time, so that the square is of one gradient and not of a batch's mean.

    denoiser: has predict(x, t, text, on), see latent_anchoring; weights: {name: tensor that requires grad};
    samples: iterable of (x (1, C, h, w), t (1,), text (1, T, d), empty (1, T, d)).
    """
    total, count = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}, 0
    for x, t, text, empty in samples:
        with torch.no_grad():
            without = denoiser.predict(x, t, empty, False)
        loss = (denoiser.predict(x, t, text, False) - without).square().sum()
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values()))):
            total[name] += gradient.float().square()
        count += 1
        on_sample()
    return {name: found.div_(max(count, 1)) for name, found in total.items()}


def threshold(forget, retain, share):
    """alpha of which I_forget / I_retain is larger for a share of all weights; both {name: importance}."""
    wanted = max(1, int(share * sum(f.numel() for f in forget.values())))
    largest = torch.empty(0, dtype=torch.float64)
    for name, f in forget.items():
        found = ratio(f, retain[name]).flatten()
        largest = torch.cat([largest, found.topk(min(wanted + 1, len(found))).values])
        largest = largest.topk(min(wanted + 1, len(largest))).values
    return largest[-1].item()


def ratio(forget, retain):
    """I_forget / I_retain, float64 on the CPU; 0 where neither matters."""
    forget, retain = forget.cpu().double(), retain.cpu().double()
    return torch.where(forget > 0, forget / retain, torch.zeros(()).double())


def dampen(forget, retain, alpha, lam=1.0):
    """{name: Mask}: selected where I_forget > alpha I_retain, kept there min(lam I_retain / I_forget, 1) (eq. 4 and 5).

    At most LARGEST_SHARE of a layer's weights, those with the largest ratio. Raises ErasureError when nothing is
    selected, or when the retained prompts say nothing.
    """
    if not any(r.any() for r in retain.values()):
        raise ErasureError(
            "The base prompts change nothing in what the model sees (the empty prompt never does), so nothing says "
            "what is to be kept; give other base prompts, 20 or more diverse ones with relatives of the concept."
        )
    masks = {}
    for name, f in forget.items():
        ratios = ratio(f, retain[name])
        chosen, most = ratios > alpha, int(LARGEST_SHARE * f.numel())
        if chosen.sum() > most:
            chosen = ratios > ratios.flatten().topk(most + 1).values[-1]
        if chosen.any():
            masks[name] = Mask.of(chosen, (lam / ratios).clamp(max=1.0).half())
    if not masks:
        raise ErasureError(f"No weight matters {alpha:g} times more for the prompts than for the base prompts.")
    return masks
