"""Finding prompts that a model answers with a memorised picture."""

import json

import torch

from ..core.errors import ErasureError
from ..core.host.files.calibrations import find, model_probe, store
from ..core.host.page.progress import Progress
from ..core.host.runs.gradients import token_influence
from ..core.host.runs.sampling import SAMPLERS, SCHEDULERS, Sampling
from ..core.host.runs.steps import encoded, measure, require_cross_attention
from ..core.measures.detection import FEWEST, Calibration, heat_map, words_of
from ..core.measures.detection_report import plot, report, rows, suspicious
from ..core.text.concepts import parse_lines

ATTRIBUTED = 8  # prompts whose words are looked at
RANKED = 3  # the same without a calibration
TEXT = {"multiline": True, "dynamicPrompts": False}  # old pages take {} for a choice and // for a comment


class MembraneDetectMemorization:
    TITLE = "Detect Memorization"
    DESCRIPTION = (
        "Tells which prompts a model answers with a picture it has memorised, without the training data: their text "
        "moves the prediction further than ordinary text does, from the first steps on and whatever the seed."
    )
    SEARCH_ALIASES = ["memorised pictures", "memorization detector", "replication", "copied training images",
                      "bright ending"]  # fmt: skip
    CATEGORY = "membrane"
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
        def whole(default, low, high, tooltip, step=1):
            return ("INT", {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip})

        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model to look into; with LoRAs and erasures as you use it."}),
                "clip": ("CLIP", {"tooltip": "The text encoder that belongs to it."}),
                "prompts": ("STRING", {**TEXT, "default": "", "tooltip": "Prompts to test, one per line. May be empty "
                                       "when you only calibrate."}),
                "seeds": whole(4, 1, 64, "Noises for each prompt. Published: 4."),
                "first_steps": whole(5, 1, 1000, "Steps that are run and measured. Published: 1, 5 or all."),
                "steps": whole(50, 1, 1000, "Length of the schedule that those steps are the beginning of."),
                "cfg": ("FLOAT", {"default": 7.5, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01,
                                  "tooltip": "Guidance, as you sample with it."}),
                "seed": whole(0, 0, 2**64 - 1, "Seed of the first noise; the others follow."),
                "sampler_name": (SAMPLERS, {"default": "euler", "tooltip": "As in KSampler. Those that draw noise of "
                                            "their own are run one picture at a time, which is slower."}),
                "scheduler": (SCHEDULERS, {"default": "normal", "tooltip": "As in KSampler."}),
                "width": whole(512, 16, 16384, "Width of the pictures.", 8),
                "height": whole(512, 16, 16384, "Height of the pictures.", 8),
            },
            "optional": {
                "benign_prompts": (
                    "STRING",
                    {**TEXT, "default": "", "tooltip": f"Ordinary prompts, one per line, at least {FEWEST}, better 100 "
                     "and more: measures what is normal for this model and settings and keeps it in "
                     "models/erasure_adapters/calibration. Leave it empty afterwards."},
                ),
                "batch_size": whole(8, 1, 256, "Pictures at a time; the result is the same."),
                "attribution": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "Also tell on which words a suspicious prompt depends. Needs memory "
                     "for gradients; for Stable Diffusion 1 and 2."},
                ),
                "bright_ending": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Run all steps and make the heat-map from where the end token is "
                     "looked at in the last one."},
                ),
            },
        }  # fmt: skip

    def detect(
        self, model, clip, prompts, seeds, first_steps, steps, cfg, seed, sampler_name, scheduler, width, height,
        benign_prompts="", batch_size=8, attribution=True, bright_ending=False,
    ):  # fmt: skip
        lines, benign = parse_lines(prompts), parse_lines(benign_prompts)
        if not lines and not benign:
            raise ErasureError("No prompt to test was given; write at least one, each on a line of its own.")
        if first_steps > steps:
            raise ErasureError(
                f"first_steps is {first_steps}, but the schedule has only {steps} steps; lower it or raise steps."
            )
        if benign and len(benign) < FEWEST:
            raise ErasureError(
                f"A calibration needs at least {FEWEST} different benign prompts, one per line, but there are "
                f"{len(benign)}; add ordinary prompts like those you will test, 100 or more are better."
            )
        require_cross_attention(model, clip)
        settings = Sampling(steps, cfg, sampler_name, scheduler, width, height)
        said = {**vars(settings), "first_steps": first_steps, "seeds": seeds}
        each = [(seed + i) % 2**64 for i in range(seeds)]
        numbers = model_probe(model, clip, settings)
        run = steps if bright_ending else first_steps
        progress = Progress(seeds * (len(benign) * first_steps + len(lines) * run))
        empty = encoded(clip, "")
        calibration, source = None, None
        if benign:
            ordinary = measure(
                model, [encoded(clip, p) for p in benign], empty, each, settings, first_steps, batch_size,
                on_evaluations=progress.at,
            )  # fmt: skip
            progress.next_phase(seeds * len(benign) * first_steps)
            calibration = Calibration(said, numbers, tuple(trace.score for trace in ordinary.traces))
            source = f"stored as calibration/{store(model, calibration)}"
        else:
            calibration, name = find(model, said, numbers)
            source = f"calibration/{name}" if name else (
                "this model has no calibration for these settings. Write ordinary prompts into benign_prompts once "
                f"({FEWEST} or more, better 100)."
            )  # fmt: skip
        texts = [encoded(clip, p) for p in lines]
        found = measure(model, texts, empty, each, settings, first_steps, batch_size, bright_ending, progress.at)
        progress.next_phase(seeds * len(lines) * run)
        words, left_out = {}, ""
        if attribution and lines:
            words, left_out = influences(model, texts, empty, each, settings, first_steps, found.traces, calibration)
        table = rows(found.traces, calibration, found.endings, words)
        text = report(table, said, calibration, source) + left_out
        memorised = "\n".join(row["prompt"] for row in table if row.get("memorised"))
        data = {"settings": {**said, "seed": seed}, "prompts": table}
        if calibration is not None:
            data["calibration"] = {
                "prompts": len(calibration.scores), "mean": calibration.mean, "std": calibration.std,
                "p99": calibration.p99,
            }  # fmt: skip
        masks = [heat_map(m, height, width) for m in found.maps or ()] or [torch.zeros(height, width)]
        result = (
            text, torch.from_numpy(plot(table, calibration))[None], torch.stack(masks), memorised,
            json.dumps(data, indent=1),
        )  # fmt: skip
        return {"ui": {"text": (text,)}, "result": result}


def influences(model, texts, empty, seeds, settings, count, traces, calibration):
    """({index of a prompt: its words}, a line on what was left out) of the suspicious prompts."""
    wanted = suspicious(traces, calibration, RANKED)
    progress = Progress(2 * count * len(seeds) * max(1, len(wanted[:ATTRIBUTED])))
    words = {}
    for i in wanted[:ATTRIBUTED]:
        try:
            norms = token_influence(model, texts[i], empty, seeds, settings, count, progress.at)
        except ErasureError as error:
            return {}, f"\nWords: {error}"
        progress.next_phase(2 * count * len(seeds))
        words[i] = words_of(texts[i].pieces, norms.tolist())
    left = len(wanted) - len(words)
    return words, f"\nThe words of {left} more prompts were not looked at." if left else ""


NODES = [MembraneDetectMemorization]
