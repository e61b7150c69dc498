"""Detection of memorised captions on the demo world, and what the mitigations while sampling do to them.

12 memorised captions against 200 ordinary ones of attribute combinations that training never showed. Figures of
benchmarks/memorization.py; alone it prints its tables.
"""

import argparse
import json

import numpy as np
import torch
from membrane.benchmarks import erasure_quality as quality
from membrane.tools.host_library import start

world, classifier = quality.world, quality.classifier
ORDINARY, SEEDS, BATCH, PAINTED = 200, 4, 64, 32
REPLICATED = 0.1  # of the distance to the nearest other memorised picture, as the model card counts
NEAR = 0.02  # mean squared error above which nothing is a copy, however far the others are
METHODS = ("dynamic guidance", "delayed guidance", "opposite guidance", "token re-weighting")


def ordinary_captions(count, seed=17):
    """(sprites, captions) of held-out combinations."""
    index = np.random.default_rng(seed).permutation(np.resize(world.held_out(), count))
    sprites = world.from_index(index)
    return sprites, world.plain_captions(sprites)


# ---------------------------------------------------------------- detection


def auc(positive, negative):
    """Area under the ROC curve: how often a positive score is above a negative one, ties count half."""
    positive, negative = np.asarray(positive)[:, None], np.asarray(negative)
    return float((positive > negative).mean() + 0.5 * (positive == negative).mean())


def tpr(positive, negative, fpr=0.01):
    """Share of positive scores above the threshold that at most `fpr` of the negative ones exceed."""
    allowed = int(fpr * len(negative))
    threshold = np.sort(np.asarray(negative))[len(negative) - allowed - 1]
    return float((np.asarray(positive) > threshold).mean())


def scores(node, demo, captions, steps, first_steps, seeds=SEEDS, bright_ending=False):
    """(magnitudes (captions, seeds, steps), bright ending scores (captions,) or None), through the host's sampler."""
    from membrane.core.host.runs.sampling import Sampling
    from membrane.core.host.runs.steps import encoded, measure

    settings = Sampling(steps, quality.CFG, "euler", "normal", quality.SIZE, quality.SIZE)
    with torch.inference_mode():
        texts, empty = [encoded(demo[1], caption) for caption in captions], encoded(demo[1], "")
        found = measure(demo[0], texts, empty, list(range(seeds)), settings, first_steps, BATCH, bright_ending)
    return torch.stack([trace.magnitudes for trace in found.traces]).numpy(), found.endings


def measure_detection(node, demo, ordinary=ORDINARY, seeds=SEEDS):
    """{"figures": {name: value}, "rows": [(what, first steps, schedule, seeds, AUC, TPR at 1 % FPR)]}."""
    captions = [*world.MEMORISED_CAPTIONS, *ordinary_captions(ordinary)[1]]
    count, rows, figures = len(world.MEMORISED_CAPTIONS), [], {}

    def add(name, what, first, steps, used, values):
        values = np.asarray(values)
        found = auc(values[:count], values[count:]), tpr(values[:count], values[count:])
        rows.append((what, first, steps, used, *found))
        for key, value in zip(("auc", "tpr_at_1_fpr"), found):
            figures[f"{key}{name}"] = round(value, 4)

    long, _ = scores(node, demo, captions, 50, 20, seeds)
    for name, first, used in (
        ("_1x1", 1, 1),
        ("_5_of_50", 5, seeds),
        ("_10_of_50", 10, seeds),
        ("_20_of_50", 20, seeds),
    ):
        add(name, "text part", first, 50, used, long[:, :used, :first].mean(axis=(1, 2)))
    for name, steps in (("_5_of_20", 20), ("", 10)):  # the same number of steps, which come to less noise
        short, _ = scores(node, demo, captions, steps, 5, seeds)
        add(name, "text part", 5, steps, seeds, short.mean(axis=(1, 2)))
    add("_1_seed", "text part", 5, 10, 1, short[:, 0].mean(axis=1))
    _, endings = scores(node, demo, captions, 20, 20, 1, bright_ending=True)
    add("_bright_ending", "bright ending", 20, 20, 1, endings)
    return {"figures": figures, "rows": rows}


def detection_table(rows):
    lines = ["| score | first steps | of a schedule of | seeds | AUC | TPR at 1 % FPR |", "|---|---|---|---|---|---|"]
    lines += [f"| {what} | {k} | {n} | {s} | {a:.3f} | {t:.2f} |" for what, k, n, s, a, t in rows]
    return "\n".join(lines)


# ---------------------------------------------------------------- mitigation


def paint(model, clip, captions, first_seed):
    """Sprites (captions, 16, 16, 3) in [0, 1], a noise of its own for each caption."""
    from membrane.core.host.runs.batching import join
    from membrane.core.host.runs.sampling import Sampling, conditioning, preview_pictures, sample

    settings = Sampling(quality.STEPS, quality.CFG, "euler", "normal", quality.SIZE, quality.SIZE)
    pictures = []
    with torch.inference_mode():
        empty = conditioning(clip, "")
        for at in range(0, len(captions), PAINTED):
            texts = join([conditioning(clip, caption) for caption in captions[at : at + PAINTED]])
            seeds = [first_seed + at + i for i in range(len(texts[0][0]))]
            pictures.append(preview_pictures(model, sample(model, texts, empty, seeds, settings)))
    return torch.cat(pictures).numpy()


def copies(pictures, own, originals=None):
    """Which pictures (n, 16, 16, 3) are copies of originals[own] (n,); the originals are the memorised pictures."""
    originals = world.memorised_pictures() if originals is None else originals
    distance = ((np.asarray(pictures)[:, None] - originals[None]) ** 2).mean(axis=(2, 3, 4))
    mine = distance[np.arange(len(own)), own]
    distance[np.arange(len(own)), own] = np.inf
    return (mine < REPLICATED * distance.min(axis=1)) & (mine < NEAR)


def measure_mitigation(node, demo, ordinary=ORDINARY, methods=METHODS):
    """[(method, pictures replicated, of, {attribute: right}, of, mean change of the ordinary pictures of 255)]."""
    judge, (sprites, captions) = classifier.load(), ordinary_captions(ordinary)
    memorised = [caption for caption in world.MEMORISED_CAPTIONS for _ in range(SEEDS)]
    own, rows, plain = np.arange(len(world.MEMORISED_CAPTIONS)).repeat(SEEDS), [], None
    for method in (None, *methods):
        model = node("MembraneMitigateMemorization", model=demo[0], method=method)[0] if method else demo[0]
        found = int(copies(paint(model, demo[1], memorised, 100), own).sum())
        others = paint(model, demo[1], captions, 5000)
        plain = others if plain is None else plain
        answers = classifier.read(judge, others)
        right = {a: int((answers[a] == getattr(sprites, a)).sum()) for a in world.ATTRIBUTES}
        change = float(np.abs(others - plain).mean() * 255)
        rows.append((method or "none", found, len(own), right, len(others), change))
        print(mitigation_table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def mitigation_table(rows):
    lines = ["| method | replicated | shape | colour | texture | background | ordinary pictures move, of 255 |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for method, copies, of, right, total, change in rows:
        cells = " | ".join(f"{right[a]} / {total}" for a in world.ATTRIBUTES)
        lines.append(f"| {method} | {copies} / {of} | {cells} | {change:.2f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few prompts, to see that it runs")
    parser.add_argument("--only", choices=("detection", "mitigation"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # two spinning threads on busy cores are slower than one
    node, tidy = start()
    demo, figures = node("MembraneDemoModel", variant="day"), {}
    if args.only != "mitigation":
        found = measure_detection(node, demo, *((8, 2) if args.quick else ()))
        print(detection_table(found["rows"]), flush=True)
        figures |= found["figures"]
    if args.only != "detection":
        rows = measure_mitigation(node, demo, *((2, METHODS[:1]) if args.quick else ()))
        figures |= {f"replicated_{row[0].replace(' ', '_').replace('-', '_')}": row[1] / row[2] for row in rows}
    tidy()
    print(json.dumps({"figures": figures}))


if __name__ == "__main__":
    main()
