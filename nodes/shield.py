"""Keeping what a model samples away from pictures that one has."""

from ..core.erasers.shield import CLOSE, LIKENESS
from ..core.errors import ErasureError
from ..core.host.patches.shield import encoded, shield
from . import inputs
from .labels import labelled


class MembraneShield:
    TITLE = "Shield Known Pictures"
    DESCRIPTION = (
        "Keeps a model from drawing pictures that you give it, whatever the prompt: as soon as a picture that is being "
        "sampled resembles one of them too closely, the prompt is not followed for that step. All other pictures stay "
        "exactly as they were. No training, and no weight changes."
    )
    SEARCH_ALIASES = ["protect pictures", "memorised pictures", "copied training images", "SPELL", "sparse repellency",
                      "shielded diffusion", "avoid image", "copyright"]  # fmt: skip
    CATEGORY = "membrane/memorisation"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model to sample with; the one that came in stays as it is.",)
    FUNCTION = "protect"

    @classmethod
    def INPUT_TYPES(cls):
        return labelled({
            "required": {
                "model": inputs.model("The model; any family, with LoRAs and erasures as you use it."),
                "radius": inputs.choice(
                    LIKENESS, CLOSE, "How like a protected picture may become. near copies: only what is almost the "
                    "same is held back. close: what one would recognise. wide: also what shares the layout.",
                ),
                "threshold": inputs.number(
                    0.0, 0.0, 1.0, 0.01, "The same as a number: likeness from 0 (unrelated) to 1 (a copy) from which "
                    "on a picture is held back. 0 takes the radius above: near copies 0.8, close 0.6, wide 0.4.",
                    round=0.0001,
                ),
                "strength": inputs.number(
                    1.0, 0.0, 1.0, 0.01, "How much a picture that is too close is held back; 0 leaves the model as it "
                    "is.", round=0.0001,
                ),
            },
            "optional": {
                "latents": ("LATENT", {"tooltip": "Pictures to protect as latents of this model, any number of them."}),
                "pictures": ("IMAGE", {"tooltip": "Pictures to protect, any number of them; needs the VAE."}),
                "vae": ("VAE", {"tooltip": "The VAE that belongs to the model, for pictures."}),
            },
        }, radius="How close is too close", threshold="Likeness held back", pictures="Pictures to protect",
           latents="Latents to protect")  # fmt: skip

    def protect(self, model, radius, threshold, strength, latents=None, pictures=None, vae=None):
        if latents is None and pictures is None:
            raise ErasureError("No picture to protect was given; connect pictures with their VAE, or latents.")
        if radius not in LIKENESS:
            raise ErasureError(f'There is no radius "{radius}"; choose one of: {", ".join(LIKENESS)}.')
        known = [] if latents is None else [latents["samples"]]
        known += [] if pictures is None else encoded(vae, pictures)
        return (shield(model, known, threshold or LIKENESS[radius], strength),)


NODES = [MembraneShield]
