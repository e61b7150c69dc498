"""The host's CLIP vision model: pictures and class names as vectors of one space."""

import torch

from ...errors import ErasureError

TEMPLATE = "a photo of a {}"  # Radford et al. 2021, section 3.1.4


def image_vectors(clip_vision, pictures, width=None):
    """Projected image embeddings (B, d) on the CPU; width: what d has to be, for the error a user meets."""
    if pictures is None:
        raise ErasureError("CLIP vision needs pictures, and this model has no preview colours; connect a vae.")
    found = clip_vision.encode_image(pictures)["image_embeds"].float().cpu()
    if width is not None and found.shape[-1] != width:
        raise ErasureError(
            f"The vision model gives vectors of width {found.shape[-1]}, class_clip of width {width}; "
            "connect the text encoder that belongs to clip_vision."
        )
    return found


def class_vectors(clip, classes):
    """Pooled text embeddings (classes, d) of "a photo of a <class>" on the CPU."""
    found = [clip.encode_from_tokens(clip.tokenize(TEMPLATE.format(name)), return_pooled=True)[1] for name in classes]
    if any(vector is None for vector in found):
        raise ErasureError(
            "The text encoder on class_clip gives no pooled vector; connect the one that belongs to clip_vision."
        )
    return torch.cat([vector.float().cpu() for vector in found])
