"""Memorised pictures on the demo world: detected, located, pruned, and searched for again.

The demo model has memorised 12 pictures with their captions. Copies are counted as its model card counts them: much
closer to the memorised picture than to any other of the twelve. Masks are located from the first 6 captions, with as
many ordinary captions as base; "as published" is with the empty prompt, both sides of the guidance and a fifth of the
steps.

    located, unseen    copies among pictures of those 6 captions, and of the other 6 ("one for all"), 4 noises each
    paraphrases        copies among pictures of all 12 in other words
    ordinary           pictures of 200 held-out combinations that the judge reads right, worst attribute
    recovered          of 12 memorised pictures, those that a text embedding brings back: all 77 rows searched for on
                       the pruned model, from the caption on, 50 steps of Adam, rate 0.1, batch 8, noise and time step
                       drawn anew each step (Kowalczuk et al. 2025, "Finding DoRI"); the same search for 12 pictures
                       that no model was trained on is the control
    evaluations        rows that go through the network to locate from 10 captions, against all 50 steps of both sets
                       with guidance, as the published code runs them (Chavhan et al. 2024)

Memory is measured on a Stable Diffusion 1.5 network of full size with random weights, in pictures of 128 x 128.
"""

import argparse
import json
import time

import numpy as np
import torch
import torch.nn.functional as F
from membrane.benchmarks import closed_form, gates
from membrane.benchmarks import memorization_detection as detection
from membrane.tools import ROOT
from membrane.tools.host_library import start

quality, world, classifier = detection.quality, detection.world, detection.classifier
CAPTIONS, HALF, SEEDS = world.MEMORISED_CAPTIONS, 6, 4
STEPS = quality.STEPS
# a network this small needs more than the published sparsity, and more steps; ordinary base prompts keep what it shares
OURS = {"sparsity": 0.2, "first_steps": 10, "rows": "prompt only"}
PUBLISHED = {"sparsity": 0.01, "first_steps": 4, "rows": "prompt and empty prompt"}  # a fifth of the steps
SPARSITIES = (0.01, 0.02, 0.05, 0.1, 0.2)
DAMPENED = 0.02
PARAPHRASES = ("a picture of {}", "{}, pixel art", "a drawing of {} on stone", "a small {}")
SEARCH_STEPS, SEARCH_RATE, SEARCH_BATCH = 50, 0.1, 8
WANDA = "Wanda (ConceptPrune)"
DAMPENING = "dampening: feed-forward (experimental)"


class World:
    """The demo model in a host, its pictures, and masks on it."""

    def __init__(self, node, ordinary):
        self.node, self.demo = node, node("MembraneDemoModel", variant="day")
        self.judge = classifier.load()
        self.sprites, self.ordinary = detection.ordinary_captions(ordinary)
        self.base = world.plain_captions(quality.sprites_of("shape", list(range(8)), 48, 52))  # none of those measured

    def paint(self, model, captions, first_seed):
        return detection.paint(model, self.demo[1], captions, first_seed)

    def copies(self, model, captions, own, first_seed=100):
        """How many pictures of captions are copies of the memorised pictures own (numbers), SEEDS noises each."""
        pictures = self.paint(model, [c for c in captions for _ in range(SEEDS)], first_seed)
        return int(detection.copies(pictures, np.repeat(own, SEEDS)).sum())

    def right(self, model):
        """{attribute: ordinary pictures that the judge reads right}."""
        answers = classifier.read(self.judge, self.paint(model, self.ordinary, 5000))
        return {a: int((answers[a] == getattr(self.sprites, a)).sum()) for a in world.ATTRIBUTES}

    def located(self, prompts, base=None, **settings):
        """(adapter, seconds, report) of the node; without base prompts ordinary ones are taken."""
        base = self.base[: len(prompts)] if base is None else base
        begin = time.perf_counter()
        adapter, text = self.node(
            "MembraneLocateMemorization", model=self.demo[0], clip=self.demo[1], prompts="\n".join(prompts),
            base_prompts="\n".join(base), sampler_name="euler", scheduler="normal",
            width=quality.SIZE, height=quality.SIZE,
            **{"method": WANDA, "seed": 0, "steps": STEPS, "cfg": quality.CFG, **OURS, **settings},
        )  # fmt: skip
        return adapter, time.perf_counter() - begin, text

    def pruned(self, adapter, strength=1.0):
        """The model with a mask."""
        stack = self.node("MembraneStack", adapter=adapter, strength=strength, permeability="fixed")[0]
        return self.node("MembraneApply", model=self.demo[0], clip=self.demo[1], stack=stack)[0]

    def row(self, model, **more):
        """The counts of one row of the table."""
        number = np.arange(len(CAPTIONS))
        paraphrases = [form.format(c) for c in CAPTIONS for form in PARAPHRASES]
        return {
            "located": self.copies(model, CAPTIONS[:HALF], number[:HALF]),
            "unseen": self.copies(model, CAPTIONS[HALF:], number[HALF:], 100 + HALF * SEEDS),
            "paraphrases": int(
                detection.copies(self.paint(model, paraphrases, 300), number.repeat(len(PARAPHRASES))).sum()
            ),
            "right": self.right(model),
            **more,
        }


def drop(row, before, total):
    """Points of the attribute that lost most."""
    return max(100 * (before["right"][a] - row["right"][a]) / total for a in world.ATTRIBUTES)


def line(name, row, before, total):
    half = HALF * SEEDS
    cells = [f"{row['located']} / {half}", f"{row['unseen']} / {half}",
             f"{row['paraphrases']} / {len(CAPTIONS) * len(PARAPHRASES)}",
             " ".join(str(row["right"][a]) for a in world.ATTRIBUTES) + f" / {total}",
             f"{drop(row, before, total):.1f}", f"{row.get('density', 0):.2%}"]  # fmt: skip
    return "| " + " | ".join([name, *cells]) + " |"


HEADER = (
    "| | located | unseen | paraphrases | ordinary: shape colour texture background | points lost | weights marked |\n"
    "|---|---|---|---|---|---|---|"
)


# ---------------------------------------------------------------- overlap


def style_pairs(attribute, value, count=HALF):
    """(prompts with a value, the same without it), as ConceptPrune pairs them."""
    sprites = quality.sprites_of(attribute, [world.NAMES[attribute].index(value)], count, 51)
    captions = world.plain_captions(sprites)
    return captions, [" ".join(c.replace(value, "").split()) for c in captions]


def overlaps(here):
    """{pair of kinds: [intersection over union]} of masks located from different prompts."""
    from membrane.core.erasers.pruning import overlap

    def masks(prompts, base=None):
        return here.located(prompts, base)[0].masks

    memorised = [masks(CAPTIONS[:HALF]), masks(CAPTIONS[HALF:]), masks(CAPTIONS[::2])]
    styles = [masks(*style_pairs("texture", value)) for value in ("striped", "dotted", "checkered")]
    return {
        "memorised, disjoint captions": [overlap(memorised[0], memorised[1])],
        "memorised, half of the captions shared": [overlap(memorised[0], memorised[2]), overlap(*memorised[1:])],
        "memorised / style": [overlap(m, s) for m in memorised[:2] for s in styles],
        "style / style": [overlap(styles[i], styles[j]) for i, j in ((0, 1), (0, 2), (1, 2))],
    }


# ---------------------------------------------------------------- search


def unknown_pictures():
    """12 pictures like the memorised ones that no model was trained on."""
    pictures = []
    for i in range(len(CAPTIONS)):
        rng = np.random.default_rng(9000 + i)
        tones = rng.random((4, 3)).astype(np.float32)
        half = np.kron(rng.choice(4, (8, 4), p=(0.4, 0.25, 0.2, 0.15)), np.ones((2, 2), int))
        pictures.append(tones[np.concatenate([half, half[:, ::-1]], 1)])
    return np.stack(pictures)


class Attacker:
    """Searches text embeddings with gradients through the whole (pruned) network."""

    def __init__(self, masks):
        from membrane.tools.pixel_world.evaluate import ASSETS, Sampler, load_text, load_unet, tokenizers
        from membrane.tools.pixel_world.train_unet import alphas_cumprod

        unet = load_unet(ASSETS / "day.safetensors").requires_grad_(False)
        prune(unet, masks)
        self.sampler = Sampler(unet, load_text(ASSETS / "day.safetensors"), tokenizers.load(ASSETS / "tokenizer"))
        self.alphas = alphas_cumprod().float()

    def search(self, caption, picture):
        """The embedding (1, 77, d) for a picture (16, 16, 3)."""
        from membrane.core.demo.world import rgb_to_latent

        clean = rgb_to_latent(torch.from_numpy(picture[None]).permute(0, 3, 1, 2)).expand(SEARCH_BATCH, -1, -1, -1)
        context = self.sampler.encode([caption]).clone().requires_grad_(True)
        optimizer, g = torch.optim.Adam([context], lr=SEARCH_RATE), torch.Generator().manual_seed(11)
        for _ in range(SEARCH_STEPS):
            t = torch.randint(1000, (SEARCH_BATCH,), generator=g)
            noise = torch.randn(clean.shape, generator=g)
            a = self.alphas[t].view(-1, 1, 1, 1)
            found = self.sampler.unet(
                a.sqrt() * clean + (1 - a).sqrt() * noise, t.float(), context.expand(SEARCH_BATCH, -1, -1)
            )
            optimizer.zero_grad()
            F.mse_loss(found, noise).backward()
            optimizer.step()
        return context.detach()

    def recovered(self, pictures, captions=CAPTIONS):
        """(pictures that come back in most of SEEDS noises, drawn copies) of pictures searched for from captions."""
        empty, hits = self.sampler.encode([""]), []
        for i, (caption, picture) in enumerate(zip(captions, pictures)):
            context = self.search(caption, picture).expand(SEEDS, -1, -1)
            drawn = self.sampler.sample(context, empty, STEPS, quality.CFG, torch.Generator().manual_seed(9))
            hits.append(int(detection.copies(drawn, np.full(SEEDS, i), pictures).sum()))
        return sum(2 * hit > SEEDS for hit in hits), sum(hits)


def prune(unet, masks):
    """Sets marked weights of the demo U-Net to zero."""
    from membrane.core.families.sites import site

    known = {site(name): p for name, p in unet.named_parameters() if name.endswith(".weight")}
    for name, mask in masks.items():
        known[name].data[mask.marks()] = 0


# ---------------------------------------------------------------- cost


def published_way(here, prompts):
    """(rows that went through the network, seconds) of all steps of both sets, one prompt at a time, with guidance."""
    from membrane.core.host.patches.steps import APPLY_MODEL
    from membrane.core.host.runs.sampling import Sampling, conditioning, sample

    settings = Sampling(50, 7.5, "euler", "normal", quality.SIZE, quality.SIZE)
    model, rows = here.demo[0].clone(), [0]
    base = type(model.model).apply_model.__get__(model.model)

    def counted(x, *args, **kwargs):
        rows[0] += len(x)
        return base(x, *args, **kwargs)

    model.add_object_patch(APPLY_MODEL, counted)
    begin = time.perf_counter()
    with torch.inference_mode():
        empty = conditioning(here.demo[1], "")
        for prompt in (*prompts, *[""] * len(prompts)):
            # the unconditional side is an object of its own, or the host would leave guidance between equal texts out
            sample(model, conditioning(here.demo[1], prompt), empty, [0], settings)
    return rows[0], time.perf_counter() - begin


def costs(here):
    """{figure: value} of locating from 10 captions, against the published way."""
    rows, seconds = published_way(here, CAPTIONS[:10])
    _, ours, text = here.located(CAPTIONS[:10], (), steps=50, cfg=7.5, **PUBLISHED | {"first_steps": 10})
    mine = int(text.rpartition(": ")[2])
    return {
        "published_evaluations": rows, "evaluations": mine, "evaluations_ratio": round(rows / mine, 2),
        "seconds_ratio": round(seconds / ours, 2),
    }  # fmt: skip


def sd15_memory():
    """{figure: MB} of locating from 10 prompts on Stable Diffusion 1.5's layout: beyond the model, and beyond what
    sampling the same pictures needs."""
    from membrane.core.erasers.pruning import locate
    from membrane.core.host.runs.locating import Watcher, layer_weights
    from membrane.core.host.runs.sampling import Sampling, conditioning, sample

    model, clip = gates.loaded(gates.sd15(gates.FULL)), Texts()
    settings = Sampling(50, 7.5, "euler", "normal", quality.SIZE, quality.SIZE)
    prompts = [f"memorised caption {i}" for i in range(10)]

    def sampling():
        sample(model, conditioning(clip, prompts[0]), conditioning(clip, ""), [0], Sampling(1, *vars_of(settings)))

    def locating():
        watcher = Watcher(model, clip, settings, 10, 0, True, 1)
        target, base = watcher.activity(prompts), watcher.activity([""] * len(prompts))
        found.update(locate(layer_weights(model, watcher.layers), target, base, 0.01, 10))

    found = {}
    with torch.inference_mode():
        sampling()
        plain = closed_form.peak_memory(sampling)
        whole = closed_form.peak_memory(locating)
    bits = sum(mask.bits.numel() for mask in found.values())
    return {
        "sd15_memory_mb": round(whole[0] / 1e6, 1),
        "sd15_memory_beyond_sampling_mb": round((whole[0] - plain[0]) / 1e6, 1),
        "sd15_mask_mb": round(bits / 1e6, 2),
    }


def vars_of(settings):
    return list(vars(settings).values())[1:]


class Texts(gates.Words):
    """Random vectors for every text, for the host's way of encoding."""

    def encode_from_tokens(self, tokens, return_pooled=False, **kwargs):
        vectors = super().encode_from_tokens(tokens)
        return (vectors, None) if return_pooled else vectors

    def encode_from_tokens_scheduled(self, tokens, **kwargs):
        return [[self.encode_from_tokens(tokens), {}]]


# ---------------------------------------------------------------- everything


def density(adapter):
    """Share of the layers' weights that a mask changes."""
    masks = adapter.masks.values()
    return sum(mask.marked for mask in masks) / sum(mask.shape[0] * mask.shape[1] for mask in masks)


def doses(here, say):
    """{name: row} of the unpruned model, of masks of rising sparsity, and of dampening."""
    rows, before = {}, None

    def add(name, model, **more):
        nonlocal before
        rows[name] = here.row(model, **more)
        before = before or rows[name]
        say(line(name, rows[name], before, len(here.ordinary)))

    say(HEADER)
    add("unpruned", here.demo[0])
    for sparsity in SPARSITIES:
        adapter = here.located(CAPTIONS[:HALF], sparsity=sparsity)[0]
        add(f"sparsity {sparsity:g}", here.pruned(adapter), density=density(adapter))
    add(f"sparsity {sparsity:g}, strength 0.5", here.pruned(adapter, 0.5), density=density(adapter))
    for sparsity in (PUBLISHED["sparsity"], OURS["sparsity"]):
        adapter = here.located(CAPTIONS[:HALF], (), **PUBLISHED | {"sparsity": sparsity})[0]
        add(f"as published, sparsity {sparsity:g}", here.pruned(adapter), density=density(adapter))
    adapter = here.located(CAPTIONS[:HALF], here.base, method=DAMPENING, sparsity=DAMPENED)[0]
    add(f"dampening, sparsity {DAMPENED:g}", here.pruned(adapter), density=density(adapter))
    return rows


def attacks(here, say):
    """{name: (pictures of 12 that come back, copies of 48)} of the embedding search."""
    mask = here.located(CAPTIONS[:HALF])[0].masks
    whole = here.located(CAPTIONS)[0].masks
    originals = world.memorised_pictures()
    found = {}
    for name, masks, pictures in (
        ("unpruned", {}, originals), ("pruned, from 6 captions", mask, originals),
        ("pruned, from all 12", whole, originals), ("control: never memorised, unpruned", {}, unknown_pictures()),
    ):  # fmt: skip
        found[name] = Attacker(masks).recovered(pictures)
        say(f"| {name} | {found[name][0]} / {len(pictures)} | {found[name][1]} / {len(pictures) * SEEDS} |")
    return found


SEARCH_HEADER = "| model | pictures recovered | copies |\n|---|---|---|"


def report(rows, ious, searches, cost, detected, mitigated, total):
    """The tables as Markdown."""
    before = rows["unpruned"]
    text = "# Memorised pictures on the demo world\n\n`python3 run.py bench memorization`\n\n## Detected\n\n"
    text += detection.detection_table(detected["rows"])
    text += f"\n\n## Pruned, located from 6 of 12 captions\n\n{HEADER}\n"
    text += "\n".join(line(name, row, before, total) for name, row in rows.items())
    text += "\n\n## Searched for on the pruned model\n\n" + SEARCH_HEADER
    for name, (pictures, found) in searches.items():
        text += f"\n| {name} | {pictures} / {len(CAPTIONS)} | {found} / {len(CAPTIONS) * SEEDS} |"
    text += "\n\n## Overlap of masks (intersection over union, mean of the layers)\n\n| masks | IoU |\n|---|---|"
    for name, values in ious.items():
        text += f"\n| {name} | {', '.join(f'{v:.2f}' for v in values)} |"
    text += "\n\n## Held back while sampling\n\n" + detection.mitigation_table(mitigated)
    text += "\n\n## Cost\n\n" + "\n".join(f"- {name}: {value}" for name, value in cost.items())
    return text + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few prompts, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    node, tidy = start()

    def say(text):
        print(text, flush=True)

    try:
        here = World(node, 8 if args.quick else detection.ORDINARY)
        if args.quick:
            globals().update(SPARSITIES=SPARSITIES[:1], SEARCH_STEPS=2, SEEDS=1)
        cost = costs(here) | ({} if args.quick else sd15_memory())
        say(str(cost))
        rows = doses(here, say)
        ious = overlaps(here)
        say(str(ious))
        searches = attacks(here, say)
        detected = detection.measure_detection(node, here.demo, *((8, 2) if args.quick else ()))
        mitigated = detection.measure_mitigation(node, here.demo, *((2, detection.METHODS[:1]) if args.quick else ()))
    finally:
        tidy()
    total, before, pruned = len(here.ordinary), rows["unpruned"], rows.get(f"sparsity {OURS['sparsity']:g}")
    if not args.quick:
        text = report(rows, ious, searches, cost, detected, mitigated, total)
        quality.write(ROOT / "benchmarks" / "results" / "memorization.md", text)
    pruned = pruned or rows[list(rows)[1]]
    half = HALF * SEEDS
    figures = {
        "auc": detected["figures"]["auc"],
        "tpr_at_1_fpr": detected["figures"]["tpr_at_1_fpr"],
        "replicated_before": (before["located"] + before["unseen"]) / (2 * half),
        "replicated_located": pruned["located"] / half,
        "replicated_unseen": pruned["unseen"] / half,
        "replicated_paraphrases": pruned["paraphrases"] / (len(CAPTIONS) * len(PARAPHRASES)),
        "ordinary_drop_points": drop(pruned, before, total),
        "recovered_by_search": searches["pruned, from 6 captions"][0] / len(CAPTIONS),
        **{f"detection_{k}": v for k, v in detected["figures"].items() if k not in ("auc", "tpr_at_1_fpr")},
        **cost,
    }
    print(json.dumps({"figures": figures}))


if __name__ == "__main__":
    main()
