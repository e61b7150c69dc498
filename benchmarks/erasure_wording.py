"""Closed-form erasure on both demo models, in the style of its captions and in styles that none of them has.

Every row is a method as Erase Concepts (Expert) runs it. Pictures of the erased concept are counted in which the judge
still sees it, and pictures of the other values of the same attribute that the judge reads right, each in the plain
caption (in-style: the captions of the rows "16 captions" are written in it) and in the held-out styles of
tools/pixel_world/styles.py. A style counts where the unerased model is right in 90 % of its pictures.

Rows that open by words (facilitated transport) or by meaning act as far as a prompt asks for it; of them the pictures
of the other values are counted that are bit-identical to the unerased model's. Four shapes at once have the rows of
FEWER alone.

Sizes are small, so that a run takes minutes: 6 steps without guidance, and a share of 32 pictures is known to about 9
points. Finished rows are kept
in output/erasure_wording_MODEL.json; --fresh starts anew.
"""

import argparse
import json

import numpy as np
import torch
from membrane.benchmarks.erasure_quality import (
    ROOT,
    TASKS,
    captions_like_the_prompts,
    kept_rows,
    more_captions,
    sprites_of,
    start,
    write,
)
from membrane.tools.pixel_world import classifier, world
from membrane.tools.pixel_world.styles import IN_STYLE, captions_in, styles_of

BATCH, STEPS, CFG, SIZE, LATENT_SCALE = 24, 6, 1.0, 128, 0.18215
IN_STYLE_PICTURES, HELD_OUT_PICTURES, SYNONYMS = 16, 4, 24  # a cell, a style, and the style of synonyms
KNOWN = 0.9  # share that the unerased model draws rightly in a style that counts
MODELS = {"day": "normal", "transformer": "simple"}  # variant of the demo model: scheduler on its card
SCHEDULERS = MODELS | {"night": MODELS["day"]}
BARE = "{}"
METHODS = {  # name: (settings of the node, whether the other values are preserved, permeability where it has one)
    "UCE, bare word": ({"templates": BARE}, True),
    "UCE, bare word, nothing preserved": ({"templates": BARE}, False),
    "UCE, automatic captions": ({}, True),
    "UCE, automatic captions, nothing preserved": ({}, False),
    "UCE, automatic captions, by words": ({}, True, "facilitated transport"),
    "UCE, automatic captions, by words, nothing preserved": ({}, False, "facilitated transport"),
    "UCE, automatic captions, by meaning": ({}, True, "meaning"),
    "UCE, automatic captions, by meaning, nothing preserved": ({}, False, "meaning"),
    "UCE, 8 captions, by meaning": ({"templates": captions_like_the_prompts}, True, "meaning"),
    "UCE, 8 captions": ({"templates": captions_like_the_prompts}, True),
    "UCE, 16 captions": ({"templates": more_captions}, True),
    "RECE, automatic captions": ({"method": "RECE"}, True),
    "RECE, regularised, automatic captions": ({"method": "RECE, regularised"}, True),
    "SPEED, automatic captions": ({"method": "SPEED"}, True),
    "SPEED, automatic captions, all tokens, rho 0.1": ({"method": "SPEED", "tokens": "all", "rho": 0.1}, True),
}
FEWER = [name for name in METHODS if name.startswith("UCE, automatic captions")]  # rows of several concepts


def rows_of(task):
    """The rows of a task, in order."""
    return ["unerased", *(METHODS if len(TASKS[task][1]) == 1 else FEWER)]


class Painter:
    """Pictures of prompts, several prompts in one KSampler run; the text of a prompt is encoded once."""

    def __init__(self, node, variant, steps=STEPS, cfg=CFG):
        self.node, self.scheduler, self.texts, self.plain = node, SCHEDULERS[variant], {}, {}
        self.steps, self.cfg = steps, cfg
        self.model, self.clip, _ = node("MembraneDemoModel", variant=variant)

    def conditioning(self, prompts):
        for prompt in prompts:
            if prompt not in self.texts:
                self.texts[prompt] = self.node("CLIPTextEncode", clip=self.clip, text=prompt)[0][0]
        each = [self.texts[prompt] for prompt in prompts]
        more = {key: [given[key] for _, given in each] for key in each[0][1] if torch.is_tensor(each[0][1][key])}
        return [[torch.cat([rows for rows, _ in each]), {key: torch.cat(value) for key, value in more.items()}]]

    def paint(self, prompts, seed, model=None, negative=""):
        """Sprites (n, 16, 16, 3) in [0, 1], one of each prompt."""
        from membrane.core.demo.world import latent_to_rgb

        pictures = []
        for first in range(0, len(prompts), BATCH):
            part = prompts[first : first + BATCH]
            latent = self.node("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=len(part))[0]
            drawn = self.node(
                "KSampler", model=model or self.model, seed=seed + first, steps=self.steps, cfg=self.cfg,
                sampler_name="euler",
                scheduler=self.scheduler, denoise=1.0, latent_image=latent, positive=self.conditioning(part),
                negative=self.conditioning([negative]),
            )[0]["samples"]  # fmt: skip
            pictures.append(latent_to_rgb(drawn.float().cpu() * LATENT_SCALE).permute(0, 2, 3, 1))
        return torch.cat(pictures).numpy()


class Set:
    """Prompts in all styles with some values of an attribute: so many in the plain caption, in each other style, and
    with synonyms."""

    def __init__(self, attribute, values, seed, plain=IN_STYLE_PICTURES, other=HELD_OUT_PICTURES, synonyms=SYNONYMS):
        self.attribute, self.seed = attribute, seed
        self.prompts, self.styles, truth = [], [], []
        for i, style in enumerate(styles_of(attribute)):
            count = {IN_STYLE: plain, "synonym": synonyms}.get(style, other)
            sprites = sprites_of(attribute, np.roll(values, -3 * i), count, seed + i)
            self.prompts += captions_in(style, attribute, sprites)
            self.styles += [style] * count
            truth.append(getattr(sprites, attribute))
        self.truth, self.styles = np.concatenate(truth), np.array(self.styles)

    def pictures(self, painter, model=None):
        """Sprites of all prompts; those of the unerased model are painted once."""
        if model is not None:
            return painter.paint(self.prompts, self.seed, model)
        if self not in painter.plain:
            painter.plain[self] = painter.paint(self.prompts, self.seed)
        return painter.plain[self]

    def right(self, judge, pictures):
        """Whether the judge sees the prompt's value in each picture."""
        return classifier.read(judge, pictures)[self.attribute] == self.truth

    def counts(self, judge, pictures):
        """{style: [pictures in which the judge sees the prompt's value, of how many]}."""
        return self.by_style(self.right(judge, pictures))

    def by_style(self, seen):
        """{style: [how many are true, of how many]} of a truth for each picture."""
        of = {s: self.styles == s for s in styles_of(self.attribute)}
        return {s: [int(seen[own].sum()), int(own.sum())] for s, own in of.items() if own.any()}


def erased(painter, task, settings, preserved, permeability=None):
    """The MODEL of one row."""
    attribute, pairs = TASKS[task]
    concepts = [concept for concept, _ in pairs]
    rest = [name for name in world.NAMES[attribute] if name not in concepts] if preserved else []
    given = {name: value(attribute) if callable(value) else value for name, value in settings.items()}
    model, adapter = painter.node(
        "MembraneErase", model=painter.model, clip=painter.clip, concepts="\n".join(map(" -> ".join, pairs)),
        **{"preserve": "\n".join(rest), "replace_with": "", **given},
    )  # fmt: skip
    if permeability is None:
        return model
    stack = painter.node("MembraneStack", adapter=adapter, permeability=permeability)[0]
    return painter.node("MembraneApply", model=painter.model, clip=painter.clip, stack=stack)[0]


def sets_of(task, *counts):
    """(Set with the erased values, Set with the others); counts: as Set takes them."""
    attribute, pairs = TASKS[task]
    names = world.NAMES[attribute]
    gone = [names.index(concept) for concept, _ in pairs]
    rest = [i for i in range(len(names)) if i not in gone]
    return Set(attribute, gone, 1031, *counts), Set(attribute, rest, 5032, *counts)


def measure(wanted, store, begin, row_of, say):
    """{task: {row: what was counted}} of a demo model; finished rows are in a file.

    wanted: {task: names of rows}; begin(): a Painter, made when the first row is missing; row_of(painter, task, name)
    -> a row; say(task, name, rows of the task): called after each.
    """
    rows, painter = kept_rows(store), None
    for task, names in wanted.items():
        done = rows.setdefault(task, {})
        for name in names:
            if name not in done:
                painter = painter or begin()
                done[name] = row_of(painter, task, name)
                write(store, json.dumps(rows, indent=1) + "\n")
                say(task, name, done)
    return {task: {name: rows[task][name] for name in names} for task, names in wanted.items()}


def measured(node, variant, tasks, store):
    """{task: {row: {"left", "kept": counts by style}}} of a demo model; the row "unerased" first."""
    judge, sets = classifier.load(), {task: sets_of(task) for task in tasks}

    def found(painter, task, name):
        model = erased(painter, task, *METHODS[name]) if name in METHODS else None
        return row_of(painter, judge, sets[task], model)

    def say(task, name, done):
        print(f"{variant}, {task}: {line(name, done)}", flush=True)

    return measure({task: rows_of(task) for task in tasks}, store, lambda: Painter(node, variant), found, say)


def row_of(painter, judge, sets, model):
    """{"left", "kept", "same": counts by style} of a MODEL, None for the unerased one."""
    pictures = [part.pictures(painter, model) for part in sets]
    found = {what: part.counts(judge, p) for what, part, p in zip(("left", "kept"), sets, pictures)}
    plain = sets[1].pictures(painter)
    return found | {"same": sets[1].by_style((pictures[1] == plain).all(axis=(1, 2, 3)))}


def known_styles(unerased):
    """The styles that the unerased model draws rightly."""
    right = {s: np.add(unerased["left"][s], unerased["kept"][s]) for s in unerased["left"]}
    return [s for s, (seen, count) in right.items() if seen >= KNOWN * count]


def share(counts, styles):
    """[seen, of how many] over some styles."""
    return np.sum([counts[s] for s in styles], axis=0).tolist() if styles else [0, 0]


def columns(name, rows):
    """{column: [seen, of how many]} of a row."""
    held_out = [s for s in known_styles(rows["unerased"]) if s != IN_STYLE]
    found = {
        f"{what}, {how}": share(rows[name][what], styles)
        for what in ("left", "kept")
        for how, styles in (("in-style", [IN_STYLE]), ("held-out", held_out))
    }
    synonyms = {"left, synonyms": share(rows[name]["left"], [s for s in held_out if s == "synonym"])}
    return found | synonyms | {"bit-identical": share(rows[name]["same"], known_styles(rows["unerased"]))}


def line(name, rows):
    """One row of a table, with the styles that left most."""
    left = {s: rows[name]["left"][s] for s in known_styles(rows["unerased"]) if s != IN_STYLE}
    worst = ", ".join(f"{s} {seen}" for s, (seen, _) in left.items() if seen) if name in METHODS else ""
    cells = [f"{seen} / {count}" for seen, count in columns(name, rows).values()]
    return "| " + " | ".join([name, *cells, worst or "-"]) + " |"


HEADER = (
    "| method | left, in-style | left, held-out | kept, in-style | kept, held-out | left, synonyms | "
    "kept, bit-identical | held-out styles that leave it |\n" + "|---" * 8 + "|"
)


def tables(rows, header, line, below=lambda found: ()):
    """All tables of {model: {task: {row: counts}}} as Markdown; below: lines that follow the rows of one."""
    parts = []
    for variant, tasks in rows.items():
        for task, found in tasks.items():
            pairs = ", ".join(" -> ".join(pair) for pair in TASKS[task][1])
            parts += [f"\n## {variant}, {task}: {pairs}\n", header, *(line(name, found) for name in found)]
            parts += below(found)
    return "\n".join(parts) + "\n"


def right_by_style(found):
    """Lines on what the unerased model draws rightly."""
    plain = found["unerased"]
    own = ", ".join(f"{s} {plain['left'][s][0] + plain['kept'][s][0]}" for s in plain["left"])
    return (
        f"\nUnerased model right, by style: {own}; of {2 * IN_STYLE_PICTURES} in the plain caption, {2 * SYNONYMS} "
        f"with synonyms, {2 * HELD_OUT_PICTURES} in each other.",
    )


def figures_of(rows):
    """{figure: percent}, named variant.task.row.column."""
    return {
        f"{variant}.{task}.{name}.{column}_percent".replace(" ", "_").replace(",", "").lower(): round(100 * a / b, 2)
        for variant, tasks in rows.items()
        for task, found in tasks.items()
        for name in found
        for column, (a, b) in columns(name, found).items()
        if b
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="measure every row again")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=["1 shape", "4 shapes"])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    torch.set_num_threads(1)  # two spinning threads on busy cores are slower than one
    rows = {}
    node, tidy = start()
    try:
        for variant in args.models:
            store = ROOT / "output" / f"erasure_wording_{variant}.json"
            if args.fresh:
                store.unlink(missing_ok=True)
            rows[variant] = measured(node, variant, args.tasks, store)
    finally:
        tidy()
    title = "# Closed-form erasure in the style of its captions, and in styles that none of them has"
    if len(rows) == len(MODELS):
        text = tables(rows, HEADER, line, right_by_style)
        write(ROOT / "benchmarks" / "results" / "erasure_wording.md", f"{title}\n{text}")
    print(json.dumps({"figures": figures_of(rows)}))


if __name__ == "__main__":
    main()
