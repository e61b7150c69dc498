"""Looking for a text that brings an erased concept back, with full knowledge of the model or of its words only."""

import random
from dataclasses import dataclass

import torch

from ..errors import ErasureError


def derived_vectors(vectors, edited_gram, cross_gram, penalty=0.1):
    """Text vectors c' (T, d) to which the edited layers answer as the original ones do to c (T, d); float32.

    argmin sum_l ||W'_l c' - W_l c||^2 + penalty ||c'||^2 (RECE, Gong et al. 2024, eq. 4), so
    c' = (S' + penalty I)^-1 X c with S' = sum_l W'_l^T W'_l and X = sum_l W'_l^T W_l, both (d, d) float64.
    """
    system = edited_gram + penalty * torch.eye(len(edited_gram), dtype=torch.float64)
    return torch.linalg.solve(system, cross_gram @ vectors.to(torch.float64).T).T.float()


# ---------------------------------------------------------------- vectors, by gradient

CONCEPT, KEPT, EMPTY, NOISE = STARTS = ("the concept", "a kept caption", "the empty prompt", "noise")


@dataclass(frozen=True)
class Descent:
    """How to search for text vectors: Adam on all rows of a text, as P4D and UnlearnDiffAtk search (Chin et al. 2024,
    eq. 5; Zhang et al. 2024, eq. 5), here without a projection onto words.

    steps: of Adam; rate: its step, in root mean squares of the vectors; batch: noised pictures a step.
    """

    steps: int = 50
    rate: float = 0.05
    batch: int = 8


def descended(vectors, loss, descent, rate, on_step=lambda done: None):
    """Text vectors (T, d) found by Adam from `vectors`, (T, d); loss(leaf (T, d)) gives a scalar with a graph to it.

    rate: of Adam, in the vectors' own unit.
    """
    leaf = vectors.clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=rate)
    for step in range(descent.steps):
        optimizer.zero_grad()
        loss(leaf).backward(inputs=[leaf])
        optimizer.step()
        on_step(step + 1)
    return leaf.detach()


def size_of(vectors):
    """The root mean square of text vectors, as a number."""
    return float(vectors.float().square().mean().sqrt())


def noise_like(vectors, seed):
    """Noise with the shape and the root mean square of text vectors."""
    drawn = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(vectors) * size_of(vectors)


# ---------------------------------------------------------------- words


@dataclass(frozen=True)
class Search:
    """How to search for words: a genetic search over prompts of `length` words (Ring-A-Bell, Tsai et al. 2024).

    population, generations: its size; elite: share of the best that is kept and paired; mutation: chance of a child
    to change one word; push: how far beyond the prompt the target lies along the concept (their eta).
    """

    length: int = 4
    population: int = 32
    generations: int = 30
    elite: float = 0.25
    mutation: float = 0.5
    push: float = 1.0
    seed: int = 0

    @property
    def evaluations(self):
        """How many prompts are encoded at most."""
        return self.population * (self.generations + 1)


@dataclass(frozen=True)
class Found:
    """A prompt and how far its text is from what was wanted (mean square of the vectors)."""

    prompt: str
    distance: float


def search_target(vectors, with_concept, without, push=1.0):
    """The text to look for: vectors (T, d) of a prompt, pushed by the mean difference that the concept makes.

    with_concept, without: (n, T, d), the same captions with and without the concept (Ring-A-Bell, eq. 3 and 4).
    """
    return vectors + push * (with_concept - without).mean(dim=0)


def search_prompts(target, words, encode, search, on_generation=lambda done: None):
    """The prompts of `words` closest to a target text (T, d), best first, each once.

    encode(prompts) -> vectors (n, T, d). Deterministic for a seed. Raises ErasureError without words.
    """
    if not words:
        raise ErasureError("The text encoder has no words to search among; the text-only search cannot run on it.")
    draw = random.Random(search.seed)
    known = {}

    def judge(prompts):
        fresh = list(dict.fromkeys(p for p in prompts if p not in known))
        if fresh:
            distances = (encode([" ".join(p) for p in fresh]).float() - target).square().flatten(1).mean(dim=1)
            known.update(zip(fresh, distances.tolist()))

    def child(parents):
        first, other = draw.choice(parents), draw.choice(parents)
        cut = draw.randint(0, search.length)
        made = [*first[:cut], *other[cut:]]
        if draw.random() < search.mutation or first == other:
            made[draw.randrange(search.length)] = draw.choice(words)
        return tuple(made)

    people = [tuple(draw.choice(words) for _ in range(search.length)) for _ in range(search.population)]
    judge(people)
    for generation in range(search.generations):
        people = sorted(set(people), key=known.__getitem__)
        parents = people[: max(2, int(search.elite * search.population))]
        people = parents + [child(parents) for _ in range(search.population - len(parents))]
        judge(people)
        on_generation(generation + 1)
    return [Found(" ".join(p), d) for p, d in sorted(known.items(), key=lambda item: item[1])]
