"""Latent Anchoring: trains an SPM adapter against a frozen denoiser.

SPM, Lyu et al. 2024 (arXiv 2312.16145), section 3.2 and appendix C. The adapter's prediction for the concept is drawn
to the surrogate's (eq. 4), and its predictions for anchors, other texts, are held where they were (eq. 5 to 8).
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import ErasureError

BETA_START, BETA_END, LEVELS = 0.00085, 0.012, 1000
NOISE, TEXTS = ANCHORS = ("noise", "texts")
PUBLISHED, MATCHING = TIMESTEPS = ("published", "matching")


class Denoiser(Protocol):
    """The network that is trained against.

    predict(x, t, text, on): noise (rows, 4, h, w) that the network sees in latents x at timesteps t (rows,), 0 to
    999, for text (rows, T, d), all on the CPU; x = sqrt(a_t) clean + sqrt(1 - a_t) noise. on: with the adapter,
    with gradients where they are enabled; otherwise without it.
    """

    def predict(self, x, t, text, on): ...


@dataclass(frozen=True)
class Settings:
    """How to train. Defaults are those of the published code.

    steps: of the optimiser; lr: peak learning rate, with a warm-up of `warmup` steps and then `cycles` cosine
    restarts; eta: guidance away from the concept (eq. 4); lam: weight of the anchors (eq. 8); anchors: how many are
    drawn a step; anchor_kind: "noise" (published) or "texts", preserved prompts drawn by their distance to the
    concept, eq. 6 with `alpha_sampling`; rollout_steps: of the noise schedule on which latents are made;
    rollout_cfg: guidance there; timestep: the one the network is told, "published" (up to 42 too high) or
    "matching" the latents; size: height and width of latents; weight_decay: of AdamW; seed: of all draws.
    """

    steps: int = 3000
    lr: float = 1e-4
    warmup: int = 500
    cycles: int = 3
    eta: float = 1.0
    lam: float = 1000.0
    anchors: int = 4
    anchor_kind: str = NOISE
    alpha_sampling: float = 1.0
    rollout_steps: int = 30
    rollout_cfg: float = 3.0
    timestep: str = PUBLISHED
    size: tuple[int, int] = (64, 64)
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self):
        for name, least in (("steps", 1), ("warmup", 0), ("cycles", 1), ("anchors", 1), ("rollout_steps", 2)):
            if getattr(self, name) < least:
                raise ErasureError(f"Training has {name} {getattr(self, name)}; expected at least {least}.")
        if not 0 < self.lr < math.inf:
            raise ErasureError(f"Training has the learning rate {self.lr}; expected a positive number, such as 1e-4.")
        for name, known in (("anchor_kind", ANCHORS), ("timestep", TIMESTEPS)):
            if getattr(self, name) not in known:
                raise ErasureError(f'Training has {name} "{getattr(self, name)}"; expected {" or ".join(known)}.')


@dataclass(frozen=True, eq=False)
class Texts:
    """Text vectors (T, d) of the concept, its surrogate and the empty prompt, and of preserved prompts (n, T, d)."""

    concept: torch.Tensor
    surrogate: torch.Tensor
    empty: torch.Tensor
    preserved: torch.Tensor | None = None


@dataclass(frozen=True)
class Report:
    """One step: its number from 1, and the losses before it."""

    step: int
    erase: float
    anchor: float

    @property
    def total(self):
        """What was minimised, without the anchors' weight."""
        return self.erase + self.anchor


def alphas_cumprod():
    """Stable Diffusion's noise schedule: (1000,) float64, betas linear in their square roots."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, LEVELS, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def rollout_timesteps(steps):
    """DDIM timesteps with leading spacing, falling: steps of them, the last one 0."""
    spacing = LEVELS // steps
    return [spacing * i for i in reversed(range(steps))]


def told_timestep(k, settings):
    """The timestep the network is told for latents after k steps of the rollout.

    Published: 999 - floor(1000 k / steps), as in LECO, which is 33 to 42 more than the latents have for 30 steps.
    """
    if settings.timestep == MATCHING:
        return rollout_timesteps(settings.rollout_steps)[k]
    return LEVELS - 1 - LEVELS * k // settings.rollout_steps


def ddim_step(x, noise, t, before, alphas):
    """Latents at timestep `before` from those at t and their noise (DDIM, Song et al. 2021, eq. 12 with sigma 0)."""
    a, b = alphas[t].item(), alphas[before].item()
    clean = (x - (1 - a) ** 0.5 * noise) / a**0.5
    return b**0.5 * clean + (1 - b) ** 0.5 * noise


def rollout(denoiser, x, k, texts, settings, alphas):
    """Latents after k DDIM steps from noise x (1, 4, h, w) for the concept, with the adapter and guidance."""
    timesteps = rollout_timesteps(settings.rollout_steps)
    text = torch.stack([texts.empty, texts.concept])
    with torch.no_grad():
        for i in range(k):
            t = torch.full((2,), timesteps[i])
            empty, concept = denoiser.predict(x.expand(2, -1, -1, -1), t, text, on=True).chunk(2)
            noise = empty + settings.rollout_cfg * (concept - empty)
            x = ddim_step(x, noise, timesteps[i], timesteps[i + 1], alphas)
    return x


def preview(denoiser, texts, settings):
    """A picture of the concept as the adapter makes it now, latents (1, 4, h, w), always from the same noise."""
    alphas = alphas_cumprod()
    generator = torch.Generator().manual_seed(settings.seed)
    x = torch.randn(1, 4, *settings.size, generator=generator)
    x = rollout(denoiser, x, settings.rollout_steps - 1, texts, settings, alphas)
    with torch.no_grad():
        noise = denoiser.predict(x, torch.zeros(1, dtype=torch.long), texts.concept[None], on=True)
    a = alphas[0].item()
    return (x - (1 - a) ** 0.5 * noise) / a**0.5


def noise_anchors(count, concept, generator):
    """Anchors (count, T, d) as the published code draws them: isotropic noise with 0.8 to 1.2 of the concept's norm.

    A draw is kept with probability 1 - its cosine with the concept, which is about 1 for all of them.
    """
    kept = []
    while len(kept) < count:
        z = torch.randn(concept.shape, generator=generator)
        z = z / z.norm()
        cosine = (z * concept).sum() / concept.norm()
        if torch.rand((), generator=generator) < 1 - cosine:
            kept.append(z * concept.norm() * (0.8 + 0.4 * torch.rand((), generator=generator)))
    return torch.stack(kept)


def text_anchors(count, texts, alpha, generator):
    """Anchors (count, T, d) among preserved prompts, by chance as (1 - |cos(anchor, concept)|)^alpha, eq. 6."""
    flat, concept = texts.preserved.flatten(1), texts.concept.flatten()
    cosine = torch.nn.functional.cosine_similarity(flat, concept[None], dim=1)
    distance = 1 - cosine.abs()
    weight = torch.where(distance > 1e-6, distance, 0.0) ** alpha
    if not weight.any():
        raise ErasureError("All preserved prompts equal the concept; preserve something else.")
    return texts.preserved[torch.multinomial(weight, count, replacement=True, generator=generator)]


def anchor_rows(texts, settings, generator):
    """(anchors (n, T, d), weights (n,) that add to 1): the empty prompt with half of the weight and drawn ones.

    In the published code half of the drawn anchors only cost time: its helper compares the second half of a batch
    laid out as empty, 1st, empty, 2nd ... The others and the empty prompt are what counts, and each is computed once.
    """
    if settings.anchor_kind == TEXTS:
        drawn = text_anchors(settings.anchors, texts, settings.alpha_sampling, generator)
    else:
        drawn = noise_anchors(settings.anchors, texts.concept, generator)[settings.anchors // 2 :]
    rows = torch.cat([texts.empty[None], drawn])
    return rows, torch.tensor([0.5, *[0.5 / len(drawn)] * len(drawn)])


def losses(denoiser, x, t, texts, anchors, weights, settings):
    """(erase loss, anchor loss) for latents x (1, 4, h, w) at a timestep.

    erase, eq. 4: mean square of e_on(concept) - (e(surrogate) - eta (e(concept) - e(surrogate))), e without the
    adapter. anchor, eq. 7: weighted mean over the anchors of the mean square of e_on(a) - e(a).
    """
    fixed = torch.cat([torch.stack([texts.concept, texts.surrogate]), anchors])
    with torch.no_grad():
        still = denoiser.predict(x.expand(len(fixed), -1, -1, -1), torch.full((len(fixed),), t), fixed, on=False)
    concept, surrogate = still[:2]
    goal = surrogate - settings.eta * (concept - surrogate)
    moving = torch.cat([texts.concept[None], anchors])
    found = denoiser.predict(x.expand(len(moving), -1, -1, -1), torch.full((len(moving),), t), moving, on=True)
    erase = (found[0] - goal).square().mean()
    each = (found[1:] - still[2:]).square().flatten(1).mean(dim=1)
    return erase, (weights.to(each) * each).sum()


def learning_rate(step, settings):
    """Learning rate of a step, counted from 0: linear warm-up, then cosine with hard restarts."""
    if step < settings.warmup:
        return settings.lr * step / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * ((settings.cycles * progress) % 1)))


def train(denoiser, parameters, texts, settings, on_step=lambda report: None, start=0, optimizer=None):
    """Trains the parameters on Texts, one of them drawn for each step; on_step(Report) may end it by an exception.

    Deterministic for a seed on one device: each step draws from a generator of its own, so that a run that is
    resumed at step `start` draws what an uninterrupted one would. Raises ErasureError when a loss is not finite;
    the parameters are then those from before that step.
    """
    parameters = list(parameters)
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    alphas = alphas_cumprod()
    for step in range(start, settings.steps):
        generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + step) % 2**63)
        which = texts[int(torch.randint(len(texts), (), generator=generator))]
        k = int(torch.randint(1, settings.rollout_steps, (), generator=generator))
        x = torch.randn(1, 4, *settings.size, generator=generator)
        anchors, weights = anchor_rows(which, settings, generator)
        x = rollout(denoiser, x, k, which, settings, alphas)
        t = told_timestep(k, settings)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.zero_grad(set_to_none=True)
        erase, anchor = losses(denoiser, x, t, which, anchors, weights, settings)
        total = erase + settings.lam * anchor
        if not torch.isfinite(total):
            raise ErasureError(
                f"The loss is not finite in step {step + 1} (erase {erase.item()}, anchor {anchor.item()}); "
                "lower the learning rate."
            )
        total.backward()
        optimizer.step()
        on_step(Report(step + 1, erase.item(), anchor.item()))
