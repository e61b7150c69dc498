"""Measuring an erasure: what is gone, what stayed, what a stubborn prompt brings back."""

import logging

import numpy as np
import torch

from ..core.host.files.reports import Place
from ..core.host.model.layers import family_name
from ..core.host.page.progress import Progress
from ..core.host.runs.pairs import PairSampler
from ..core.host.runs.sampling import Sampling
from ..core.measures import distances
from ..core.measures.evaluation import evaluate, prompts_of, same, seeds_from
from ..core.measures.judges import CLASSIFIERS, NONE, classes_of, distances_of, judge_of
from ..core.measures.record import Record
from ..core.measures.render_grid import grid
from ..core.measures.render_text import report
from . import inputs
from .labels import labelled
from .shown import part, shown

log = logging.getLogger("membrane")


class MembraneEvaluate:
    TITLE = "Evaluate Erasure"
    DESCRIPTION = (
        "Draws the same prompts from the same noise with the original and the erased model, and measures what changed: "
        "much where it should, nothing elsewhere. Writes a page to look at and a JSON file from which it goes on after "
        "a stop."
    )
    SEARCH_ALIASES = ["benchmark", "retention", "integrity", "compare models", "erasure metrics", "drift"]
    CATEGORY = "membrane/measure"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("grid", "report")
    OUTPUT_TOOLTIPS = (
        "Original above erased above where they differ, the first pairs of each kind.",
        "The numbers as text.",
    )
    FUNCTION = "evaluate"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return labelled({
            "required": {
                **inputs.BOTH_MODELS,
                "erase_prompts": inputs.text(
                    "", "Prompts that ask for what was erased, one per line. With a classifier, 'a pentagram = "
                    "star' asks for a class in other words.",
                    placeholder="Prompts with what was erased, one per line",
                ),
                "neighbour_prompts": inputs.text(
                    "", "Close relatives that must stay, one per line.",
                    placeholder="Prompts with close relatives that must stay, one per line",
                ),
                "unrelated_prompts": inputs.text(
                    "", "Prompts that have nothing to do with it, one per line. 50 or more for "
                    "numbers to rely on. The empty prompt is always measured too.",
                    placeholder="Prompts that have nothing to do with it, one per line",
                ),
                "seeds": inputs.whole(
                    2, 2, 64, "Pictures of each prompt. Two neighbouring ones tell how far apart two seeds are, which "
                    "is integrity 0.",
                ),
                **inputs.sampling(),
                "filename_prefix": inputs.line(
                    "evaluation/membrane", "Name of the files in the output folder; a number is added, nothing is "
                    "overwritten.",
                ),
            },
            "optional": {
                "vae": ("VAE", {"tooltip": "Makes the pictures. Without it the live preview's colours are used, and "
                                "distances are those of the latents."}),
                "classifier": inputs.choice(
                    CLASSIFIERS, NONE, "What tells whether a concept is still there. demo world: for the demo model. "
                    "CLIP vision: zero-shot with clip_vision and class_clip.",
                ),
                "class_names": inputs.text(
                    "", "What the classifier chooses between, one per line. A prompt asks for the class that it names. "
                    "demo world: empty means its shapes.",
                ),
                "clip_vision": ("CLIP_VISION", {"tooltip": "Adds a distance by what CLIP sees, and the zero-shot "
                                                "classifier."}),
                "class_clip": ("CLIP", {"tooltip": "The text encoder that belongs to clip_vision, for class names."}),
                "perceptual": inputs.choice(
                    distances.PERCEPTUAL, distances.NONE, "A perceptual distance, if its package and weights are on "
                    "this machine already. Nothing is installed or downloaded.",
                ),
                "batch_size": inputs.whole(4, 1, 64, "Pictures at a time."),
                "noise_levels": inputs.whole(
                    5, 0, 100, "Noise levels at which both models are compared on the original's way. 0 leaves that "
                    "out.",
                ),
                "pictures_shown": inputs.whole(8, 0, 32, "Pairs of each kind that are kept as pictures."),
                "seed_offset": inputs.whole(
                    0, 0, 2**32, "0: the same noise for both models. Anything else gives the erased model other noise: "
                    "with one model twice, integrity is then about 0.",
                ),
                "resume": inputs.switch(
                    True, "Go on with an earlier file of the same name, settings and models. Off begins anew."
                ),
            },
        })  # fmt: skip

    def evaluate(
        self, original, erased, clip, erase_prompts, neighbour_prompts, unrelated_prompts, seeds, seed, steps, cfg,
        sampler_name, scheduler_name, width, height, filename_prefix, vae=None, classifier=NONE, class_names="",
        clip_vision=None, class_clip=None, perceptual=distances.NONE, batch_size=4, noise_levels=5, pictures_shown=8,
        seed_offset=0, resume=True,
    ):  # fmt: skip
        classes = classes_of(classifier, class_names)
        prompts = prompts_of(classes, erase_prompts, neighbour_prompts, unrelated_prompts)
        settings = Sampling(steps, cfg, sampler_name, scheduler_name, width, height)
        names, seen = inputs.vision(clip_vision, class_clip)
        judge, measures = judge_of(classifier, classes, names, seen), distances_of(vae is not None, seen, perceptual)
        count = seeds * sum(map(len, prompts.values()))
        progress = Progress(2 * count)
        pairs = PairSampler(original, erased, clip, vae, settings, batch_size, noise_levels, seed_offset, progress.at)
        said = {
            "models": [family_name(original), family_name(erased)], **vars(settings), "seed": seed, "seeds": seeds,
            "seed_offset": seed_offset, "batch_size": batch_size, "distances": sorted(measures),
            "noise_levels": noise_levels, "pictures_shown": pictures_shown, "classifier": classifier,
            "classes": classes, "vae": vae is not None,
            "prompts": {s: [[p.text, p.label, p.synonym] for p in found] for s, found in prompts.items()},
        }  # fmt: skip
        record = Record(said, pairs.probe([found[0].text for found in prompts.values()]))
        place = Place(filename_prefix)
        record = (resume and place.earlier(lambda other: same(other, record))) or record
        self._go_on(place, record, pairs, progress, count)
        found, files = evaluate(record, prompts, pairs, measures, seeds_from(seed, seeds), judge, pictures_shown, place)
        return self._shown(record, found, files, place)

    def _go_on(self, place, record, pairs, progress, count):
        """Counts the pairs that a record holds already."""
        if record.rows:
            log.info("Membrane: going on with %s, %d of %d pairs are there", place.name, len(record.rows), count)
        pairs.done = 2 * len(record.rows)
        progress.at(pairs.done)

    def _shown(self, record, found, files, place):
        """Outputs of a Record and its summary, and the files for the page."""
        where = "/".join(filter(None, (files[0]["subfolder"], place.name)))
        text = f"{report(record, found)}\nFiles in the output folder: {where}.json and {where}.html"
        picture = torch.from_numpy(np.ascontiguousarray(grid(record)))[None]
        return shown((picture, text), part(f"Evaluated: {place.name}", text), text=(text,), membrane_files=files)


NODES = [MembraneEvaluate]
