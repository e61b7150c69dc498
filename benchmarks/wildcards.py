"""A server that is asked for thousands of wildcard prompts: gates of a fixed prompt before and after, and its memory.

A ComfyUI of its own on the CPU, asked over HTTP as the page asks it: the demo model (day) with star erased by an
adapter whose gate follows the prompt, and a prompt that stays in the graph for the whole run, encoded once. Every
queued prompt has a text of its own. At the start and at the end the fixed prompt is sampled from the same noise and
previewed.

    python run.py bench wildcards
    python -m benchmarks.wildcards --count 300     # fewer; writes nothing
    python -m benchmarks.wildcards --minutes 30    # as many as are done by then
    python -m benchmarks.wildcards --plain         # wildcards drawn without the erasure: what the server itself keeps
"""

import argparse
import io
import json
import sys
import time

import numpy as np
import psutil
from membrane.tools.run import hosts
from membrane.tools.run.comfy_server import Server
from PIL import Image

FIXED, ERASED = "a red star on snow", "star"
SHAPES, COLOURS, GROUNDS = ("heart", "circle", "square"), ("red", "blue", "green"), ("snow", "sand", "grass")
GATED, OPEN = "facilitated transport", "fixed"
KEPT_SEED, ASKED_SEED = 0, 1  # the first one's picture stays in the graph, so that its text stays in use
POINTS = 20  # at which the memory is noted
TOLERANCE = 1e-4  # of a gate


def node(kind, **inputs):
    """A node of an API prompt."""
    return {"class_type": kind, "inputs": inputs}


def sampled(model, text, seed):
    """The nodes that draw a text with a model and show it, named after the text's node."""
    latent = node("EmptyLatentImage", width=64, height=64, batch_size=1)
    noise = {"seed": seed, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    ends = {"positive": [text, 0], "negative": ["negative", 0], "latent_image": [f"{text}_latent", 0]}
    return {
        f"{text}_latent": latent,
        f"{text}_sampler": node("KSampler", model=[model, 0], **noise, **ends),
        f"{text}_picture": node("VAEDecode", samples=[f"{text}_sampler", 0], vae=["demo", 2]),
        f"{text}_shown": node("PreviewImage", images=[f"{text}_picture", 0]),
    }


def graph(permeability=GATED, seed=KEPT_SEED, wildcard=None, preview=None, erased=True):
    """An API prompt that draws the fixed text, and what else is asked for.

    wildcard: another text to draw; preview: a word that makes the node that previews the gates run again.
    """
    nodes = {
        "demo": node("MembraneDemoModel", variant="day"),
        "erase": node(
            "MembraneErase", model=["demo", 0], clip=["demo", 1], concepts=f"{ERASED} -> circle", replace_with="",
            preserve="heart", method="UCE", strength=1.0,
        ),
        "stack": node(
            "MembraneStack", adapter=["erase", 1], strength=1.0, start_percent=0.0, end_percent=1.0,
            permeability=permeability,
        ),
        "apply": node("MembraneApply", model=["demo", 0], clip=["demo", 1], stack=["stack", 0]),
        "fixed": node("CLIPTextEncode", clip=["demo", 1], text=FIXED),
        "negative": node("CLIPTextEncode", clip=["demo", 1], text=""),
    }  # fmt: skip
    model = "apply" if erased else "demo"
    nodes |= sampled(model, "fixed", seed)
    if wildcard:
        nodes |= {"wildcard": node("CLIPTextEncode", clip=["demo", 1], text=wildcard), **sampled(model, "wildcard", 0)}
    if preview:
        lines = f"{FIXED}\n{preview}"
        nodes["preview"] = node("MembranePreview", clip=["demo", 1], stack=["stack", 0], prompts=lines)
        nodes["chart"] = node("PreviewImage", images=["preview", 0])
    return nodes


def wildcard_text(number):
    """A text of its own for each number; every fourth one has what is erased."""
    shape = ERASED if number % 4 == 0 else SHAPES[number % 3]
    return f"a {COLOURS[number // 3 % 3]} {shape} on {GROUNDS[number // 9 % 3]} {number}"


class Asked:
    """A server and what it was asked."""

    def __init__(self, server):
        self.server, self.process = server, psutil.Process(server.process.pid)

    def megabytes(self):
        """What the server and its children hold, RSS in MB."""
        family = (self.process, *self.process.children(recursive=True))
        return sum(one.memory_info().rss for one in family) / 2**20

    def run(self, **what):
        """The history entry of a graph, once it is done."""
        return self.server.wait(self.server.queue(graph(**what)), timeout=600)

    def picture(self, **what):
        """Pixels (64, 64, 3) of the fixed prompt from the seed that is not kept."""
        images = self.run(seed=ASKED_SEED, **what)["outputs"]["fixed_shown"]["images"]
        ((_, content),) = self.server.images({"outputs": {"fixed": {"images": images}}})
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)

    def gate(self, word):
        """The gate of the fixed prompt as Preview Permeability says it."""
        lines = self.run(preview=word)["outputs"]["preview"]["membrane"][0]["lines"]
        return float(lines[lines.index(FIXED) + 1].split()[-1])  # "  star   1.000"


def asked(server, count, erased=True, minutes=None):
    """{figure: number} of so many wildcard prompts, or of those that are done in some minutes; erased: whether these
    are drawn with the erasure."""
    here = Asked(server)
    first, opened, plain = here.picture(), here.picture(permeability=OPEN), here.picture(erased=False)
    gate = here.gate("before")
    here.run()  # from here on the fixed text stays in the graph
    every, sizes, begin = max(1, count // POINTS), [], time.monotonic()
    for number in range(1, count + 1):
        here.run(wildcard=wildcard_text(number), erased=erased)
        if number % every == 0:
            sizes.append(here.megabytes())
            print(f"{number} prompts, {sizes[-1]:.0f} MB, {time.monotonic() - begin:.0f} s", flush=True)
        if minutes is not None and time.monotonic() - begin > 60 * minutes:
            break
    sizes.append(here.megabytes())
    last, gate_after = here.picture(), here.gate("after")
    warm = len(sizes) // 4  # what is kept for good is there by then
    return {
        "prompts": number,
        "gate_before": gate,
        "gate_after": gate_after,
        "levels_from_before": int(np.abs(last - first).max()),
        "levels_from_open": int(np.abs(last - opened).max()),
        "levels_from_no_erasure": int(np.abs(last - plain).max()),
        "memory_first_mb": round(sizes[0], 1),
        "memory_quarter_mb": round(sizes[warm], 1),
        "memory_last_mb": round(sizes[-1], 1),
        "memory_most_mb": round(max(sizes), 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000, help="wildcard prompts; 5000 without it")
    parser.add_argument("--minutes", type=float, help="end after so many minutes, however many prompts are done")
    parser.add_argument("--plain", action="store_true", help="draw the wildcards without the erasure, for comparison")
    arguments = parser.parse_args()
    count = arguments.count
    if count < 1:
        parser.error("--count needs at least one prompt")
    with Server(hosts.wanted().path, sys.executable, options=["--cpu"]) as server:
        figures = asked(server, count, not arguments.plain, arguments.minutes)
    print(json.dumps({"figures": figures}))
    same = abs(figures["gate_after"] - figures["gate_before"]) <= TOLERANCE
    return not same or figures["levels_from_before"] > 0


if __name__ == "__main__":
    sys.exit(main())
