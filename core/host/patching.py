"""Puts a plan on a clone of the host's MODEL.

The text part acts on each conditioning when the host prepares it (`extra_conds` of the base model), so
it costs nothing per step; parts with a time range act in `apply_model`. Both are object patches, which
every host from March 2024 on undoes by itself when it switches to another clone.
"""

import logging

from ..errors import ErasureError
from ..plan import make_plan
from ..stack import ErasureStack

log = logging.getLogger("membrane")
EXTRA_CONDS, APPLY_MODEL = "extra_conds", "apply_model"


def context_width(model):
    """Width of the text vectors a MODEL reads; raises for models without text cross-attention."""
    width = getattr(model.model.model_config, "unet_config", {}).get("context_dim")
    if isinstance(width, (list, tuple)):
        width = width[0]
    reads = next((module.in_features for _, module in cross_attention_layers(model)), None)
    if width is None or reads != width:
        raise ErasureError(
            f"The model {type(model.model).__name__} has no cross-attention that reads the text directly "
            "(no matching attn2.to_k layers were found); "
            "closed-form erasure needs a Stable Diffusion 1, 2 or XL type U-Net."
        )
    return int(width)


def cross_attention_layers(model):
    """(key of the weight, module) of the key and value layers that read the text, in the U-Net's order."""
    for name, module in model.model.diffusion_model.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            yield f"diffusion_model.{name}.weight", module


def family(model):
    """The host's name of the model's family, such as SD15 or SDXL."""
    return type(model.model.model_config).__name__.lstrip("_")


class ErasedConditioning:
    """Stands in for the base model's `extra_conds`: erases from each conditioning's text once.

    Immutable; clones may share it. `previous` is what another pack had put in the same place.
    """

    def __init__(self, base, stack, plan, previous):
        self.base, self.stack, self.plan, self.previous = base, stack, plan, previous

    def __call__(self, **kwargs):
        original = self.previous or type(self.base).extra_conds.__get__(self.base)
        text = kwargs.get("cross_attn")
        if text is None or self.plan.constant is None:
            return original(**kwargs)
        # a ControlNet reads the same text but is not part of what was edited
        if "control" in kwargs and kwargs.get("cross_attn_controlnet") is None:
            kwargs["cross_attn_controlnet"] = text
        kwargs["cross_attn"] = (text.float() + self.plan.constant.delta(text)).to(text.dtype)
        return original(**kwargs)

    def __deepcopy__(self, memo):
        return self


class TimedErasure:
    """Stands in for the base model's `apply_model`: adds the parts that act in some steps only."""

    def __init__(self, base, parts, previous):
        self.base, self.parts, self.previous = base, parts, previous

    def __call__(self, x, t, c_concat=None, c_crossattn=None, *args, **kwargs):
        original = self.previous or type(self.base).apply_model.__get__(self.base)
        if c_crossattn is not None:
            sampling = self.base.model_sampling
            erased = c_crossattn.float()
            for part in self.parts:
                start, end = sampling.percent_to_sigma(part.start_percent), sampling.percent_to_sigma(part.end_percent)
                on = ((t <= start) & (t >= end)).float().view(-1, 1, 1)  # no copy to the CPU, so no waiting
                erased = erased + on * part.delta(c_crossattn)
            c_crossattn = erased.to(c_crossattn.dtype)
        return original(x, t, c_concat, c_crossattn, *args, **kwargs)

    def __deepcopy__(self, memo):
        return self


def _foreign(model, name, ours):
    """What another pack has put in a place of the base model, below our own patch of class `ours`; or None."""
    patch = model.object_patches.get(name)
    return patch.previous if isinstance(patch, ours) else patch


def applied_stack(model):
    """The stack that already acts on a MODEL, empty when none does."""
    patch = model.object_patches.get(EXTRA_CONDS)
    return patch.stack if isinstance(patch, ErasedConditioning) else ErasureStack()


def apply_stack(model, stack):
    """A clone of a MODEL with the stack added to what already acts on it; the model itself when nothing acts."""
    width = context_width(model)
    whole = applied_stack(model) + stack
    plan = make_plan(whole, width)
    if not plan:
        return model
    patched = model.clone()
    foreign = _foreign(model, EXTRA_CONDS, ErasedConditioning)
    patched.add_object_patch(EXTRA_CONDS, ErasedConditioning(model.model, whole, plan, foreign))
    if plan.timed:
        parts = [part.to(model.load_device) for part in plan.timed]  # once, not in every step
        foreign = _foreign(model, APPLY_MODEL, TimedErasure)
        patched.add_object_patch(APPLY_MODEL, TimedErasure(model.model, parts, foreign))
    log.info("Membrane: %d erasure adapter(s) on the text of %s", len(whole.entries), type(model.model).__name__)
    return patched


def without_stack(model):
    """A clone of a MODEL without the stack that acts on its text; another pack's patches stay."""
    clone = model.clone()
    for name, ours in ((EXTRA_CONDS, ErasedConditioning), (APPLY_MODEL, TimedErasure)):
        foreign = _foreign(clone, name, ours)
        if foreign is None:
            clone.object_patches.pop(name, None)
        else:
            clone.object_patches[name] = foreign
    return clone
