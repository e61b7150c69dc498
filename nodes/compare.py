"""One seed on two models: the picture before the erasure and the one after it."""

from ..core.host.files.pictures import shown_pictures
from ..core.host.page.progress import Progress
from ..core.host.runs.sampling import SAMPLERS, SCHEDULERS, Sampling, decode, sample_latent
from ..core.measures.differences import changed_lines
from . import inputs
from .labels import labelled
from .shown import part, shown


class MembraneCompare:
    TITLE = "Sample Original and Erased"
    DESCRIPTION = (
        "Samples the same prompt from the same seed with the model as it was and with the erased one, and shows both "
        "pictures under one divider. Takes the place of KSampler and VAE Decode."
    )
    SEARCH_ALIASES = ["compare", "before after", "side by side", "image comparer", "ab test", "ksampler"]
    CATEGORY = "membrane/measure"
    RETURN_TYPES = ("IMAGE", "IMAGE")
    RETURN_NAMES = ("original", "erased")
    OUTPUT_TOOLTIPS = ("Pictures of the model as it was.", "The same pictures with the erasure.")
    FUNCTION = "compare"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        types = {
            "required": {
                "original": inputs.model("The model as it was, from its loader."),
                "erased": inputs.model("The same model with the erasure on it."),
                "positive": ("CONDITIONING", {"tooltip": "The prompt, for both."}),
                "negative": ("CONDITIONING", {"tooltip": "The negative prompt, for both."}),
                "latent_image": ("LATENT", {"tooltip": "Where both begin: an empty latent, or a picture's."}),
                "vae": ("VAE", {"tooltip": "Makes the pictures."}),
                "seed": inputs.whole(0, 0, inputs.LARGEST_SEED, "Seed of both, as in KSampler."),
                "steps": inputs.whole(20, 1, 10000, "Steps of the sampler."),
                "cfg": inputs.number(7.0, 0.0, 100.0, 0.1, "Guidance.", round=0.01),
                "sampler_name": inputs.choice(SAMPLERS, "euler", "As in KSampler."),
                "scheduler": inputs.choice(SCHEDULERS, "normal", "As in KSampler."),
                "denoise": inputs.number(
                    1.0, 0.01, 1.0, 0.01, "How much of latent_image is made anew; 1 for an empty one."
                ),
            },
        }
        return labelled(types)

    def compare(
        self, original, erased, positive, negative, latent_image, vae, seed, steps, cfg, sampler_name, scheduler,
        denoise,
    ):  # fmt: skip
        settings, progress, sides = Sampling(steps, cfg, sampler_name, scheduler), Progress(2 * steps), []

        def step(number, denoised, x, total):
            progress.at(number + 1)

        for model in (original, erased):
            latents = sample_latent(model, positive, negative, settings, latent_image, seed, denoise, step)
            sides.append(decode(vae, latents))
            progress.next_phase(steps)
        before, after = (shown_pictures(s, f"membrane_{n}") for s, n in zip(sides, ("original", "erased")))
        pairs = [{"before": a, "after": b} for a, b in zip(before, after)]
        return shown(sides, part("", changed_lines(*sides)), membrane_pairs=pairs)


NODES = [MembraneCompare]
