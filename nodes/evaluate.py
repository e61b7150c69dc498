"""Measuring an erasure: what is gone, what stayed, what a stubborn prompt brings back."""

import logging
import time

import numpy as np
import torch

from ..core.demo.judge import ANSWERS
from ..core.demo.judge import NONE as NO_SHAPE
from ..core.errors import ErasureError
from ..core.host.files.reports import Place
from ..core.host.model.layers import family
from ..core.host.page.progress import Progress
from ..core.host.runs.sampling import SAMPLERS, SCHEDULERS, PairSampler, Sampling
from ..core.host.text.vision import class_vectors, image_vectors
from ..core.measures import distances
from ..core.measures.compare import built_in, by_pictures, by_vectors, compare, demo_judge, zero_shot_judge
from ..core.measures.record import EMPTY, ERASE, NEIGHBOUR, UNRELATED, Record
from ..core.measures.render_grid import grid
from ..core.measures.render_page import page
from ..core.measures.render_text import report
from ..core.measures.scores import Prompt, parse_prompt
from ..core.measures.summary import summarise
from ..core.text.concepts import parse_lines

log = logging.getLogger("membrane")

NONE, DEMO_WORLD, CLIP_VISION = CLASSIFIERS = ("none", "demo world", "CLIP vision")
WRITE_EVERY = 5  # seconds between two versions of the file
TEXT = {"multiline": True, "dynamicPrompts": False}  # old pages take {} for a choice and // for a comment


def whole(default, low, high, tooltip, step=1):
    return ("INT", {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip})


SAMPLING_INPUTS = {
    "seed": whole(0, 0, 2**64 - 1, "Seed of the first picture; the others follow."),
    "steps": whole(20, 1, 1000, "Steps of the sampler."),
    "cfg": (
        "FLOAT", {"default": 7.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01, "tooltip": "Guidance."},
    ),
    "sampler_name": (SAMPLERS, {"default": "euler", "tooltip": "Take one without _ancestral or sde: those add noise of "
                     "their own, and small changes grow."}),
    "scheduler_name": (SCHEDULERS, {"default": "normal", "tooltip": "As in KSampler."}),
    "width": whole(512, 16, 16384, "Width of the pictures.", 8),
    "height": whole(512, 16, 16384, "Height of the pictures.", 8),
}  # fmt: skip
MODEL_INPUTS = {
    "original": ("MODEL", {"tooltip": "The model before the erasure."}),
    "erased": ("MODEL", {"tooltip": "The same model with the erasure on it."}),
    "clip": ("CLIP", {"tooltip": "The text encoder of both."}),
}


class MembraneEvaluate:
    TITLE = "Evaluate Erasure"
    DESCRIPTION = (
        "Draws the same prompts from the same noise with the original and the erased model, and measures what changed: "
        "much where it should, nothing elsewhere. Writes a page to look at and a JSON file from which it goes on after "
        "a stop."
    )
    SEARCH_ALIASES = ["benchmark", "retention", "integrity", "compare models", "erasure metrics", "drift"]
    CATEGORY = "membrane"
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
        return {
            "required": {
                **MODEL_INPUTS,
                "erase_prompts": (
                    "STRING",
                    {**TEXT, "default": "a star", "tooltip": "Prompts that ask for what was erased, one per line. "
                     "With a classifier, 'a pentagram = star' asks for a class in other words."},
                ),
                "neighbour_prompts": (
                    "STRING",
                    {**TEXT, "default": "a heart\na moon", "tooltip": "Close relatives that must stay, one per line."},
                ),
                "unrelated_prompts": (
                    "STRING",
                    {**TEXT, "default": "a red ring on snow", "tooltip": "Prompts that have nothing to do with it, one "
                     "per line. 50 or more for numbers to rely on. The empty prompt is always measured too."},
                ),
                "seeds": whole(2, 2, 64, "Pictures of each prompt. Two neighbouring ones tell how far apart two seeds "
                               "are, which is integrity 0."),
                **SAMPLING_INPUTS,
                "filename_prefix": (
                    "STRING",
                    {"default": "evaluation/membrane", "tooltip": "Name of the files in the output folder; a number is "
                     "added, nothing is overwritten."},
                ),
            },
            "optional": {
                "vae": ("VAE", {"tooltip": "Makes the pictures. Without it the live preview's colours are used, and "
                                "distances are those of the latents."}),
                "classifier": (
                    list(CLASSIFIERS),
                    {"default": NONE, "tooltip": "What tells whether a concept is still there. demo world: for the "
                     "demo model. CLIP vision: zero-shot with clip_vision and class_clip."},
                ),
                "class_names": (
                    "STRING",
                    {**TEXT, "default": "", "tooltip": "What the classifier chooses between, one per line. A prompt "
                     "asks for the class that it names. demo world: empty means its shapes."},
                ),
                "clip_vision": ("CLIP_VISION", {"tooltip": "Adds a distance by what CLIP sees, and the zero-shot "
                                                "classifier."}),
                "class_clip": ("CLIP", {"tooltip": "The text encoder that belongs to clip_vision, for class names."}),
                "perceptual": (
                    list(distances.PERCEPTUAL),
                    {"default": distances.NONE, "tooltip": "A perceptual distance, if its package and weights are on "
                     "this machine already. Nothing is installed or downloaded."},
                ),
                "batch_size": whole(4, 1, 64, "Pictures at a time."),
                "noise_levels": whole(5, 0, 100, "Noise levels at which both models are compared on the original's "
                                      "way. 0 leaves that out."),
                "pictures_shown": whole(8, 0, 32, "Pairs of each kind that are kept as pictures."),
                "seed_offset": whole(0, 0, 2**32, "0: the same noise for both models. Anything else gives the erased "
                                     "model other noise: with one model twice, integrity is then about 0."),
                "resume": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "Go on with an earlier file of the same name, settings and models. "
                     "Off begins anew."},
                ),
            },
        }  # fmt: skip

    def evaluate(
        self, original, erased, clip, erase_prompts, neighbour_prompts, unrelated_prompts, seeds, seed, steps, cfg,
        sampler_name, scheduler_name, width, height, filename_prefix, vae=None, classifier=NONE, class_names="",
        clip_vision=None, class_clip=None, perceptual=distances.NONE, batch_size=4, noise_levels=5, pictures_shown=8,
        seed_offset=0, resume=True,
    ):  # fmt: skip
        classes = classes_of(classifier, class_names)
        prompts = prompts_of(classes, erase_prompts, neighbour_prompts, unrelated_prompts)
        settings = Sampling(steps, cfg, sampler_name, scheduler_name, width, height)
        judge = judge_of(classifier, classes, clip_vision, class_clip)
        count = sum(map(len, prompts.values()))
        progress = Progress(2 * count * seeds)
        pairs = PairSampler(original, erased, clip, vae, settings, batch_size, noise_levels, seed_offset, progress.at)
        measures = measures_of(vae, clip_vision, perceptual)
        record = Record(
            {
                "models": [family(original), family(erased)],
                **vars(settings),
                "seed": seed, "seeds": seeds, "seed_offset": seed_offset, "batch_size": batch_size,
                "distances": sorted(measures), "noise_levels": noise_levels, "pictures_shown": pictures_shown,
                "classifier": classifier, "classes": classes, "vae": vae is not None,
                "prompts": {s: [[p.text, p.label, p.synonym] for p in found] for s, found in prompts.items()},
            },
            pairs.probe([found[0].text for found in prompts.values()]),
        )  # fmt: skip
        place = Place(filename_prefix)
        record = (resume and place.earlier(lambda other: same(other, record))) or record
        done = len(record.rows)
        if done:
            log.info("Membrane: going on with %s, %d of %d pairs are there", place.name, done, count * seeds)
        pairs.done = 2 * done
        progress.at(pairs.done)
        written = time.monotonic()

        def save():
            nonlocal written
            if time.monotonic() - written > WRITE_EVERY:
                place.write("json", record.to_json())
                written = time.monotonic()

        try:
            compare(
                record, prompts, pairs, measures, lambda n: [(seed + n * seeds + i) % 2**64 for i in range(seeds)],
                judge, pictures_shown, save,
            )  # fmt: skip
        finally:
            if record.rows:  # Cancel, out of memory: what was measured stays
                found = summarise(record)
                files = [place.write("json", record.to_json(found)), place.write("html", page(record, found))]
        where = "/".join(filter(None, (files[0]["subfolder"], place.name)))
        text = f"{report(record, found)}\nFiles in the output folder: {where}.json and {where}.html"
        picture = torch.from_numpy(np.ascontiguousarray(grid(record)))[None]
        return {"ui": {"text": (text,), "membrane_files": files}, "result": (picture, text)}


def classes_of(classifier, names):
    """What the classifier chooses between; the demo world's shapes where nothing is named."""
    shapes = [name for name in ANSWERS["shape"] if name != NO_SHAPE]
    return parse_lines(names) or (shapes if classifier == DEMO_WORLD else [])


def prompts_of(classes, erase, neighbour, unrelated):
    """{stratum: [Prompt]} of the boxes; raises ErasureError when nothing is to be compared."""
    found = {}
    for stratum, text in ((ERASE, erase), (NEIGHBOUR, neighbour), (UNRELATED, unrelated)):
        lines = parse_lines(text)
        if lines:
            found[stratum] = [parse_prompt(line, classes) for line in lines]
    if not found:
        raise ErasureError("No prompt to compare was given; write at least one, each on a line of its own.")
    return {**found, EMPTY: [Prompt("")]}


def judge_of(classifier, classes, clip_vision, class_clip):
    """The chosen classifier as a function of pictures, or None."""
    if classifier == NONE:
        return None
    if classifier == DEMO_WORLD:
        return demo_judge(classes)
    if clip_vision is None or class_clip is None or len(classes) < 2:
        raise ErasureError(
            'The classifier "CLIP vision" needs clip_vision, the text encoder that belongs to it as class_clip, and at '
            "least two class names; connect and write them, or choose another classifier."
        )
    vectors = class_vectors(class_clip, classes)
    return zero_shot_judge(classes, vectors, lambda pictures: image_vectors(clip_vision, pictures, vectors.shape[1]))


def measures_of(vae, clip_vision, perceptual):
    """{name: Distance} of what is connected."""
    found = built_in(vae is not None)
    if clip_vision is not None:
        found["CLIP vision"] = by_vectors(lambda pictures: image_vectors(clip_vision, pictures))
    if perceptual != distances.NONE:
        found[perceptual] = by_pictures(distances.perceptual(perceptual))
    return found


def same(earlier, record):
    """Whether two records are of the same settings and the same models, as far as those answer to one noise."""
    if earlier.fingerprint() != record.fingerprint():
        return False
    a, b = (np.array(r.probe, np.float64) for r in (earlier, record))
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-2, atol=1e-3 * np.abs(b).max()))


NODES = [MembraneEvaluate]
