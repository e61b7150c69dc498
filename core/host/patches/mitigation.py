"""Puts the mitigations of core/erasers/mitigation.py on a MODEL: they act while it samples."""

import logging
import weakref

import comfy.conds
import torch

from ...adapters.patch import Patch
from ...erasers.mitigation import LEAVE, Transition, pull, reweighted_attention, switched, token_codes
from ...errors import ErasureError
from ..model.layers import require_unet, text_readers
from ..text.known_tokens import PROMPTS
from .conditioning import EXTRA_CONDS
from .places import put_below
from .steps import APPLY_MODEL

log = logging.getLogger("membrane")
TOKENS = "membrane_tokens"


class GuidanceSwitch:
    """A post-CFG function: another guidance scale until a transition, for each picture of the batch.

    until: part of the sampling (0 to 1), or None for the Transition that each picture shows. strength: 1 takes the
    prediction at the other scale, 0 the usual one.
    """

    def __init__(self, scale, until, strength):
        self.scale, self.until, self.strength = scale, until, strength
        self.sampling, self.transition = None, None

    def __call__(self, args):
        usual, conditional, unconditional = args["denoised"], args["cond_denoised"], args["uncond_denoised"]
        if args["uncond"] is None or unconditional is None:  # a guider without a negative side
            return usual
        return switched(usual, conditional, unconditional, self._waits(args), self.scale, self.strength)

    def _waits(self, args):
        """Which pictures (B,) are before their transition."""
        conditional = args["cond_denoised"]
        sigma = args["sigma"].float().expand(len(conditional))
        if self.until is not None:
            return sigma > float(args["model"].model_sampling.percent_to_sigma(self.until))
        transition = self._transition(mark(args["cond"]), sigma)
        transition.see(sigma, pull(conditional, args["uncond_denoised"], sigma))
        return ~transition.open

    def _transition(self, mark, sigma):
        """The Transition of the sampling under way, a new one for another sampling."""
        if self.sampling is None or self.sampling() is not mark or len(self.transition.lowest) != len(sigma):
            self.sampling, self.transition = weakref.ref(mark), Transition(sigma)
        return self.transition

    def __deepcopy__(self, memo):
        return type(self)(self.scale, self.until, self.strength)


def mark(positive):
    """An object that lives as long as one sampling: the host prepares the conditionings anew for each.

    The text, or what stands in its place: Stable Cascade calls it otherwise.
    """
    conditions = positive[0]["model_conds"]
    return conditions.get("c_crossattn") or next(iter(conditions.values()))


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


class TokenCodes(Patch):
    """Stands in for the base model's `extra_conds`: tells start token and padding of each positive conditioning."""

    function = EXTRA_CONDS

    def __call__(self, **kwargs):
        text = kwargs.pop("membrane_text", kwargs.get("cross_attn"))
        out = self.original(**kwargs)
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
            codes[row] = token_codes(contexts)[:, None]
        return codes


class TokenSteps(Patch):
    """Stands in for the base model's `apply_model`: lends the codes of the rows to the attention for one call."""

    function, lends = APPLY_MODEL, True

    def __init__(self, base, rows):
        super().__init__(base)
        self.rows = rows

    def __call__(self, x, t, c_concat=None, c_crossattn=None, *args, **kwargs):
        codes, before = kwargs.pop(TOKENS, None), self.rows.codes
        try:
            self.rows.codes = None if codes is None else codes[..., 0]
            return self.original(x, t, c_concat, c_crossattn, *args, **kwargs)
        finally:
            self.rows.codes = before


class Reweighted:
    """Stands in for cross-attention: reweighted_attention() by the codes of the rows in the network."""

    keeps_text = True  # brings none of its own

    def __init__(self, rows, factor, strength):
        self.rows, self.factor, self.strength = rows, factor, strength

    def __call__(self, q, k, v, options):
        codes = k.new_full((1, 1), LEAVE) if self.rows.codes is None else self.rows.codes
        return reweighted_attention(q, k, v, options["n_heads"], codes, self.factor, self.strength)

    def __deepcopy__(self, memo):
        return self


def reweight_tokens(model, factor, strength):
    """A clone of a MODEL whose cross-attention for the positive prompt is Reweighted; the model itself when that
    changes nothing.

    Raises ErasureError for a model without such attention, and when another node already stands in its place.
    """
    require_unet(model, "Re-weighting tokens", "choose dynamic, delayed or opposite guidance")
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
    put_below(patched, EXTRA_CONDS, TokenCodes(base))
    put_below(patched, APPLY_MODEL, TokenSteps(base, rows))
    attention = Reweighted(rows, factor, strength)
    for block in blocks(model):
        patched.set_model_attn2_replace(attention, *block)
    return patched


def blocks(model):
    """[(name, number)] of the blocks with cross-attention, as the host calls them."""
    found = {}
    for key, _ in text_readers(model):
        _, part, number, *_ = key.split(".")
        name = part.split("_")[0]
        found[name, 0 if name == "middle" else int(number)] = None
    return list(found)
