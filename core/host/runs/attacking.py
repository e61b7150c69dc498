"""Searches over text vectors that bring an erased concept back, from several starts."""

import torch

from ...measures.attack import size_of
from ...text.concepts import fill
from ...text.similarity import short_captions
from .gradients import searched_text
from .sampling import sample

SEEN = 8  # pictures of each caption, by the original model, that a search is shown
SEED = 2**32  # numbers that a search is drawn from


def searched_from_starts(test, original, erased, draw, seeds, kept, descent, on_step=lambda done: None):
    """Adds to a StressTest what searches by gradient find on the erased MODEL, from all starts with each of some seeds.

    draw: (negative CONDITIONING, Sampling, seed of the first picture that is shown); kept: words of something that was
    kept, or "" for a neutral caption; descent: Descent; on_step(steps done of all searches) may raise to stop.
    """
    empty, settings, first = draw
    shown = [(first + i) % 2**64 for i in range(SEEN)]
    clean = torch.cat([sample(original, test.condition(text), empty, shown, settings) for text in test.asked])
    rate, done = descent.rate * size_of(test.plain.conditioning[0][0]), 0

    def searched(start, seed):
        nonlocal done
        found = searched_text(erased, start, clean, descent, rate, seed, lambda step: on_step(done + step))
        done += descent.steps
        return found

    caption = fill(test.captions[0], kept) if kept else short_captions()[0]
    test.descend(caption, searched, [seed % SEED for seed in seeds])
