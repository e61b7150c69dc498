"""What an erasure at a text entry adds to a step of a Flux-shaped network: time per step against the bare model.

The host's own Flux class with random weights at half the width of Flux.1 (1536 channels, 12 heads; one double block,
two single blocks), 64 rows of T5's width and a pooled vector, 128 x 128 pixels, one thread, float32. Each variant is
sampled right after the bare model with the same prompt; a step is the processor's time between two calls of the
sampler, so that what happens once per prompt is not in it. The figures are medians of the ratios of the two. Flux.1 has
19 double and 38 single blocks of four times the arithmetic, beside which whatever is added to the text is less.
"""

import argparse
import json
import time
from statistics import median

import torch
from membrane.tools.host_library import start

SIZES = {
    "hidden_size": 1536, "num_heads": 12, "axes_dim": [16, 56, 56], "depth": 1, "depth_single_blocks": 2,
    "context_in_dim": 4096, "vec_in_dim": 768,
}  # fmt: skip
ROWS = 64  # of text
STEPS = 3
CONCEPTS = "\n".join(f"{word} -> circle" for word in ("star", "heart", "moon", "house", "tree", "cat", "dog", "sea"))


def step_times(node, model, text, latents):
    """Seconds of the processor for each step but the first, which prepares the text."""
    import comfy.model_management
    import comfy.sample

    comfy.model_management.load_models_gpu([model])
    noise, times = torch.randn(1, 16, latents, latents, generator=torch.Generator().manual_seed(1)), []
    comfy.sample.sample(
        model, noise, STEPS, 1.0, "euler", "simple", text, text, torch.zeros_like(noise), disable_pbar=True, seed=1,
        callback=lambda *args: times.append(time.process_time()),
    )  # fmt: skip
    return [after - before for before, after in zip(times, times[1:])]


def variants(node, model, clip):
    """{name: MODEL with maps at both text entries}."""

    def erased(concepts):
        return node(
            "MembraneErase", model=model, clip=clip, concepts=concepts, replace_with="", preserve="", method="UCE",
            strength=1.0, pooled="edit",
        )[1]  # fmt: skip

    def applied(adapter, mode="fixed", **settings):
        stack = node("MembraneStack", adapter=adapter, strength=1.0, permeability=mode, **settings)[0]
        return node("MembraneApply", model=model, clip=clip, stack=stack)[0]

    one, eight = erased(CONCEPTS.splitlines()[0]), erased(CONCEPTS)
    return {
        "map": applied(one),
        "map_of_8": applied(eight),
        "gated": applied(one, "facilitated transport"),
        "range": applied(one, end_percent=0.8),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small network, to see that it runs")
    parser.add_argument("--latents", type=int, default=16, help="latents are this many pixels wide and high")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    node, tidy = start()
    from membrane.tools.tiny import networks, words

    sizes, turns = dict(SIZES), arguments.turns
    if arguments.quick:
        sizes, turns = {**SIZES, "hidden_size": 256, "num_heads": 2, "depth_single_blocks": 1}, 1
    with torch.inference_mode():
        model = networks.build("flux_dev", **sizes)
        clip = words.clip(sizes["context_in_dim"], words.pooled(sizes["vec_in_dim"]), ROWS)
        text = node("CLIPTextEncode", clip=clip, text="a red star")[0]
        print(f"{sum(p.numel() for p in model.model.parameters()) / 1e6:.0f} M parameters", flush=True)
        measured = variants(node, model, clip)
        ratios, bare = {name: [] for name in measured}, []
        for turn in range(turns + 1):
            for name, variant in measured.items():
                before = step_times(node, model, text, arguments.latents)
                found = step_times(node, variant, text, arguments.latents)
                if turn:  # the first one warms up
                    bare += before
                    ratios[name].append(median(found) / median(before))
            print(f"turn {turn} of {turns}: bare {median(before):.2f} s", flush=True)
    for name, values in ratios.items():
        print(f"{name:10} {median(values):.3f}x of the bare step ({min(values):.3f} to {max(values):.3f})")
    figures = {f"{name}_ratio": round(median(values), 3) for name, values in ratios.items()}
    tidy()
    print(json.dumps({"figures": {**figures, "bare_step_seconds": round(median(bare), 3)}}))


if __name__ == "__main__":
    main()
