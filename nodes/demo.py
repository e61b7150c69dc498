"""The bundled demo model."""

from ..core.host.demo.model import VARIANTS, load_demo_model
from . import inputs
from .labels import labelled


class MembraneDemoModel:
    TITLE = "Load Demo Model"
    DESCRIPTION = (
        "Loads Pixel World, a small text-to-image model that comes with Membrane, to try concept erasure without "
        "any download. It draws one of eight shapes in one of eight colours, for example 'a striped red star on "
        "snow'. Use an empty latent of 128 x 128, the euler sampler, 20 steps and CFG 1.5."
    )
    SEARCH_ALIASES = ["pixel world", "demo checkpoint", "example model", "try membrane", "concept erasure demo"]
    CATEGORY = "membrane"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    OUTPUT_TOOLTIPS = (
        "The diffusion model, in the Stable Diffusion 1 architecture, or Flux's for the transformer.",
        "The text encoder; it knows the words of Pixel World only.",
        "The exact VAE: each of 16 x 16 sprite pixels becomes a block of 8 x 8.",
    )
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        return labelled(
            {
                "required": {
                    "variant": inputs.choice(
                        VARIANTS,
                        VARIANTS[0],
                        "day: the original model. night: the same model fine-tuned on dusk colours, to see whether an "
                        "erasure made on day carries over. transformer: the same pictures from a diffusion "
                        "transformer, a small Flux with its two text encoders; needs a ComfyUI of 2025 or newer.",
                    ),
                },
            }
        )

    def load(self, variant):
        return load_demo_model(variant)


NODES = [MembraneDemoModel]
