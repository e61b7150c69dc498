"""Finding the weights that keep memorised pictures, or a concept, in the graph."""

import itertools
import logging

from ..core.adapters.adapter import Card, ErasureAdapter
from ..core.erasers.dampening import dampen, threshold
from ..core.erasers.pruning import base_for, locate, report
from ..core.erasers.value_neurons import require_ordinary
from ..core.errors import ErasureError
from ..core.host.model.layers import family_name, parameter_count
from ..core.host.model.weights import base_layers
from ..core.host.page.progress import Progress
from ..core.host.patches.origin import weight_sample
from ..core.host.runs.locating import FEED_FORWARD, TEXT, Watcher, importances, layer_weights, linear_layers
from ..core.host.runs.sampling import SAMPLERS, SCHEDULERS, Sampling
from ..core.host.runs.value_neurons import ValueNeurons
from ..core.host.text.encode import fingerprint
from ..core.text.concepts import parse_lines
from . import inputs
from .labels import labelled
from .shown import part, shown

log = logging.getLogger("membrane")

WANDA = "Wanda (ConceptPrune)"
DAMPENING = {  # Selective Synaptic Dampening, by the layers it may act on
    "dampening: feed-forward (experimental)": FEED_FORWARD,
    "dampening: text keys and values (experimental)": TEXT,
}
NEMO = "neurons (NeMo)"
QUESTIONS = 200  # about as often neurons are switched off to see whether they matter
METHOD_TOOLTIP = (
    "Wanda: what the prompts excite in the feed-forward blocks more than the base prompts; no gradients. dampening: "
    "Selective Synaptic Dampening, weights whose gradients matter for the prompts and not for the base prompts are "
    "scaled down; needs 20 or more diverse base prompts. neurons: what the prompts excite in the value layers of the "
    "cross-attention as no base prompt does, and without which their pull falls to that of base prompts; needs 20 or "
    "more ordinary captions as base prompts."
)
BOTH, PROMPT_ONLY = "prompt and empty prompt", "prompt only"


class MembraneLocateMemorization:
    TITLE = "Locate Memorized Subspace"
    DESCRIPTION = (
        "Finds the weights by which a model repeats memorised pictures, or draws a concept, and gives an adapter that "
        "prunes them. Suppresses replication for ordinary prompts; searched-for text vectors can bring it back."
    )
    SEARCH_ALIASES = ["memorization", "prune", "conceptprune", "wanda", "replication", "overfit", "unlearn"]
    CATEGORY = "membrane/memorisation"
    RETURN_TYPES = ("ERASURE_ADAPTER", "STRING")
    RETURN_NAMES = ("adapter", "report")
    OUTPUT_TOOLTIPS = (
        "The adapter, for Stack Erasure Adapters or Save Erasure Adapter.",
        "How many weights of each layer were marked, and what it took.",
    )
    FUNCTION = "locate"

    @classmethod
    def INPUT_TYPES(cls):
        return labelled({
            "required": {
                "model": inputs.model("The model to look into; it stays as it is."),
                "clip": inputs.CLIP,
                "prompts": inputs.text(
                    "", "Prompts of memorised pictures, or with the concept, one per line. About ten are enough."
                ),
                "base_prompts": inputs.text(
                    "", "What to compare with: nothing (the empty prompt, for memorised pictures), or for each prompt "
                    "the same without the concept, one per line.",
                ),
                "method": inputs.choice([WANDA, *DAMPENING, NEMO], WANDA, METHOD_TOOLTIP),
                "sparsity": inputs.number(
                    0.01, 0.0001, 0.2, 0.0001, "Share of weights to mark in each step. Published: 0.01 for memorised "
                    "pictures, styles and nudity, 0.02 for objects. neurons takes as many as it needs.", round=0.0001,
                ),
                "first_steps": inputs.whole(
                    10, 1, 1000, "How many of the first steps are looked at; no more are run. Published: 10 of 50.",
                    step=None,
                ),
                "steps": inputs.whole(50, 1, 1000, "Steps of the whole schedule.", step=None),
                "cfg": inputs.number(7.5, 0.0, 100.0, 0.1, "Guidance scale."),
                "sampler_name": inputs.choice(SAMPLERS, "euler", "A sampler with a fixed schedule."),
                "scheduler": inputs.choice(SCHEDULERS, "normal", "The noise schedule."),
                "seed": inputs.whole(
                    0, 0, inputs.LARGEST_SEED, "Seed of the noise, the same for all prompts. The same seed gives the "
                    "same mask.", step=None,
                ),
                "width": inputs.whole(512, 64, 4096, "Width in pixels.", 8),
                "height": inputs.whole(512, 64, 4096, "Height in pixels.", 8),
            },
            "optional": {
                "rows": inputs.choice(
                    [BOTH, PROMPT_ONLY], BOTH, "What is counted: both sides of the guidance, as published, or that of "
                    "the prompt only, which is cleaner.",
                ),
                "select": inputs.number(
                    0.0, 0.0, 0.99, 0.01, "A weight is pruned when it was marked in more than this share of the steps. "
                    "0: in any (published).",
                ),
                "concepts": inputs.text(
                    "", "Names for permeability to compare prompts with, one per line; empty: the prompts themselves."
                ),
                "batch_size": inputs.whole(
                    4, 1, 64, "Prompts at a time; more is faster and takes more memory. The mask is the same.",
                    step=None,
                ),
            },
        }, concepts="Names for permeability", rows="What is counted")  # fmt: skip

    def locate(
        self, model, clip, prompts, base_prompts, method, sparsity, first_steps, steps, cfg, sampler_name, scheduler,
        seed, width, height, rows=BOTH, select=0.0, concepts="", batch_size=4,
    ):  # fmt: skip
        lines, base = parse_lines(prompts), parse_lines(base_prompts)
        require_locatable(lines, first_steps, steps)
        settings = Sampling(steps, cfg, sampler_name, scheduler, width, height)
        if method == NEMO:
            masks, cost = self._neurons(model, clip, lines, base, settings, first_steps, seed, batch_size)
        elif method == WANDA:
            base = base_for(lines, base)
            watcher = Watcher(model, clip, settings, first_steps, seed, rows == BOTH, batch_size)
            masks, cost = self._pruned(watcher, lines, base, sparsity, select)
        else:
            base = base or [""]
            masks, cost = self._dampened(model, clip, method, lines, base, settings, first_steps, seed, sparsity)
        said = {
            "prompts": lines, "base_prompts": base, "sparsity": sparsity, "first_steps": first_steps, "select": select,
            "steps": steps, "cfg": cfg, "sampler": sampler_name, "scheduler": scheduler, "seed": seed,
            "size": [width, height], "rows": rows,
            "weight_sample": {name: weight_sample(base_layers(model)[name]) for name in list(masks)[:1]},
        }  # fmt: skip
        names = tuple(parse_lines(concepts) or dict.fromkeys(lines))
        adapter = ErasureAdapter(Card(method, names, (), family_name(model), fingerprint(clip), said), {"mask": masks})
        text = f"{report(masks, parameter_count(model))}\n{cost}"
        log.info("Membrane: %s", next(row for row in text.splitlines() if row.startswith("marked: ")))
        return shown((adapter, text), part(f"Located in {len(masks)} layers", text))

    def _pruned(self, watcher, prompts, base, sparsity, select):
        """(masks, what they took) of Wanda."""
        watcher.on_prompts = Progress(len(set(prompts)) + len(set(base))).at
        target, other = watcher.activity(prompts), watcher.activity(base)
        weights = layer_weights(watcher.model, watcher.layers)
        masks = locate(weights, target, other, sparsity, watcher.first_steps, select)
        return masks, f"evaluations of the network: {watcher.evaluations}"

    def _neurons(self, model, clip, prompts, base, settings, first_steps, seed, batch):
        """(masks, what they took and did) of NeMo."""
        base = list(dict.fromkeys(base))
        require_ordinary(len(base))
        found = ValueNeurons(model, clip, settings, first_steps, seed, batch)
        masks, before, after, goal = found.masks(prompts, base, Progress(QUESTIONS).at)
        pulls = [f"{prompt}: {a:.2f} -> {b:.2f}" for prompt, a, b in zip(prompts, before, after)]
        neurons = sum(mask.marked // mask.shape[1] for mask in masks.values())
        told = [f"pull of the text, {goal:.2f} or less is ordinary:", *pulls, f"neurons switched off: {neurons}"]
        return masks, "\n".join([*told, f"evaluations of the network: {found.evaluations}"])

    def _dampened(self, model, clip, method, prompts, base, settings, first_steps, seed, share):
        """(masks, what they took) of Selective Synaptic Dampening; alpha is the one that selects that share of the
        weights."""
        layers = linear_layers(model, DAMPENING[method])
        progress, done = Progress((len(prompts) + len(base)) * first_steps), itertools.count(1)
        forget, retain = (
            importances(model, clip, layers, given, settings, first_steps, seed, lambda: progress.at(next(done)))
            for given in (prompts, base)
        )
        alpha = threshold(forget, retain, share)
        return dampen(forget, retain, alpha), f"alpha: {alpha:.3g}"


def require_locatable(lines, first_steps, steps):
    """Raises ErasureError when there is nothing to look at, or no such steps."""
    if not lines:
        raise ErasureError("No prompt was given; write at least one, each on a line of its own.")
    if first_steps > steps:
        raise ErasureError(f"first_steps is {first_steps}, but steps only {steps}; expected at most as many.")


NODES = [MembraneLocateMemorization]
