"""Trained erasure on both demo models: this pack's Latent Anchoring beside ESD, GEM and EraseAnything.

The published loops are written from their formulas (benchmarks/_flux_loops.py) and run on the transformer with their
authors' settings, for one concept; this pack trains with its node as an artist would, of whose inputs only the concept,
what comes instead, the size of the pictures and `quality` are set, in the rows that say so also the other values of the
attribute as what to preserve. The loops and this pack on the U-Net learn the bare word, this pack on the transformer
its own captions, as its node does by itself. Then the U-Net's adapters on the "night" checkpoint without retuning, and
three stacked on either model.

    erased   pictures of the erased value, of 64, in which the judge still sees it
    kept     pictures of the other values of the same attribute, of 96, that the judge reads right; before: unerased
    moved    mean absolute difference of these to the unerased pictures of the same noise, of 255
    same     share of these that are the same bit for bit
    seconds  of one core's time for one adapter; MB: the peak of memory above the loaded model; kB: of the file

Every adapter is trained in a process of its own and kept, as finished rows are, in output/training_dit; an interrupted
run goes on (--fresh starts anew).
"""

import argparse
import contextlib
import itertools
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from membrane.benchmarks import _flux_loops as loops
from membrane.benchmarks import erasure_wording as wording
from membrane.benchmarks.erasure_quality import SIZE, kept_rows, sprites_of, write
from membrane.tools import ROOT
from membrane.tools.host_library import start
from membrane.tools.pixel_world import classifier, world

STORE = ROOT / "output" / "training_dit"
STEPS, CFG = 8, 1.0
ERASED, KEPT = 64, 96
CONCEPTS = {  # concept: (attribute, surrogate)
    "star": ("shape", "circle"),
    "red": ("colour", "blue"),
    "striped": ("texture", "plain"),
    "heart": ("shape", "square"),
}
OURS = {f"Latent Anchoring, {quality}": {"quality": quality} for quality in ("quick", "normal", "thorough")}
QUICK, NORMAL, THOROUGH = OURS
PRESERVING = f"{QUICK}, others preserved"
OURS[PRESERVING] = OURS[QUICK]
TRANSPORT, MEANING, FIXED = "facilitated transport", "meaning", "fixed"
THREE = {"day": ("star", "heart", "striped"), "transformer": ("star", "red", "striped")}
METHODS = [*loops.LOOPS, *OURS]


def rows_of(model, methods):
    """{name: (checkpoint, model trained on, method, concepts whose adapters are on it, permeability, concept looked
    for)} of a model."""
    rows, checkpoints = {}, {"day": ("day", "night"), "transformer": ("transformer",)}[model]
    for concept in THREE[model]:
        for method in methods:
            if method in OURS:
                for permeability in (TRANSPORT, MEANING, FIXED):
                    rows[f"{concept}: {method}, {permeability}"] = (
                        model, model, method, (concept,), permeability, concept
                    )  # fmt: skip
            elif model == "transformer" and concept == THREE[model][0]:
                rows[f"{concept}: published: {method}"] = (model, model, method, (concept,), FIXED, concept)
    for method, permeability in itertools.product(methods, (TRANSPORT, MEANING)):
        if method in OURS and method != THOROUGH:
            for concept in THREE[model]:
                for checkpoint in checkpoints[1:]:
                    rows[f"{checkpoint}, {concept}: {method}, {permeability}"] = (
                        checkpoint, model, method, (concept,), permeability, concept
                    )  # fmt: skip
                rows[f"three stacked, {concept}: {method}, {permeability}"] = (
                    model, model, method, THREE[model], permeability, concept
                )  # fmt: skip
    return rows


# ---------------------------------------------------------------- training, in a process of its own


def file_of(model, method, concept, kind="safetensors"):
    return STORE / f"{model}_{re.sub('[^a-z]+', '_', method.lower())}_{concept}.{kind}"


def others_of(concept):
    """The other values of a concept's attribute."""
    return [name for name in world.NAMES[CONCEPTS[concept][0]] if name != concept]


class Peak:
    """How much more memory this process has had since it was made, MB; on Linux, where the kernel forgets an older
    peak, else since its own beginning."""

    def __init__(self):
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.before = self._now()

    def __call__(self):
        return self._now() - self.before

    @staticmethod
    def _now():
        with contextlib.suppress(OSError, AttributeError):
            found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
            return int(found.group(1)) / 1000
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def train_published(method, concept, quick):
    """Trains and keeps the changes of the weights; {"seconds", "megabytes", "kilobytes"}."""
    from safetensors.torch import save_file

    _, surrogate = CONCEPTS[concept]
    kept = others_of(concept)
    with torch.no_grad():
        first = loops.Trained(("txt",), (loops.QUERIES,))
        first.velocity(torch.zeros(1, *loops.SHAPE), 1.0, [concept])
    del first
    peak, begin = Peak(), time.process_time()
    found = loops.LOOPS[method](concept, surrogate, kept, **({"steps": 2} if quick else {}))
    seconds = time.process_time() - begin
    save_file(found.changes(), str(file_of("transformer", method, concept)))
    return {"seconds": seconds, "megabytes": peak(), "kilobytes": found.bytes / 1000}


def train_ours(model, method, concept, quick):
    """Trains with the node and keeps the adapter; the same figures."""
    from membrane.core.formats import native

    node, tidy = start()
    try:
        painter = wording.Painter(node, model, 2, 3.0)
        painter.paint([concept], 0)
        more = {"steps": 2, "rollout_steps": 3, "quality": "as set"} if quick else OURS[method]
        if method == PRESERVING:
            more = more | {"preserve": "\n".join(others_of(concept))}
        peak, begin = Peak(), time.process_time()
        adapter, report = node(
            "MembraneTrain", model=painter.model, clip=painter.clip, concepts=f"{concept} -> {CONCEPTS[concept][1]}",
            width=SIZE, height=SIZE, preview_every=0, save_every=10**5, **more,
        )  # fmt: skip
        seconds, file = time.process_time() - begin, file_of(model, method, concept)
        native.save(adapter, str(file))
        print(report, file=sys.stderr)
    finally:
        tidy()
    return {"seconds": seconds, "megabytes": peak(), "kilobytes": file.stat().st_size / 1000}


def train_one(model, method, concept, quick):
    """Trains in this process."""
    STORE.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if method in OURS:
        found = train_ours(model, method, concept, quick)
    else:
        found = train_published(method, concept, quick)
    write(file_of(model, method, concept, "json"), json.dumps(found))


def cost_of(model, method, concept, quick=False):
    """What an adapter cost; trained now where it is not there yet."""
    file = file_of(model, method, concept, "json")
    if not file.is_file():
        command = [sys.executable, "-m", "benchmarks.training_dit", "--models", model, "--methods", method]
        command += ["--one", concept, *(["--quick"] if quick else [])]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"training {concept} by {method} on {model} failed:\n{done.stderr[-2000:]}")
        print(f"{model}, {method}, {concept}: {file.read_text(encoding='utf-8')}", flush=True)
    return json.loads(file.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- pictures and counts


class Judged:
    """Pictures of one checkpoint before and after, judged."""

    def __init__(self, node, variant, sizes):
        self.painter, self.judge = wording.Painter(node, variant, STEPS, CFG), classifier.load()
        self.sizes, self.plain = sizes, {}

    def sets(self, concept, others):
        """(Prompts with the concept, with other values of its attribute); none has one of the other erased words."""
        attribute, _ = CONCEPTS[concept]
        gone = world.NAMES[attribute].index(concept)
        rest = [i for i, name in enumerate(world.NAMES[attribute]) if name not in (concept, *others)]
        return [
            Prompts(attribute, sprites_of(attribute, values, count, seed, others), first)
            for values, count, seed, first in (([gone], self.sizes[0], 31, 1000), (rest, self.sizes[1], 32, 5000))
        ]

    def row(self, model, concept, others):
        key, sets = (concept, others), self.sets(concept, others)
        if key not in self.plain:
            self.plain[key] = [part.paint(self.painter) for part in sets]
        plain, found = self.plain[key], [part.paint(self.painter, model) for part in sets]
        counts = {}
        for what, part, before, after in zip(("erased", "kept"), sets, plain, found):
            counts |= {what: part.right(self.judge, after), f"{what}_of": len(after)}
            counts[f"{what}_before"] = part.right(self.judge, before)
        return counts | {"moved": moved(found[1], plain[1]), "same": same(found[1], plain[1])}


class Prompts:
    """Plain captions of sprites, and the noise of each."""

    def __init__(self, attribute, sprites, seed):
        self.attribute, self.sprites, self.seed = attribute, sprites, seed

    def paint(self, painter, model=None, negative=""):
        return painter.paint(world.plain_captions(self.sprites), self.seed, model, negative)

    def right(self, judge, pictures):
        """In how many pictures the judge sees what their prompts say."""
        seen = classifier.read(judge, pictures)[self.attribute] == getattr(self.sprites, self.attribute)
        return int(seen.sum())


def moved(found, plain):
    """Mean absolute difference of pictures in [0, 1], of 255."""
    return float(np.abs(found - plain).mean() * 255)


def same(found, plain):
    """Share of pictures that are equal bit for bit."""
    return float((found == plain).reshape(len(found), -1).all(axis=1).mean())


def with_changes(model, changes):
    """A clone of a MODEL of the host with changes of its weights, {name of a layer: change}."""
    changed = model.clone()
    wanted = {f"diffusion_model.{name}.weight": ("diff", (change,)) for name, change in changes.items()}
    missed = set(wanted) - set(changed.add_patches(wanted, 1.0))
    if missed:
        raise RuntimeError(f"the host did not take {len(missed)} weights, {sorted(missed)[0]} among them")
    return changed


def erased(node, painter, model, method, concepts, permeability):
    """The MODEL with the adapters of some concepts, made on a demo model by a method."""
    files = [file_of(model, method, concept) for concept in concepts]
    if method not in OURS:
        from safetensors.torch import load_file

        return with_changes(painter.model, load_file(str(files[0])))
    from membrane.core.formats import native

    stack = None
    for file in files:
        before = {"stack": stack} if stack else {}
        stack = node("MembraneStack", adapter=native.load(str(file)), permeability=permeability, **before)[0]
    return node("MembraneApply", model=painter.model, clip=painter.clip, stack=stack)[0]


def measure(node, rows, sizes, store, quick):
    """{name: row} of one model; finished ones are in a file."""
    done = kept_rows(store)
    judged = {}
    print(HEADER)
    for name, (checkpoint, model, method, concepts, permeability, concept) in rows.items():
        if name not in done:
            costs = [cost_of(model, method, each, quick) for each in concepts]
            if checkpoint not in judged:
                judged[checkpoint] = Judged(node, checkpoint, sizes)
            place = judged[checkpoint]
            changed = erased(node, place.painter, model, method, concepts, permeability)
            others = tuple(each for each in concepts if each != concept)
            done[name] = place.row(changed, concept, others) | {
                "seconds": sum(cost["seconds"] for cost in costs),
                "megabytes": max(cost["megabytes"] for cost in costs),
                "kilobytes": sum(cost["kilobytes"] for cost in costs),
            }
            again = kept_rows(store)
            write(store, json.dumps(again | {name: done[name]}, indent=1) + "\n")  # others may run beside this one
        print(line(name, done[name]), flush=True)
    return {name: done[name] for name in rows}


# ---------------------------------------------------------------- tables and figures


HEADER = (
    "| adapters | erased, still seen | kept, right | kept, before | moved, of 255 | same | seconds | MB | kB |\n"
    + "|---" * 9
    + "|"
)


def line(name, row):
    return (
        f"| {name} | {row['erased']} / {row['erased_of']} | {row['kept']} / {row['kept_of']} "
        f"| {row['kept_before']} / {row['kept_of']} | {row['moved']:.2f} | {row['same']:.2f} | {row['seconds']:.0f} "
        f"| {row['megabytes']:.0f} | {row['kilobytes']:.0f} |"
    )


def figures_of(found):
    """{figure: number}, named model.row.what."""
    figures = {}
    for model, rows in found.items():
        for name, row in rows.items():
            key = re.sub(r"[^a-z0-9]+", "_", f"{model} {name}".lower())
            figures[f"{key}.erased_percent"] = round(100 * row["erased"] / row["erased_of"], 2)
            figures[f"{key}.kept_drop_points"] = round(100 * (row["kept_before"] - row["kept"]) / row["kept_of"], 2)
            figures[f"{key}.moved"] = round(row["moved"], 3)
            figures[f"{key}.kilobytes"] = round(row["kilobytes"], 1)
    return figures


def report(found):
    """All tables as Markdown."""
    titles = {"day": "U-Net", "transformer": "Transformer"}
    parts = ["# Trained erasure on both demo models\n", __doc__.split("\n\n", 2)[1] + "\n", "Seconds are of a machine "
             "that did other work as well.\n"]  # fmt: skip
    for model, rows in found.items():
        parts += [f"## {titles[model]}\n", HEADER, *(line(name, row) for name, row in rows.items()), ""]
    return "\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two steps and a few pictures, to see that it runs")
    parser.add_argument("--fresh", action="store_true", help="train and measure everything again")
    parser.add_argument("--models", nargs="*", choices=THREE, default=list(THREE))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=[m for m in METHODS if m != THOROUGH])
    parser.add_argument("--rows", nargs="*", help="only rows whose names begin so")
    parser.add_argument("--finished", action="store_true", help="only the report, of the rows that are kept")
    parser.add_argument("--one", choices=CONCEPTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        global STORE
        STORE = ROOT / "output" / "training_dit_quick"
    if args.one:
        return train_one(args.models[0], args.methods[0], args.one, args.quick)
    torch.set_num_threads(1)  # two spinning threads on busy cores are slower than one
    if args.fresh or args.quick:
        for file in STORE.glob("*"):
            file.unlink()
    found = {}
    if args.finished:
        return tell({model: finished(model) for model in THREE})
    node, tidy = start()
    try:
        for model in args.models:
            rows = rows_of(model, args.methods)
            if args.rows:
                rows = {name: row for name, row in rows.items() if name.startswith(tuple(args.rows))}
            sizes = (8, 8) if args.quick else (ERASED, KEPT)
            found[model] = measure(node, rows, sizes, STORE / f"rows_{model}.json", args.quick)
    finally:
        tidy()
    return tell(found, whole=not (args.quick or args.rows) and len(found) == len(THREE))


def finished(model):
    """{name: row} of the rows of a model that are kept, in order."""
    file = STORE / f"rows_{model}.json"
    kept = kept_rows(file)
    return {name: kept[name] for name in rows_of(model, METHODS) if name in kept}


def tell(found, whole=True):
    """Prints the figures, and writes the report where it is whole."""
    if whole:
        write(ROOT / "benchmarks" / "results" / "training_dit.md", report(found))
    print(json.dumps({"figures": figures_of(found)}))


if __name__ == "__main__":
    main()
