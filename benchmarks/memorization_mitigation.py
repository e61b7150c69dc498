"""Copies of memorised pictures before and after each mitigation, for captions, other words, and under search.

The demo world's 12 memorised pictures, as in benchmarks/memorization.py; adapters are located from 6 of the captions.
Every located adapter and finished row is kept in output/, so that an interrupted run goes on where it stopped (--fresh
starts anew).

    located, unseen   copies among NOISES pictures of each of those 6 captions, and of the other 6
    recognisable      of both, those that show the memorised picture to the eye: correlation, whatever the contrast
    paraphrases       copies among pictures of all 12 in other words, one noise each
    search            of every other memorised picture, those recognisable in most of SEARCHED noises from text vectors
                      that were searched for with gradients, from the caption on (Kowalczuk et al. 2025): on the network
                      with its weights pruned; where a mitigation acts while sampling, on the network without it, and
                      the pictures are then sampled with it
    ordinary          pictures of held-out combinations that the judge reads right, worst attribute; those that are the
                      same bit by bit; how far they move, mean of all, of 255

--model transformer runs the copies there; the search goes through the U-Net only.
"""

import argparse
import json

import numpy as np
import torch
from membrane.benchmarks import erasure_quality as quality
from membrane.benchmarks import memorization as world_of
from membrane.benchmarks import memorization_detection as detection
from membrane.tools import ROOT
from membrane.tools.host_library import start

world, classifier = quality.world, quality.classifier
CAPTIONS, HALF = world.MEMORISED_CAPTIONS, 6
NOISES, SEARCHED, ORDINARY, BASE = 1, 2, 24, 24  # pictures a caption, noises a search, ordinary ones, base prompts
LOOKED_FOR = range(0, 12, 2)  # the memorised pictures that are searched for
PARAPHRASES = world_of.PARAPHRASES[:1]
WANDA, NEMO, SHIELD = "prune (Wanda), share 0.2", "neurons (NeMo)", "shield, close"
ALIKE = 0.6  # correlation from which two pictures are the same to the eye, whatever their contrast; others reach 0.27


class Here:
    """A variant of the demo model, with the pictures it paints as it is."""

    def __init__(self, node, variant, store):
        self.store, self.node, self.demo = store, node, node("MembraneDemoModel", variant=variant)
        self.scheduler, self.judge = quality.MODELS[variant], classifier.load()
        self.sprites, self.ordinary = detection.ordinary_captions(ORDINARY)
        self.base = world.plain_captions(quality.sprites_of("shape", list(range(8)), 48, 52))[:BASE]
        self.plain = self.paint(self.demo[0], self.ordinary, 5000)

    def paint(self, model, texts, first_seed):
        """Sprites (n, 16, 16, 3) of n captions or CONDITIONINGs, a noise of its own for each."""
        from membrane.core.host.runs.batching import fitting, join
        from membrane.core.host.runs.sampling import Sampling, conditioning, preview_pictures, sample

        settings = Sampling(quality.STEPS, quality.CFG, "euler", self.scheduler, quality.SIZE, quality.SIZE)
        pictures = [None] * len(texts)
        with torch.inference_mode():
            known = {text: conditioning(self.demo[1], text) for text in ("", *texts) if isinstance(text, str)}
            given = [known[text] if isinstance(text, str) else text for text in texts]
            for rows in fitting(given):
                for part in (rows[i : i + 32] for i in range(0, len(rows), 32)):
                    seeds = [first_seed + i for i in part]
                    latents = sample(model, join([given[i] for i in part]), known[""], seeds, settings)
                    for i, picture in zip(part, preview_pictures(model, latents)):
                        pictures[i] = picture
        return torch.stack(pictures).numpy()

    def copies(self, model, texts, own, first_seed):
        """(copies, recognisable ones) among pictures of texts, of the memorised pictures own (numbers)."""
        pictures = self.paint(model, texts, first_seed)
        return int(detection.copies(pictures, np.asarray(own)).sum()), int(recognisable(pictures, own).sum())

    def row(self, model, contexts=None):
        """The counts of one model; contexts: text vectors that were searched for, for each memorised picture."""
        number = np.arange(len(CAPTIONS)).repeat(NOISES)
        texts, cut = [caption for caption in CAPTIONS for _ in range(NOISES)], HALF * NOISES
        paraphrases = [form.format(c) for c in CAPTIONS for form in PARAPHRASES]
        located = self.copies(model, texts[:cut], number[:cut], 100)
        unseen = self.copies(model, texts[cut:], number[cut:], 100 + cut)
        others = self.copies(model, paraphrases, np.arange(len(CAPTIONS)).repeat(len(PARAPHRASES)), 300)
        ordinary = self.paint(model, self.ordinary, 5000)
        answers = classifier.read(self.judge, ordinary)
        same = (ordinary == self.plain).reshape(len(ordinary), -1).all(axis=1)
        return {
            "located": located[0],
            "unseen": unseen[0],
            "of": cut,
            "paraphrases": others[0],
            "recognisable": located[1] + unseen[1],
            "paraphrases_of": len(paraphrases),
            "search": None if contexts is None else self.recovered(model, contexts),
            "right": min(int((answers[a] == getattr(self.sprites, a)).sum()) for a in world.ATTRIBUTES),
            "same": int(same.sum()),
            "ordinary_of": len(ordinary),
            "moved": float(np.abs(ordinary - self.plain).mean() * 255),
        }

    def recovered(self, model, contexts):
        """Of the memorised pictures that were searched for, those that are recognisable in most noises."""
        texts = [[[context, {}]] for context in contexts for _ in range(SEARCHED)]
        found = recognisable(self.paint(model, texts, 9), np.repeat(LOOKED_FOR, SEARCHED)).reshape(-1, SEARCHED)
        return int((2 * found.sum(axis=1) > SEARCHED).sum())

    def located(self, name, **settings):
        """{model, masks} of the locating node from the first captions; located only once."""
        from membrane.core.formats import native

        file = self.store.with_name(f"{self.store.stem}_{name}.safetensors")
        if file.is_file():
            return self.applied(native.load(str(file)))
        adapter = self.node(
            "MembraneLocateMemorization", model=self.demo[0], clip=self.demo[1], prompts="\n".join(CAPTIONS[:HALF]),
            sampler_name="euler", scheduler=self.scheduler, width=quality.SIZE, height=quality.SIZE,
            seed=0, cfg=quality.CFG, **settings,
        )[0]  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        native.save(adapter, str(file))
        return self.applied(adapter)

    def applied(self, adapter):
        """{model, masks} of a located adapter."""
        stack = self.node("MembraneStack", adapter=adapter, permeability="fixed")[0]
        model = self.node("MembraneApply", model=self.demo[0], clip=self.demo[1], stack=stack)[0]
        return {"model": model, "masks": adapter.masks}

    def wanda(self):
        """Pruned as benchmarks/memorization.py found best on this network."""
        base = "\n".join(self.base[:HALF])
        return self.located("wanda", method=world_of.WANDA, base_prompts=base, steps=quality.STEPS, **world_of.OURS)

    def nemo(self):
        """Neurons, with the steps at which detection tells this network's memorised captions."""
        base = "\n".join(self.base)
        return self.located(
            "nemo", method=NEMO, base_prompts=base, sparsity=0.01, steps=10, first_steps=5, batch_size=24
        )

    def shielded(self):
        """The model with all memorised pictures protected, close."""
        sprites = torch.from_numpy(world.memorised_pictures())
        large = sprites.repeat_interleave(8, 1).repeat_interleave(8, 2)
        return {"model": self.node("MembraneShield", model=self.demo[0], pictures=large, vae=self.demo[2])[0]}

    def held_back(self, method):
        """A function that gives the model with a mitigation of the mitigating node."""
        return lambda: {"model": self.node("MembraneMitigateMemorization", model=self.demo[0], method=method)[0]}

    def methods(self, variant):
        """{name: function that gives {model, masks}}."""
        found = {"none": lambda: {"model": self.demo[0]}, WANDA: self.wanda, SHIELD: self.shielded}
        if variant == "transformer":  # which has no cross-attention
            return found
        return found | {NEMO: self.nemo} | {method: self.held_back(method) for method in detection.METHODS}


def recognisable(pictures, own):
    """Which pictures (n, 16, 16, 3) show the memorised pictures own (n,): by the correlation of all pixels, channel
    means left out, which a change of contrast leaves as it is and copies() calls another picture."""
    a, b = (x - x.mean((1, 2), keepdims=True) for x in (pictures, world.memorised_pictures()[own]))
    return (a * b).sum((1, 2, 3)) / np.sqrt((a**2).sum((1, 2, 3)) * (b**2).sum((1, 2, 3))) > ALIKE


class Searches:
    """Text vectors that bring memorised pictures back, searched for once for each network."""

    def __init__(self):
        self.plain = None

    def __call__(self, masks):
        """[(1, 77, d)] for the memorised pictures on the network with some weights pruned."""
        if masks or self.plain is None:
            attacker, originals = world_of.Attacker(masks or {}), world.memorised_pictures()
            found = [attacker.search(CAPTIONS[i], originals[i]) for i in LOOKED_FOR]
            if masks:
                return found
            self.plain = found
        return self.plain


HEADER = (
    "| mitigation | located | unseen | recognisable | paraphrases | search | ordinary right | the same bit by bit "
    "| moved, of 255 |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def line(name, row):
    search = "-" if row["search"] is None else f"{row['search']} / {len(LOOKED_FOR)}"
    cells = [
        name, f"{row['located']} / {row['of']}", f"{row['unseen']} / {row['of']}",
        f"{row['recognisable']} / {2 * row['of']}",
        f"{row['paraphrases']} / {row['paraphrases_of']}", search, f"{row['right']} / {row['ordinary_of']}",
        f"{row['same']} / {row['ordinary_of']}", f"{row['moved']:.2f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def measure(node, variant, store, say, chosen=None):
    """{mitigation: row}; rows that the file `store` holds are not measured again."""
    rows = json.loads(store.read_text(encoding="utf-8")) if store.is_file() else {}
    here, searches = Here(node, variant, store), Searches()
    say(HEADER)
    for name, make in here.methods(variant).items():
        if chosen and name not in chosen:
            continue
        if name not in rows:
            found = make()
            contexts = None if variant == "transformer" else searches(found.get("masks"))
            rows[name] = here.row(found["model"], contexts)
            quality.write(store, json.dumps(rows, indent=1) + "\n")
        say(line(name, rows[name]))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few pictures, to see that it runs")
    parser.add_argument("--fresh", action="store_true", help="measure every row again")
    parser.add_argument("--model", choices=quality.MODELS, default="day", help="variant of the demo model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    suffix = f"_{args.model}" * (args.model != "day")
    store = ROOT / "output" / f"memorization_mitigation{suffix}{'_quick' * args.quick}.json"
    if args.fresh or args.quick:
        for file in store.parent.glob(f"{store.stem}*"):
            file.unlink()
    if args.quick:
        globals().update(NOISES=1, SEARCHED=1, ORDINARY=8)
        world_of.SEARCH_STEPS = 1
    node, tidy = start()
    try:
        chosen = ("none", WANDA) if args.quick else None
        rows = measure(node, args.model, store, lambda text: print(text, flush=True), chosen)
    finally:
        tidy()
    if not args.quick:
        title = "# Mitigation of memorised pictures" + ", on the transformer" * (args.model != "day")
        text = "\n".join([HEADER, *(line(name, row) for name, row in rows.items())])
        file = ROOT / "benchmarks" / "results" / f"memorization_mitigation{suffix}.md"
        quality.write(file, f"{title}\n\n`python3 run.py bench memorization_mitigation`\n\n{text}\n")
    figures = {}
    for name, row in rows.items():
        key = "".join(c if c.isalnum() else "_" for c in name.lower())
        figures |= {f"{key}.{what}": value for what, value in row.items() if not what.endswith("of")}
    print(json.dumps({"figures": {name: value for name, value in figures.items() if value is not None}}))


if __name__ == "__main__":
    main()
