"""Erasure on both demo models: this pack's nodes as they are, the published methods, and the remedies between.

One value of each kind of attribute, then four at once. Every prompt is drawn by the unerased model and by each erased
one from the same noise, in the plain caption (in-style) and in the held-out styles of tools/pixel_world/styles.py that
the unerased model draws rightly. This pack's rows are its nodes with their own defaults; the other values of the
attribute are on the list of what to keep, for all methods that have one. Published rows are set as their papers or
scripts are; the negative prompt needs guidance, so that its row is drawn at CFG 1.5, which alone moves pictures. The
trained ones are those of benchmarks/training_dit.py, trained on the bare word, for the first task alone.

    left   pictures of the erased values in which the judge still sees them
    kept   pictures of the other values of the attribute that the judge reads right; lost: points of these that the
           unerased model has more
    H      harmonic mean of (1 - left) and kept over both, 0 to 100
    moved  mean absolute difference of the kept pictures to the unerased ones, of 255; same: share of these that are
           equal bit for bit

--remedies compares, once, what else could be done where a T5 spreads a word over the whole prompt: which rows, how much
of the pooled map, a map behind the first blocks, the values of the blocks alone. Finished rows are kept in
output/erasure_dit; --fresh starts anew, --finished writes the report of what is there. Rows that a table of the report
lacks were not run.
"""

import argparse
import json
import re
from dataclasses import replace

import torch
from membrane.benchmarks import _flux_loops as loops
from membrane.benchmarks import training_dit as training
from membrane.benchmarks.erasure import COLOURS, SHAPES, TEXTURES
from membrane.benchmarks.erasure_quality import kept_rows, write
from membrane.benchmarks.erasure_wording import Painter, Set, known_styles, share
from membrane.tools import ROOT
from membrane.tools.host_library import start
from membrane.tools.pixel_world import classifier, world
from membrane.tools.pixel_world.styles import IN_STYLE

STORE = ROOT / "output" / "erasure_dit"
STEPS, CFG = 6, 1.0
GUIDED = 1.5  # the model's card; where the negative prompt counts
PLAIN, OTHER = 32, 4  # pictures in the plain caption, and in each other style
BACKGROUNDS = [("snow", "coal")]
TASKS = {
    "1 shape": ("shape", SHAPES[:1]),
    "1 colour": ("colour", COLOURS[:1]),
    "1 texture": ("texture", TEXTURES),
    "1 background": ("background", BACKGROUNDS),
    "4 shapes": ("shape", SHAPES),
    "4 colours": ("colour", COLOURS),
}
MODELS = {"transformer": "Transformer", "day": "U-Net"}


# ---------------------------------------------------------------- methods


def lists(attribute, pairs):
    """(concepts, what to keep) as texts of a node."""
    gone = [concept for concept, _ in pairs]
    return "\n".join(map(" -> ".join, pairs)), "\n".join(n for n in world.NAMES[attribute] if n not in gone)


def expert(**settings):
    """Erase Concepts (Expert) with its defaults and some settings: function of (painter, attribute, pairs) -> what
    differs from the plain run."""

    def make(painter, attribute, pairs):
        return {"model": adapter_of(painter, attribute, pairs, **settings)[0]}

    return make


def adapter_of(painter, attribute, pairs, **settings):
    """(MODEL, ErasureAdapter) of Erase Concepts (Expert)."""
    concepts, preserve = lists(attribute, pairs)
    return painter.node(
        "MembraneErase", model=painter.model, clip=painter.clip, concepts=concepts, preserve=preserve, **settings
    )


def daily(painter, attribute, pairs):
    """Erase Concepts with its defaults: acts as far as a prompt asks for it."""
    remove, keep = lists(attribute, pairs)
    return {
        "model": painter.node("MembraneForget", model=painter.model, clip=painter.clip, remove=remove, keep=keep)[0]
    }


def negative_prompt(painter, attribute, pairs):
    return {"negative": ", ".join(concept for concept, _ in pairs), "cfg": GUIDED}


def trained_as_published(method):
    def make(painter, attribute, pairs):
        ((concept, _),) = pairs
        training.cost_of("transformer", method, concept)
        return {"model": training.erased(painter.node, painter, "transformer", method, (concept,), training.FIXED)}

    return make


PUBLISHED_UCE = {"templates": "{}", "rows": "as published", "replacements": "as published"}
UNTRAINED = {
    "published: negative prompt": negative_prompt,
    "published: UCE, the script for Flux: last token": expert(edition="scripts of 2025", **PUBLISHED_UCE),
    "published: UCE, the paper": expert(**PUBLISHED_UCE),
}
TRAINED = {f"published: {method}": trained_as_published(method) for method in loops.LOOPS}
OURS = {
    "UCE": expert(),
    "RECE, regularised": expert(method="RECE, regularised"),
    "SPEED": expert(method="SPEED"),
    "Double Projections": expert(method="Double Projections"),
    "Erase Concepts, where asked": daily,
}


def methods_of(model, task):
    """{name: method} for a task on a model."""
    return UNTRAINED | (TRAINED if (model, task) == ("transformer", "1 shape") else {}) | OURS


# ---------------------------------------------------------------- remedies


def pooled_by(strength):
    """UCE with its pooled map at a strength."""

    def make(painter, attribute, pairs):
        _, adapter = adapter_of(painter, attribute, pairs)
        return {"model": applied(painter, _scaled(adapter, {"pooled": strength}))}

    return make


def _scaled(adapter, strengths):
    """An adapter with its maps at some text entries at a strength, 1 for those that are not named."""
    maps = {name: replace(m, a=m.a * strengths.get(name, 1.0)) for name, m in adapter.maps.items()}
    return replace(adapter, deltas={**adapter.deltas, "map": maps})


def applied(painter, adapter):
    stack = painter.node("MembraneStack", adapter=adapter, permeability="fixed")[0]
    return painter.node("MembraneApply", model=painter.model, clip=painter.clip, stack=stack)[0]


TIMES = (1.0, 0.7, 0.4)  # at which states of the text inside the network are collected
RIDGE = 1e-3  # of the mean square of a kept row


def states(captions, read):
    """What read(network) -> {name: module} gets of the text for captions, {name: (captions * times, T, d)}, in latents
    that the unerased model makes of each; None for the captions' own latents, else those of other captions."""

    def collected(latents=None):
        trained = loops.Trained(("txt",), (loops.QUERIES,), rank=1, alpha=1.0)
        found, hooks = {}, []
        for name, module in read(trained.model).items():
            hooks.append(module.register_forward_hook(lambda _, given, out, n=name: found.setdefault(n, []).append(
                out[1] if isinstance(out, tuple) else given[0])))  # fmt: skip
        made = []
        with torch.no_grad():
            for i, caption in enumerate(captions):
                for j, t in enumerate(TIMES):
                    x = _latents(trained, caption, t) if latents is None else latents[i * len(TIMES) + j]
                    made.append(x)
                    for rows in found.values():
                        del rows[i * len(TIMES) + j :]  # of the way there
                    trained.velocity(x, t, [caption])
        for hook in hooks:
            hook.remove()
        return made, {name: torch.cat(rows) for name, rows in found.items()}

    return collected


def _latents(trained, caption, t):
    """Latents at time t as the unerased model makes them, by a few steps without guidance."""
    times = torch.linspace(1, t, 4) if t < 1 else torch.ones(1)
    x = torch.randn(1, *loops.SHAPE, generator=trained.generator)
    for now, following in zip(times, times[1:]):
        x = x + trained.velocity(x, now, [caption]) * (following - now)
    return x


def ridge(pairs, kept):
    """UCE's map E (d, d) of states: pairs of (n, T, d), of the concept and of its replacement, and those to keep."""
    concept, replacement = (torch.cat([pair[i].flatten(0, 1) for pair in pairs]).double() for i in (0, 1))
    kept = kept.flatten(0, 1).double()
    weight = kept.square().sum() / len(kept)
    gram = concept.T @ concept / len(concept) + kept.T @ kept / len(kept)
    gram += RIDGE * weight * torch.eye(len(gram), dtype=torch.double)
    return torch.linalg.solve(gram, ((replacement - concept).T @ concept / len(concept)).T).T.float()


def maps_inside(read, attribute, pairs):
    """{name: E} at some modules of the network, of the automatic captions."""
    from membrane.core.text.captions import captions_of
    from membrane.core.text.concepts import fill

    templates = captions_of("anything").templates
    gone = [concept for concept, _ in pairs]
    rest = [name for name in world.NAMES[attribute] if name not in gone]
    _, kept = states(["", *(fill(t, rest[i % len(rest)]) for i, t in enumerate(templates * 3))], read)()
    found = {name: [] for name in kept}
    for concept, replacement in pairs:
        latents, old = states([fill(t, concept) for t in templates], read)()
        _, new = states([fill(t, replacement) for t in templates], read)(latents)
        for name in kept:
            found[name].append((old[name], new[name]))
    return {name: ridge(found[name], kept[name]) for name in kept}


def only_pooled(painter, attribute, pairs):
    """The MODEL with this pack's map of the pooled text alone."""
    _, adapter = adapter_of(painter, attribute, pairs)
    return applied(painter, _scaled(adapter, {name: 0.0 for name in adapter.maps if name != "pooled"}))


def after_block(index):
    """A map of the text's stream behind a double block, and this pack's of the pooled text."""

    def make(painter, attribute, pairs):
        change = maps_inside(lambda net: {"": net.double_blocks[index]}, attribute, pairs)[""]
        model = only_pooled(painter, attribute, pairs)

        def mapped(given, extra):
            out = extra["original_block"](given)
            return {**out, "txt": out["txt"] + out["txt"] @ change.T.to(out["txt"])}

        model.set_model_patch_replace(mapped, "dit", "double_block", index)
        return {"model": model}

    return make


def inside_blocks(first):
    """The text's queries, keys and values of all double blocks from part `first` on changed by maps of what they read,
    and this pack's map of the pooled text."""

    def make(painter, attribute, pairs):
        found = maps_inside(
            lambda net: {f"double_blocks.{i}.txt_attn.qkv": b.txt_attn.qkv for i, b in enumerate(net.double_blocks)},
            attribute, pairs,
        )  # fmt: skip
        weights, changes = painter.model.model.diffusion_model.state_dict(), {}
        for name, change in found.items():
            changes[name] = weights[f"{name}.weight"].float() @ change
            changes[name][: first * change.shape[0]] = 0
        return {"model": training.with_changes(only_pooled(painter, attribute, pairs), changes)}

    return make


REMEDIES = {
    "all rows, pooled map (the default)": expert(),
    "erased concept weighed 3 times": expert(erase_scale=3.0),
    "rows as published": expert(rows="as published"),
    "pooled map left out": expert(pooled="leave"),
    "pooled map at half strength": pooled_by(0.5),
    "pooled map at 1.5": pooled_by(1.5),
    "all rows, bare word": expert(templates="{}"),
    "map behind block 1 of 3": after_block(0),
    "keys and values inside the blocks": inside_blocks(loops.KEYS),
    "values inside the blocks": inside_blocks(loops.VALUES),
    "anchor 0.05": expert(anchor=0.05),
    "rows as published, bare word": expert(rows="as published", templates="{}"),
    "map behind block 2 of 3": after_block(1),
}
REMEDY_TASKS = ("1 texture", "1 colour")  # where the default leaves most


# ---------------------------------------------------------------- pictures and counts


def sets_of(task, plain, other):
    """(Set with the erased values, Set with the others)."""
    attribute, pairs = TASKS[task]
    names = world.NAMES[attribute]
    gone = [names.index(concept) for concept, _ in pairs]
    rest = [i for i in range(len(names)) if i not in gone]
    return Set(attribute, gone, 1031, plain, other, other), Set(attribute, rest, 5032, plain, other, other)


class Bench:
    """One demo model, its pictures and its judge."""

    def __init__(self, node, variant, sizes):
        self.painter, self.judge, self.sizes = Painter(node, variant, STEPS, CFG), classifier.load(), sizes
        self.plain = {}

    def paint(self, task, model=None, negative="", cfg=CFG):
        self.painter.cfg = cfg
        sets = sets_of(task, *self.sizes)
        return [self.painter.paint(part.prompts, part.seed, model, negative) for part in sets]

    def row(self, task, method=None):
        """Counts by style, and what moved; of the unerased model without a method."""
        if task not in self.plain:
            self.plain[task] = self.paint(task)
        plain = found = self.plain[task]
        if method is not None:
            found = self.paint(task, **method(self.painter, *TASKS[task]))
        row = {
            what: part.counts(self.judge, pictures)
            for what, part, pictures in zip(("left", "kept"), sets_of(task, *self.sizes), found)
        }
        return row | {"moved": training.moved(found[1], plain[1]), "same": training.same(found[1], plain[1])}


def measure(node, variant, wanted, sizes, store):
    """{task: {row: counts}} for {task: {row: method}}, the row "unerased" first."""
    rows = kept_rows(store)
    bench = None
    for task, methods in wanted.items():
        done = rows.setdefault(task, {})
        print(f"\n## {variant}, {task}\n{HEADER}", flush=True)
        for name, method in {"unerased": None, **methods}.items():
            if name not in done:
                bench = bench or Bench(node, variant, sizes)
                done[name] = bench.row(task, method)
                write(store, json.dumps(rows, indent=1) + "\n")
            print(line(name, done), flush=True)
    return {task: {name: rows[task][name] for name in ("unerased", *methods)} for task, methods in wanted.items()}


# ---------------------------------------------------------------- tables and figures


HEADER = (
    "| method | left, in-style | left, held-out | kept, in-style | kept, held-out | lost | H | moved | same |\n"
    + "|---" * 9
    + "|"
)


def columns(name, rows):
    """{column: [seen, of how many]} of a row."""
    styles = known_styles(rows["unerased"])
    return {
        f"{what}, {how}": share(rows[name][what], [s for s in styles if (s == IN_STYLE) == (how == "in-style")])
        for what in ("left", "kept")
        for how in ("in-style", "held-out")
    }


def totals(name, rows):
    """(share left, share kept) over all styles that count."""
    found = columns(name, rows)
    return [
        sum(a for key, (a, _) in found.items() if key.startswith(what))
        / sum(b for key, (_, b) in found.items() if key.startswith(what))
        for what in ("left", "kept")
    ]


def summary(name, rows):
    """(points lost, H) of a row."""
    from membrane.core.measures.scores import harmonic_mean

    (left, kept), (_, before) = totals(name, rows), totals("unerased", rows)
    return 100 * (before - kept), 100 * harmonic_mean([1 - left, kept])


def line(name, rows):
    cells = [f"{seen} / {count}" for seen, count in columns(name, rows).values()]
    lost, harmonic = summary(name, rows)
    row = rows[name]
    cells += ["-"] * 4 if name == "unerased" else [
        f"{lost:.1f}", f"{harmonic:.1f}", f"{row['moved']:.2f}", f"{row['same']:.2f}"
    ]  # fmt: skip
    return "| " + " | ".join([name, *cells]) + " |"


def tables(rows):
    """{task: {row: counts}} as Markdown."""
    parts = []
    for task, found in rows.items():
        pairs = ", ".join(map(" -> ".join, TASKS[task][1]))
        parts += [f"\n### {task}: {pairs}\n", HEADER, *(line(name, found) for name in found)]
    return "\n".join(parts) + "\n"


def figures_of(rows):
    """{figure: number} for {model: {task: {row: counts}}}, named model.task.row.what."""
    figures = {}
    for model, tasks in rows.items():
        for task, found in tasks.items():
            for name in found:
                if name == "unerased":
                    continue
                key = re.sub(r"[^a-z0-9.]+", "_", f"{model}.{task}.{name}".lower()).strip("_")
                lost, harmonic = summary(name, found)
                for column, (seen, count) in columns(name, found).items():
                    if count:
                        what = column.replace(", ", "_").replace("-", "_")
                        figures[f"{key}.{what}_percent"] = round(100 * seen / count, 2)
                figures |= {f"{key}.lost_points": round(lost, 2), f"{key}.harmonic": round(harmonic, 2)}
                figures |= {f"{key}.moved": round(found[name]["moved"], 3), f"{key}.same": found[name]["same"]}
    return figures


def report(rows, remedies):
    """The whole report as Markdown."""
    parts = ["# Erasure on both demo models, with the nodes' own defaults\n", __doc__.split("\n\n", 1)[1].strip()]
    for model, tasks in rows.items():
        parts += [f"\n## {MODELS[model]}", tables(tasks)]
    if remedies:
        parts += ["\n## Remedies on the transformer: UCE with automatic captions, unless a row says else",
                  tables(remedies)]  # fmt: skip
    return "\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few pictures of one task, to see that it runs")
    parser.add_argument("--fresh", action="store_true", help="measure every row again")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="*", help="only rows whose names begin so")
    parser.add_argument("--untrained", action="store_true", help="without the rows that have to be trained")
    parser.add_argument("--remedies", action="store_true", help="only the remedies")
    parser.add_argument("--finished", action="store_true", help="only the report, of the rows that are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)  # two spinning threads on busy cores are slower than one
    folder = STORE.with_name("erasure_dit_quick") if args.quick else STORE
    sizes, tasks = ((4, 1), args.tasks[:1]) if args.quick else ((PLAIN, OTHER), args.tasks)
    if args.fresh or args.quick:
        for file in folder.glob("*"):
            file.unlink()
    if args.finished:
        return tell(*finished(folder))
    found, remedies = {}, {}
    node, tidy = start()
    try:
        for model in [] if args.remedies else args.models:
            wanted = {task: methods_of(model, task) for task in tasks}
            if args.untrained or args.quick:
                wanted = {task: {n: m for n, m in of.items() if n not in TRAINED} for task, of in wanted.items()}
            if args.methods:
                begin = tuple(args.methods)
                wanted = {t: {n: m for n, m in of.items() if n.startswith(begin)} for t, of in wanted.items()}
            found[model] = measure(node, model, wanted, sizes, folder / f"{model}.json")
        if args.remedies or (tasks == list(TASKS) and "transformer" in args.models):
            begin = tuple(args.methods or [""])
            chosen = {name: method for name, method in REMEDIES.items() if name.startswith(begin)}
            wanted = {task: chosen for task in REMEDY_TASKS if task in tasks}
            remedies = measure(node, "transformer", wanted, sizes, folder / "remedies.json")
    finally:
        tidy()
    whole = not args.quick and len(found) == len(MODELS) and tasks == list(TASKS)
    return tell(found, remedies, whole)


def finished(folder):
    """(rows by model, remedies) of all that is kept."""
    kept = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")}
    kept = {name: {task: of for task, of in tasks.items() if len(of) > 1} for name, tasks in kept.items()}
    return {model: kept[model] for model in MODELS if kept.get(model)}, kept.get("remedies", {})


def tell(found, remedies, whole=True):
    """Prints the figures, and writes the report where it is whole."""
    if whole:
        write(ROOT / "benchmarks" / "results" / "erasure_dit.md", report(found, remedies))
    print(json.dumps({"figures": figures_of(found | ({"remedies": remedies} if remedies else {}))}))


if __name__ == "__main__":
    main()
