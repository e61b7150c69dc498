"""Detection of memorised pictures on one MODEL under one set of settings: scores of prompts, and their words."""

from dataclasses import dataclass

from ...errors import ErasureError
from ...measures.detection import words_of
from ..model.layers import is_unet
from .gradients import token_influence
from .sampling import Sampling
from .steps import encoded, measure, require_text_encoder


@dataclass
class Detector:
    """What scores depend on besides the prompts; raises ErasureError for a model or CLIP that cannot be looked into.

    first_steps: of the sampling, those that are measured; seeds: of the noises of each prompt; batch: pictures at a
    time, on which nothing depends.
    """

    model: object
    clip: object
    settings: Sampling
    first_steps: int
    seeds: list
    batch: int = 8

    def __post_init__(self):
        require_text_encoder(self.model, self.clip)
        self.empty = encoded(self.clip, "")

    @property
    def said(self):
        """What a calibration holds for, as JSON."""
        return {**vars(self.settings), "first_steps": self.first_steps, "seeds": len(self.seeds)}

    def texts(self, prompts):
        """[Text] of prompts."""
        return [encoded(self.clip, prompt) for prompt in prompts]

    def measure(self, texts, endings=False, on_evaluations=lambda done: None):
        """Found of Texts, see steps.measure()."""
        return measure(
            self.model, texts, self.empty, self.seeds, self.settings, self.first_steps, self.batch, endings,
            on_evaluations,
        )  # fmt: skip

    @property
    def evaluations_of_words(self):
        """How many evaluations the words of one prompt take."""
        return 2 * self.first_steps * len(self.seeds)

    def words(self, texts, on_evaluations=lambda done: None):
        """([[Word], the most influential first] of Texts, None) or (None, why the model does not tell)."""
        if not is_unet(self.model):
            return None, "which words it depends on is told on Stable Diffusion 1 and 2 only."
        found = []
        for text in texts:
            before = len(found) * self.evaluations_of_words
            try:
                norms = token_influence(
                    self.model, text, self.empty, self.seeds, self.settings, self.first_steps,
                    lambda done, before=before: on_evaluations(before + done),
                )  # fmt: skip
            except ErasureError as error:
                return None, str(error)
            found.append(words_of(text.pieces, norms.tolist()))
        return found, None
