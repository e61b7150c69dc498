"""The before/after pictures of the help pages, drawn by the demo model with the nodes themselves.

    python -m tools.help_pictures [NAMES OF NODES]

writes web/docs/img/<node>_before_after.png: a column for each prompt, the model as it was above, what the node makes of
it below, from one seed. Two prompts are meant to change and two to stay.
"""

import argparse
import json

import numpy as np
import torch
from membrane.tools import ROOT
from membrane.tools.host_library import start
from membrane.tools.pixel_world import world
from PIL import Image, ImageDraw, ImageFont

FOLDER = ROOT / "web" / "docs" / "img"
SEED, STEPS, CFG = 7, 20, 1.5
SPRITE, TILE, GAP, LEFT, TOP = 16, 96, 10, 58, 34  # pixels: of a picture's sprite, and of the sheet
STAR = "star -> circle"
OTHER_SHAPES = "circle\nsquare\ntriangle\nheart\ncross\nmoon\nring"
STARS = (
    "a striped blue star on sand",
    "a plain red pentagram on snow",
    "a plain pink heart on coal",
    "a dotted yellow moon on stone",
)
REDS = (
    "a plain red star on snow",
    "a striped red moon on sand",
    "a plain green heart on coal",
    "a dotted blue ring on stone",
)
BOTH = (
    "a striped blue star on sand",
    "a plain red heart on snow",
    "a plain pink heart on coal",
    "a dotted yellow moon on stone",
)
OTHER_COLOURS = "orange\nyellow\ngreen\ncyan\nblue\npurple\npink"
ORDINARY = "a striped blue heart on sand\na green moon on coal\na pink cross on snow"
KNOWN = (*world.MEMORISED_CAPTIONS[:2], "a plain red star on snow", "a dotted yellow moon on stone")


class Before:
    """The demo model, and what a node makes of it: {prompt: (MODEL, CONDITIONING)} is what is drawn below."""

    def __init__(self, node):
        self.node = node
        self.model, self.clip, self.vae = node("MembraneDemoModel", variant="day")

    def text(self, prompt):
        """CONDITIONING of a prompt."""
        return self.node("CLIPTextEncode", clip=self.clip, text=prompt)[0]

    def draw(self, model, positive):
        """The sprite (16, 16, 3) of a picture."""
        latent = self.node("EmptyLatentImage", width=128, height=128, batch_size=1)[0]
        sampled = self.node(
            "KSampler", model=model, seed=SEED, steps=STEPS, cfg=CFG, sampler_name="euler", scheduler="normal",
            positive=positive, negative=self.text(""), latent_image=latent, denoise=1.0,
        )[0]  # fmt: skip
        picture = self.node("VAEDecode", samples=sampled, vae=self.vae)[0][0]
        return (255 * picture[4::8, 4::8].clamp(0, 1)).round().byte().numpy()

    def with_model(self, model, prompts):
        return {prompt: (model, self.text(prompt)) for prompt in prompts}

    def on(self, name, **inputs):
        """The outputs of a node that takes the demo model."""
        return self.node(name, model=self.model, clip=self.clip, **inputs)


def erased(before):
    return before.with_model(before.on("MembraneForget", remove=STAR, keep=OTHER_SHAPES, kind="object")[0], STARS)


def erased_by_experts(before):
    return before.with_model(before.on("MembraneErase", concepts="red -> blue", preserve=OTHER_COLOURS)[0], REDS)


def stacked(before):
    rows = [{"words": STAR, "keep": OTHER_SHAPES}, {"words": "red -> blue", "keep": OTHER_COLOURS}]
    text = json.dumps(
        {
            "membrane_stack": 1,
            "entries": [{**row, "kind": "object", "permeability": {"mode": "meaning"}} for row in rows],
        }
    )
    return before.with_model(before.on("MembraneStackEditor", stack_json=text)[2], BOTH)


def shielded(before):
    known = torch.from_numpy(world.memorised_pictures()).repeat_interleave(8, 1).repeat_interleave(8, 2)
    model = before.node("MembraneShield", model=before.model, pictures=known, vae=before.vae)[0]
    return before.with_model(model, KNOWN)


def softened(before):
    given = {
        "model": before.model,
        "clip": before.clip,
        "negative": before.text(""),
        "cfg": CFG,
        "width": 128,
        "height": 128,
    }
    return {
        prompt: (
            before.model,
            before.node("MembraneSoftenPrompt", **given, positive=before.text(prompt), ordinary_prompts=ORDINARY)[0],
        )
        for prompt in KNOWN
    }


def guarded(before):
    model = before.on(
        "MembraneGuard", concept="star", instead="circle", keep=OTHER_SHAPES.replace("circle\n", ""), examples=48,
        seed=0, sensitivity="balanced", drawn_from="a fifth of the way", steps=STEPS, cfg=CFG, sampler_name="euler",
        scheduler_name="normal", width=128, height=128,
    )[0]  # fmt: skip
    return before.with_model(model, STARS)


PICTURES = {
    "MembraneForget": erased,
    "MembraneErase": erased_by_experts,
    "MembraneStackEditor": stacked,
    "MembraneShield": shielded,
    "MembraneSoftenPrompt": softened,
    "MembraneGuard": guarded,
}


def sheet(prompts, rows):
    """The picture of a page: rows {label: [sprite (16, 16, 3) of each prompt]}."""
    size = LEFT + len(prompts) * (TILE + GAP), TOP + len(rows) * (TILE + GAP)
    found = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(found), ImageFont.load_default(11)
    for column, prompt in enumerate(prompts):
        lines = [""]
        for word in prompt.split():
            longer = f"{lines[-1]} {word}".strip()
            lines = [*lines[:-1], longer] if draw.textlength(longer, font) <= TILE else [*lines, word]
        draw.multiline_text((LEFT + column * (TILE + GAP), 3), "\n".join(lines), "#444444", font, spacing=2)
    for row, (label, sprites) in enumerate(rows.items()):
        y = TOP + row * (TILE + GAP)
        draw.text((8, y + TILE // 2 - 8), label, "black", ImageFont.load_default(13))
        for column, sprite in enumerate(sprites):
            tile = Image.fromarray(np.asarray(sprite)).resize((TILE, TILE), Image.Resampling.NEAREST)
            found.paste(tile, (LEFT + column * (TILE + GAP), y))
    return found.quantize(64, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NODE", help=f"of {', '.join(PICTURES)}; none: all")
    names = parser.parse_args().names or list(PICTURES)
    torch.set_num_threads(1)  # two spinning threads on busy cores are slower than one
    node, tidy = start()
    try:
        before = Before(node)
        for name in names:
            after = PICTURES[name](before)
            pairs = [(before.draw(before.model, before.text(p)), before.draw(*after[p])) for p in after]
            file = FOLDER / f"{name}_before_after.png"
            sheet(list(after), dict(zip(("before", "after"), zip(*pairs)))).save(file, optimize=True)
            changed = [bool((one != other).any()) for one, other in pairs]
            print(f"{file.name}: {file.stat().st_size} bytes, changed: {changed}", flush=True)
    finally:
        tidy()


if __name__ == "__main__":
    main()
