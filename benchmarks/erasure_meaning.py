"""Erasure that opens by meaning, beside words, on both demo models: synonyms, held-out wording, what stays.

UCE with the automatic captions, as Erase Concepts (Expert) makes it, opened for a prompt by its words (facilitated
transport) or by its meaning, with the other values of the attribute preserved and without; and for the star the adapter
on layers that benchmarks/training_dit.py trains quickly, on the bare word and nothing kept. Counted are pictures of the
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
from membrane.benchmarks import training_dit
from membrane.benchmarks.erasure_quality import ROOT, TASKS, start, write
from membrane.benchmarks.erasure_wording import MODELS, Painter, measure, sets_of, tables
from membrane.tools.pixel_world import classifier, world
from membrane.tools.pixel_world.styles import IN_STYLE, styles_of

EACH, SYNONYMS = 3, 24  # pictures of a style, and with synonyms
SYNONYM = "synonym"
RAN = ("1 shape", "4 shapes")
UNERASED = "unerased"
ROWS = {  # name: (permeability, whether the other values are preserved)
    "by meaning": ("meaning", True),
    "by meaning, nothing preserved": ("meaning", False),
    "by words": ("facilitated transport", True),
}
TRAINED = {"trained, by meaning": "meaning", "trained, by words": "facilitated transport"}
TRAINED_FOR, CONCEPT = "1 shape", "star"


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


def trained(painter, variant, permeability):
    """The MODEL with the adapter on layers that bench training_dit trains for the star, made now where it is missing.

    Its probes are fitted when it is trained or, of a file without them, when it is applied: to the same texts.
    """
    from membrane.core.formats import native

    training_dit.cost_of(variant, training_dit.QUICK, CONCEPT)
    adapter = native.load(str(training_dit.file_of(variant, training_dit.QUICK, CONCEPT)))
    stack = painter.node("MembraneStack", adapter=adapter, permeability=permeability)[0]
    return painter.node("MembraneApply", model=painter.model, clip=painter.clip, stack=stack)[0]


def row_of(painter, judge, sets, model):
    """{count: [pictures, of how many]} of a MODEL, None for the unerased one."""
    gone, rest = sets
    of_gone, of_rest = (part.pictures(painter, model) for part in sets)
    left, kept = (part.right(judge, pictures) for part, pictures in ((gone, of_gone), (rest, of_rest)))
    same = (of_rest == rest.pictures(painter)).all(axis=(1, 2, 3))
    synonym = gone.styles == SYNONYM
    found = {"left": left[~synonym], "left, synonyms": left[synonym], "kept": kept, "bit-identical": same}
    return {name: [int(seen.sum()), len(seen)] for name, seen in found.items()}


def measured(node, variant, store):
    """{task: {row: counts}} of a demo model."""
    judge, sets = classifier.load(), {task: sets_of(task, EACH, EACH, SYNONYMS) for task in RAN}

    def found(painter, task, name):
        if name in TRAINED:
            model = trained(painter, variant, TRAINED[name])
        else:
            model = erased(painter, task, *ROWS[name]) if name in ROWS else None
        return row_of(painter, judge, sets[task], model)

    def say(task, name, done):
        print(f"{variant}, {task}: {line(name, done)}", flush=True)

    wanted = {task: (UNERASED, *ROWS, *(TRAINED if task == TRAINED_FOR else ())) for task in RAN}
    return measure(wanted, store, lambda: Painter(node, variant), found, say)


def harmonic(row, unerased):
    """H, 0 to 100: harmonic mean of the share erased and of what is kept of what the unerased model draws rightly."""
    from membrane.core.measures.scores import harmonic_mean

    left, of = np.add(row["left"], row["left, synonyms"])
    return 100 * harmonic_mean([1 - left / of, min(1.0, row["kept"][0] / unerased["kept"][0])])


def line(name, rows):
    """One row of a table."""
    row = rows[name]
    cells = [f"{seen} / {of}" for seen, of in row.values()]
    h = f"{harmonic(row, rows[UNERASED]):.1f}" if name != UNERASED else "-"
    return "| " + " | ".join([name, *cells, h]) + " |"


HEADER = "| opens | left | left, synonyms | kept | kept, bit-identical | H |\n" + "|---" * 6 + "|"


def styles_counted():
    """The last line of the report."""
    styles = ", ".join(name for name in styles_of("shape") if name not in (IN_STYLE, SYNONYM))
    return f"\nStyles beside the plain caption and synonyms: {styles}.\n"


def figures_of(rows):
    """{figure: percent}, named variant.task.row.count, and H."""
    found = {}
    for variant, tasks in rows.items():
        for task, of_task in tasks.items():
            for name, row in of_task.items():
                key = f"{variant}.{task}.{name}".replace(" ", "_").replace(",", "")
                for count, (seen, of) in row.items():
                    found[f"{key}.{count}_percent".replace(" ", "_").replace(",", "")] = round(100 * seen / of, 2)
                if name != UNERASED:
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
            rows[variant] = measured(node, variant, store)
    finally:
        tidy()
    if len(rows) == len(MODELS):
        title = "# Erasure that opens by meaning or by words, in wording that no caption has"
        text = tables(rows, HEADER, line) + styles_counted()
        write(ROOT / "benchmarks" / "results" / "erasure_meaning.md", f"{title}\n{text}")
    print(json.dumps({"figures": figures_of(rows)}))


if __name__ == "__main__":
    main()
