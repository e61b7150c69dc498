"""What is erased, kept, damaged and brought back: every method of this pack and the published ones, one table.

Same demo model, same prompts, same noise for all. Published methods are set as their papers or code say: bare words,
one line a concept, the other values of the attribute preserved. The judge is the bundled classifier. The SPM adapters
are trained by this pack, with captions and anchors as in benchmarks/training.py; what is published is how they are
combined. ESD-x runs at two learning rates, chosen for this model.

    erased      pictures of the erased concepts in which the judge still sees them
    kept        pictures of the other values of the same attribute that the judge reads right
    reworded    both once more in wording that no caption has: the styles of tools/pixel_world/styles.py (comma lists,
                other openings, emphasis ...), of which the judge still sees the erased concept or reads the kept value
    synonyms    pictures of synonyms of the erased concepts in which the judge still sees them; only shapes have some
    H           harmonic mean of (1 - erased) and kept, 0 to 100
    integrity   of the kept pictures: 1 as before, 0 as another seed (core/measures/retention.py), with its interval
    words       pictures that show the first concept again, for prompts found by a search over words that only needs
                the text encoder (core/measures/attack.py); the concept's own words are not allowed
    derived     the same for RECE's derived vectors, with full knowledge of the weights (eq. 4, penalty 0.1)
    seconds     of one core to make the edit, training included; file: what has to be kept of it

Trained adapters, pictures of the unerased model and finished rows are kept in output/, so that an interrupted run goes
on (--fresh starts anew). --workers processes share the tasks.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from membrane.benchmarks import erasure_quality as quality
from membrane.benchmarks import training
from membrane.benchmarks.erasure_wording import Set
from membrane.tools import ROOT
from membrane.tools.host_library import start
from membrane.tools.pixel_world.styles import IN_STYLE
from membrane.tools.run import bench

classifier, world = quality.classifier, quality.world
FOLDER = ROOT / "output" / "erasure"
BATCH, SEEDS = 16, 2  # pictures a forward pass; noises of a prompt
ERASED, KEPT, ATTACKED = 24, 32, 8  # pictures a row
REWORDED, SYNONYMS = 2, 8  # more pictures a row: of each style of other wording, and with synonyms
SYNONYM = "synonym"
TRAINING_STEPS, TRAINING_RATE = 200, 5e-3
SHAPES = [("star", "circle"), ("heart", "square"), ("moon", "ring"), ("cross", "triangle")]
COLOURS = [("red", "blue"), ("green", "yellow"), ("pink", "orange"), ("purple", "cyan")]
TEXTURES = [("striped", "plain")]
TASKS = {
    "1 shape": ("shape", SHAPES[:1]),
    "1 colour": ("colour", COLOURS[:1]),
    "4 shapes": ("shape", SHAPES),
    "4 colours": ("colour", COLOURS),
    "1 texture": ("texture", TEXTURES),
}
ONE = ("1 shape", "1 colour", "1 texture")
FOUR = ("4 shapes", "4 colours")


@dataclass
class Edit:
    """What a method makes: a MODEL, a negative prompt, the seconds it took and the bytes to keep."""

    model: object
    negative: str = ""
    seconds: float = 0.0
    size: float = 0.0


# ---------------------------------------------------------------- methods


def erased_by(gate=None, file=None, **settings):
    """A closed form through MembraneErase; gate: its permeability, open everywhere when None; file(demo model) -> bytes
    of what the published code saves."""

    def make(bench, attribute, pairs):
        concepts = [concept for concept, _ in pairs]
        values = {name: value(attribute) if callable(value) else value for name, value in settings.items()}
        preserve = "\n".join(name for name in world.NAMES[attribute] if name not in concepts)
        begin = time.process_time()
        model, adapter = bench.node(
            "MembraneErase", model=bench.model, clip=bench.clip, concepts="\n".join(map(" -> ".join, pairs)),
            preserve=preserve, **values,
        )  # fmt: skip
        seconds = time.process_time() - begin
        if gate:
            model = bench.stacked([adapter], gate)
        return Edit(model, "", seconds, file(bench.model) if file else bench.saved(adapter))

    return make


def spm(permeability):
    """One trained adapter a concept, stacked."""

    def make(bench, attribute, pairs):
        adapters, seconds = [], 0.0
        for concept, surrogate in pairs:
            training.ADAPTERS[concept] = (attribute, concept, surrogate, {})
            took = FOLDER / "adapters" / f"{concept}_{bench.training_steps}.seconds"
            begin = time.process_time()
            adapters.append(training.trained(bench.node, bench.demo, concept, bench.training_steps)[0])
            if not took.is_file():
                quality.write(took, str(time.process_time() - begin))
            seconds += float(took.read_text())
        return Edit(bench.stacked(adapters, permeability), "", seconds, sum(map(bench.saved, adapters)))

    return make


def negative_prompt(bench, attribute, pairs):
    """The concepts as the negative prompt at the same CFG."""
    return Edit(bench.model, ", ".join(concept for concept, _ in pairs))


def weights_that(*ends):
    """Bytes, float32, of the weights whose names end so: what the published code writes."""

    def size(model):
        state = model.model.diffusion_model.state_dict()
        return sum(4 * w.numel() for name, w in state.items() if name.endswith(ends))

    return size


ESD_STEPS, ESD_GUIDANCE, ESD_DDIM, ESD_ETA = 150, 3.0, 10, 1.0


def esd_x(rate):
    """ESD-x (Gandikota et al., ICCV 2023): the cross-attention is fine-tuned so that its prediction for the concept's
    words becomes that of the frozen model, guided away from them (eq. 5 and 7; eta 1).

    Latents come from the model in training, guided by 3, at a random step; one concept is drawn for each step. The
    rates are those that erase here: at the published 1e-5 so small a network does not move in so few steps.
    """

    def make(bench, attribute, pairs):
        from membrane.core.erasers.paths import alphas_cumprod, ddim_step, rollout_timesteps
        from membrane.tools.pixel_world.evaluate import load_unet

        begin = time.process_time()
        file = ROOT / "assets" / "pixel_world" / "day.safetensors"
        frozen, tuned = load_unet(file).requires_grad_(False), load_unet(file).requires_grad_(False)
        parameters = {name: p.requires_grad_(True) for name, p in tuned.named_parameters() if ".attn2." in name}
        optimizer = torch.optim.Adam(parameters.values(), lr=rate)
        alphas, times = alphas_cumprod(), rollout_timesteps(ESD_DDIM)
        empty, *texts = (bench.vectors([word])[0].clone() for word in ["", *(concept for concept, _ in pairs)])
        draw = torch.Generator().manual_seed(0)
        for _ in range(2 if bench.quick else ESD_STEPS):
            text = texts[int(torch.randint(len(texts), (), generator=draw))]
            both, until = torch.stack([empty, text]), int(torch.randint(ESD_DDIM, (), generator=draw))
            x = torch.randn(1, 4, 16, 16, generator=draw)
            with torch.no_grad():
                for t, after in zip(times[:until], times[1:]):
                    off, on = tuned(x.expand(2, -1, -1, -1), torch.full((2,), float(t)), both).chunk(2)
                    x = ddim_step(x, off + ESD_GUIDANCE * (on - off), t, after, alphas)
                t = torch.full((2,), float(times[until]))
                off, on = frozen(x.expand(2, -1, -1, -1), t, both).chunk(2)
            loss = (tuned(x, t[:1], text[None]) - (off - ESD_ETA * (on - off))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        before = dict(frozen.named_parameters())
        change = {f"diffusion_model.{name}": ("diff", ((p - before[name]).detach(),)) for name, p in parameters.items()}
        model = bench.model.clone()
        missed = set(change) - set(model.add_patches(change, 1.0))
        if missed:
            raise RuntimeError(f"the host did not take {len(missed)} of ESD's weights, {sorted(missed)[0]} among them")
        return Edit(model, "", time.process_time() - begin, sum(4 * p.numel() for p in parameters.values()))

    return make


KV = ("attn2.to_k.weight", "attn2.to_v.weight")
CAPTIONS, MORE = quality.captions_like_the_prompts, quality.more_captions
PUBLISHED = {
    "negative prompt": negative_prompt,
    "UCE": erased_by(method="UCE", templates="{}", file=weights_that(*KV)),
    "RECE": erased_by(method="RECE", templates="{}", file=weights_that("")),
    "SPEED": erased_by(method="SPEED", templates="{}", layers="values", file=weights_that("attn2.to_v.weight")),
    "ESD-x, rate 1e-3": esd_x(1e-3),
    "ESD-x, rate 4e-4": esd_x(4e-4),
    "SPM's combination, trained here": spm("reference"),
}
RECOMMENDED = "Erase Concepts, only where the prompt asks for it"
OURS = {
    RECOMMENDED: erased_by(gate="meaning", method="UCE", replace_with=""),  # automatic captions; opens by meaning
    "UCE, 16 captions": erased_by(method="UCE", templates=MORE),
    "UCE, 16 captions, permeability": erased_by(gate="facilitated transport", method="UCE", templates=MORE),
    "SPM, permeability": spm("facilitated transport"),
    "SPM, by meaning": spm("meaning"),
    "SPEED, 16 captions, all tokens": erased_by(method="SPEED", templates=MORE, tokens="all", rho=0.1),
    "RECE, captions, penalty on distance": erased_by(method="RECE", templates=CAPTIONS, penalty_on="distance"),
    "Double Projections, 16 captions, all tokens": erased_by(method="Double Projections", templates=MORE, tokens="all"),
}
METHODS = PUBLISHED | OURS


# ---------------------------------------------------------------- pictures and counts


class Bench:
    """The demo model in the host, its text, its pictures and its judge."""

    def __init__(self, node, quick):
        from membrane.core.host.runs.sampling import Sampling

        self.node, self.quick = node, quick
        self.demo = node("MembraneDemoModel", variant="day")
        self.model, self.clip, _ = self.demo
        self.judge = classifier.load()
        self.settings = Sampling(quality.STEPS, quality.CFG, "euler", "normal", quality.SIZE, quality.SIZE)
        self.training_steps = 4 if quick else TRAINING_STEPS
        self.texts, self.found_words = {}, {}

    def vectors(self, prompts):
        """Text vectors (n, 77, d), each prompt encoded once."""
        for prompt in prompts:
            if prompt not in self.texts:
                self.texts[prompt] = self.node("CLIPTextEncode", clip=self.clip, text=prompt)[0][0][0]
        return torch.cat([self.texts[prompt] for prompt in prompts])

    def paint(self, vectors, seeds, model, negative=""):
        """Sprites (n, 16, 16, 3) in [0, 1] for text vectors (n, 77, d), a seed each."""
        from membrane.core.host.runs.sampling import preview_pictures, sample

        off, pictures = [[self.vectors([negative]), {}]], []
        with torch.inference_mode():
            for i in range(0, len(seeds), BATCH):
                on = [[vectors[i : i + BATCH], {}]]
                pictures.append(preview_pictures(model, sample(model, on, off, seeds[i : i + BATCH], self.settings)))
        return torch.cat(pictures).numpy()

    def saved(self, adapter):
        """Bytes of an adapter's file."""
        folder = Path(sys.modules["folder_paths"].models_dir) / "erasure_adapters"
        return (
            (folder / self.node("MembraneSaveAdapter", adapter=adapter, filename_prefix="b").ui["text"][0])
            .stat()
            .st_size
        )

    def stacked(self, adapters, permeability):
        """The model with adapters on it."""
        return training.stacked(self.node, self.demo, adapters, permeability)

    def words_for(self, attribute, pairs):
        """The prompts that the search over words finds for a task's first concept; for all methods the same."""
        from membrane.core.host.text.encode import encode
        from membrane.core.host.text.vocabulary import words_near
        from membrane.core.measures.attack import Search, search_prompts, search_target

        concept = pairs[0][0]
        if concept not in self.found_words:
            captions = [template for template in CAPTIONS(attribute).splitlines() if template != "{}"]
            with torch.inference_mode():
                on, off = (self.vectors([c.replace("{}", w) for c in captions]) for w in (concept, ""))
                target = search_target(off.mean(dim=0), on, off)
                found = search_prompts(
                    target, words_near(self.clip, concept, 500), lambda p: encode(self.clip, p).vectors,
                    Search(generations=3 if self.quick else 30),
                )  # fmt: skip
            self.found_words[concept] = [f.prompt for f in found[: ATTACKED // SEEDS]]
        return self.found_words[concept]


def seeds_of(prompts, first):
    """SEEDS seeds for each prompt, all different."""
    return list(range(first, first + prompts * SEEDS))


class Task:
    """One task: its prompts, and the pictures of the unerased model, which are kept in a file."""

    def __init__(self, bench, name):
        self.bench, self.name = bench, name
        self.attribute, self.pairs = TASKS[name]
        sizes = (4, 4) if bench.quick else (ERASED, KEPT)
        values = world.NAMES[self.attribute]
        gone = [values.index(concept) for concept, _ in self.pairs]
        rest = [i for i in range(len(values)) if i not in gone]
        self.sets = [
            quality.sprites_of(self.attribute, kind, size // SEEDS, seed)
            for kind, size, seed in zip((gone, rest), sizes, (31, 32))
        ]
        self.reworded = [
            Set(self.attribute, kind, seed, 1, REWORDED, SYNONYMS) for kind, seed in ((gone, 33), (rest, 34))
        ]
        self.first = gone[0]
        file = FOLDER / f"{name.replace(' ', '_')}{'_quick' * bench.quick}.npz"
        self.plain = load(file)
        if len(self.plain) < 4:
            FOLDER.mkdir(parents=True, exist_ok=True)
            np.savez(file, *(paint(i, bench.model) for paint in (self.paint, self.paint_reworded) for i in (0, 1)))
            self.plain = load(file)

    def paint(self, which, model, negative=""):
        vectors = self.bench.vectors(world.plain_captions(self.sets[which])).repeat_interleave(SEEDS, dim=0)
        seeds = seeds_of(len(self.sets[which]), (1000, 5000)[which])
        return self.bench.paint(vectors, seeds, model, negative)

    def paint_reworded(self, which, model, negative=""):
        prompts = self.reworded[which].prompts
        seeds = range((9000, 9500)[which], (9000, 9500)[which] + len(prompts))
        return self.bench.paint(self.bench.vectors(prompts), list(seeds), model, negative)

    def wording(self, pictures):
        """{what: [how many, of how many]} of the pictures of both sets in other wording."""
        found = {}
        for what, own, painted in zip(("left", "kept"), self.reworded, pictures):
            right = own.right(self.bench.judge, painted)
            kinds = {"reworded": ~np.isin(own.styles, (IN_STYLE, SYNONYM)), "synonyms": own.styles == SYNONYM}
            found |= {f"{what}_{kind}": [int(right[some].sum()), int(some.sum())] for kind, some in kinds.items()}
        return found

    def right(self, pictures, which):
        """How many of the pictures show what their prompt says."""
        answers = classifier.read(self.bench.judge, pictures)[self.attribute]
        return int((answers == np.repeat(getattr(self.sets[which], self.attribute), SEEDS)).sum())

    def row(self, method):
        """One row of the table."""
        from membrane.core.measures.retention import integrity
        from membrane.core.measures.scores import harmonic_mean

        edit = method(self.bench, self.attribute, self.pairs)
        found = [self.paint(which, edit.model, edit.negative) for which in (0, 1)]
        distances = rms(found[1], self.plain[1]).reshape(-1, SEEDS)
        plain = self.plain[1].reshape(-1, SEEDS, *self.plain[1].shape[1:])
        ceilings = rms(plain, np.roll(plain, -1, axis=1))
        counts = {"erased_of": len(found[0]), "kept_of": len(found[1])}
        for name, pictures in (("", found), ("_before", self.plain)):
            counts |= {f"erased{name}": self.right(pictures[0], 0), f"kept{name}": self.right(pictures[1], 1)}
        shares = [1 - counts["erased"] / counts["erased_of"], counts["kept"] / counts["kept_of"]]
        reworded = [self.paint_reworded(which, edit.model, edit.negative) for which in (0, 1)]
        return {
            **counts,
            **self.wording(reworded),
            **{f"{name}_before": count for name, count in self.wording(self.plain[2:]).items()},
            "harmonic": 100 * harmonic_mean(shares),
            "integrity": asdict(integrity(distances, ceilings)),
            **self.attacks(edit),
            "seconds": edit.seconds,
            "bytes": edit.size,
        }

    def attacks(self, edit):
        """How often the first concept comes back."""
        from membrane.core.host.patches.opened import attack_grams
        from membrane.core.measures.attack import derived_vectors

        bench = self.bench
        words = bench.words_for(self.attribute, self.pairs)
        mine = getattr(self.sets[0], self.attribute) == self.first
        captions = [c for c, own in zip(world.plain_captions(self.sets[0]), mine) if own][:ATTACKED]
        contexts = bench.vectors(captions)
        with torch.inference_mode():
            grams = attack_grams(bench.model, edit.model)
        derived = torch.stack([torch.cat([c[:1], derived_vectors(c[1:], *grams)]) for c in contexts])
        derived = derived[torch.arange(ATTACKED) % len(derived)]  # tasks of four concepts have fewer captions of each
        kinds = {
            "words": (bench.vectors(words).repeat_interleave(SEEDS, dim=0), seeds_of(len(words), 7000)),
            "derived": (derived, seeds_of(ATTACKED // SEEDS, 8000)),
        }
        counts = {}
        for kind, (vectors, seeds) in kinds.items():
            answers = classifier.read(bench.judge, bench.paint(vectors, seeds, edit.model, edit.negative))
            counts[kind] = int((answers[self.attribute] == self.first).sum())
        return counts | {"attacked_of": ATTACKED, "searched": words}


def load(file):
    """The pictures that are kept in a file, none where there is none."""
    if not file.is_file():
        return []
    with np.load(file) as kept:
        return [kept[part] for part in kept.files]


def rms(a, b):
    """Root mean square difference of pictures (..., h, w, 3)."""
    return np.sqrt(np.square(a - b).mean(axis=(-1, -2, -3)))


# ---------------------------------------------------------------- tables and figures


HEADER = (
    "| method | erased, still seen | kept, right | reworded, still seen | synonyms, still seen | reworded, kept | H "
    "| integrity | words | derived | seconds | file |\n" + "|---" * 12 + "|"
)


def line(name, row):
    i = row["integrity"]
    size = f"{row['bytes'] / 1000:,.0f} kB" if row["bytes"] else "-"
    return (
        f"| {name} | {row['erased']} / {row['erased_of']} | {row['kept']} / {row['kept_of']} "
        f"| {cell(row['left_reworded'])} | {cell(row['left_synonyms'])} | {cell(row['kept_reworded'])} "
        f"| {row['harmonic']:.1f} "
        f"| {i['value']:.3f} ({i['low']:.3f} to {i['high']:.3f}) | {row['words']} / {row['attacked_of']} "
        f"| {row['derived']} / {row['attacked_of']} | {row['seconds']:.2f} | {size} |"
    )


def cell(counts):
    """[how many, of how many] as a cell."""
    return f"{counts[0]} / {counts[1]}" if counts[1] else "-"


def table(rows):
    parts = []
    for task, found in rows.items():
        before = next(iter(found.values()))
        parts += [
            f"\n## {task}: {', '.join(map(' -> '.join, TASKS[task][1]))}\n",
            f"Unerased: {before['erased_before']} / {before['erased_of']} and {before['kept_before']} / "
            f"{before['kept_of']}; in other wording {cell(before['left_reworded_before'])} and "
            f"{cell(before['kept_reworded_before'])}, synonyms {cell(before['left_synonyms_before'])}. "
            f"Searched words: {', '.join(before['searched'])}.\n",
            HEADER,
            *(line(("" if name in OURS else "published: ") + name, row) for name, row in found.items()),
        ]
    return "\n".join(parts) + "\n"


WORDING = ("reworded", "synonyms", "reworded_kept_drop")


def mean_of(rows, tasks, name, what):
    """Mean over tasks of a method's erased percent, points of kept lost, harmonic mean, integrity or recovery."""
    value = {
        "erased": lambda r: 100 * r["erased"] / r["erased_of"],
        "kept_drop": lambda r: 100 * (r["kept_before"] - r["kept"]) / r["kept_of"],
        "harmonic": lambda r: r["harmonic"],
        "integrity": lambda r: r["integrity"]["value"],
        "words": lambda r: 100 * r["words"] / r["attacked_of"],
        "derived": lambda r: 100 * r["derived"] / r["attacked_of"],
        "reworded": lambda r: percent(r["left_reworded"]),
        "synonyms": lambda r: percent(r["left_synonyms"]),
        "reworded_kept_drop": lambda r: percent(r["kept_reworded_before"]) - percent(r["kept_reworded"]),
    }[what]
    if what == "synonyms":
        tasks = [task for task in tasks if TASKS[task][0] == "shape"]
    return round(float(np.mean([value(rows[task][name]) for task in tasks])), 3)


def percent(counts):
    return 100 * counts[0] / counts[1]


def figures_of(rows):
    """{figure: number}. Ours is the recommended method; the best published one is that with the best mean H, chosen
    separately for one concept and for four."""
    complete = {name for name in METHODS if all(name in rows.get(task, ()) for task in TASKS)}
    figures = {}
    for group, tasks, wanted in (("one", ONE, ("erased", "kept_drop", "integrity")), ("four", FOUR, ("harmonic",))):
        tasks = [task for task in tasks if task in rows]
        if not tasks:
            continue
        for who, names in (("ours", [RECOMMENDED]), ("best_published", PUBLISHED)):
            there = [name for name in names if all(name in rows[task] for task in tasks)]
            if there:
                best = max(there, key=lambda name: mean_of(rows, tasks, name, "harmonic"))
                figures |= {f"{who}_{group}_{what}": mean_of(rows, tasks, best, what) for what in wanted}
    for name in sorted(complete):
        key = re.sub(r"[^a-z0-9-]+", "_", name.lower())
        for what in ("erased", "kept_drop", *WORDING, "harmonic", "integrity", "words", "derived"):
            figures[f"{key}.{what}"] = mean_of(rows, TASKS, name, what)
    return figures


def summary_table(rows):
    """The table for the README: means over all tasks, over one concept and over four."""
    lines = [
        "| method | still seen, % | kept, points lost | reworded, % | synonyms, % | reworded, points lost | H | H, one "
        "| H, four | integrity | words, % | derived, % |",
        "|---" * 12 + "|",
    ]
    for name in METHODS:
        if all(name in rows.get(task, ()) for task in TASKS):
            every = [mean_of(rows, TASKS, name, what) for what in ("erased", "kept_drop", *WORDING, "harmonic")]
            one, four = (mean_of(rows, tasks, name, "harmonic") for tasks in (ONE, FOUR))
            rest = [mean_of(rows, TASKS, name, what) for what in ("integrity", "words", "derived")]
            cells = [f"{v:.1f}" for v in (*every, one, four)] + [f"{rest[0]:.3f}"] + [f"{v:.0f}" for v in rest[1:]]
            lines.append("| " + " | ".join([("" if name in OURS else "published: ") + name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def plot(rows, file):
    """Kept against erased, one dot a method: means over all tasks, as a PNG."""
    from PIL import Image, ImageDraw, ImageFont

    size, edge = 640, 70
    picture = Image.new("RGB", (size + 380, size), "white")
    draw = ImageDraw.Draw(picture)
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    inner = size - 2 * edge
    draw.rectangle((edge, edge, edge + inner, edge + inner), outline="#888888")
    draw.text((edge, 20), "Erased and intact: mean over all tasks", "black", ImageFont.load_default(18))
    draw.text((edge + 150, size - 34), "erased, % of pictures", "black", font)
    draw.text((edge, edge - 22), "integrity of what is kept", "black", font)
    names = [name for name in METHODS if all(name in rows.get(task, ()) for task in TASKS)]
    values = {n: (1 - mean_of(rows, TASKS, n, "erased") / 100, mean_of(rows, TASKS, n, "integrity")) for n in names}
    low, drawn = min(0.0, *(y for _, y in values.values())), []
    for k in range(6):
        x, y = edge + inner * k / 5, edge + inner * (1 - k / 5)
        draw.text((x - 8, edge + inner + 6), f"{20 * k}", "black", small)
        draw.text((edge - 40, y - 8), f"{low + (1 - low) * k / 5:.2f}", "black", small)
    for i, (name, (x, y)) in enumerate(values.items()):
        px, py = edge + inner * x, edge + inner * (1 - (y - low) / (1 - low))
        place = (px, py)
        while any(abs(px - ox) < 18 and abs(py - oy) < 18 for ox, oy in drawn):
            px -= 20  # beside the one that lies there already, on a line to its own place
        drawn.append((px, py))
        draw.line((px, py, *place), fill="#888888")
        colour = "#c2543d" if name in OURS else "#4a6fa5"
        draw.ellipse((px - 9, py - 9, px + 9, py + 9), fill=colour)
        label = f"{i + 1}"
        draw.text((px - draw.textlength(label, small) / 2, py - 8), label, "white", small)
        draw.ellipse((size, edge + 30 * i, size + 18, edge + 30 * i + 18), fill=colour)
        draw.text((size + 9 - draw.textlength(label, small) / 2, edge + 30 * i + 1), label, "white", small)
        draw.text((size + 28, edge + 30 * i), ("" if name in OURS else "published: ") + name, "black", font)
    partial = file.with_suffix(".partial")
    picture.save(partial, "PNG")
    partial.replace(file)


def machine():
    """What kind of machine this is, in words."""
    kind = bench.machine()
    return f"{kind['cores']} cores of {kind['cpu']}"


def store_of(quick, part=""):
    return FOLDER / f"rows{'_quick' * quick}{part}.json"


def read_rows(quick):
    """{task: {method: row}} of all finished rows, in the order of the tables."""
    found = {}
    for file in sorted(FOLDER.glob(f"rows{'_quick' * quick}_[0-9]*.json")):
        for task, rows in json.loads(file.read_text(encoding="utf-8")).items():
            found.setdefault(task, {}).update(rows)
    # rows of before the columns of other wording are not finished
    return {t: {m: found[t][m] for m in METHODS if "left_reworded" in found[t].get(m, ())} for t in TASKS if t in found}


def work(part, parts, quick, tasks, methods):
    """Measures the rows of every parts-th task that are not there yet."""
    training.STORE, training.RATE = FOLDER / "adapters", TRAINING_RATE
    done = read_rows(quick)
    store = store_of(quick, f"_{part}")
    mine = quality.kept_rows(store)
    node, tidy = start()
    try:
        bench = Bench(node, quick)
        for name in tasks[part::parts]:
            missing = [m for m in methods if m not in done.get(name, {})]
            if not missing:
                continue
            task = Task(bench, name)
            print(f"\n## {name}\n{HEADER}", flush=True)
            for method in missing:
                begin = time.process_time()
                row = task.row(METHODS[method])
                row["cpu_seconds"] = time.process_time() - begin
                mine.setdefault(name, {})[method] = row
                quality.write(store, json.dumps(mine, indent=1) + "\n")
                print(line(method, row), flush=True)
    finally:
        tidy()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few pictures of one task, to see that it runs")
    parser.add_argument("--fresh", action="store_true", help="train and measure everything again")
    parser.add_argument("--workers", type=int, default=2, help="processes that share the tasks")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)  # two spinning threads on busy cores are slower than one
    tasks = args.tasks[:1] if args.quick else args.tasks
    if args.part is not None:
        return work(args.part, args.workers, args.quick, tasks, args.methods)
    if args.fresh or args.quick:
        for file in FOLDER.glob("**/*" if args.fresh else "*_quick*"):
            if file.is_file():
                file.unlink()
    begin = time.monotonic()
    if args.workers == 1 or args.quick:
        work(0, 1, args.quick, tasks, args.methods)
    else:
        again = [*sys.argv[1:], "--workers", str(args.workers)]
        again = [a for a in again if a not in ("--fresh",)]
        command = [sys.executable, "-m", "benchmarks.erasure", *again]
        workers = [subprocess.Popen([*command, "--part", str(i)], cwd=ROOT) for i in range(args.workers)]
        try:
            codes = [worker.wait() for worker in workers]
        finally:
            for worker in workers:
                worker.terminate()
        if any(codes):
            sys.exit(f"a worker ended with exit codes {codes}; run it again, it goes on where it stopped")
    rows = read_rows(args.quick)
    cpu = sum(row["cpu_seconds"] for found in rows.values() for row in found.values())
    print(f"\n{summary_table(rows)}\n{time.monotonic() - begin:.0f} s now, {cpu:.0f} s of processor time in all rows")
    if not args.quick and all(len(rows.get(task, ())) == len(METHODS) for task in TASKS):
        results = ROOT / "benchmarks" / "results"
        head = (
            f"# Erasure methods side by side\n\n{datetime.date.today()}, {machine()}, `python3 run.py "
            f"bench erasure`. {ERASED} pictures of erased and {KEPT} of kept values a row, {SEEDS} noises a prompt.\n\n"
            f"![erased against intact](erasure.png)\n\nMeans over all {len(TASKS)} tasks:\n\n"
        )
        quality.write(results / "erasure.md", head + summary_table(rows) + table(rows))
        plot(rows, results / "erasure.png")
    print(json.dumps({"figures": figures_of(rows)}))
    return None


if __name__ == "__main__":
    main()
