"""Holding memorised pictures back while sampling, without a trained weight: guidance that waits until the picture is
under way, and attention that leans on the start token instead of the padding.

Jain et al., "Classifier-Free Guidance inside the Attraction Basin May Cause Memorization", CVPR 2025; Ren et al.,
"Unveiling and Mitigating Memorization in Text-to-image Diffusion Models through Cross Attention", ECCV 2024.
"""

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
