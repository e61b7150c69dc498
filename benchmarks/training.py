"""Latent Anchoring on the demo world: what training erases, keeps and costs, and how it moves to another checkpoint.

Trains with the node of the pack, at the sizes of the demo model, and measures as erasure_quality does. The tables are
those of the SPM paper: components (table 4) and ranks (table 3), then three adapters stacked, and all of them on the
"night" checkpoint without retuning. Trained adapters and finished rows are kept in output/training, so that an
interrupted run goes on (--fresh starts anew). --cost compares one iteration with the published loop's layout of rows.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time

import torch
from membrane.benchmarks import erasure_quality as quality
from membrane.benchmarks.gates import FULL, sd15
from membrane.tools import ROOT
from membrane.tools.host_library import start

classifier, world = quality.classifier, quality.world
STORE = ROOT / "output" / "training"
STEPS, RATE, ANCHORING = 600, 3e-3, 10.0
ADAPTERS = {  # name: (attribute, concept, surrogate, settings)
    "star": ("shape", "star", "circle", {}),
    "star, no anchoring": ("shape", "star", "circle", {"anchoring": 0.0}),
    "heart": ("shape", "heart", "square", {}),
    "striped": ("texture", "striped", "plain", {}),
    "star, rank 2": ("shape", "star", "circle", {"rank": 2}),
    "star, rank 4": ("shape", "star", "circle", {"rank": 4}),
}
TRANSPORT, FIXED = "facilitated transport", "fixed"
ROWS = {  # name: (checkpoint, adapters, permeability, concept that is looked for)
    "star: none (no anchoring, no transport)": ("day", ["star, no anchoring"], FIXED, "star"),
    "star: anchoring only": ("day", ["star"], FIXED, "star"),
    "star: transport only": ("day", ["star, no anchoring"], TRANSPORT, "star"),
    "star: both": ("day", ["star"], TRANSPORT, "star"),
    "star: both, rank 2": ("day", ["star, rank 2"], TRANSPORT, "star"),
    "star: both, rank 4": ("day", ["star, rank 4"], TRANSPORT, "star"),
    "heart: both": ("day", ["heart"], TRANSPORT, "heart"),
    "striped: both": ("day", ["striped"], TRANSPORT, "striped"),
    "three stacked, star": ("day", ["star", "heart", "striped"], TRANSPORT, "star"),
    "three stacked, heart": ("day", ["star", "heart", "striped"], TRANSPORT, "heart"),
    "three stacked, striped": ("day", ["star", "heart", "striped"], TRANSPORT, "striped"),
    "three summed, star": ("day", ["star", "heart", "striped"], FIXED, "star"),
    "three summed, striped": ("day", ["star", "heart", "striped"], FIXED, "striped"),
    "night, star": ("night", ["star"], TRANSPORT, "star"),
    "night, heart": ("night", ["heart"], TRANSPORT, "heart"),
    "night, striped": ("night", ["striped"], TRANSPORT, "striped"),
}


# ---------------------------------------------------------------- training


def captions(attribute, words, rng):
    """A caption for each word in the place of an attribute, the others drawn."""
    found = []
    for word in words:
        named = {a: rng.choice(world.NAMES[a]) for a in world.ATTRIBUTES} | {attribute: word}
        found.append(f"a {named['texture']} {named['colour']} {named['shape']} on {named['background']}")
    return found


def trained(node, demo, name, steps):
    """(ErasureAdapter, seconds) of one of ADAPTERS; trained only once."""
    from membrane.core.formats import native

    attribute, concept, surrogate, settings = ADAPTERS[name]
    file = STORE / f"{name.replace(', ', '_').replace(' ', '_')}_{steps}.safetensors"
    if file.is_file():
        adapter = native.load(str(file))
        return adapter, adapter.card.settings["seconds"]
    rng = random.Random(0)
    others = [word for word in world.NAMES[attribute] if word != concept]
    templates = ["{}", "a {}", *captions(attribute, ["{}"] * 14, rng)]
    begin = time.perf_counter()
    adapter, report = node(
        "MembraneTrain", model=demo[0], clip=demo[1], concepts=f"{concept} -> {surrogate}", steps=steps,
        learning_rate=RATE, warmup=30, cycles=1, width=quality.SIZE, height=quality.SIZE, rollout_steps=10,
        timestep="matching", templates="\n".join(templates), preview_every=0, save_every=10**5,
        preserve="\n".join([*others, *captions(attribute, others * 3, rng)]), **{"anchoring": ANCHORING, **settings},
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    adapter.card.settings["seconds"] = round(seconds)
    STORE.mkdir(parents=True, exist_ok=True)
    native.save(adapter, str(file))
    print(f"{name}: {seconds:.0f} s, {report.splitlines()[-1]}", flush=True)
    return adapter, seconds


# ---------------------------------------------------------------- quality


class Judged:
    """Pictures of one checkpoint, before and after, judged."""

    def __init__(self, node, variant, sizes):
        self.demo, self.sizes, self.plain = node("MembraneDemoModel", variant=variant), sizes, {}
        self.painter, self.judge = quality.Painter(node, self.demo), classifier.load()

    def row(self, model, concept, others=()):
        """Counts and distances for a concept, see quality.compare(); no prompt has one of the others, erased too."""
        attribute = next(a for a in world.ATTRIBUTES if concept in world.NAMES[a])
        gone = world.NAMES[attribute].index(concept)
        rest = [i for i, name in enumerate(world.NAMES[attribute]) if name not in (concept, *others)]
        sets = [
            quality.sprites_of(attribute, values, count // quality.BATCH, seed, others)
            for values, count, seed in (([gone], self.sizes[0], 31), (rest, self.sizes[1], 32))
        ]
        prompts = [world.plain_captions(s) for s in sets]
        if (concept, others) not in self.plain:
            self.plain[concept, others] = [self.painter.paint(p, seed) for p, seed in zip(prompts, (1000, 5000))]
        found = [self.painter.paint(p, seed, model=model) for p, seed in zip(prompts, (1000, 5000))]
        return quality.compare(self.judge, attribute, sets, self.plain[concept, others], found)


def stacked(node, demo, adapters, permeability):
    stack = None
    for adapter in adapters:
        before = {"stack": stack} if stack else {}
        stack = node("MembraneStack", adapter=adapter, permeability=permeability, **before)[0]
    return node("MembraneApply", model=demo[0], clip=demo[1], stack=stack)[0]


def line(name, row):
    return (
        f"| {name} | {row['erased']} / {row['erased_of']} | {row['kept']} / {row['kept_of']} "
        f"| {row['kept_before']} / {row['kept_of']} | {row['others_drop_points']:.1f} | {row['pixels']:.2f} |"
    )


HEADER = (
    "| adapters | erased, still seen | kept, right | kept, before | others, points lost | pixels |\n"
    "|---|---|---|---|---|---|"
)


def measure(node, names, steps, sizes, store):
    rows = quality.kept_rows(store)
    judged, day = {}, None
    print(HEADER)
    for name in names:
        if name not in rows:
            variant, adapters, permeability, concept = ROWS[name]
            day = day or node("MembraneDemoModel", variant="day")
            found = [trained(node, day, adapter, steps)[0] for adapter in adapters]
            place = judged.setdefault(variant, None) or Judged(node, variant, sizes)
            judged[variant] = place
            others = tuple(ADAPTERS[a][1] for a in adapters if ADAPTERS[a][1] != concept)
            rows[name] = place.row(stacked(node, place.demo, found, permeability), concept, others)
            again = quality.kept_rows(store)
            quality.write(store, json.dumps(again | rows, indent=1) + "\n")
        print(line(name, rows[name]), flush=True)
    return {name: rows[name] for name in names}


# ---------------------------------------------------------------- cost of one iteration


def ours(denoiser, texts, settings, x, k, path):
    from membrane.core.erasers.objectives import spm_losses
    from membrane.core.erasers.spm import anchor_rows, rollout

    anchors, weights = anchor_rows(texts, settings, torch.Generator().manual_seed(0))
    x = rollout(denoiser, x, k, texts, settings, path)
    erase, anchor = spm_losses(denoiser, x, path.told(k), texts, anchors, weights, settings)
    (erase + settings.lam * anchor).backward()


def published(denoiser, texts, settings, x, k, path):
    """The rows of the published loop: each prediction with its unconditional half, all eight anchor rows twice."""
    from membrane.core.erasers.conditions import together
    from membrane.core.erasers.spm import noise_anchors, rollout

    drawn = noise_anchors(settings.anchors, texts.concept, torch.Generator().manual_seed(0))
    x = rollout(denoiser, x, k, texts, settings, path)
    t = path.told(k)

    def predict(rows, on):
        found = denoiser.predict(x.expand(len(rows), -1, -1, -1), torch.full((len(rows),), t), rows, on)
        return found[len(rows) // 2 :]

    pairs = together([row for sample in drawn for row in (texts.empty, sample)])
    with torch.no_grad():
        concept, surrogate = (predict(together([texts.empty, y]), False) for y in (texts.concept, texts.surrogate))
    erase = (predict(together([texts.empty, texts.concept]), True)
             - (surrogate - settings.eta * (concept - surrogate))).square().mean()  # fmt: skip
    on = predict(pairs, True)
    with torch.no_grad():
        off = predict(pairs, False)
    (erase + settings.lam * (on - off).square().mean()).backward()


def without_checkpoints(model):
    """Takes away what computes a block twice, from a network that a HostDenoiser has made ready."""
    for module in model.model.diffusion_model.modules():
        if type(module.__dict__.get("forward")).__name__ == "_Checkpointed":
            del module.forward


def cost(way, full, size):
    """Prints seconds of each of 3 iterations and the peak of memory above the loaded model; in a process of its own."""
    torch.set_num_threads(1)
    node, tidy = start()
    from membrane.core.erasers.paths import NoiseSchedule
    from membrane.core.erasers.spm import Settings, Texts
    from membrane.core.host.runs.training import HostDenoiser, trainable_sites

    model = sd15(FULL) if full else node("MembraneDemoModel", variant="day")[0]
    width = 768 if full else 128
    g = torch.Generator().manual_seed(0)
    texts = Texts(*(torch.randn(77, width, generator=g) for _ in range(3)))
    settings = Settings(size=(size, size))
    path = NoiseSchedule(settings)
    step = {"ours": ours, "published": published}[way]
    with HostDenoiser(model, trainable_sites(model)) as denoiser:
        if way == "published":
            without_checkpoints(model)
        with torch.no_grad():
            denoiser.predict(torch.randn(2, 4, size, size), torch.tensor([5, 5]), torch.stack([texts.empty] * 2), True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            # 15 steps of the rollout are the mean; both ways spend the same on them, so the large network does fewer
            step(denoiser, texts, settings, torch.randn(1, 4, size, size, generator=g), 4 if full else 15, path)
            seconds.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tidy()
    print(json.dumps({"seconds": sorted(seconds)[1], "megabytes": (peak - before) / 1000, "whole": peak / 1000}))


def cost_figures(full, size):
    """Both ways in turn, each in a fresh process, so that their peaks of memory are their own."""
    found = {}
    for way in ("ours", "published"):
        command = [sys.executable, "-m", "benchmarks.training", "--one", way, "--size", str(size)]
        command += ["--full"] if full else []
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        found[way] = json.loads(out.strip().splitlines()[-1])
        print(f"{'SD 1.5' if full else 'demo model'}, latents {size} x {size}, {way}: {found[way]}", flush=True)
    return found


def costs(quick):
    """Figures of one iteration, on the demo model and on a full Stable Diffusion 1.5 network; kept as the rows are."""
    store = STORE / f"cost{'_quick' * quick}.json"
    if store.is_file():
        return json.loads(store.read_text(encoding="utf-8"))
    small = cost_figures(False, 16)
    figures = {"iteration_speedup": round(small["published"]["seconds"] / small["ours"]["seconds"], 2)}
    if not quick:
        large = cost_figures(True, 32)
        figures["sd15_iteration_speedup"] = round(large["published"]["seconds"] / large["ours"]["seconds"], 2)
        figures["peak_memory_ratio"] = round(large["ours"]["megabytes"] / large["published"]["megabytes"], 3)
        figures["sd15_peak_megabytes"] = round(large["ours"]["whole"])
    quality.write(store, json.dumps(figures))
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps and pictures, to see that it runs")
    parser.add_argument("--fresh", action="store_true", help="train and measure everything again")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS), help="only some rows of the tables")
    parser.add_argument("--cost", action="store_true", help="only the cost of one iteration")
    parser.add_argument("--one", choices=("ours", "published"), help=argparse.SUPPRESS)
    parser.add_argument("--full", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=32, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return cost(args.one, args.full, args.size)
    torch.set_num_threads(1)  # two spinning threads on busy cores are slower than one
    if args.fresh or args.quick:
        for file in STORE.glob("*" if args.fresh else "*_quick.json"):
            file.unlink()
    figures = {}
    if args.cost or args.rows == list(ROWS):
        figures |= costs(args.quick)
    if not args.cost:
        steps, sizes = (4, (8, 8)) if args.quick else (STEPS, (quality.ERASED, quality.KEPT))
        store = STORE / f"rows{'_quick' * args.quick}.json"
        node, tidy = start()
        rows = measure(node, args.rows[:2] if args.quick else args.rows, steps, sizes, store)
        tidy()
        figures |= summary(rows)
        if not args.quick and len(rows) == len(ROWS):
            table = "\n".join([HEADER, *(line(name, row) for name, row in rows.items())])
            quality.write(ROOT / "benchmarks" / "results" / "training.md", f"# Trained adapters\n\n{table}\n")
    print(json.dumps({"figures": figures}))
    return None


def summary(rows):
    """The figures of the issue: the worst of the three single adapters, of the stack, and of the other checkpoint."""

    def seen(row):
        return 100 * row["erased"] / row["erased_of"]

    def lost(row):
        return 100 * (row["kept_before"] - row["kept"]) / row["kept_of"]

    groups = {
        "": [f"{name}: both" for name in ("star", "heart", "striped")],
        "stacked_": [name for name in ROWS if name.startswith("three stacked")],
        "transfer_": [name for name in ROWS if name.startswith("night")],
    }
    figures = {}
    for prefix, names in groups.items():
        found = [rows[name] for name in names if name in rows]
        if found:
            figures[f"{prefix}erased_after"] = round(max(map(seen, found)), 2)
            figures[f"{prefix}kept_drop_points"] = round(max(map(lost, found)), 2)
    return figures


if __name__ == "__main__":
    main()
