"""U-Nets that read a picture and its mask beside the noisy latents, as those for inpainting do."""

import torch

from ..compat import channels_and_ratio
from .layers import denoiser

BESIDE = ("mask", "masked_image")  # the host's names of what follows the latents of such a network, in this order


def reads_more(model):
    """Whether the U-Net of a MODEL reads more channels than its latents have."""
    first = denoiser(model).input_blocks[0][0]
    return first.in_channels != channels_and_ratio(model.model.latent_format)[0]


def inpaints(base):
    """Whether a base model is one for inpainting that the host can fill for a picture that is masked as a whole."""
    return tuple(getattr(base, "concat_keys", ())) == BESIDE and hasattr(base, "blank_inpaint_image_like")


def whole_masked(base, x):
    """What such a network reads beside latents x (n, C, h, w) for a picture that is masked as a whole, which makes it
    one that draws from text alone: (n, 1 + C, h, w)."""
    return torch.cat([torch.ones_like(x[:, :1]), base.blank_inpaint_image_like(x)], dim=1)


def masked_picture(base, latents):
    """The same as arguments of the host's `extra_conds`; none for all other models."""
    if not inpaints(base):
        return {}
    return {"latent_image": base.blank_inpaint_image_like(latents), "denoise_mask": torch.ones_like(latents)}
