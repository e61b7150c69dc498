"""Prompts as all that the network of a MODEL is called with for them."""

import comfy.model_management
import torch

from ...erasers.conditions import Conditions
from ...errors import ErasureError
from ..model.inpainting import masked_picture
from ..model.layers import family, text_entries
from .encode import each_given, pooled_of


def conditions_for(model, clip, prompts, latents, pixels, on_progress=None):
    """{prompt: Conditions} of prompts, prepared by the MODEL's own `extra_conds`, as sampling prepares them.

    latents: empty ones (1, C, h, w) of the pictures to be made, pixels: their (width, height), which SDXL reads beside
    its pooled text. The tensors are on the CPU and can be saved for a backward pass. Raises ErasureError for a CLIP
    that belongs to another model.
    """
    known = text_entries(model)
    given = [(prompt, found) for prompt, _, found in each_given(clip, list(dict.fromkeys(prompts)), on_progress)]
    if any(entry.pooled and entry.result == "y" for entry in known):
        pooled_of(clip, [found.get("pooled_output") for _, found in given])  # raises where there is none
    comfy.model_management.load_models_gpu([model])
    found = {prompt: _prepared(model, encoded, latents, pixels) for prompt, encoded in given}
    _require_width(known, next(iter(found.values())))
    return found


def _prepared(model, encoded, latents, pixels):
    more = {name: value for name, value in encoded.items() if name != "cond"}
    try:
        with torch.inference_mode():
            conds = type(model.model).extra_conds(
                model.model, cross_attn=encoded["cond"], noise=latents, device=model.load_device, width=pixels[0],
                height=pixels[1], prompt_type="positive", **masked_picture(model.model, latents), **more,
            )  # fmt: skip
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ErasureError(
            f"The model {type(model.model).__name__} could not prepare the text that the text encoder gave ({error}); "
            "connect the CLIP that belongs to the model."
        ) from error
    vector, entries = encoded.get("pooled_output"), family(model).entries
    pooled = {entry.result: vector.shape[-1] for entry in entries if entry.pooled and entry.result in conds}
    with torch.inference_mode(False):
        given = {name: _ordinary(cond.cond) for name, cond in conds.items()}
    return Conditions(given, family(model).text.result, pooled)


def _ordinary(value):
    """A copy on the CPU that is not a tensor of inference mode."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    return [_ordinary(part) for part in value] if isinstance(value, list) else value


def _require_width(known, text):
    entry, width = next(iter(known.items()))
    found = text.given[entry.result].shape[-1] if entry.result in text.given else None
    # layers of the model that join several texts, or prepare them, are no measure of how wide these are
    if found is None or (width not in (None, found) and not entry.prepared and " and " not in entry.norm):
        raise ErasureError(
            f"The text encoder gives vectors of width {found}, but the model reads vectors of width {width}; "
            "connect the CLIP that belongs to the model."
        )
