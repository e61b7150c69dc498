"""Quality of closed-form erasure on the demo world: what is gone, what stays, what changes beside it.

Same model, same prompts and same noise for every method; counts beside every share. The judge is the bundled
classifier, which never saw a picture of the model. Runs on the ComfyUI of the tests, in this process, through the
pack's own nodes. Every finished row is kept in output/erasure_quality.json, so that an interrupted run goes on where
it stopped (--fresh starts anew).

    erased    pictures of the erased concepts in which the judge still sees them; 64 a task
    kept      pictures of the other values of the same attribute that the judge reads right; 96 a task
    others    worst loss, in points, of the other three attributes over all pictures
    pixels    mean absolute difference to the unerased picture of the same prompt and noise, kept prompts, 0 to 255
    features  the same distance in the judge's last hidden layer, relative to the length of the unerased one

--model transformer runs it on the transformer, whose T5-style encoder spreads a word over the whole prompt.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from membrane.tools import ROOT
from membrane.tools.host_library import start
from membrane.tools.pixel_world import classifier, world

BATCH = 4  # pictures of one prompt, which differ in their noise
STEPS, CFG, SIZE = 20, 1.5, 128  # the model's card
ERASED, KEPT = 64, 96  # pictures a task
LATENT_SCALE = 0.18215
MODELS = {"day": "normal", "transformer": "simple"}  # variant of the demo model: scheduler on its card
TASKS = {  # name: (attribute, [(concept, replacement)])
    "1 shape": ("shape", [("star", "circle")]),
    "2 shapes": ("shape", [("star", "circle"), ("heart", "square")]),
    "4 shapes": ("shape", [("star", "circle"), ("heart", "square"), ("moon", "ring"), ("cross", "triangle")]),
    "2 colours": ("colour", [("red", "blue"), ("green", "yellow")]),
    "1 texture": ("texture", [("striped", "plain")]),
}


# ---------------------------------------------------------------- the methods, a table to add to


def captions_like_the_prompts(attribute, count=8):
    """Templates for one attribute: the bare word, and `count` captions in which every other value occurs."""
    shapes, colours, textures, grounds = (world.NAMES[a] for a in ("shape", "colour", "texture", "background"))
    templates = ["{}"]
    for i in range(count):
        words = {
            "shape": shapes[i % 8],
            "colour": colours[(i + 3 * (i // 8)) % 8],
            "texture": textures[(i + i // 8) % 4],
            "background": grounds[(i + i // 4) % 4],
        }
        words[attribute] = "{}"
        templates.append(f"a {words['texture']} {words['colour']} {words['shape']} on {words['background']}")
    return "\n".join(templates)


def more_captions(attribute):
    """Twice as many."""
    return captions_like_the_prompts(attribute, 16)


def erase_with(**settings):
    """A method: MembraneErase with the bare word, its other defaults and these settings; functions of the task's
    attribute are called."""

    def variant(node, demo, task):
        attribute, pairs = TASKS[task]
        concepts = [concept for concept, _ in pairs]
        preserve = [name for name in world.NAMES[attribute] if name not in concepts]
        values = {name: value(attribute) if callable(value) else value for name, value in settings.items()}
        begin = time.perf_counter()
        model, adapter = node(
            "MembraneErase", model=demo[0], clip=demo[1], concepts="\n".join(map(" -> ".join, pairs)),
            **{"preserve": "\n".join(preserve), "templates": "{}", **values},
        )  # fmt: skip
        return {"model": model, "adapter": adapter, "seconds": time.perf_counter() - begin}

    return variant


def gated(variant):
    """The same erasure, opened for each prompt by Facilitated Transport."""

    def opened(node, demo, task):
        found = variant(node, demo, task)
        stack = node("MembraneStack", adapter=found["adapter"], permeability="facilitated transport")[0]
        return found | {"model": node("MembraneApply", model=demo[0], clip=demo[1], stack=stack)[0]}

    return opened


def negative_prompt(node, demo, task):
    """No erasure: the concepts as the negative prompt, at the same CFG."""
    return {"negative": ", ".join(concept for concept, _ in TASKS[task][1])}


METHODS = {  # name: function (node, demo, task) -> what differs from the plain run: model, negative, adapter, seconds
    "negative prompt": negative_prompt,
    "UCE": erase_with(method="UCE"),
    "RECE": erase_with(method="RECE"),
    "SPEED": erase_with(method="SPEED"),
    "Double Projections": erase_with(method="Double Projections"),
    "UCE, captions": erase_with(method="UCE", templates=captions_like_the_prompts),
    "UCE, 16 captions": erase_with(method="UCE", templates=more_captions),  # what we recommend
    "SPEED, captions": erase_with(method="SPEED", templates=captions_like_the_prompts),
    "SPEED, 16 captions, all tokens": erase_with(method="SPEED", templates=more_captions, tokens="all", rho=0.1),
    "Double Projections, 16 captions, all tokens": erase_with(
        method="Double Projections", templates=more_captions, tokens="all"
    ),
    "RECE, captions": erase_with(method="RECE", templates=captions_like_the_prompts),
    "RECE, captions, penalty on distance": erase_with(
        method="RECE", templates=captions_like_the_prompts, penalty_on="distance"
    ),
    "UCE, gated": gated(erase_with(method="UCE")),
    "SPEED, gated": gated(erase_with(method="SPEED")),
    "UCE, 16 captions, gated": gated(erase_with(method="UCE", templates=more_captions)),
}
ROWS = {  # what a transformer's encoder makes a question of
    "UCE, as published": erase_with(method="UCE", rows="as published"),
    "UCE, captions, as published": erase_with(method="UCE", templates=captions_like_the_prompts, rows="as published"),
    "UCE, captions, pooled left": erase_with(method="UCE", templates=captions_like_the_prompts, pooled="leave"),
}


# ---------------------------------------------------------------- pictures


class Painter:
    """Pictures of prompts, one KSampler run a prompt; the text of a prompt is encoded once."""

    def __init__(self, node, demo, scheduler="normal"):
        self.node, (self.model, self.clip, _) = node, demo
        self.texts, self.scheduler = {}, scheduler

    def text(self, prompt):
        if prompt not in self.texts:
            self.texts[prompt] = self.node("CLIPTextEncode", clip=self.clip, text=prompt)[0]
        return self.texts[prompt]

    def paint(self, prompts, first_seed, model=None, negative=""):
        """Sprites (len(prompts) * BATCH, 16, 16, 3) in [0, 1]; BATCH in a row belong to one prompt."""
        from membrane.core.demo.world import latent_to_rgb

        latent = self.node("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=BATCH)[0]
        pictures = []
        for i, prompt in enumerate(prompts):
            drawn = self.node(
                "KSampler", model=model or self.model, seed=first_seed + i, steps=STEPS, cfg=CFG,
                sampler_name="euler", scheduler=self.scheduler, denoise=1.0, latent_image=latent,
                positive=self.text(prompt), negative=self.text(negative),
            )[0]["samples"]  # fmt: skip
            pictures.append(latent_to_rgb(drawn.float().cpu() * LATENT_SCALE).permute(0, 2, 3, 1))
        return torch.cat(pictures).numpy()


# ---------------------------------------------------------------- measuring


def sprites_of(attribute, values, count, seed, banned=()):
    """`count` sprites that take the given values of an attribute in turn, each other attribute evenly spread over all
    names that are not banned."""
    rng = np.random.default_rng(seed)
    allowed = {a: [i for i, name in enumerate(world.NAMES[a]) if name not in banned] for a in world.ATTRIBUTES}
    fields = {a: rng.permutation(np.resize(allowed[a], count)) for a in world.ATTRIBUTES}
    fields[attribute] = np.resize(values, count)
    return world.Sprites(**fields)


def sets_of(task, erased=ERASED, kept=KEPT):
    """(sprites with an erased value, sprites with a kept one), one per prompt."""
    attribute, pairs = TASKS[task]
    names = world.NAMES[attribute]
    gone = [names.index(concept) for concept, _ in pairs]
    rest = [i for i in range(len(names)) if i not in gone]
    return sprites_of(attribute, gone, erased // BATCH, 31), sprites_of(attribute, rest, kept // BATCH, 32)


@torch.no_grad()
def features(judge, pictures):
    """The judge's last hidden layer, (n, 192)."""
    return judge.body(torch.as_tensor(pictures).permute(0, 3, 1, 2) * 2 - 1)


def rights(judge, pictures, sprites):
    """{attribute: whether the judge's answer is what the prompt said, (n,)}."""
    answers = classifier.read(judge, pictures)
    return {a: answers[a] == np.repeat(getattr(sprites, a), BATCH) for a in world.ATTRIBUTES}


def compare(judge, attribute, sets, plain, found):
    """Counts and distances of one row. plain, found: (pictures of the erased set, of the kept set)."""
    before, after = ([rights(judge, p, s) for p, s in zip(pictures, sets)] for pictures in (plain, found))

    def right(parts, name):
        return int(sum(part[name].sum() for part in parts))

    total = sum(len(p) for p in plain)
    others = {a: [right(before, a), right(after, a)] for a in world.ATTRIBUTES if a != attribute}
    base = features(judge, plain[1])
    return {
        "erased": int(after[0][attribute].sum()),
        "erased_before": int(before[0][attribute].sum()),
        "erased_of": len(plain[0]),
        "kept": int(after[1][attribute].sum()),
        "kept_before": int(before[1][attribute].sum()),
        "kept_of": len(plain[1]),
        "others": others,
        "others_of": total,
        "others_drop_points": max(100 * (b - a) / total for b, a in others.values()),
        "pixels": float(np.abs(found[1] - plain[1]).mean() * 255),
        "features": float(((features(judge, found[1]) - base).norm(dim=1) / base.norm(dim=1)).mean()),
    }


def run_row(painter, judge, task, method, sets, plain):
    """One row: a method on a task."""
    node, demo = painter.node, (painter.model, painter.clip, None)
    change = method(node, demo, task)
    adapter, seconds = change.pop("adapter", None), change.pop("seconds", None)
    prompts = [world.plain_captions(s) for s in sets]
    found = [painter.paint(p, seed, **change) for p, seed in zip(prompts, (1000, 5000))]
    result = compare(judge, TASKS[task][0], sets, plain, found)
    if adapter is not None:
        folder = Path(sys.modules["folder_paths"].models_dir) / "erasure_adapters"
        saved = node("MembraneSaveAdapter", adapter=adapter, filename_prefix="quality")
        result["kilobytes"] = (folder / saved.ui["text"][0]).stat().st_size / 1000
        result["seconds"] = seconds
    return result


# ---------------------------------------------------------------- keeping and telling


def write(file, text):
    """Writes a file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def kept_rows(file):
    """The rows that a file holds, if it is there."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def line(name, row):
    """One row of the table, as Markdown."""
    parts = [
        name,
        f"{row['erased']} / {row['erased_of']}",
        f"{row['kept']} / {row['kept_of']}",
        f"{row['kept_before']} / {row['kept_of']}",
        f"{row['others_drop_points']:.1f}",
        f"{row['pixels']:.2f}",
        f"{row['features']:.3f}",
        f"{row['seconds']:.2f}" if "seconds" in row else "-",
        f"{row['kilobytes']:.1f}" if "kilobytes" in row else "-",
    ]
    return "| " + " | ".join(parts) + " |"


HEADER = (
    "| method | erased, still seen | kept, right | kept, before | others, points lost | pixels | features "
    "| seconds | kB |\n|---|---|---|---|---|---|---|---|---|"
)


def table(rows):
    """The whole report as Markdown. rows: {task: {method: row}}."""
    parts = []
    for task, found in rows.items():
        pairs = ", ".join(" -> ".join(pair) for pair in TASKS[task][1])
        parts += [f"\n## {task}: {pairs}\n", HEADER, *(line(name, row) for name, row in found.items())]
    return "\n".join(parts) + "\n"


def figures_of(rows):
    """{figure: number}, named task.method.what."""
    figures = {}
    for task, found in rows.items():
        for name, row in found.items():
            key = f"{task}.{name}".replace(" ", "_").replace(",", "").lower()
            figures[f"{key}.erased_percent"] = round(100 * row["erased"] / row["erased_of"], 2)
            figures[f"{key}.kept_drop_points"] = round(100 * (row["kept_before"] - row["kept"]) / row["kept_of"], 2)
            figures[f"{key}.others_drop_points"] = round(row["others_drop_points"], 2)
            figures[f"{key}.pixels"] = round(row["pixels"], 2)
            figures[f"{key}.features"] = round(row["features"], 4)
    return figures


def unerased(painter, file, sets):
    """The unerased pictures of both sets, painted once and kept in a file."""
    if not file.is_file():
        painted = [painter.paint(world.plain_captions(s), seed) for s, seed in zip(sets, (1000, 5000))]
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, *painted)
    with np.load(file) as kept:
        return [kept[name] for name in kept.files]


def measure(tasks, methods, store, sizes, say=print, variant="day"):
    """{task: {method: row}}; rows that the file `store` holds are not measured again."""
    rows = kept_rows(store)
    node, tidy = start()
    try:
        demo = node("MembraneDemoModel", variant=variant)
        painter, judge = Painter(node, demo, MODELS[variant]), classifier.load()
        for task in tasks:
            done = rows.setdefault(task, {})
            missing = [name for name in methods if name not in done]
            if not missing:
                continue
            sets = sets_of(task, *sizes)
            plain = unerased(painter, store.with_name(f"{store.stem}_{task.replace(' ', '_')}.npz"), sets)
            say(f"\n## {task}\n{HEADER}")
            for name in missing:
                done[name] = run_row(painter, judge, task, methods[name], sets, plain)
                write(store, json.dumps(rows, indent=1) + "\n")
                say(line(name, done[name]))
    finally:
        tidy()
    return {task: {name: rows[task][name] for name in methods if name in rows[task]} for task in TASKS if task in rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few pictures of one task, to see that it runs")
    parser.add_argument("--fresh", action="store_true", help="measure every row again")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="*", choices=[*METHODS, *ROWS], help="all that fit the model")
    parser.add_argument("--model", choices=MODELS, default="day", help="variant of the demo model")
    args = parser.parse_args()
    known = METHODS if args.model == "day" else METHODS | ROWS
    chosen = {name: known[name] for name in args.methods or known}
    torch.set_num_threads(1)  # two spinning threads on busy cores are slower than one
    name = "erasure_quality" + f"_{args.model}" * (args.model != "day")
    store = ROOT / "output" / f"{name}{'_quick' * args.quick}.json"
    if args.fresh or args.quick:
        for file in store.parent.glob(f"{store.stem}*" if args.quick else f"{name}*"):
            file.unlink()
    tasks, sizes = (args.tasks[:1], (8, 8)) if args.quick else (args.tasks, (ERASED, KEPT))
    rows = measure(tasks, chosen, store, sizes, lambda text: print(text, flush=True), args.model)
    if not args.quick:
        title = "# Quality of closed-form erasure" + ", on the transformer" * (args.model != "day")
        write(ROOT / "benchmarks" / "results" / f"{name}.md", f"{title}\n{table(rows)}")
    print(json.dumps({"figures": figures_of(rows)}))


if __name__ == "__main__":
    main()
