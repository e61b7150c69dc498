"""Training towards two distributions: one to forget, one to retain.

The setting is that of Schioppa et al. 2024, "Model Integrity when Unlearning with T2I Diffusion Models" (arXiv
2411.02068): the concept's outputs are to change, and the outputs for everything retained to stay those of the frozen
model. How the two losses are joined here, as a weighted sum or by projecting gradients, is the field's common way; it
was not checked against the algorithms of that paper.
"""

import torch

from .conditions import together

WEIGHTED, PROJECTED = "weighted sum", "projected gradient"
RETAINED = (WEIGHTED, PROJECTED)


def drawn_texts(count, texts, generator):
    """`count` of the preserved prompts, each equally likely, as a batch of texts."""
    drawn = torch.randint(len(texts.preserved), (count,), generator=generator)
    return together([texts.preserved[i] for i in drawn.tolist()])


def walked(denoiser, noise, k, texts, empty, settings, path):
    """Latents (n, C, h, w) of the frozen model after k guided steps from noise (n, C, h, w), one for each of n texts:
    a sample of what is to be retained, at the level after k steps."""
    x, guided = path.beginning(noise), settings.rollout_cfg != 1
    for i in range(k):
        rows = together([*([empty] * len(texts) if guided else []), *texts])
        twice = torch.cat([x, x]) if guided else x
        with torch.no_grad():
            found = denoiser.predict(twice, torch.full((len(twice),), path.levels[i]), rows, on=False)
        without, prompted = found.chunk(2) if guided else (0.0, found)
        x = path.after(x, without + settings.rollout_cfg * (prompted - without), i)
    return x


def forget_loss(denoiser, x, t, texts, settings):
    """Mean square of e_on(concept) - (e(surrogate) - eta (e(concept) - e(surrogate))), in latents x (1, C, h, w) at t.
    The surrogate is the empty prompt where none is named."""
    twice, level = torch.cat([x, x]), torch.full((2,), t)
    with torch.no_grad():
        concept, other = denoiser.predict(twice, level, together([texts.concept, texts.surrogate]), on=False)
    (found,) = denoiser.predict(x, level[:1], together([texts.concept]), on=True)
    return (found - (other - settings.eta * (concept - other))).square().mean()


def retain_loss(denoiser, x, t, texts):
    """Mean square of e_on - e for n texts, each in latents (n, C, h, w) of its own at t."""
    level = torch.full((len(x),), t)
    with torch.no_grad():
        still = denoiser.predict(x, level, texts, on=False)
    return (denoiser.predict(x, level, texts, on=True) - still).square().mean()


def projected(forget, retain):
    """The forget gradient without what would raise the retain loss, lists of tensors for the same parameters.

    Where their product over all parameters is negative, forget - <forget, retain> / ||retain||^2 retain, and forget
    itself elsewhere, so that its product with the retain gradient is never negative (Yu et al. 2020, "Gradient Surgery
    for Multi-Task Learning", algorithm 1, with the retain gradient left as it is).
    """
    product = sum((f * r).sum() for f, r in zip(forget, retain))
    if product >= 0:
        return list(forget)
    share = product / sum(r.square().sum() for r in retain)
    return [f - share * r for f, r in zip(forget, retain)]


def backward(parameters, forget, retain, objective, weight):
    """Sets the gradients of parameters: of the forget loss, projected or not, and `weight` times the retain loss."""
    each = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (forget, retain)]
    pull, hold = ([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)] for found in each)
    if objective == PROJECTED:
        pull = projected(pull, hold)
    for parameter, f, r in zip(parameters, pull, hold):
        parameter.grad = f + weight * r
