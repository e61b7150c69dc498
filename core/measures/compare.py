"""The evaluation itself: prompt by prompt, only numbers and a few small pictures are kept."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..demo.judge import ANSWERS, attribute_of, load, read, sprites
from ..errors import ErasureError
from .distances import cosine_distance, rms
from .record import encoded_picture
from .retention import relative_drift

FLOOR_PROMPTS = 3  # of each stratum on which the numerical noise is measured


class Pairs(Protocol):
    """Both models' pictures, see core/host/runs/sampling.py: pair(text, seeds) and again(text, seeds)."""

    def pair(self, text, seeds): ...

    def again(self, text, seeds): ...


@dataclass(frozen=True)
class Distance:
    """A distance: features(latents, pictures) are made once a picture, between(a, b) -> (B,) compares them."""

    features: Any
    between: Any


def built_in(pictures=True):
    """{name: Distance} of what needs no network."""
    found = {"latent": Distance(lambda latents, pictures: latents, rms)}
    if pictures:
        found["pixel"] = Distance(lambda latents, pictures: pictures, rms)
    return found


def by_vectors(embed):
    """Cosine distance of embed(pictures) -> (B, d)."""
    return Distance(lambda latents, pictures: embed(pictures), cosine_distance)


def by_pictures(function):
    """A distance of two batches of pictures (B, H, W, 3)."""
    return Distance(lambda latents, pictures: pictures, function)


def demo_judge(classes):
    """pictures (B, H, W, 3) -> class names, by the demo world's own classifier. Raises ErasureError."""
    attribute = attribute_of(classes)
    if attribute is None:
        known = "; ".join(", ".join(names) for names in ANSWERS.values())
        raise ErasureError(
            f"The demo world's classifier cannot tell {', '.join(classes)} apart; name classes of one kind: {known}."
        )
    model, names = load(), ANSWERS[attribute]
    return lambda pictures: [names[i] for i in read(model, sprites(pictures))[attribute]]


def zero_shot_judge(classes, class_vectors, embed):
    """pictures -> class names, by the closest of class_vectors (classes, d) to embed(pictures) (CLIP, section 3.1)."""

    def unit(x):
        return x / x.norm(dim=1, keepdim=True)

    wanted = unit(class_vectors.double())
    return lambda pictures: [classes[i] for i in (unit(embed(pictures).double()) @ wanted.T).argmax(dim=1).tolist()]


def compare(record, prompts, pairs, distances, seeds_of, judge=None, shown=8, after_prompt=lambda: None):
    """Fills a Record: measures what it does not hold yet.

    prompts: {stratum: [Prompt]}; pairs: Pairs; distances: {name: Distance}; seeds_of(number of the prompt) -> its
    seeds; judge(pictures) -> class names, or None; shown: pairs kept as pictures a stratum; after_prompt() is called
    when another prompt is in the record.
    """
    number = 0
    for stratum, wanted in prompts.items():
        for index, prompt in enumerate(wanted):
            seeds, number = seeds_of(number), number + 1
            if record.done(stratum, index):
                continue
            rows, picture = measure(prompt, pairs, distances, seeds, judge, index < FLOOR_PROMPTS)
            record.rows += [{"stratum": stratum, "index": index, **row} for row in rows]
            if picture and index < shown:
                record.pictures.append({"stratum": stratum, "prompt": prompt.text, "seed": seeds[0], **picture})
            after_prompt()
    record.finished = True


def measure(prompt, pairs, distances, seeds, judge, with_floor):
    """(rows of a prompt, one a seed; its first pair as small pictures or None)."""
    pair = pairs.pair(prompt.text, seeds)
    rows = [
        {"prompt": prompt.text, "label": prompt.label, "synonym": prompt.synonym, "seed": seed,
         "distance": {}, "ceiling": {}, "drift": []}
        for seed in seeds
    ]  # fmt: skip
    again = pairs.again(prompt.text, seeds) if with_floor else None
    for name, distance in distances.items():
        before = distance.features(pair.original, pair.original_pictures)
        after = distance.features(pair.erased, pair.erased_pictures)
        other = before.roll(-1, 0)  # the picture of the next seed
        for row, moved, ceiling in zip(rows, distance.between(before, after), distance.between(before, other)):
            row["distance"][name], row["ceiling"][name] = float(moved), float(ceiling)
        if again is not None:
            rows[0].setdefault("floor", {})[name] = float(distance.between(before[:1], distance.features(*again))[0])
    for sigma, (edited, original, unprompted) in pair.drift:
        for row, value in zip(rows, relative_drift(edited.numpy(), original.numpy(), unprompted.numpy())):
            row["drift"].append([sigma, float(value) if np.isfinite(value) else None])
    if judge is not None:
        answers = zip(judge(pair.original_pictures), judge(pair.erased_pictures))
        for row, answer in zip(rows, answers):
            row["answer"] = list(answer)
    if pair.original_pictures is None:
        return rows, None
    first = {"original": pair.original_pictures[0], "erased": pair.erased_pictures[0]}
    return rows, {name: encoded_picture(picture.numpy()) for name, picture in first.items()}
