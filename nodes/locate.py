"""Finding the weights that keep memorised pictures, or a concept, in the graph."""

import itertools
import logging

from ..core.adapters.adapter import Card, ErasureAdapter
from ..core.erasers.dampening import dampen, threshold
from ..core.erasers.pruning import locate, report
from ..core.errors import ErasureError
from ..core.host.model.layers import family, parameter_count
from ..core.host.model.weights import base_layers
from ..core.host.page.progress import Progress
from ..core.host.runs.locating import (
    FEED_FORWARD,
    TEXT,
    Watcher,
    importances,
    layer_weights,
    linear_layers,
    weight_sample,
)
from ..core.host.runs.sampling import SAMPLERS, SCHEDULERS, Sampling
from ..core.host.text.encode import fingerprint
from ..core.text.concepts import parse_lines

log = logging.getLogger("membrane")

WANDA = "Wanda (ConceptPrune)"
DAMPENING = {  # Selective Synaptic Dampening, by the layers it may act on
    "dampening: feed-forward (experimental)": FEED_FORWARD,
    "dampening: text keys and values (experimental)": TEXT,
}
METHOD_TOOLTIP = (
    "Wanda: what the prompts excite in the feed-forward blocks more than the base prompts; no gradients. dampening: "
    "Selective Synaptic Dampening, weights whose gradients matter for the prompts and not for the base prompts are "
    "scaled down; needs 20 or more diverse base prompts."
)
BOTH, PROMPT_ONLY = "prompt and empty prompt", "prompt only"


def base_lines(prompts, base):
    """As many base prompts as prompts: those given, or one or the empty prompt repeated."""
    lines = parse_lines(base) or [""]
    if len(lines) not in (1, len(prompts)):
        raise ErasureError(
            f"There are {len(prompts)} prompts and {len(lines)} base prompts; expected one base prompt for each, or "
            "one for all, or none."
        )
    return lines if len(lines) == len(prompts) else lines * len(prompts)


class MembraneLocateMemorization:
    TITLE = "Locate Memorized Subspace"
    DESCRIPTION = (
        "Finds the weights by which a model repeats memorised pictures, or draws a concept, and gives an adapter that "
        "prunes them. Suppresses replication for ordinary prompts; searched-for text vectors can bring it back."
    )
    SEARCH_ALIASES = ["memorization", "prune", "conceptprune", "wanda", "replication", "overfit", "unlearn"]
    CATEGORY = "membrane"
    RETURN_TYPES = ("ERASURE_ADAPTER", "STRING")
    RETURN_NAMES = ("adapter", "report")
    OUTPUT_TOOLTIPS = (
        "The adapter, for Stack Erasure Adapters or Save Erasure Adapter.",
        "How many weights of each layer were marked, and what it took.",
    )
    FUNCTION = "locate"

    @classmethod
    def INPUT_TYPES(cls):
        text = {"multiline": True, "dynamicPrompts": False}  # old pages take {} for a choice and // for a comment
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model to look into; it stays as it is."}),
                "clip": ("CLIP", {"tooltip": "The text encoder whose words the model reads."}),
                "prompts": (
                    "STRING",
                    {**text, "default": "", "tooltip": "Prompts of memorised pictures, or with the concept, one per "
                     "line. About ten are enough."},
                ),
                "base_prompts": (
                    "STRING",
                    {**text, "default": "", "tooltip": "What to compare with: nothing (the empty prompt, for memorised "
                     "pictures), or for each prompt the same without the concept, one per line."},
                ),
                "method": ([WANDA, *DAMPENING], {"default": WANDA, "tooltip": METHOD_TOOLTIP}),
                "sparsity": (
                    "FLOAT",
                    {"default": 0.01, "min": 0.0001, "max": 0.2, "step": 0.0001, "round": 0.0001, "tooltip": "Share of "
                     "weights to mark in each step. Published: 0.01 for memorised pictures, styles and nudity, 0.02 "
                     "for objects."},
                ),
                "first_steps": (
                    "INT",
                    {"default": 10, "min": 1, "max": 1000, "tooltip": "How many of the first steps are looked at; no "
                     "more are run. Published: 10 of 50."},
                ),
                "steps": ("INT", {"default": 50, "min": 1, "max": 1000, "tooltip": "Steps of the whole schedule."}),
                "cfg": ("FLOAT", {"default": 7.5, "min": 0.0, "max": 100.0, "step": 0.1, "tooltip": "Guidance scale."}),
                "sampler_name": (list(SAMPLERS), {"default": "euler", "tooltip": "A sampler with a fixed schedule."}),
                "scheduler": (list(SCHEDULERS), {"default": "normal", "tooltip": "The noise schedule."}),
                "seed": (
                    "INT",
                    {"default": 0, "min": 0, "max": 2**64 - 1,
                     "tooltip": "Seed of the noise, the same for all prompts. The same seed gives the same mask."},
                ),
                "width": ("INT", {"default": 512, "min": 64, "max": 4096, "step": 8, "tooltip": "Width in pixels."}),
                "height": ("INT", {"default": 512, "min": 64, "max": 4096, "step": 8, "tooltip": "Height in pixels."}),
            },
            "optional": {
                "rows": (
                    [BOTH, PROMPT_ONLY],
                    {"default": BOTH, "tooltip": "What is counted: both sides of the guidance, as published, or that "
                     "of the prompt only, which is cleaner."},
                ),
                "select": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 0.99, "step": 0.01, "tooltip": "A weight is pruned when it was "
                     "marked in more than this share of the steps. 0: in any (published)."},
                ),
                "concepts": (
                    "STRING",
                    {**text, "default": "", "tooltip": "Names for permeability to compare prompts with, one per line; "
                     "empty: the prompts themselves."},
                ),
                "batch_size": (
                    "INT",
                    {"default": 4, "min": 1, "max": 64, "tooltip": "Prompts at a time; more is faster and takes more "
                     "memory. The mask is the same."},
                ),
            },
        }  # fmt: skip

    def locate(
        self, model, clip, prompts, base_prompts, method, sparsity, first_steps, steps, cfg, sampler_name, scheduler,
        seed, width, height, rows=BOTH, select=0.0, concepts="", batch_size=4,
    ):  # fmt: skip
        lines = parse_lines(prompts)
        if not lines:
            raise ErasureError("No prompt was given; write at least one, each on a line of its own.")
        if first_steps > steps:
            raise ErasureError(f"first_steps is {first_steps}, but steps only {steps}; expected at most as many.")
        settings = Sampling(steps, cfg, sampler_name, scheduler, width, height)
        if method == WANDA:
            base = base_lines(lines, base_prompts)
            progress = Progress(len(set(lines)) + len(set(base)))
            watcher = Watcher(model, clip, settings, first_steps, seed, rows == BOTH, batch_size, progress.at)
            target, other = watcher.activity(lines), watcher.activity(base)
            masks = locate(layer_weights(model, watcher.layers), target, other, sparsity, first_steps, select)
            cost = f"evaluations of the network: {watcher.evaluations}"
        else:
            base = parse_lines(base_prompts) or [""]
            masks, alpha = self._dampened(model, clip, method, lines, base, settings, first_steps, seed, sparsity)
            cost = f"alpha: {alpha:.3g}"
        said = {
            "prompts": lines, "base_prompts": base, "sparsity": sparsity, "first_steps": first_steps, "select": select,
            "steps": steps, "cfg": cfg, "sampler": sampler_name, "scheduler": scheduler, "seed": seed,
            "size": [width, height], "rows": rows,
            "weight_sample": {name: weight_sample(base_layers(model)[name]) for name in list(masks)[:1]},
        }  # fmt: skip
        names = tuple(parse_lines(concepts) or dict.fromkeys(lines))
        adapter = ErasureAdapter(Card(method, names, (), family(model), fingerprint(clip), said), {"mask": masks})
        text = report(masks, parameter_count(model))
        log.info("Membrane: %s", text.splitlines()[-1])
        return adapter, f"{text}\n{cost}"

    def _dampened(self, model, clip, method, prompts, base, settings, first_steps, seed, share):
        """(masks, alpha) of Selective Synaptic Dampening; alpha is the one that selects that share of the weights."""
        layers = linear_layers(model, DAMPENING[method])
        progress, done = Progress((len(prompts) + len(base)) * first_steps), itertools.count(1)
        forget, retain = (
            importances(model, clip, layers, given, settings, first_steps, seed, lambda: progress.at(next(done)))
            for given in (prompts, base)
        )
        alpha = threshold(forget, retain, share)
        return dampen(forget, retain, alpha), alpha


NODES = [MembraneLocateMemorization]
