"""Latent Anchoring: trains an SPM adapter against a frozen denoiser.

SPM, Lyu et al. 2024 (arXiv 2312.16145), section 3.2 and appendix C. The adapter's prediction for the concept is drawn
to the surrogate's (eq. 4), and its predictions for anchors, other texts, are held where they were (eq. 5 to 8).
"""

import math
from dataclasses import asdict, dataclass
from typing import Protocol

import torch

from ..errors import ErasureError
from .adversarial import Game
from .conditions import Conditions, likeness, together
from .objectives import ADVERSARIAL, LOSSES, OBJECTIVES, SPM, places, predicted
from .paths import PUBLISHED, TIMESTEPS, NoiseSchedule
from .retained import RETAINED, backward, drawn_texts, forget_loss, retain_loss, walked

NOISE, TEXTS = ANCHORS = ("noise", "texts")


class Denoiser(Protocol):
    """The network that is trained against.

    predict(x, t, text, on): what the network predicts for latents x (rows, C, h, w) at levels t (rows,) and a text for
    each row, all on the CPU. Of Stable Diffusion's kind: noise, timesteps 0 to 999, and x = sqrt(a_t) clean + sqrt(1 -
    a_t) noise; of models trained by flow matching: velocities, and sigmas. text: (rows, T, d), or as many Conditions.
    on: with the adapter, with gradients where they are enabled; otherwise without it.
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
    "matching" the latents; size: height and width of latents; weight_decay: of AdamW; seed: of all draws; objective:
    one of OBJECTIVES, "esd" and "gem" have no anchors; channels: of latents, (C,) or, of videos, (C, frames).
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
    objective: str = SPM
    channels: tuple[int, ...] = (4,)

    def __post_init__(self):
        for name, least in (("steps", 1), ("warmup", 0), ("cycles", 1), ("anchors", 1), ("rollout_steps", 2)):
            if getattr(self, name) < least:
                raise ErasureError(f"Training has {name} {getattr(self, name)}; expected at least {least}.")
        if not 0 < self.lr < math.inf:
            raise ErasureError(f"Training has the learning rate {self.lr}; expected a positive number, such as 1e-4.")
        for name, known in (("anchor_kind", ANCHORS), ("timestep", TIMESTEPS), ("objective", OBJECTIVES)):
            if getattr(self, name) not in known:
                raise ErasureError(f'Training has {name} "{getattr(self, name)}"; expected {" or ".join(known)}.')

    def said(self):
        """The settings as a card has them."""
        return {**asdict(self), "size": list(self.size), "channels": list(self.channels)}


@dataclass(frozen=True, eq=False)
class Texts:
    """Text vectors (T, d) of the concept, its surrogate and the empty prompt, and of preserved prompts (n, T, d); or
    the Conditions of each. alone: whether the concept is the bare words, in no caption."""

    concept: torch.Tensor | Conditions
    surrogate: torch.Tensor | Conditions
    empty: torch.Tensor | Conditions
    preserved: torch.Tensor | list | None = None
    alone: bool = False


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


def walk(denoiser, x, k, texts, settings, path, on=True):
    """Latents of a roll-out from noise x (1, C, h, w) for the concept, with guidance: after 0, 1, ... k steps, one
    after the other. on: with the adapter, or without."""
    guided = settings.rollout_cfg != 1
    x = path.beginning(x)
    yield x
    for i in range(k):
        with torch.no_grad():
            found = predicted(denoiser, x, path.levels[i], [texts.empty] * guided + [texts.concept], on)
            empty, concept = found.chunk(2) if guided else (0.0, found)
            x = path.after(x, empty + settings.rollout_cfg * (concept - empty), i)
        yield x


def rollout(denoiser, x, k, texts, settings, path, on=True):
    """Latents after k steps, see walk()."""
    *_, x = walk(denoiser, x, k, texts, settings, path, on)
    return x


def preview(denoiser, texts, settings, path=None, on=True):
    """A picture of the concept as the adapter makes it now, latents (1, C, h, w), always from the same noise.

    on: with the adapter, or as it was without.
    """
    path = path or NoiseSchedule(settings)
    generator = torch.Generator().manual_seed(settings.seed)
    x = torch.randn(1, *settings.channels, *settings.size, generator=generator)
    x = rollout(denoiser, x, settings.rollout_steps - 1, texts, settings, path, on)
    with torch.no_grad():
        return path.clean(x, predicted(denoiser, x, path.levels[-1], [texts.concept], on))


def noise_anchors(count, concept, generator):
    """Anchors [(T, d)] as the published code draws them: isotropic noise with 0.8 to 1.2 of the concept's norm.

    A draw is kept with probability 1 - its cosine with the concept, which is about 1 for all of them. Of Conditions,
    the rows and each pooled vector are drawn so, as the published code does for SDXL.
    """
    if isinstance(concept, Conditions):
        return [concept.noised(lambda vectors: _noise(vectors, generator)) for _ in range(count)]
    return torch.stack([_noise(concept, generator) for _ in range(count)])


def _noise(concept, generator):
    while True:
        z = torch.randn(concept.shape, generator=generator)
        z = z / z.norm()
        cosine = (z * concept).sum() / concept.norm()
        if torch.rand((), generator=generator) < 1 - cosine:
            return z * concept.norm() * (0.8 + 0.4 * torch.rand((), generator=generator))


def text_anchors(count, texts, alpha, generator):
    """Anchors [count] among preserved prompts, by chance as (1 - |cos(anchor, concept)|)^alpha, eq. 6."""
    distance = 1 - likeness(texts.preserved, texts.concept).abs()
    weight = torch.where(distance > 1e-6, distance, 0.0) ** alpha
    if not weight.any():
        raise ErasureError("All preserved prompts equal the concept; preserve something else.")
    drawn = torch.multinomial(weight, count, replacement=True, generator=generator)
    return together([texts.preserved[i] for i in drawn.tolist()])


def anchor_rows(texts, settings, generator):
    """(anchors [n], weights (n,) that add to 1): the empty prompt with half of the weight and drawn ones.

    In the published code half of the drawn anchors only cost time: its helper compares the second half of a batch
    laid out as empty, 1st, empty, 2nd ... The others and the empty prompt are what counts, and each is computed once.
    """
    if settings.anchor_kind == TEXTS:
        drawn = text_anchors(settings.anchors, texts, settings.alpha_sampling, generator)
    else:
        drawn = noise_anchors(settings.anchors, texts.concept, generator)[settings.anchors // 2 :]
    return together([texts.empty, *drawn]), torch.tensor([0.5, *[0.5 / len(drawn)] * len(drawn)])


def learning_rate(step, settings):
    """Learning rate of a step, counted from 0: linear warm-up, then cosine with hard restarts."""
    if step < settings.warmup:
        return settings.lr * step / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * ((settings.cycles * progress) % 1)))


def train(denoiser, parameters, texts, settings, on_step=lambda report: None, start=0, optimizer=None, path=None):
    """Trains the parameters on Texts, one of them drawn for each step; on_step(Report) may end it by an exception.

    path: of the roll-outs; None for Stable Diffusion's noise schedule. Deterministic for a seed on one device: each
    step draws from a generator of its own, so that a run that is resumed at step `start` draws what an uninterrupted
    one would; but the attacks of adversarial training begin anew. Raises ErasureError when a loss is not finite; the
    parameters are then those from before that step.
    """
    parameters, path = list(parameters), path or NoiseSchedule(settings)
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    game = Game(denoiser, parameters, texts, settings, path) if settings.objective == ADVERSARIAL else None
    for step in range(start, settings.steps):
        generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + step) % 2**63)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.zero_grad(set_to_none=True)
        if game is not None:
            on_step(_played(game, generator, optimizer, step))
            continue
        which = texts[int(torch.randint(len(texts), (), generator=generator))]
        k = int(torch.randint(path.first, settings.rollout_steps, (), generator=generator))
        x = torch.randn(1, *settings.channels, *settings.size, generator=generator)
        if settings.objective in RETAINED:
            rows = drawn_texts(settings.anchors, which, generator)
            on_step(_retaining(denoiser, parameters, which, x, k, rows, settings, path, generator, optimizer, step))
            continue
        anchors = anchor_rows(which, settings, generator) if settings.objective == SPM else ((), torch.zeros(0))
        on_step(_step(denoiser, which, x, places(settings, k), anchors, settings, path, optimizer, step))


def _step(denoiser, texts, x, after, anchors, settings, path, optimizer, step):
    """Report of one step of the optimiser, with the loss taken after some numbers of steps of a roll-out from noise."""
    erased = held = 0.0
    for k, latents in enumerate(walk(denoiser, x, max(after), texts, settings, path)):
        if k not in after:
            continue
        erase, anchor = LOSSES[settings.objective](denoiser, latents, path.told(k), texts, *anchors, settings)
        _require_finite(step, erase.item(), anchor.item())
        total = (erase + settings.lam * anchor) / len(after)
        total.backward()
        erased, held = erased + erase.item() / len(after), held + anchor.item() / len(after)
    optimizer.step()
    return Report(step + 1, erased, held)


def _played(game, generator, optimizer, step):
    """Report of one step of the optimiser in adversarial training."""
    erase, anchor = game(generator)
    _require_finite(step, erase, anchor)
    optimizer.step()
    return Report(step + 1, erase, anchor)


def _retaining(denoiser, parameters, texts, x, k, kept, settings, path, generator, optimizer, step):
    """Report of one step that forgets in latents of the concept and retains in latents of each of some kept texts, all
    after k steps of a roll-out."""
    noise = torch.randn(len(kept), *x.shape[1:], generator=generator)
    theirs = walked(denoiser, noise, k, kept, texts.empty, settings, path)
    forget = forget_loss(denoiser, rollout(denoiser, x, k, texts, settings, path), path.told(k), texts, settings)
    retain = retain_loss(denoiser, theirs, path.told(k), kept)
    _require_finite(step, forget.item(), retain.item())
    backward(parameters, forget, retain, settings.objective, settings.lam)
    optimizer.step()
    return Report(step + 1, forget.item(), retain.item())


def _require_finite(step, erase, anchor):
    if not math.isfinite(erase + anchor):
        raise ErasureError(
            f"The loss is not finite in step {step + 1} (erase {erase}, anchor {anchor}); lower the learning rate."
        )
