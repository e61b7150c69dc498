"""What another strength of Erase Concepts costs: passes of the text encoder and seconds of the processor.

The host's own CLIP of Stable Diffusion 1.5 in its full size (123 M parameters, random weights, float32), one thread,
beside a small network that reads vectors of that width; the texts, their number and their length are those of a real
run. "anew" empties the memory of encoded texts before each run, as when there was none; "kept" is what an artist gets
who moves the strength after a first run. Each run has its own strength; the figures are medians over --turns runs.
"""

import argparse
import json
import time
from statistics import median

import torch
from membrane.tools.host_library import start

WORDS = {"remove": "van gogh -> a painting", "keep": "claude monet\npaul cezanne\na landscape", "kind": "style"}


def counted(clip):
    """A list that grows by one for each pass of a CLIP's encoder."""
    model, passes = clip.cond_stage_model, []
    encode = model.encode_token_weights
    model.encode_token_weights = lambda *args: (passes.append(1), encode(*args))[1]
    return passes


def runs(node, model, clip, count, anew):
    """(passes, processor seconds) of `count` runs, each of its own strength; anew: each with an empty memory."""
    from membrane.core.host.text.kept import KEPT

    passes, found = counted(clip), []
    for turn in range(count):
        if anew:
            KEPT.known.clear()
            KEPT.size = 0
        before, start_at = len(passes), time.process_time()
        node("MembraneForget", model=model, clip=clip, **WORDS, strength=(1.0 if anew else 0.5) - 0.1 * turn)
        found.append((len(passes) - before, time.process_time() - start_at))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small encoder, to see that it runs")
    parser.add_argument("--turns", type=int, default=1, choices=range(1, 6))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # two spinning threads on busy cores are slower than one
    node, tidy = start()
    from membrane.tools.tiny import encoders, networks

    figures = {}
    with torch.inference_mode():
        clip = encoders.encoder("sd15", full=not arguments.quick)
        width = clip.encode_from_tokens(clip.tokenize("")).shape[-1]
        model = networks.build("sd15", context_dim=width)
        print(f"{sum(p.numel() for p in clip.cond_stage_model.parameters()) / 1e6:.0f} M parameters", flush=True)
        for name, anew in (("anew", True), ("kept", False)):  # the last run of the former fills the memory
            found = runs(node, model, clip, arguments.turns, anew)
            passes, seconds = (median(column) for column in zip(*found))
            print(f"{name}: {passes:.0f} passes of the encoder, {seconds:.2f} s of the processor", flush=True)
            figures |= {f"{name}_passes": passes, f"{name}_processor_seconds": round(seconds, 3)}
    tidy()
    print(json.dumps({"figures": figures}))


if __name__ == "__main__":
    main()
