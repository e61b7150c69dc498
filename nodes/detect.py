"""Finding prompts that a model answers with a memorised picture."""

import json

import torch

from ..core.errors import ErasureError
from ..core.host.files.calibrations import calibrate, calibration_for
from ..core.host.page.progress import Progress
from ..core.host.runs.detecting import Detector
from ..core.host.runs.sampling import SAMPLERS, SCHEDULERS, Sampling
from ..core.measures.detection import FEWEST, heat_map, require_enough
from ..core.measures.detection_report import plot, report, rows, suspicious
from ..core.text.concepts import parse_lines
from . import inputs
from .labels import labelled
from .shown import part, shown

ATTRIBUTED = 8  # prompts whose words are looked at
RANKED = 3  # the same without a calibration


class MembraneDetectMemorization:
    TITLE = "Detect Memorization"
    DESCRIPTION = (
        "Tells which prompts a model answers with a picture it has memorised, without the training data: their text "
        "moves the prediction further than ordinary text does, from the first steps on and whatever the seed."
    )
    SEARCH_ALIASES = ["memorised pictures", "memorization detector", "replication", "copied training images",
                      "bright ending"]  # fmt: skip
    CATEGORY = "membrane/memorisation"
    RETURN_TYPES = ("STRING", "IMAGE", "MASK", "STRING", "STRING")
    RETURN_NAMES = ("report", "plot", "heat_map", "memorised", "json")
    OUTPUT_TOOLTIPS = (
        "Scores, verdicts and the words they depend on.",
        "A curve for each prompt over the steps.",
        "Where each prompt's picture is memorised, one mask a prompt in their order; black unless bright_ending is on.",
        "The prompts judged memorised, one per line; empty without a calibration.",
        "Everything as JSON, for scripts.",
    )
    FUNCTION = "detect"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return labelled({
            "required": {
                "model": inputs.model("The model to look into; with LoRAs and erasures as you use it."),
                "clip": ("CLIP", {"tooltip": "The text encoder that belongs to it."}),
                "prompts": inputs.text("", "Prompts to test, one per line. May be empty when you only calibrate."),
                "seeds": inputs.whole(4, 1, 64, "Noises for each prompt. Published: 4."),
                "first_steps": inputs.whole(
                    5, 1, 1000, "Steps that are run and measured. 5 of 10 with 4 seeds tell on both demo models; "
                    "published: 5 of 50.",
                ),
                "steps": inputs.whole(
                    10, 1, 1000, "Length of the schedule that those steps are the beginning of: they reach down to "
                    "half of the noise levels, where memorised prompts show."
                ),
                "cfg": inputs.number(7.5, 0.0, 100.0, 0.1, "Guidance, as you sample with it.", round=0.01),
                "seed": inputs.whole(0, 0, inputs.LARGEST_SEED, "Seed of the first noise; the others follow."),
                "sampler_name": inputs.choice(
                    SAMPLERS, "euler", "As in KSampler. Those that draw noise of their own are run one picture at a "
                    "time, which is slower.",
                ),
                "scheduler": inputs.choice(SCHEDULERS, "normal", "As in KSampler."),
                "width": inputs.whole(512, 16, 16384, "Width of the pictures.", 8),
                "height": inputs.whole(512, 16, 16384, "Height of the pictures.", 8),
            },
            "optional": {
                "benign_prompts": inputs.text(
                    "", f"Ordinary prompts, one per line, at least {FEWEST}, better 100 and more: measures what is "
                    "normal for this model and settings and keeps it in models/erasure_adapters/calibration. Leave it "
                    "empty afterwards.",
                ),
                "batch_size": inputs.whole(8, 1, 256, "Pictures at a time; the result is the same."),
                "attribution": inputs.switch(
                    True, "Also tell on which words a suspicious prompt depends. Needs memory for gradients; for "
                    "Stable Diffusion 1 and 2.",
                ),
                "bright_ending": inputs.switch(
                    False, "Run all steps and make the heat-map from where the end token is looked at in the last one."
                ),
            },
        })  # fmt: skip

    def detect(
        self, model, clip, prompts, seeds, first_steps, steps, cfg, seed, sampler_name, scheduler, width, height,
        benign_prompts="", batch_size=8, attribution=True, bright_ending=False,
    ):  # fmt: skip
        lines, benign = parse_lines(prompts), parse_lines(benign_prompts)
        require_testable(lines, benign, first_steps, steps)
        settings = Sampling(steps, cfg, sampler_name, scheduler, width, height)
        each = [(seed + i) % 2**64 for i in range(seeds)]
        detector = Detector(model, clip, settings, first_steps, each, batch_size)
        run = steps if bright_ending else first_steps
        ordinary, tested = seeds * len(benign) * first_steps, seeds * len(lines) * run
        progress = Progress(ordinary + tested)
        calibration, source = calibrate(detector, benign, progress.at) if benign else calibration_for(detector)
        progress.next_phase(ordinary)
        texts = detector.texts(lines)
        found = detector.measure(texts, bright_ending, progress.at)
        progress.next_phase(tested)
        words, left_out = {}, ""
        if attribution and lines:
            words, left_out = self._words(detector, texts, suspicious(found.traces, calibration, RANKED))
        table = rows(found.traces, calibration, found.endings, words)
        text = report(table, detector.said, calibration, source) + left_out
        masks = [heat_map(m, height, width) for m in found.maps or ()] or [torch.zeros(height, width)]
        return self._shown(text, table, calibration, masks, {**detector.said, "seed": seed})

    def _words(self, detector, texts, wanted):
        """({index of a Text: its words}, a line on what was left out) of the wanted ones."""
        chosen = wanted[:ATTRIBUTED]
        progress = Progress(detector.evaluations_of_words * max(1, len(chosen)))
        words, why = detector.words([texts[i] for i in chosen], progress.at)
        if words is None:
            return {}, f"\nWords: {why}"
        left = len(wanted) - len(chosen)
        more = f"\nThe words of {left} more prompts were not looked at." if left else ""
        return dict(zip(chosen, words)), more

    def _shown(self, text, table, calibration, masks, settings):
        """The outputs, and the report for the page."""
        memorised = "\n".join(row["prompt"] for row in table if row.get("memorised"))
        data = {"settings": settings, "prompts": table}
        if calibration is not None:
            data["calibration"] = calibration.summary
        picture = torch.from_numpy(plot(table, calibration))[None]
        result = text, picture, torch.stack(masks), memorised, json.dumps(data, indent=1)
        found = len(memorised.splitlines())
        title = f"Memorised: {found} of {len(table)} prompts" if calibration is not None else "No calibration yet"
        return shown(result, part(title, text), text=(text,))


def require_testable(lines, benign, first_steps, steps):
    """Raises ErasureError when there is nothing to test, too little to calibrate with, or no such steps."""
    if not lines and not benign:
        raise ErasureError("No prompt to test was given; write at least one, each on a line of its own.")
    if first_steps > steps:
        raise ErasureError(
            f"first_steps is {first_steps}, but the schedule has only {steps} steps; lower it or raise steps."
        )
    if benign:
        require_enough(len(benign))


NODES = [MembraneDetectMemorization]
