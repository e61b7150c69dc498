"""What is minimised while an adapter is trained: SPM's loss with its anchors, ESD's, and GEM's.

Each is (denoiser, x, t, Texts, anchors, their weights (n,), Settings) -> (erase loss, anchor loss) for latents x (1, C,
h, w) at a level t. e_on is the prediction with the adapter, e the one without it: noise, or the velocity of models that
are trained by flow matching.
"""

import torch

from ..errors import ErasureError
from .conditions import together
from .retained import PROJECTED, RETAINED, WEIGHTED

SPM, ESD, GEM, ADVERSARIAL = "spm", "esd", "gem", "adversarial"
GEM_WEIGHT = 100.0  # gamma
GEM_PART = 10 / 28  # how far a roll-out goes, of its steps


def predicted(denoiser, x, t, texts, on):
    """Predictions (n, C, h, w) for n texts in the same latents x (1, C, h, w)."""
    rows = x.expand(len(texts), *[-1] * (x.dim() - 1))
    return denoiser.predict(rows, torch.full((len(texts),), t), together(texts), on=on)


def spm_losses(denoiser, x, t, texts, anchors, weights, settings):
    """SPM, Lyu et al. 2024. erase, eq. 4: mean square of e_on(concept) - (e(surrogate) - eta (e(concept) -
    e(surrogate))). anchor, eq. 7: weighted mean over the anchors of the mean square of e_on(a) - e(a).
    """
    with torch.no_grad():
        still = predicted(denoiser, x, t, [texts.concept, texts.surrogate, *anchors], on=False)
    goal = pushed_away(still[0], still[1], settings.eta)
    found = predicted(denoiser, x, t, [texts.concept, *anchors], on=True)
    erase = (found[0] - goal).square().mean()
    each = (found[1:] - still[2:]).square().flatten(1).mean(dim=1)
    return erase, (weights.to(each) * each).sum()


def esd_losses(denoiser, x, t, texts, anchors, weights, settings):
    """ESD, Gandikota et al. 2023 (arXiv 2303.07345), eq. 7: mean square of e_on(concept) - (e("") - eta (e(concept) -
    e(""))). It holds nothing else where it was: the anchor loss is 0.
    """
    with torch.no_grad():
        concept, empty = predicted(denoiser, x, t, [texts.concept, texts.empty], on=False)
    (found,) = predicted(denoiser, x, t, [texts.concept], on=True)
    erase = (found - pushed_away(concept, empty, settings.eta)).square().mean()
    return erase, torch.zeros_like(erase)


def gem_losses(denoiser, x, t, texts, anchors, weights, settings):
    """GEM, 2026: gamma max(0, |e_on(concept) - e(surrogate)| - eta |e_on(concept) - e(concept)|), norms over the whole
    latent: drawn to the surrogate, and away from where the concept was. The anchor loss is 0.
    """
    with torch.no_grad():
        concept, surrogate = predicted(denoiser, x, t, [texts.concept, texts.surrogate], on=False)
    (found,) = predicted(denoiser, x, t, [texts.concept], on=True)
    attraction, repulsion = length(found - surrogate), length(found - concept)
    erase = GEM_WEIGHT * torch.relu(attraction - settings.eta * repulsion)
    return erase, torch.zeros_like(erase)


def pushed_away(concept, other, eta):
    """The other prediction, less eta times what the concept's adds to it."""
    return other - eta * (concept - other)


def length(x):
    """Norm of x with a gradient of 0, not NaN, where x is 0: an adapter starts closed."""
    return x.square().sum().clamp_min(torch.finfo(x.dtype).tiny).sqrt()


LOSSES = {SPM: spm_losses, ESD: esd_losses, GEM: gem_losses}
OBJECTIVES = (*LOSSES, *RETAINED, ADVERSARIAL)  # the last see other latents: retained.py, adversarial.py
METHODS = {
    SPM: "SPM",
    ESD: "ESD",
    GEM: "GEM",
    WEIGHTED: "Weighted sum",
    PROJECTED: "Projected gradient",
    ADVERSARIAL: "Adversarial",
}  # as cards name them


def alpha_of(objective, rank):
    """The alpha of new factors, which their product is scaled by over the rank: the rank for GEM and adversarial
    training, 1 for the others."""
    return float(rank) if objective in (GEM, ADVERSARIAL) else 1.0


def require_surrogates(objective, concepts):
    """Raises ErasureError where a Concept has a surrogate and an objective knows none."""
    named = next((concept for concept in concepts if concept.surrogate), None)
    if objective == ESD and named is not None:
        raise ErasureError(
            f'The concept "{named.text}" has the surrogate "{named.surrogate}", but the objective esd draws concepts '
            "away from the empty prompt and to nothing else; leave the surrogate out, or set objective to spm or gem."
        )


def places(settings, drawn):
    """After how many steps of a roll-out a step of the optimiser takes its loss: after `drawn`, or, as GEM does, after
    each of the first."""
    if settings.objective != GEM:
        return (drawn,)
    return range(max(1, min(settings.rollout_steps - 1, round(settings.rollout_steps * GEM_PART))))
