"""Copies of memorised pictures before and after each mitigation, for captions, other words, and under search.

The demo world's 12 memorised pictures, as in benchmarks/memorization.py; adapters are located and trained from 6 of the
captions, all by the pack's own nodes. Adapters and finished rows are kept in output/, so that an interrupted run goes
on where it stopped (--fresh starts anew).

    located, unseen   copies among NOISES pictures of each of those 6 captions, and of the other 6
    recognisable      of both, those that show the memorised picture to the eye: correlation, whatever the contrast
    paraphrases       copies among pictures of all 12 in other words, FORMS wordings each
    search            of every third memorised picture, those recognisable in most of SEARCHED noises from text vectors
                      that were searched for with gradients, from the caption on (Kowalczuk et al. 2025), through all
                      that acts on the weights and while sampling; what acts on the text does so on what was found
    ordinary          pictures of held-out combinations that the judge reads right, worst attribute; points lost; those
                      that are the same bit by bit; how far they move, mean of all, of 255
    once, a prompt,   seconds of processor time: to make the mitigation, what each new prompt takes before sampling
    a picture         (mean of the 12 captions), and sampling

Without --model and --rows all mitigations are measured on both variants of the demo model. The table that is written is
of all rows that are kept. The transformer has no cross-attention, for neurons and re-weighted tokens.
"""

import argparse
import json
import re
import time

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
FORMS = 1  # wordings of each caption
LOOKED_FOR = range(0, 12, 3)  # the memorised pictures that are searched for
SEARCH_STEPS, SEARCH_RATE = 50, 0.1  # Adam's, in root mean squares of the text vectors
SOFTENED = 5  # ordinary prompts that softening knows
TRAINED = {"steps": 200, "learning_rate": 3e-3, "rank": 4, "anchoring": 10.0, "warmup": 20, "cycles": 1}
NEUTRAL = "a drawing"  # what training draws a memorised caption to
WANDA, NEMO, SHIELD = "prune (Wanda), share 0.2", "neurons (NeMo)", "shield, close"
SOFTEN, TRAIN = "soften the prompt", "adversarial training"
NONE, PRUNED_SHIELD, PRUNED_SOFTEN = "none", "prune (Wanda) and shield", "prune (Wanda) and soften"
OF_CROSS_ATTENTION = (NEMO, "token re-weighting")
ORDER = (NONE, WANDA, NEMO, TRAIN, SOFTEN, SHIELD, PRUNED_SOFTEN, PRUNED_SHIELD, *detection.METHODS)  # of the table
ALIKE = 0.6  # correlation from which two pictures are the same to the eye, whatever their contrast; others reach 0.27


class Mitigated:
    """A mitigation: the MODEL that it samples with, and what it does to a text before.

    acts: the name of what acts on the weights and while sampling, under which its searches are kept. text: CONDITIONING
    -> CONDITIONING. once: seconds that it took to make. What texts and pictures take is kept, a number of seconds each.
    """

    def __init__(self, model, acts="plain", text=None, once=0.0):
        self.model, self.acts, self.text, self.once = model, acts, text, once
        self.text_seconds, self.picture_seconds = [], []

    def softened(self, text):
        """What a text becomes."""
        if self.text is None:
            return text
        begin = time.process_time()
        text = self.text(text)
        self.text_seconds.append(time.process_time() - begin)
        return text


class Here:
    """A variant of the demo model, with the pictures it paints as it is."""

    def __init__(self, node, variant, store):
        self.store, self.node, self.demo = store, node, node("MembraneDemoModel", variant=variant)
        self.scheduler, self.judge, self.known = quality.MODELS[variant], classifier.load(), {}
        self.sprites, self.ordinary = detection.ordinary_captions(ORDINARY)
        self.base = world.plain_captions(quality.sprites_of("shape", list(range(8)), 48, 52))[:BASE]
        sprites = torch.from_numpy(world.memorised_pictures())
        self.large = sprites.repeat_interleave(8, 1).repeat_interleave(8, 2)
        self.plain = self.paint(Mitigated(self.demo[0]), self.ordinary, 5000)

    def encoded(self, text):
        """The CONDITIONING of a text."""
        from membrane.core.host.runs.sampling import conditioning

        if text not in self.known:
            with torch.inference_mode():
                self.known[text] = conditioning(self.demo[1], text)
        return self.known[text]

    def paint(self, found, texts, first_seed, noises=1):
        """Sprites (n * noises, 16, 16, 3) of n captions or CONDITIONINGs, each picture from a noise of its own."""
        from membrane.core.host.runs.batching import fitting, join
        from membrane.core.host.runs.sampling import Sampling, preview_pictures, sample

        settings = Sampling(quality.STEPS, quality.CFG, "euler", self.scheduler, quality.SIZE, quality.SIZE)
        with torch.inference_mode():
            given = [self.encoded(text) if isinstance(text, str) else text for text in texts]
            given = [text for one in given for text in [found.softened(one)] * noises]
            pictures = [None] * len(given)
            for rows in fitting(given):
                for part in (rows[i : i + 32] for i in range(0, len(rows), 32)):
                    seeds, texts = [first_seed + i for i in part], join([given[i] for i in part])
                    begin = time.process_time()
                    latents = sample(found.model, texts, self.encoded(""), seeds, settings)
                    found.picture_seconds += [(time.process_time() - begin) / len(part)] * len(part)
                    for i, picture in zip(part, preview_pictures(found.model, latents)):
                        pictures[i] = picture
        return torch.stack(pictures).numpy()

    def copies(self, found, texts, own, first_seed, noises=1):
        """(copies, recognisable ones) among pictures of texts, of the memorised pictures own (numbers)."""
        pictures, own = self.paint(found, texts, first_seed, noises), np.repeat(own, noises)
        return int(detection.copies(pictures, own).sum()), int(recognisable(pictures, own).sum())

    def row(self, found, contexts):
        """The counts of one mitigation; contexts: CONDITIONINGs that were searched for."""
        number, cut = np.arange(len(CAPTIONS)), HALF * NOISES
        forms = [form.format(c) for c in CAPTIONS for form in world_of.PARAPHRASES[:FORMS]]
        located = self.copies(found, CAPTIONS[:HALF], number[:HALF], 100, NOISES)
        unseen = self.copies(found, CAPTIONS[HALF:], number[HALF:], 100 + cut, NOISES)
        seconds = np.mean(found.text_seconds or [0.0])
        ordinary = self.paint(found, self.ordinary, 5000)
        answers = classifier.read(self.judge, ordinary)
        same = (ordinary == self.plain).reshape(len(ordinary), -1).all(axis=1)
        return {
            "located": located[0],
            "unseen": unseen[0],
            "of": cut,
            "paraphrases": self.copies(found, forms, number.repeat(FORMS), 300)[0],
            "recognisable": located[1] + unseen[1],
            "paraphrases_of": len(forms),
            "search": self.recovered(found, contexts),
            "search_of": len(LOOKED_FOR),
            "right": min(int((answers[a] == getattr(self.sprites, a)).sum()) for a in world.ATTRIBUTES),
            "same": int(same.sum()),
            "ordinary_of": len(ordinary),
            "moved": float(np.abs(ordinary - self.plain).mean() * 255),
            "seconds_once": round(found.once, 1),
            "seconds_a_prompt": round(float(seconds), 2),
            "seconds_a_picture": round(float(np.mean(found.picture_seconds)), 3),
        }

    def recovered(self, found, contexts):
        """Of the memorised pictures that were searched for, those that are recognisable in most noises."""
        pictures = self.paint(found, contexts, 9, SEARCHED)
        shown = recognisable(pictures, np.repeat(LOOKED_FOR, SEARCHED)).reshape(-1, SEARCHED)
        return int((2 * shown.sum(axis=1) > SEARCHED).sum())

    def searched(self, found):
        """[CONDITIONING] for the memorised pictures that are looked for, searched for from the captions on the model
        of a Mitigated; kept in a file of output/."""
        file = self.store.with_name(f"{self.store.stem}_searched_{found.acts}.pt")
        if not file.is_file():
            contexts = self._searched(found.model)
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save([vectors.clone() for ((vectors, _),) in contexts], file)
        return [
            [[vectors, self.encoded(CAPTIONS[i])[0][1]]]
            for i, vectors in zip(LOOKED_FOR, torch.load(file, weights_only=True))
        ]

    def _searched(self, model):
        from membrane.core.host.runs.gradients import searched_text
        from membrane.core.measures.attack import Descent, size_of

        clean = self.node("VAEEncode", pixels=self.large, vae=self.demo[2])[0]["samples"]
        descent, found = Descent(SEARCH_STEPS, SEARCH_RATE), []
        for i in LOOKED_FOR:
            begin = self.encoded(CAPTIONS[i])
            rate = descent.rate * size_of(begin[0][0])
            found.append(searched_text(model, begin, clean[i : i + 1], descent, rate, 11))
        return found

    # ------------------------------------------------------------ the mitigations

    def adapter(self, name):
        """The adapter of a name: wanda, neurons or trained; made once and kept in a file of output/."""
        from membrane.core.formats import native

        file = self.store.with_name(f"{self.store.stem}_{name}.safetensors")
        if not file.is_file():
            begin = time.process_time()
            adapter = getattr(self, f"_{name}")()
            adapter.card.settings["process_seconds"] = round(time.process_time() - begin, 1)
            file.parent.mkdir(parents=True, exist_ok=True)
            native.save(adapter, str(file))
        return native.load(str(file))

    def applied(self, name):
        """Mitigated by the adapter of a name."""
        adapter = self.adapter(name)
        stack = self.node("MembraneStack", adapter=adapter, permeability="fixed")[0]
        model = self.node("MembraneApply", model=self.demo[0], clip=self.demo[1], stack=stack)[0]
        return Mitigated(model, name, once=adapter.card.settings["process_seconds"])

    def _located(self, **settings):
        """The adapter of the locating node from the first captions."""
        return self.node(
            "MembraneLocateMemorization", model=self.demo[0], clip=self.demo[1], prompts="\n".join(CAPTIONS[:HALF]),
            sampler_name="euler", scheduler=self.scheduler, width=quality.SIZE, height=quality.SIZE,
            seed=0, cfg=quality.CFG, **settings,
        )[0]  # fmt: skip

    def _wanda(self):
        """Pruned as benchmarks/memorization.py found best on this network."""
        base = "\n".join(self.base[:HALF])
        return self._located(method=world_of.WANDA, base_prompts=base, steps=quality.STEPS, **world_of.OURS)

    def _neurons(self):
        """Neurons, with the steps at which detection tells this network's memorised captions."""
        base = "\n".join(self.base)
        return self._located(method=NEMO, base_prompts=base, sparsity=0.01, steps=10, first_steps=5, batch_size=24)

    def _trained(self):
        """Adversarial training: the captions are drawn to a neutral one, and so are the text vectors that are searched
        for while it trains."""
        return self.node(
            "MembraneTrain", model=self.demo[0], clip=self.demo[1], concepts="\n".join(CAPTIONS[:HALF]),
            surrogate=NEUTRAL, objective="adversarial", preserve="\n".join(self.base), width=quality.SIZE,
            height=quality.SIZE, rollout_steps=10, timestep="matching", preview_every=0, save_every=10**5,
            filename_prefix="memorised", **TRAINED,
        )[0]  # fmt: skip

    def shielded(self, model):
        """A MODEL with all memorised pictures protected, close."""
        return self.node("MembraneShield", model=model, pictures=self.large, vae=self.demo[2])[0]

    def softened(self, model):
        """What softens a text on a MODEL until it pulls as ordinary prompts do."""

        def soften(text):
            return self.node(
                "MembraneSoftenPrompt", model=model, positive=text, negative=self.encoded(""), clip=self.demo[1],
                ordinary_prompts="\n".join(self.base[:SOFTENED]), cfg=quality.CFG, scheduler=self.scheduler,
                width=quality.SIZE, height=quality.SIZE,
            )[0]  # fmt: skip

        return soften

    def held_back(self, method):
        """A function that gives the mitigating node's way of holding pictures back."""
        acts = re.sub("[^a-z]+", "_", method.lower())
        return lambda: Mitigated(self.node("MembraneMitigateMemorization", model=self.demo[0], method=method)[0], acts)

    def pruned_and_shielded(self):
        pruned = self.applied("wanda")
        return Mitigated(self.shielded(pruned.model), "wanda_shield", once=pruned.once)

    def pruned_and_softened(self):
        pruned = self.applied("wanda")
        return Mitigated(pruned.model, "wanda", self.softened(pruned.model), pruned.once)

    def methods(self, variant):
        """{name: function that gives a Mitigated}."""
        demo = self.demo[0]
        found = {
            NONE: lambda: Mitigated(demo),
            WANDA: lambda: self.applied("wanda"),
            NEMO: lambda: self.applied("neurons"),
            TRAIN: lambda: self.applied("trained"),
            SOFTEN: lambda: Mitigated(demo, text=self.softened(demo)),
            SHIELD: lambda: Mitigated(self.shielded(demo), "shield"),
            PRUNED_SOFTEN: self.pruned_and_softened,
            PRUNED_SHIELD: self.pruned_and_shielded,
            **{method: self.held_back(method) for method in detection.METHODS},
        }
        return {name: make for name, make in found.items() if variant == "day" or name not in OF_CROSS_ATTENTION}


def recognisable(pictures, own):
    """Which pictures (n, 16, 16, 3) show the memorised pictures own (n,): by the correlation of all pixels, channel
    means left out, which a change of contrast leaves as it is and copies() calls another picture."""
    a, b = (x - x.mean((1, 2), keepdims=True) for x in (pictures, world.memorised_pictures()[own]))
    return (a * b).sum((1, 2, 3)) / np.sqrt((a**2).sum((1, 2, 3)) * (b**2).sum((1, 2, 3))) > ALIKE


HEADER = (
    "| mitigation | located | unseen | recognisable | paraphrases | search | ordinary right | points lost "
    "| the same bit by bit | moved, of 255 | once, s | a prompt, s | a picture, s |\n" + "|---" * 13 + "|"
)


def points_lost(row):
    """Ordinary pictures that the judge reads wrong, in points; it reads all of the unchanged models' right."""
    return 100 * (1 - row["right"] / row["ordinary_of"])


def line(name, row):
    cells = [
        name, f"{row['located']} / {row['of']}", f"{row['unseen']} / {row['of']}",
        f"{row['recognisable']} / {2 * row['of']}", f"{row['paraphrases']} / {row['paraphrases_of']}",
        f"{row['search']} / {row['search_of']}", f"{row['right']} / {row['ordinary_of']}", f"{points_lost(row):.1f}",
        f"{row['same']} / {row['ordinary_of']}", f"{row['moved']:.2f}", f"{row['seconds_once']:g}",
        f"{row['seconds_a_prompt']:g}", f"{row['seconds_a_picture']:.2f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def measure(node, variant, store, say, chosen=None):
    """{mitigation: row}; rows that the file `store` holds are not measured again."""
    here, rows = Here(node, variant, store), quality.kept_rows(store)
    say(HEADER)
    for name, make in here.methods(variant).items():
        if chosen is not None and name not in chosen:
            continue
        if name not in rows:
            found = make()
            row = here.row(found, here.searched(found))
            rows = quality.kept_rows(store) | {name: row}  # another run may have kept one meanwhile
            quality.write(store, json.dumps(rows, indent=1) + "\n")
        say(line(name, rows[name]))


def kept_tables(folder):
    """{variant: {mitigation: row}} of all rows that are kept in a folder, in the order of ORDER."""
    kept = {
        variant: quality.kept_rows(folder / f"memorization_mitigation_{variant}.json") for variant in quality.MODELS
    }
    return {variant: {name: rows[name] for name in ORDER if name in rows} for variant, rows in kept.items() if rows}


def report(tables):
    """The rows of the variants as Markdown."""
    parts = ["# Mitigation of memorised pictures", "`python3 run.py bench memorization_mitigation`"]
    for variant, rows in tables.items():
        parts += [f"## {variant}", "\n".join([HEADER, *(line(name, row) for name, row in rows.items())])]
    return "\n\n".join(parts) + "\n"


def figures_of(tables):
    """{figure: number}, named variant.mitigation.what."""
    return {
        f"{variant}.{''.join(c if c.isalnum() else '_' for c in name.lower())}.{what}": value
        for variant, rows in tables.items()
        for name, row in rows.items()
        for what, value in row.items()
        if what != "of" and not what.endswith("_of") and value is not None
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few pictures, to see that it runs")
    parser.add_argument("--fresh", action="store_true", help="measure every row again")
    parser.add_argument("--model", choices=quality.MODELS, help="one variant of the demo model")
    parser.add_argument("--rows", nargs="*", choices=ORDER, help="only these mitigations")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = args.rows
    if args.quick:
        globals().update(NOISES=1, SEARCHED=1, ORDINARY=8, FORMS=1, SEARCH_STEPS=1)
        chosen = chosen or (NONE, WANDA)
    node, tidy = start()
    try:
        for variant in [args.model] if args.model else quality.MODELS:
            store = ROOT / "output" / f"memorization_mitigation_{variant}{'_quick' * args.quick}.json"
            if args.fresh or args.quick:
                for file in store.parent.glob(f"{store.stem}*"):
                    file.unlink()
            measure(node, variant, store, lambda text: print(text, flush=True), chosen)
    finally:
        tidy()
    tables = kept_tables(ROOT / "output")
    if not args.quick:
        quality.write(ROOT / "benchmarks" / "results" / "memorization_mitigation.md", report(tables))
    print(json.dumps({"figures": figures_of(tables)}))


if __name__ == "__main__":
    main()
