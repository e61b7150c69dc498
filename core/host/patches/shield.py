"""Puts the shield of core/erasers/shield.py on a MODEL: it acts while it samples."""

import logging

import torch

from ...erasers.shield import fitted, frames, held_back, likeness, patterns
from ...errors import ErasureError
from ..compat import channels_and_ratio

log = logging.getLogger("membrane")
KNOWN = "Pictures to protect"  # as messages call them


class Shield:
    """A post-CFG function that does not follow a prediction which resembles a known picture.

    pictures: [(K, C, h, w)] in the model's latent space, of any sizes; threshold: likeness from which on a prediction
    is not followed; strength: 1 follows the other prediction instead, 0 changes nothing.
    """

    def __init__(self, pictures, threshold, strength):
        self.pictures, self.threshold, self.strength = pictures, threshold, strength
        self.known, self.told = {}, False

    def __call__(self, args):
        usual, negative = args["denoised"], args.get("uncond_denoised")
        channels = self.pictures[0].shape[1]
        if usual.dim() not in (4, 5) or usual.shape[1] != channels:
            self._tell(usual)
            return usual
        pictures = frames(usual)
        known = self._patterns(tuple(pictures.shape[-2:]), usual.device)
        closest, which = likeness(pictures, known).max(dim=1)
        other = held_back(pictures, None if negative is None else frames(negative), known[which], self.strength)
        hit = closest > self.threshold
        if usual.dim() == 5:  # in the order of the usual ones in memory, or the network would add up in another order
            hit = hit.view(len(usual), 1, -1, 1, 1)
            other = other.unflatten(0, (len(usual), -1)).movedim(1, 2).contiguous()
        else:
            hit = hit.view(-1, 1, 1, 1)
        return torch.where(hit, other, usual)

    def _patterns(self, size, device):
        """Patterns (K, C h w) of the known pictures at a size, kept for the next step."""
        if (size, device) not in self.known:
            self.known = {(size, device): torch.cat([patterns(fitted(p, size)) for p in self.pictures]).to(device)}
        return self.known[size, device]

    def _tell(self, usual):
        if not self.told:
            self.told = True
            log.warning(
                "Membrane: the shield knows pictures of %d channels and leaves latents of the shape %s as they are. "
                "This is said once.", self.pictures[0].shape[1], tuple(usual.shape),
            )  # fmt: skip

    def __deepcopy__(self, memo):
        return self


def encoded(vae, pictures, what=KNOWN):
    """[latents (1, C, h, w)] of pictures (K, H, W, 3), each encoded alone: video VAEs take a batch for one film.

    what: their name, for the ErasureError without a VAE.
    """
    if vae is None:
        raise ErasureError(f"{what} were given without a VAE; connect the VAE that belongs to the model.")
    return [vae.encode(picture[None, ..., :3]) for picture in pictures]


def require_latents(model, found, what):
    """Raises ErasureError for the samples of a LATENT that are no pictures or videos of a MODEL; what: their name."""
    channels, _ = channels_and_ratio(model.model.latent_format)
    if getattr(found, "is_nested", False) or found.dim() not in (4, 5) or found.shape[1] != channels:
        raise ErasureError(
            f"{what} are latents of the shape {tuple(found.shape)}, but {type(model.model).__name__} "
            f"draws pictures of {channels} channels; encode them with the VAE that belongs to this model."
        )


def shield(model, latents, threshold, strength):
    """A clone of a MODEL that keeps what it samples away from known pictures; the model itself for a strength of 0.

    latents: [samples of a LATENT], pictures or videos; every frame is a known picture. Raises ErasureError for latents
    of another model's kind.
    """
    for found in latents:
        require_latents(model, found, KNOWN)
    if strength == 0:
        return model
    with torch.no_grad():
        own = [frames(model.model.process_latent_in(found.float().cpu())) for found in latents]
    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(Shield(own, threshold, strength))
    return patched
