"""Mitigations while sampling that need no gradients: guidance that waits until the picture is under way, and attention
that leans on the start token instead of the end tokens.
"""

import copy
import logging
import weakref

import comfy.conds
import torch

from ...errors import ErasureError
from ..model.layers import context_width, cross_attention_layers
from ..text.known_tokens import PROMPTS
from .stack import APPLY_MODEL, EXTRA_CONDS, ErasedConditioning, ErasedSteps

log = logging.getLogger("membrane")
TOKENS = "membrane_tokens"
LEAVE, START, PADDING = 0.0, 1.0, 2.0  # what is done to a token
SAME = 1e-5  # relative difference below which two noise levels are one


class Run:
    """What GuidanceSwitch has seen of one sampling, for each picture (B,)."""

    def __init__(self, mark, like):
        self.mark = mark
        self.lowest, self.last, self.before = (torch.full_like(like, torch.inf) for _ in range(3))
        self.open = torch.zeros_like(like, dtype=torch.bool)

    def see(self, sigma, length):
        """Opens pictures whose text part has grown since the noise level before, which was a local minimum."""
        fresh = sigma < self.lowest * (1 - SAME)
        counts = fresh | (sigma <= self.lowest * (1 + SAME))  # not on the way back up, as restarts and churn go
        self.before = torch.where(fresh, self.last, self.before)
        self.last = torch.where(counts, length, self.last)
        self.lowest = torch.minimum(self.lowest, sigma)
        self.open = self.open | (counts & (self.last > self.before))


class GuidanceSwitch:
    """A post-CFG function: another guidance scale until a transition, for each picture of the batch.

    Jain et al., "Classifier-Free Guidance inside the Attraction Basin May Cause Memorization", CVPR 2025.
    until: part of the sampling (0 to 1), or None for the first local minimum of the text part's length ||D_c - D_u|| /
    sigma. strength: 1 takes the prediction at the other scale, 0 the usual one.
    """

    def __init__(self, scale, until, strength):
        self.scale, self.until, self.strength = scale, until, strength
        self.run = None

    def __call__(self, args):
        usual, conditional, unconditional = args["denoised"], args["cond_denoised"], args["uncond_denoised"]
        if args["uncond"] is None or unconditional is None:  # a guider without a negative side
            return usual
        part = conditional - unconditional
        waits = self._waits(args, part)
        other = unconditional + self.scale * part
        if self.strength != 1:
            other = usual + self.strength * (other - usual)
        return torch.where(waits.view(-1, *[1] * (usual.dim() - 1)), other, usual)

    def _waits(self, args, part):
        """Which pictures (B,) are before their transition."""
        sigma = args["sigma"].float().expand(len(part))
        if self.until is not None:
            return sigma > float(args["model"].model_sampling.percent_to_sigma(self.until))
        run = self.run
        if run is None or run.mark() is not _mark(args["cond"]) or len(run.lowest) != len(sigma):
            run = self.run = Run(weakref.ref(_mark(args["cond"])), sigma)
        run.see(sigma, part.float().flatten(1).norm(dim=1) / sigma)
        return ~run.open

    def __deepcopy__(self, memo):
        return type(self)(self.scale, self.until, self.strength)


def _mark(positive):
    """An object that lives as long as one sampling: the host prepares the conditionings anew for each."""
    return positive[0]["model_conds"]["c_crossattn"]


def switch_guidance(model, scale, until, strength):
    """A clone of a MODEL with a GuidanceSwitch; the model itself when that changes nothing."""
    if strength == 0 or until == 0:
        return model
    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(GuidanceSwitch(scale, until, strength), disable_cfg1_optimization=True)
    return patched


# ---------------------------------------------------------------- token re-weighting


class Rows:
    """What is done to the tokens of the rows that are going through the network now, (rows, T), or None."""

    def __init__(self):
        self.codes = None


class TokenCodes:
    """Stands in for the base model's `extra_conds`: tells start token and padding of each positive conditioning."""

    def __init__(self, base, previous):
        self.base, self.previous = base, previous

    def __call__(self, **kwargs):
        original = self.previous or type(self.base).extra_conds.__get__(self.base)
        text = kwargs.pop("membrane_text", kwargs.get("cross_attn"))
        out = original(**kwargs)
        if text is not None:
            # repeated along with the text where the host evens out lengths
            codes = comfy.conds.CONDCrossAttn(
                self.codes(text, kwargs.get("prompt_type")).to(kwargs.get("device", "cpu"))
            )
            out[TOKENS] = codes
        return out

    def codes(self, text, prompt_type):
        """(rows, T, 1) for text vectors (rows, T, d)."""
        codes = torch.full((*text.shape[:2], 1), LEAVE)
        if prompt_type == "negative":
            return codes
        for row, contexts in enumerate(PROMPTS.ends(text)):
            if contexts is None:
                log.warning(
                    "Membrane: a prompt's tokens are not known (it was averaged, cut or made elsewhere); "
                    "token re-weighting leaves it as it is"
                )
                continue
            at = 0
            for length, end in contexts:
                codes[row, at] = START
                codes[row, at + end + 1 : at + length] = PADDING
                at += length
        return codes

    def __deepcopy__(self, memo):
        return self


class TokenSteps:
    """Stands in for the base model's `apply_model`: lends the codes of the rows to the attention for one call."""

    def __init__(self, base, rows, previous):
        self.base, self.rows, self.previous = base, rows, previous

    def __call__(self, x, t, c_concat=None, c_crossattn=None, *args, **kwargs):
        original = self.previous or type(self.base).apply_model.__get__(self.base)
        codes, before = kwargs.pop(TOKENS, None), self.rows.codes
        try:
            self.rows.codes = None if codes is None else codes[..., 0]
            return original(x, t, c_concat, c_crossattn, *args, **kwargs)
        finally:
            self.rows.codes = before

    def __deepcopy__(self, memo):
        return self


class Reweighted:
    """Cross-attention softmax(q k^T / sqrt(d)) v with start token logits times a factor and padding left out.

    Ren et al., "Unveiling and Mitigating Memorization in Text-to-image Diffusion Models through Cross Attention",
    ECCV 2024, section 5. strength: between the usual attention and that.
    """

    def __init__(self, rows, factor, strength):
        self.rows, self.strength = rows, strength
        self.factor = 1 + strength * (factor - 1)

    def __call__(self, q, k, v, options):
        heads, codes = options["n_heads"], self.rows.codes
        if codes is None:
            codes = k.new_full((1, 1), LEAVE)
        codes = codes.to(k.device).repeat_interleave(len(k) // len(codes), dim=0)
        codes = torch.nn.functional.pad(codes, (0, k.shape[1] - codes.shape[1]), value=LEAVE)  # tokens others appended
        k = torch.where((codes == START)[..., None], k * self.factor, k)
        weight = torch.where(codes == PADDING, 1 - self.strength, 1.0).to(q.dtype)
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=weight.log()[:, None, None])
        return found.transpose(1, 2).flatten(2)

    def __deepcopy__(self, memo):
        return self


def reweight_tokens(model, factor, strength):
    """A clone of a MODEL whose cross-attention for the positive prompt is Reweighted; the model itself when that
    changes nothing.

    Raises ErasureError for a model without such attention, and when another node already stands in its place.
    """
    context_width(model)
    if strength == 0:
        return model
    others = model.model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn2", {})
    if others:
        holder = type(next(iter(others.values()))).__name__
        raise ErasureError(
            f"Another node already replaces the model's cross-attention ({holder} in {len(others)} blocks), which only "
            "one can do; choose another method, or take the other node away."
        )
    patched, base, rows = model.clone(), model.model, Rows()
    _below(patched, EXTRA_CONDS, ErasedConditioning, TokenCodes(base, None))
    _below(patched, APPLY_MODEL, ErasedSteps, TokenSteps(base, rows, None))
    attention = Reweighted(rows, factor, strength)
    for block in blocks(model):
        patched.set_model_attn2_replace(attention, *block)
    return patched


def blocks(model):
    """[(name, number)] of the blocks with cross-attention, as the host calls them."""
    found = {}
    for key, _ in cross_attention_layers(model):
        _, part, number, *_ = key.split(".")
        name = part.split("_")[0]
        found[name, 0 if name == "middle" else int(number)] = None
    return list(found)


def _below(patched, name, ours, patch):
    """Puts a patch in a place of the base model, below an erasure, which may be exchanged later for another."""
    erasure = patched.object_patches.get(name)
    if isinstance(erasure, ours):
        patch.previous, erasure = erasure.previous, copy.copy(erasure)
        erasure.previous = patch
        patched.add_object_patch(name, erasure)
    else:
        patch.previous = erasure
        patched.add_object_patch(name, patch)
