"""The path from noise to a picture that a roll-out goes: Stable Diffusion's noise schedule, or a model's own levels."""

import torch

BETA_START, BETA_END, LEVELS = 0.00085, 0.012, 1000
PUBLISHED, MATCHING = TIMESTEPS = ("published", "matching")


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


class NoiseSchedule:
    """DDIM steps of Stable Diffusion; predictions are noise, levels are timesteps 0 to 999.

    first: the fewest steps after which a loss is drawn, as in SPM's code.
    """

    first = 1

    def __init__(self, settings, alphas=None):
        self.settings, self.alphas = settings, alphas_cumprod() if alphas is None else alphas
        self.levels = rollout_timesteps(settings.rollout_steps)

    def beginning(self, noise):
        """Latents that a roll-out begins with."""
        return noise

    def told(self, k):
        """The level that the network is told for latents after k steps when it is trained there."""
        return told_timestep(k, self.settings)

    def after(self, x, noise, i):
        """Latents after step i, from those before it and the prediction."""
        return ddim_step(x, noise, self.levels[i], self.levels[i + 1], self.alphas)

    def clean(self, x, noise):
        """The clean latents, from those at the last level and the prediction."""
        a = self.alphas[self.levels[-1]].item()
        return (x - (1 - a) ** 0.5 * noise) / a**0.5

    def drawn(self, low, generator):
        """A level (1,) by chance, not among the lowest share `low`."""
        return torch.randint(int(low * LEVELS), LEVELS, (1,), generator=generator)

    def noised(self, clean, noise, level):
        """Clean latents (1, C, h, w) with noise, at a level (1,)."""
        a = self.alphas[level].item()
        return a**0.5 * clean + (1 - a) ** 0.5 * noise


def straight(clean, noise, sigma):
    """Latents on the straight line between clean ones and noise (Liu et al. 2023)."""
    return (1 - sigma) * clean + sigma * noise


class Flow:
    """Euler steps between a model's own noise levels; predictions are velocities dx / dsigma (Liu et al. 2023, eq. 1).

    sigmas: falling levels of a roll-out, without a 0 at the end; scaled(noise): latents at the first of them;
    mixed(clean, noise, sigma): latents at a level. first: the fewest steps after which a loss is drawn: the velocity in
    pure noise is the mean picture of a text, with what its pictures have in common, such as stripes.
    """

    first = 0

    def __init__(self, sigmas, scaled=lambda noise: noise, mixed=straight):
        self.levels, self.scaled, self.mixed = [float(sigma) for sigma in sigmas], scaled, mixed

    def beginning(self, noise):
        """Latents that a roll-out begins with."""
        return self.scaled(noise)

    def told(self, k):
        """The level of latents after k steps."""
        return self.levels[k]

    def after(self, x, velocity, i):
        """Latents after step i, from those before it and the prediction."""
        return x + (self.levels[i + 1] - self.levels[i]) * velocity

    def clean(self, x, velocity):
        """The clean latents, from those at the last level and the prediction."""
        return x - self.levels[-1] * velocity

    def drawn(self, low, generator):
        """A level (1,) by chance between those of the roll-out, not among the lowest share `low` of its steps."""
        place = float(torch.rand((), generator=generator)) * (1 - low) * (len(self.levels) - 1)
        i, part = int(place), place % 1
        after = self.levels[min(i + 1, len(self.levels) - 1)]
        return torch.tensor([self.levels[i] + part * (after - self.levels[i])])

    def noised(self, clean, noise, level):
        """Clean latents (1, C, h, w) with noise, at a level (1,)."""
        return self.mixed(clean, noise, level.item())
