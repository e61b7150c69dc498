"""Prompts whose text pulls less: the first steps of sampling are run, and the text is moved there by gradient."""

import torch

from ...erasers.mitigation import Softened
from ...measures.detection import magnitude
from .gradients import softened_text
from .sampling import denoised
from .steps import guided_steps

# where and when a CONDITIONING acts; its text is softened as if it acted everywhere
PLACES = ("area", "strength", "mask", "mask_strength", "set_area_to_bounds", "start_percent", "end_percent", "control",
          "control_apply_to_uncond")  # fmt: skip


class Softener:
    """Softens CONDITIONINGs on one MODEL under one set of settings.

    negative: CONDITIONING that the text's pull is told against; seeds: of the noises; settings: Sampling; count: the
    first steps of the sampling, at whose noise levels a text is softened.
    """

    def __init__(self, model, negative, seeds, settings, count):
        self.model, self.negative = model, _everywhere(negative[:1])
        self.seeds, self.settings, self.count = seeds, settings, count

    def pull(self, text):
        """Mean length of what a CONDITIONING of one row adds to the prediction, the score of Detect Memorization."""
        return self._seen(text)[1]

    def soften(self, positive, softening, on_step=lambda done: None):
        """(CONDITIONING, [Softened of each row of text]): every text of it as Softening says, all else as it was,
        pooled text too; the very CONDITIONING where nothing pulls too much."""
        entries, found = [], []
        for vectors, options in positive:
            rows = []
            for i in range(len(vectors)):
                text = _everywhere([_row(vectors, options, i)])
                rows.append(self._soften(text, softening, lambda done: on_step(len(found) * softening.steps + done)))
                found.append(rows[-1])
            entries.append([torch.cat([row.vectors.to(vectors) for row in rows]), options])
        return (entries if any(row.steps for row in found) else positive), found

    def _soften(self, text, softening, on_step):
        points, pull = self._seen(text)
        if softening.target is not None and pull <= softening.target:
            return Softened(text[0][0], pull, pull, softening.target, 0)
        plain = denoised(self.model, self.negative, points)
        return softened_text(self.model, text, points, plain, softening, on_step)[1]

    def _seen(self, text):
        """([(noisy latents, sigma) on the CPU] of the first steps of all noises, the mean pull there)."""
        points, lengths = [], []

        def on_step(step):
            points.append((step.x.float().cpu(), step.sigma.float().cpu()))
            lengths.append(float(magnitude(step.delta.float()).mean()))

        for seed in self.seeds:
            guided_steps(self.model, text, self.negative, [seed], self.settings, self.count, on_step)
        return points, sum(lengths) / len(lengths)


def _everywhere(conditioning):
    return [[v, {name: value for name, value in options.items() if name not in PLACES}] for v, options in conditioning]


def _row(vectors, options, i):
    """One row of a CONDITIONING's entry, with its row of every option that has as many."""
    rows = len(vectors)
    kept = {
        name: value[i : i + 1] if isinstance(value, torch.Tensor) and value.dim() and len(value) == rows else value
        for name, value in options.items()
    }
    return [vectors[i : i + 1], kept]
