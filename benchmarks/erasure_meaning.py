"""Closed-form erasure that opens by meaning, beside words, on both demo models: synonyms, held-out wording, what stays.

UCE with the automatic captions, as Erase Concepts (Expert) makes it, opened for a prompt by its words (facilitated
transport) or by its meaning, with the other values of the attribute preserved and without. Counted are pictures of the
erased concepts in which the judge still sees them, in the styles of benchmarks/erasure_wording.py (none of which is a
caption) and with synonyms, and pictures of the other values that the judge reads right and that are bit-identical to
the unerased model's.

6 steps without guidance; a share of 24 pictures is known to about 10 points. Finished rows are kept in
output/erasure_meaning_MODEL.json; --fresh starts anew.
"""

import argparse
import json

import numpy as np
import torch
from membrane.benchmarks.erasure_quality import ROOT, TASKS, sprites_of, start, write
from membrane.benchmarks.erasure_wording import MODELS, Painter
from membrane.tools.pixel_world import classifier, world
from membrane.tools.pixel_world.styles import IN_STYLE, captions_in, styles_of

EACH, SYNONYMS = 3, 24  # pictures of a style, and with synonyms
SYNONYM = "synonym"
RAN = ("1 shape", "4 shapes")
UNERASED = "unerased"
ROWS = {  # name: (permeability, whether the other values are preserved)
    "by meaning": ("meaning", True),
    "by meaning, nothing preserved": ("meaning", False),
    "by words": ("facilitated transport", True),
}


class Prompts:
    """Prompts in all styles with some values of an attribute."""

    def __init__(self, attribute, values, seed):
        self.attribute, self.seed = attribute, seed
        self.texts, styles, truth = [], [], []
        for i, style in enumerate(styles_of(attribute)):
            count = SYNONYMS if style == SYNONYM else EACH
            sprites = sprites_of(attribute, np.roll(values, -3 * i), count, seed + i)
            self.texts += captions_in(style, attribute, sprites)
            styles += [style] * count
            truth.append(getattr(sprites, attribute))
        self.truth, self.synonym = np.concatenate(truth), np.array(styles) == SYNONYM
        self.plain = None

    def paint(self, painter, model=None):
        """Sprites of all prompts; those of the unerased model are painted once."""
        if model is not None:
            return painter.paint(self.texts, self.seed, model)
        if self.plain is None:
            self.plain = painter.paint(self.texts, self.seed)
        return self.plain

    def right(self, judge, pictures):
        """Whether the judge sees the prompt's value in each picture."""
        return classifier.read(judge, pictures)[self.attribute] == self.truth


def erased(painter, task, permeability, preserved):
    """The MODEL of one row."""
    attribute, pairs = TASKS[task]
    concepts = [concept for concept, _ in pairs]
    rest = [name for name in world.NAMES[attribute] if name not in concepts] if preserved else []
    adapter = painter.node(
        "MembraneErase", model=painter.model, clip=painter.clip, concepts="\n".join(map(" -> ".join, pairs)),
        preserve="\n".join(rest), replace_with="",
    )[1]  # fmt: skip
    stack = painter.node("MembraneStack", adapter=adapter, permeability=permeability)[0]
    return painter.node("MembraneApply", model=painter.model, clip=painter.clip, stack=stack)[0]


def row_of(painter, judge, gone, rest, model):
    """{count: [pictures, of how many]} of a MODEL, None for the unerased one."""
    of_gone, of_rest = gone.paint(painter, model), rest.paint(painter, model)
    left, kept = gone.right(judge, of_gone), rest.right(judge, of_rest)
    same = (of_rest == rest.paint(painter)).all(axis=(1, 2, 3))
    found = {"left": left[~gone.synonym], "left, synonyms": left[gone.synonym], "kept": kept, "bit-identical": same}
    return {name: [int(seen.sum()), len(seen)] for name, seen in found.items()}


def measure(node, variant, store, say=print):
    """{task: {row: counts}} of a demo model."""
    rows = json.loads(store.read_text(encoding="utf-8")) if store.is_file() else {}
    judge, painter = classifier.load(), Painter(node, variant)
    for task in RAN:
        attribute, pairs = TASKS[task]
        names = world.NAMES[attribute]
        values = [names.index(concept) for concept, _ in pairs]
        gone = Prompts(attribute, values, 1031)
        rest = Prompts(attribute, [i for i in range(len(names)) if i not in values], 5032)
        done = rows.setdefault(task, {})
        for name in (UNERASED, *ROWS):
            if name not in done:
                model = erased(painter, task, *ROWS[name]) if name in ROWS else None
                done[name] = row_of(painter, judge, gone, rest, model)
                write(store, json.dumps(rows, indent=1) + "\n")
                say(f"{variant}, {task}: {line(name, done)}")
    return {task: {name: rows[task][name] for name in (UNERASED, *ROWS)} for task in RAN}


def harmonic(row, unerased):
    """H, 0 to 100: harmonic mean of the share erased and of what is kept of what the unerased model draws rightly."""
    from membrane.core.measures.scores import harmonic_mean

    left, of = np.add(row["left"], row["left, synonyms"])
    return 100 * harmonic_mean([1 - left / of, min(1.0, row["kept"][0] / unerased["kept"][0])])


def line(name, rows):
    """One row of a table."""
    row = rows[name]
    cells = [f"{seen} / {of}" for seen, of in row.values()]
    h = f"{harmonic(row, rows[UNERASED]):.1f}" if name in ROWS else "-"
    return "| " + " | ".join([name, *cells, h]) + " |"


HEADER = "| opens | left | left, synonyms | kept | kept, bit-identical | H |\n" + "|---" * 6 + "|"


def report(rows):
    """All tables as Markdown."""
    parts = []
    for variant, tasks in rows.items():
        for task, found in tasks.items():
            pairs = ", ".join(" -> ".join(pair) for pair in TASKS[task][1])
            parts += [f"\n## {variant}, {task}: {pairs}\n", HEADER, *(line(name, found) for name in found)]
    styles = ", ".join(name for name in styles_of("shape") if name not in (IN_STYLE, SYNONYM))
    parts.append(f"\nStyles beside the plain caption and synonyms: {styles}.")
    return "\n".join(parts) + "\n"


def figures_of(rows):
    """{figure: percent}, named variant.task.row.count, and H."""
    found = {}
    for variant, tasks in rows.items():
        for task, of_task in tasks.items():
            for name, row in of_task.items():
                key = f"{variant}.{task}.{name}".replace(" ", "_").replace(",", "")
                for count, (seen, of) in row.items():
                    found[f"{key}.{count}_percent".replace(" ", "_").replace(",", "")] = round(100 * seen / of, 2)
                if name in ROWS:
                    found[f"{key}.harmonic"] = round(harmonic(row, of_task[UNERASED]), 2)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="measure every row again")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    torch.set_num_threads(1)  # two spinning threads on busy cores are slower than one
    rows = {}
    node, tidy = start()
    try:
        for variant in args.models:
            store = ROOT / "output" / f"erasure_meaning_{variant}.json"
            if args.fresh:
                store.unlink(missing_ok=True)
            rows[variant] = measure(node, variant, store, lambda text: print(text, flush=True))
    finally:
        tidy()
    if len(rows) == len(MODELS):
        title = "# Closed-form erasure that opens by meaning or by words, in wording that no caption has"
        write(ROOT / "benchmarks" / "results" / "erasure_meaning.md", f"{title}\n{report(rows)}")
    print(json.dumps({"figures": figures_of(rows)}))


if __name__ == "__main__":
    main()
