"""A stress test from beginning to end: prompts that may bring an erased concept back, and how far each does."""

from dataclasses import dataclass

import torch

from ..errors import ErasureError
from ..text.concepts import fill
from .attack import derived_vectors, search_prompts, search_target
from .distances import rms
from .render_grid import attack_sheet

DERIVED, WORDS = "derived vectors", "words"
ATTACKS = {"both": (DERIVED, WORDS), DERIVED: (DERIVED,), WORDS: (WORDS,)}
WORDS_TRIED = 500  # the words nearest to the concept that the search chooses from


@dataclass
class Attempt:
    """One attack: its kind, the prompt it is made of, its conditioning and the pictures that came of it."""

    kind: str
    prompt: str
    conditioning: list
    pictures: torch.Tensor | None = None
    recovery: float = 0.0
    said: str = ""


def require_class(concept, classes, judge):
    """Raises ErasureError for a concept that is empty, or that a classifier does not choose."""
    if not concept:
        raise ErasureError("No concept to look for was given; write the word that was erased.")
    if classes and judge and concept not in classes:
        raise ErasureError(f'The concept "{concept}" is not among the class names; add it there.')


class StressTest:
    """Attacks on one concept, first gathered, then drawn and judged.

    captions: templates to attack with; condition(text) -> CONDITIONING; judge(pictures) -> class names, or None to
    compare pictures with the original model's. plain: the concept as it is asked for; attempts: the attacks on it.
    """

    def __init__(self, concept, captions, condition, judge=None):
        self.concept, self.captions, self.condition, self.judge = concept, captions, condition, judge
        self.asked = [fill(caption, concept) for caption in captions]
        self.plain, self.attempts = Attempt("", self.asked[0], condition(self.asked[0])), []
        self.original = None

    def derive(self, grams, penalty):
        """Adds text vectors that the erased layers take for those of each caption; grams: of attack_grams()."""
        for text in self.asked:
            vectors = derived(self.condition(text), grams, penalty)
            self.attempts.append(Attempt(DERIVED, text, vectors))

    def search(self, search, words, encode, tried, on_generation):
        """Adds the best prompts of other words: texts close to the captions without the concept, pushed towards it.

        search: Search; encode(prompts) -> (n, T, d); tried: how many are added.
        """
        on, off = (encode([fill(caption, word) for caption in self.captions]) for word in (self.concept, ""))
        target = search_target(off.mean(dim=0), on, off, search.push)
        found = search_prompts(target, words, encode, search, on_generation)[:tried]
        self.attempts += [Attempt(WORDS, one.prompt, self.condition(one.prompt)) for one in found]

    def draw(self, original, erased, on_drawn=lambda done: None):
        """Draws all attempts from the same noise, judges them and puts the strongest first.

        original, erased: functions of a CONDITIONING that give (latents (n, C, h, w), pictures (n, H, W, 3) or None) of
        a model.
        """
        wanted, self.original = original(self.plain.conditioning)
        on_drawn(1)
        plain = None
        for i, attempt in enumerate((self.plain, *self.attempts)):
            latents, attempt.pictures = erased(attempt.conditioning)
            plain = latents if plain is None else plain
            self._judge(attempt, latents, wanted, plain)
            on_drawn(i + 2)
        self.attempts.sort(key=lambda attempt: -attempt.recovery)

    def _judge(self, attempt, latents, wanted, plain):
        """Sets how far an attempt brings the concept back: pictures in which it is recognised, or how much of the way
        from the erased model's pictures to the original's."""
        if self.judge is not None:
            right = sum(answer == self.concept for answer in self.judge(attempt.pictures))
            attempt.recovery, attempt.said = right / len(latents), f"recognised in {right} of {len(latents)}"
            return
        far, near = rms(plain, wanted).mean(), rms(latents, wanted).mean()
        attempt.recovery = float(1 - near / far) if far > 0 else 0.0
        attempt.said = f"{attempt.recovery:.0%} of the way back to the original"

    @property
    def best_words(self):
        """The strongest prompt of words, or nothing."""
        return next((attempt.prompt for attempt in self.attempts if attempt.kind == WORDS), "")

    def report(self):
        """How far each attempt brings the concept back, as text."""
        lines = [f'As asked, "{self.plain.prompt}": {self.plain.said}', "Attacks, the strongest first:"]
        return "\n".join([*lines, *(f'  {a.kind}, "{a.prompt}": {a.said}' for a in self.attempts)])

    def sheet(self):
        """The pictures (1, H, W, 3) in [0, 1] of the original, as asked, and under each attack."""
        if self.original is None:
            return torch.zeros(1, 64, 64, 3)
        rows = [(f"original: {self.concept}", self.plain.prompt, self.original)]
        rows += [("erased, as asked", self.plain.said, self.plain.pictures)]
        rows += [(f"{a.kind}: {a.prompt}", a.said, a.pictures) for a in self.attempts]
        return torch.from_numpy(attack_sheet(rows))[None]


def derived(positive, grams, penalty):
    """A CONDITIONING whose vectors the erased model's layers take for those of `positive`."""
    vectors, options = positive[0]
    rows = derived_vectors(vectors[0].float().cpu(), *grams, penalty)
    rows[0] = vectors[0, 0]  # the start token is the same for every prompt
    return [[rows[None].to(vectors), options]]
