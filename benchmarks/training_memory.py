"""Memory and time of training an eraser on networks of full width: SDXL, and a stack of Flux.1's blocks.

The host's own classes with random weights, kept in bfloat16 and computed in float32, as the host does where a device
has no fast bfloat16; on a CPU, one thread, small pictures: Stable Diffusion XL whole (2.6 billion weights), and one
double and two single blocks of Flux.1's width with its text entries and 64 rows of text. One iteration of Latent
Anchoring with four anchors, rank 1, on the layers that the node takes by itself, after a roll-out of one step with
guidance where the model needs it. Each network in a process of its own; where no kernel of Linux tells the peak of
memory, that of the whole process counts.

    model    MB of the weights
    peak     MB at most above the loaded model, during an iteration
    factors  how many numbers are trained, thousands
    seconds  of the processor, of one iteration
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from membrane.benchmarks.erasure_quality import write
from membrane.benchmarks.training_dit import Peak
from membrane.tools import ROOT
from membrane.tools.host_library import start

STORE = ROOT / "output" / "training_memory"
LAYOUTS = {  # name: (of tools/tiny/networks.py, sizes, pixels of the pictures, rows of text)
    "sdxl": ("sdxl_full", {}, 128, 77),
    "flux_blocks": ("flux_full", {"depth": 1, "depth_single_blocks": 2}, 128, 64),
}
TOY = {"sdxl": ("sdxl", {}, 64, 77), "flux_blocks": ("flux_dev", {}, 64, 8)}
CONCEPT, SURROGATE = "a red star", "a red circle"


def one(name, quick):
    """Figures of one network, measured in this process."""
    torch.set_num_threads(1)
    node, tidy = start()
    from membrane.core.erasers.spm import Settings, train
    from membrane.core.erasers.spm_run import texts_of
    from membrane.core.host.runs.training import HostDenoiser, encoded_for, fitted, trainable_sites
    from membrane.core.text.similarity import short_captions
    from membrane.tools.tiny import networks, words

    kind, sizes, pixels, padded = (TOY if quick else LAYOUTS)[name]
    try:
        made = networks.network(kind)
        model = networks.build(kind, dtype=torch.bfloat16, manual_cast=torch.float32, **sizes)
        clip = words.clip(made.width, made.extra, padded, max(padded, words.LONGEST))
        given = fitted(model, pixels, pixels, preserves=False)
        settings = Settings(steps=1, rollout_steps=2, warmup=0, cycles=1, **given)
        anchors = short_captions()[:8] if settings.anchor_kind == "texts" else []
        texts = texts_of(
            encoded_for(model, clip, [CONCEPT, SURROGATE, "", *anchors], pixels, pixels),
            [(CONCEPT, SURROGATE)], anchors,
        )  # fmt: skip
        weights = sum(p.numel() * p.element_size() for p in model.model.diffusion_model.parameters())
        with HostDenoiser(model, trainable_sites(model)) as denoiser:
            peak, times = Peak(), [time.process_time()]
            train(
                denoiser, denoiser.parameters(), texts, settings, lambda _: times.append(time.process_time()),
                path=denoiser.path(settings.rollout_steps),
            )  # fmt: skip
            found = {
                "model": weights / 1e6,
                "peak": peak(),
                "factors": sum(p.numel() for p in denoiser.parameters()) / 1000,
                "layers": len(denoiser.layers),
                "pixels": pixels,
                "seconds": times[-1] - times[-2],
            }
    finally:
        tidy()
    return found


def measured(name, quick):
    """The same in a process of its own; kept."""
    file = STORE / f"{name}{'_quick' * quick}.json"
    if not file.is_file():
        command = [sys.executable, "-m", "benchmarks.training_memory", "--one", name, *(["--quick"] if quick else [])]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
        write(file, done.stdout.strip().splitlines()[-1])
    return json.loads(file.read_text(encoding="utf-8"))


HEADER = (
    "| network | layers trained | factors, thousands | model, MB | peak above it, MB | pictures | seconds |\n"
    + "|---" * 7
    + "|"
)


def line(name, row):
    return (
        f"| {name} | {row['layers']} | {row['factors']:.0f} | {row['model']:.0f} | {row['peak']:.0f} "
        f"| {row['pixels']} x {row['pixels']} | {row['seconds']:.0f} |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny networks, to see that it runs")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--networks", nargs="*", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--one", choices=LAYOUTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(one(args.one, args.quick)))
    if args.fresh or args.quick:
        for file in STORE.glob("*_quick.json" if args.quick else "*"):
            file.unlink()
    print(HEADER)
    rows = {}
    for name in args.networks:
        rows[name] = measured(name, args.quick)
        print(line(name, rows[name]), flush=True)
    if not args.quick and len(rows) == len(LAYOUTS):
        text = "\n".join([HEADER, *(line(name, row) for name, row in rows.items())])
        about = __doc__.split("\n\n", 2)[1]
        write(
            ROOT / "benchmarks" / "results" / "training_memory.md", f"# Training on full width\n\n{about}\n\n{text}\n"
        )
    figures = {
        f"{name}_{what}": round(row[key], 1)
        for name, row in rows.items()
        for what, key in (("peak_megabytes", "peak"), ("model_megabytes", "model"), ("iteration_seconds", "seconds"))
    }
    return print(json.dumps({"figures": figures}))


if __name__ == "__main__":
    main()
