"""Holding memorised pictures back without a trained weight: guidance that waits until the picture is under way,
attention that leans on the start token instead of the padding, and text vectors that pull less.

Jain et al., "Classifier-Free Guidance inside the Attraction Basin May Cause Memorization", CVPR 2025; Ren et al.,
"Unveiling and Mitigating Memorization in Text-to-image Diffusion Models through Cross Attention", ECCV 2024; Wen et
al., "Detecting, Explaining, and Mitigating Memorization in Diffusion Models", ICLR 2024.
"""

from dataclasses import dataclass

import torch

SAME = 1e-5  # relative difference below which two noise levels are one
LEAVE, START, PADDING = 0.0, 1.0, 2.0  # what is done to a token

# ---------------------------------------------------------------- guidance


class Transition:
    """When each picture of one sampling leaves the attraction basin (Jain et al.): at the first local minimum of the
    text part's length ||D_c - D_u|| / sigma. open: (B,) bool, those that have left it."""

    def __init__(self, like):
        """like: a tensor (B,) of the sampling's pictures."""
        self.lowest, self.last, self.before = (torch.full_like(like, torch.inf) for _ in range(3))
        self.open = torch.zeros_like(like, dtype=torch.bool)

    def see(self, sigma, length):
        """Opens pictures whose text part has grown since the noise level before, which was a local minimum.

        sigma, length: (B,). A noise level that is seen twice counts with its last length.
        """
        fresh = sigma < self.lowest * (1 - SAME)
        counts = fresh | (sigma <= self.lowest * (1 + SAME))  # not on the way back up, as restarts and churn go
        self.before = torch.where(fresh, self.last, self.before)
        self.last = torch.where(counts, length, self.last)
        self.lowest = torch.minimum(self.lowest, sigma)
        self.open = self.open | (counts & (self.last > self.before))


def pull(conditional, unconditional, sigma):
    """Length (B,) of the text part ||D_c - D_u|| / sigma of predictions (B, ...) at noise levels sigma (B,)."""
    return (conditional - unconditional).float().flatten(1).norm(dim=1) / sigma


def switched(usual, conditional, unconditional, waits, scale, strength):
    """Predictions (B, ...): for the pictures that wait (B,) with another guidance scale, the usual ones for the others.

    strength: 1 takes the prediction at the other scale, 0 the usual one.
    """
    other = unconditional + scale * (conditional - unconditional)
    if strength != 1:
        other = usual + strength * (other - usual)
    return torch.where(waits.view(-1, *[1] * (usual.dim() - 1)), other, usual)


# ---------------------------------------------------------------- token re-weighting


def token_codes(contexts):
    """(T,) what is done to the tokens of a text of contexts [(length, place of the first end token)]: each context's
    start token is START, what follows its end token is PADDING, the rest LEAVE."""
    codes = []
    for length, end in contexts:
        codes += [START, *[LEAVE] * end, *[PADDING] * (length - end - 1)]
    return torch.tensor(codes)


def reweighted_attention(q, k, v, heads, codes, factor, strength):
    """Attention softmax(q k^T / sqrt(d)) v, (B, n, heads d), with the start token's logits times a factor and padding
    left out (Ren et al., section 5).

    q: (B, n, heads d); k, v: (B, T, heads d); codes: (rows, T' <= T) for B a multiple of rows, tokens beyond T' are
    left as they are. strength: 0 is the usual attention, 1 the one above.
    """
    codes = codes.to(k.device).repeat_interleave(len(k) // len(codes), dim=0)
    codes = torch.nn.functional.pad(codes, (0, k.shape[1] - codes.shape[1]), value=LEAVE)
    k = torch.where((codes == START)[..., None], k * (1 + strength * (factor - 1)), k)
    weight = torch.where(codes == PADDING, 1 - strength, 1.0).to(q.dtype)
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=weight.log()[:, None, None])
    return found.transpose(1, 2).flatten(2)


# ---------------------------------------------------------------- text vectors that pull less


@dataclass(frozen=True)
class Softening:
    """How a text is softened: by Adam on its vectors, from the first steps of sampling (Wen et al., section 5).

    target: the pull from which on nothing is changed, or None for a share of the text's own pull; steps: of Adam at
    most; rate: its first step, in root mean squares of the vectors; growth: each further one is so much larger, since
    networks that read text differently need larger ones.
    """

    target: float | None = None
    share: float = 0.5
    steps: int = 20
    rate: float = 0.05
    growth: float = 1.2


@dataclass(frozen=True)
class Softened:
    """Text vectors, their pull before and after, the target it was to reach, and the steps that were taken."""

    vectors: torch.Tensor
    before: float
    after: float
    target: float
    steps: int


def softened(vectors, pulls, softening, on_step=lambda done: None):
    """Softened of text vectors (1, T, d): those of the least pull on the way, the very ones that came in where they
    pull no more than the target.

    pulls(leaf) gives (pull, its gradient with respect to the leaf (1, T, d)); on_step(steps done) may raise to stop.
    """
    leaf = vectors.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=softening.rate * float(vectors.float().square().mean().sqrt()))
    best, least, before, target = vectors, torch.inf, None, softening.target
    for step in range(softening.steps + 1):
        pull_now, leaf.grad = pulls(leaf)
        before = pull_now if before is None else before
        target = softening.share * before if target is None else target
        if pull_now < least:
            best, least = leaf.detach().clone() if step else vectors, pull_now
        if least <= target or step == softening.steps:
            break
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= softening.growth
        on_step(step + 1)
    return Softened(best, before, least, target, step)
