"""Detection of memorised captions on the demo world's models, and what the mitigations while sampling do to them.

12 memorised captions against ordinary ones of attribute combinations that training never showed. Scores:

    text part      how far the text moves the prediction, ||e(x, c) - e(x, empty)||, mean over the first steps (Wen et
                   al., ICLR 2024)
    bright ending  the same where the end token is looked at in the last step (Chen et al., ICLR 2025); models with
                   cross-attention
    sharpness      ||(H_c - H_empty) s||, s the difference of both scores and H the Jacobians of each, in the first step
                   (Jeon et al., ICML 2025); the product by a difference along s instead of forward differentiation
    anisotropy     the text part in the first step, and ANISOTROPY times its cosine with e(x, empty) near the end, both
                   asked on pure noise (Asthana et al., ICLR 2026), with the weights for Stable Diffusion 1

The one that Detect Memorization ships is the text part of 5 of 10 steps, 4 noises, on every family. Finished tables are
kept in output/ (--fresh measures them again). The mitigations are printed by --mitigation and kept by
benchmarks/memorization.py, which takes its figures from here.
"""

import argparse
import json

import numpy as np
import torch
from membrane.benchmarks import erasure_quality as quality
from membrane.tools import ROOT
from membrane.tools.host_library import start

world, classifier = quality.world, quality.classifier
ORDINARY, SEEDS, BATCH, PAINTED = 200, 4, 64, 32
LONG = (5, 10, 20)  # first steps of a schedule of 50 that are measured
ALONE, SHORT = 60, (5,)  # ordinary captions and first steps where both models are measured
REPLICATED = 0.1  # of the distance to the nearest other memorised picture, as the model card counts
NEAR = 0.02  # mean squared error above which nothing is a copy, however far the others are
ANISOTROPY = 2.0  # weight of the cosine beside the length
NEARLY = 0.98  # part of the schedule that counts as its end: timestep 20 or so of 1000
TOWARDS = 0.01  # length of a difference along a direction, of the noise's
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


def scores(node, demo, captions, steps, first_steps, seeds=SEEDS, bright_ending=False, scheduler="normal"):
    """(magnitudes (captions, seeds, steps), bright ending scores (captions,) or None), through the host's sampler."""
    from membrane.core.host.runs.sampling import Sampling
    from membrane.core.host.runs.steps import encoded, measure

    settings = Sampling(steps, quality.CFG, "euler", scheduler, quality.SIZE, quality.SIZE)
    with torch.inference_mode():
        texts, empty = [encoded(demo[1], caption) for caption in captions], encoded(demo[1], "")
        found = measure(demo[0], texts, empty, list(range(seeds)), settings, first_steps, BATCH, bright_ending)
    return torch.stack([trace.magnitudes for trace in found.traces]).numpy(), found.endings


def one_step_scores(demo, captions, seeds=SEEDS):
    """{"sharpness", "anisotropy": scores (captions,)}, means over the noises."""
    from membrane.core.host.runs.batching import fitting, join
    from membrane.core.host.runs.sampling import Sampling, conditioning, seeded_noise

    model, found = demo[0], {"sharpness": {}, "anisotropy": {}}
    settings = Sampling(1, quality.CFG, "euler", "normal", quality.SIZE, quality.SIZE)
    with torch.inference_mode():
        noise, empty = seeded_noise(model, list(range(seeds)), settings)[1], conditioning(demo[1], "")
        texts = [conditioning(demo[1], caption) for caption in captions]
        for rows in fitting(texts):
            for part in (rows[i : i + BATCH // seeds] for i in range(0, len(rows), BATCH // seeds)):
                asked = join([texts[i] for i in part for _ in range(seeds)])
                several = noise.repeat(len(part), 1, 1, 1)
                for name, of in (("sharpness", sharpness), ("anisotropy", anisotropy)):
                    values = of(model, asked, empty, several).view(len(part), seeds).mean(dim=1)
                    found[name].update(zip(part, values.tolist()))
    return {name: [values[i] for i in range(len(captions))] for name, values in found.items()}


def sharpness(model, text, empty, noise):
    """||(H_c - H_empty) s|| (B,) in pure noise (B, C, h, w) at the highest level, up to a factor that all share.

    s is the difference of the predicted clean latents under a text and without; the Jacobians are told by a step along
    it.
    """
    x, sigma = latents_at(model, 0.0, noise)
    pull = difference(model, text, empty, x, sigma)
    length = pull.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    step = TOWARDS * x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    moved = difference(model, text, empty, x + step * pull / length, sigma)
    return ((moved - pull) / step * length).flatten(1).norm(dim=1)


def anisotropy(model, text, empty, noise):
    """||e(x, c) - e(x, empty)|| at the highest level + ANISOTROPY times the mean over the places of the cosine, over
    the channels, of e(x, empty) with e(x, c) - e(x, empty) near the end, in pure noise (B, C, h, w) both times."""
    from membrane.core.host.runs.sampling import denoised
    from membrane.core.measures.detection import magnitude

    first, high = latents_at(model, 0.0, noise)
    last, low = latents_at(model, NEARLY, noise)
    length = magnitude(difference(model, text, empty, first, high) / high.view(-1, 1, 1, 1))
    (plain,) = denoised(model, empty, [(last, low)])
    pull = -difference(
        model, text, empty, last, low
    )  # of the noise: what is added to it is taken off the clean latents
    return length + ANISOTROPY * torch.cosine_similarity(last - plain, pull, dim=1).flatten(1).mean(dim=1)


def latents_at(model, part, noise):
    """(latents (B, C, h, w) that the network sees as pure noise, sigma (B,)) at a part of the schedule."""
    sampling = model.model.model_sampling
    sigma = torch.full((len(noise),), float(sampling.percent_to_sigma(max(part, 1e-4))))
    return noise / sampling.calculate_input(sigma[:1], torch.ones(1, 1, 1, 1)), sigma


def difference(model, text, empty, x, sigma):
    """Predicted clean latents (B, C, h, w) under a text, less those without one."""
    from membrane.core.host.runs.sampling import denoised

    return denoised(model, text, [(x, sigma)])[0] - denoised(model, empty, [(x, sigma)])[0]


def measure_detection(node, demo, ordinary=ORDINARY, seeds=SEEDS, variant="day", firsts=LONG):
    """{"figures": {name: value}, "rows": [(what, first steps, schedule, seeds, AUC, TPR at 1 % FPR)]}."""
    captions = [*world.MEMORISED_CAPTIONS, *ordinary_captions(ordinary)[1]]
    count, rows, figures, scheduler = len(world.MEMORISED_CAPTIONS), [], {}, quality.MODELS[variant]

    def add(name, what, first, steps, used, values):
        values = np.asarray(values)
        found = auc(values[:count], values[count:]), tpr(values[:count], values[count:])
        rows.append((what, first, steps, used, *found))
        for key, value in zip(("auc", "tpr_at_1_fpr"), found):
            figures[f"{key}{name}"] = round(value, 4)

    long, _ = scores(node, demo, captions, 50, firsts[-1], seeds, scheduler=scheduler)
    for name, first, used in (
        ("_1x1", 1, 1),
        ("_1_of_50", 1, seeds),
        *((f"_{first}_of_50", first, seeds) for first in firsts),
    ):
        add(name, "text part", first, 50, used, long[:, :used, :first].mean(axis=(1, 2)))
    for name, steps in (("_5_of_20", 20), ("", 10)):  # the same number of steps, which come to less noise
        short, _ = scores(node, demo, captions, steps, 5, seeds, scheduler=scheduler)
        add(name, "text part", 5, steps, seeds, short.mean(axis=(1, 2)))
    add("_1_seed", "text part", 5, 10, 1, short[:, 0].mean(axis=1))
    for what, values in one_step_scores(demo, captions, seeds).items():
        add(f"_{what}", what, 1, 1, seeds, values)
    if variant == "day":
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


def kept_detection(node, variant, store, quick):
    """measure_detection() of a variant of the demo model; what the file `store` holds is not measured again."""
    if not store.is_file():
        sizes = (8, 2) if quick else (ALONE, SEEDS)
        found = measure_detection(node, node("MembraneDemoModel", variant=variant), *sizes, variant, SHORT)
        quality.write(store, json.dumps(found, indent=1) + "\n")
    return json.loads(store.read_text(encoding="utf-8"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few prompts, to see that it runs")
    parser.add_argument("--fresh", action="store_true", help="measure both tables again")
    parser.add_argument("--model", choices=quality.MODELS, help="one variant of the demo model; nothing is written")
    parser.add_argument("--mitigation", action="store_true", help="the mitigations while sampling instead")
    args = parser.parse_args()
    torch.set_num_threads(1)  # two spinning threads on busy cores are slower than one
    node, tidy = start()
    figures, parts = {}, ["# Detection of memorised captions", "`python3 run.py bench memorization_detection`"]
    try:
        if args.mitigation:
            small = (2, METHODS[:1]) if args.quick else ()
            rows = measure_mitigation(node, node("MembraneDemoModel", variant="day"), *small)
            figures = {f"replicated_{row[0].replace(' ', '_').replace('-', '_')}": row[1] / row[2] for row in rows}
        for variant in () if args.mitigation else [args.model] if args.model else quality.MODELS:
            store = ROOT / "output" / f"memorization_detection_{variant}{'_quick' * args.quick}.json"
            if args.fresh or args.quick:
                store.unlink(missing_ok=True)
            found = kept_detection(node, variant, store, args.quick)
            parts += [f"## {variant}", detection_table(found["rows"])]
            print(parts[-1], flush=True)
            figures |= {f"{variant}.{name}": value for name, value in found["figures"].items()}
    finally:
        tidy()
    if not (args.quick or args.model or args.mitigation):
        text = "\n\n".join(parts) + "\n"
        quality.write(ROOT / "benchmarks" / "results" / "memorization_detection.md", text)
    print(json.dumps({"figures": figures}))


if __name__ == "__main__":
    main()
