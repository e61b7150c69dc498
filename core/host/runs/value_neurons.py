"""What the value layers of the host's network answer to prompts, and how memorised these are without some neurons."""

import contextlib
import itertools
from dataclasses import dataclass, field

import comfy.model_management
import torch

from ...erasers.value_neurons import activation, deviations, goal_of, masks_of, refine, select
from ..patches.steps import APPLY_MODEL
from .locating import Watched, linear_layers
from .sampling import conditioning, run
from .steps import encoded, measure

VALUES = ("cross_attention.value",)
SEEDS = 2  # noises of a score


@dataclass
class ValueNeurons:
    """Neurons of the value layers of a MODEL that answer to memorised prompts.

    settings: Sampling; first_steps: of its steps, those in which a text's pull is measured; seed: of the first of SEEDS
    noises; size: pictures at a time. evaluations: rows of the network so far.
    """

    model: object
    clip: object
    settings: object
    first_steps: int
    seed: int
    size: int = 8
    layers: dict = field(init=False)
    evaluations: int = field(default=0, init=False)

    def __post_init__(self):
        self.layers = linear_layers(self.model, VALUES)

    def masks(self, prompts, ordinary, on_score=lambda done: None):
        """({layer: Mask}, scores before, scores after, goal) of the neurons that the prompts share; scores: of each
        prompt; on_score: called with the number of scores asked for so far."""
        normal, theirs = self._activations(ordinary), self._activations(prompts)
        z = {layer: deviations(theirs[layer], normal[layer]) for layer in self.layers}
        goal, asked = goal_of(torch.tensor(self._scores(ordinary), dtype=torch.float64)), itertools.count(1)

        def score(off):
            with self._without(off):
                found = max(self._scores(prompts))
            on_score(next(asked))
            return found

        before = self._scores(prompts)
        off, reached = select(z, score, goal)
        off = refine(z, off, score, max(goal, reached))
        with self._without(off):
            after = self._scores(prompts)
        return masks_of(off, {layer: module.in_features for layer, module in self.layers.items()}), before, after, goal

    def _scores(self, prompts):
        """How far each prompt's text moves the prediction, mean over the noises and first steps (Wen et al. 2024)."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        seeds = [(self.seed + i) % 2**64 for i in range(SEEDS)]
        texts, empty = [encoded(self.clip, prompt) for prompt in prompts], encoded(self.clip, "")
        found = measure(self.model, texts, empty, seeds, self.settings, self.first_steps, self.size)
        self.evaluations += 2 * len(seeds) * len(prompts) * self.first_steps
        return [trace.score for trace in found.traces]

    def _activations(self, prompts):
        """{layer: (prompts, out)} in the first step."""
        found = {layer: [] for layer in self.layers}
        for prompt in prompts:
            model = self.model.clone()
            watched = Watched(model.model, model.object_patches.get(APPLY_MODEL), False)
            model.add_object_patch(APPLY_MODEL, watched)

            def see(layer, module, inputs, output, watched=watched):
                if watched.rows is not None:
                    found[layer].append(activation(output[watched.rows]).mean(dim=0).cpu())

            with self._hooked(see):
                text, empty = conditioning(self.clip, prompt), conditioning(self.clip, "")
                run(model, text, empty, self.settings, [self.seed], steps=1)
            self.evaluations += watched.evaluations
        return {layer: torch.stack(rows) for layer, rows in found.items()}

    def _without(self, off):
        """With some neurons {layer: (out,) bool} switched off, for all rows."""

        def silence(layer, module, inputs, output):
            chosen = off.get(layer)
            return output if chosen is None else output.masked_fill(chosen.to(output.device), 0)

        return self._hooked(silence)

    @contextlib.contextmanager
    def _hooked(self, see):
        """With see(layer, module, inputs, output) called behind each value layer."""
        with contextlib.ExitStack() as hooks:
            for layer, module in self.layers.items():
                hooks.callback(module.register_forward_hook(_bound(see, layer)).remove)
            yield


def _bound(see, layer):
    return lambda module, inputs, output: see(layer, module, inputs, output)
