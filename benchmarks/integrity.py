"""Integrity at equal erasure: how much of what is kept stays the frozen model's, for closed form and trained erasures.

The star is erased in favour of the circle, with the pack's own nodes. Each method's adapter is then taken at the least
of STRENGTHS at which the judge sees the star in at most ALLOWED of the pictures with it, so that all of them erase
alike; what never gets there is listed at its best strength. Integrity (Schioppa et al. 2024; the scale is ours) is 1
for an untouched model (the floor: the row "none" measures it) and 0 for pictures as different as those from another
noise (the ceiling): RMS of pixels over the pictures of the seven other shapes, same noise, against the unerased model's
own pictures from another noise.

All trained adapters have rank 1 and the same steps, learning rate, captions and kept prompts; anchoring is the weight
of what is kept. --model transformer runs it there.
"""

import argparse
import json
import random

import numpy as np
import torch
from membrane.benchmarks import erasure_quality as quality
from membrane.benchmarks.training import captions
from membrane.tools import ROOT
from membrane.tools.host_library import start

world, classifier = quality.world, quality.classifier
CONCEPT, SURROGATE, ATTRIBUTE = "star", "circle", "shape"
STRENGTHS, ALLOWED = (0.5, 1.0, 1.5, 2.0), 0.05
ERASED, KEPT = 5, 7  # prompts, quality.BATCH pictures each
STEPS, RATE = 200, 3e-3
TRAINED = {  # name: settings of the training node
    "ESD": {"objective": "esd"},
    "SPM": {"objective": "spm", "anchoring": 10.0},
    "weighted sum": {"objective": "weighted sum", "anchoring": 10.0},
    "projected gradient": {"objective": "projected gradient", "anchoring": 10.0},
}


def uce(node, demo):
    """UCE's adapter, with eight captions."""
    kept = [name for name in world.NAMES[ATTRIBUTE] if name != CONCEPT]
    return node(
        "MembraneErase", model=demo[0], clip=demo[1], concepts=f"{CONCEPT} -> {SURROGATE}", method="UCE",
        preserve="\n".join(kept), templates=quality.captions_like_the_prompts(ATTRIBUTE),
    )[1]  # fmt: skip


def trained(node, demo, settings, steps):
    """A trained adapter; ESD knows no surrogate."""
    rng, others = random.Random(0), [name for name in world.NAMES[ATTRIBUTE] if name != CONCEPT]
    templates = ["{}", "a {}", *captions(ATTRIBUTE, ["{}"] * 14, rng)]
    concept = CONCEPT if settings["objective"] == "esd" else f"{CONCEPT} -> {SURROGATE}"
    return node(
        "MembraneTrain", model=demo[0], clip=demo[1], concepts=concept, steps=steps, learning_rate=RATE,
        warmup=30, cycles=1, width=quality.SIZE, height=quality.SIZE, rollout_steps=10, timestep="matching",
        templates="\n".join(templates), preserve="\n".join([*others, *captions(ATTRIBUTE, others * 3, rng)]),
        preview_every=0, save_every=10**5, filename_prefix="integrity", **settings,
    )[0]  # fmt: skip


class Judged:
    """Pictures of one variant before and after an adapter."""

    def __init__(self, node, variant):
        self.node, self.demo, self.judge = node, node("MembraneDemoModel", variant=variant), classifier.load()
        self.painter = quality.Painter(node, self.demo, quality.MODELS[variant])
        gone = world.NAMES[ATTRIBUTE].index(CONCEPT)
        rest = [i for i in range(8) if i != gone]
        self.sets = [quality.sprites_of(ATTRIBUTE, [gone], ERASED, 31), quality.sprites_of(ATTRIBUTE, rest, KEPT, 32)]
        self.prompts = [world.plain_captions(s) for s in self.sets]
        self.plain = self.painter.paint(self.prompts[1], 5000)
        self.ceiling = rms(self.plain, self.painter.paint(self.prompts[1], 9000))

    def applied(self, adapter, strength):
        """The MODEL with an adapter at a strength."""
        stack = self.node("MembraneStack", adapter=adapter, strength=strength, permeability="fixed")[0]
        return self.node("MembraneApply", model=self.demo[0], clip=self.demo[1], stack=stack)[0]

    def right(self, which, pictures):
        """How many pictures of the erased (0) or the kept prompts (1) the judge takes for what the prompt says."""
        return int(quality.rights(self.judge, pictures, self.sets[which])[ATTRIBUTE].sum())

    def left(self, model):
        """Pictures in which the star is still seen."""
        return self.right(0, self.painter.paint(self.prompts[0], 1000, model=model))

    def row(self, model, strength, left):
        """A row of the table: what a MODEL keeps and its integrity, beside what is left of the star."""
        pictures = self.painter.paint(self.prompts[1], 5000, model=model)
        return {
            "strength": strength, "left": left, "of": ERASED * quality.BATCH, "kept": self.right(1, pictures),
            "kept_of": len(pictures), "integrity": integrity_of(rms(self.plain, pictures), self.ceiling),
        }  # fmt: skip

    def untouched(self):
        """The row of the unerased model."""
        return self.row(self.demo[0], 0.0, self.left(self.demo[0]))

    def erased(self, adapter):
        """The row of the least strength that erases enough, or of the least of those that leave least."""
        best = None
        for strength in STRENGTHS:
            model = self.applied(adapter, strength)
            left = self.left(model)
            if best is None or left < best[2]:
                best = model, strength, left
            if left <= ALLOWED * ERASED * quality.BATCH:
                break
        return self.row(*best)


def rms(a, b):
    """Distances (prompts, noises) of pictures (prompts * noises, ...)."""
    return np.sqrt(((a - b) ** 2).reshape(-1, quality.BATCH, a[0].size).mean(axis=2))


def integrity_of(distances, ceilings):
    """[value, low, high], see membrane.core.measures.retention."""
    from membrane.core.measures.retention import integrity

    found = integrity(distances, ceilings)
    return [round(v, 3) for v in (found.value, found.low, found.high)]


HEADER = "| method | strength | star left | other shapes right | integrity of the others |\n|---|---|---|---|---|"


def line(name, row):
    value, low, high = row["integrity"]
    return (
        f"| {name} | {row['strength']:g} | {row['left']} / {row['of']} | {row['kept']} / {row['kept_of']} "
        f"| {value:.2f} ({low:.2f} to {high:.2f}) |"
    )


def measure(node, variant, store, steps, say):
    """{method: row}; rows that the file `store` holds are not measured again."""
    rows, judged = quality.kept_rows(store), Judged(node, variant)
    say(HEADER)
    methods = {"none": None, "UCE, 8 captions": uce} | {
        name: (lambda node, demo, given=given: trained(node, demo, given, steps)) for name, given in TRAINED.items()
    }
    for name, make in methods.items():
        if name not in rows:
            rows[name] = judged.erased(make(node, judged.demo)) if make else judged.untouched()
            quality.write(store, json.dumps(rows, indent=1) + "\n")
        say(line(name, rows[name]))
    return rows


def table(rows):
    """The rows as Markdown."""
    return "\n".join([HEADER, *(line(name, row) for name, row in rows.items())])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--fresh", action="store_true", help="measure every row again")
    parser.add_argument("--model", choices=quality.MODELS, default="day", help="variant of the demo model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    suffix = f"_{args.model}" * (args.model != "day") + "_quick" * args.quick
    store = ROOT / "output" / f"integrity{suffix}.json"
    if args.fresh or args.quick:
        store.unlink(missing_ok=True)
    if args.quick:
        globals().update(STRENGTHS=(1.0,), TRAINED=dict(list(TRAINED.items())[-1:]), ERASED=1, KEPT=1)
    node, tidy = start()
    try:
        rows = measure(node, args.model, store, 3 if args.quick else STEPS, lambda text: print(text, flush=True))
    finally:
        tidy()
    if not args.quick:
        title = "# Integrity at equal erasure" + ", on the transformer" * (args.model != "day")
        said = f"{title}\n\n`python3 run.py bench integrity`; {STEPS} steps of training, rank 1.\n\n{table(rows)}\n"
        quality.write(ROOT / "benchmarks" / "results" / f"integrity{suffix}.md", said)
    figures = {}
    for name, row in rows.items():
        key = name.replace(", ", "_").replace(" ", "_").lower()
        figures |= {f"{key}.left": row["left"] / row["of"], f"{key}.kept": row["kept"] / row["kept_of"]}
        figures[f"{key}.integrity"] = row["integrity"][0]
    print(json.dumps({"figures": figures}))


if __name__ == "__main__":
    main()
