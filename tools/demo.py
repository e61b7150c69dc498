"""The demo: erases a shape on a real host over HTTP, shows it in a picture and measures it in a report.

It does so on both demo models: a U-Net that reads CLIP and a transformer that reads T5.
"""

import argparse
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from membrane.tools import ROOT
from membrane.tools.pixel_world import classifier, world
from membrane.tools.run.comfy_server import Server, ServerError
from PIL import Image, ImageDraw, ImageFont

WORKFLOW = ROOT / "tests" / "workflows" / "erase_a_concept.json"
# nodes of the workflow by their titles
MODEL, ERASE, PROMPT, LATENT, COMPARE, SAVE_ORIGINAL, SAVE_ERASED = "1", "2", "3", "5", "6", "10", "11"
MODELS = {"U-Net": "day", "transformer": "transformer"}  # variants of MODEL
CONCEPT = "star"
BATCH, ERASED_PROMPTS, KEPT_PROMPTS = 4, 16, 21
COLUMNS = (
    ("the concept", "a striped blue star on sand"),
    ("a paraphrase", "a drawing of a plain red pentagram on snow"),
    ("kept: heart", "a plain pink heart on coal"),
    ("kept: moon", "a dotted yellow moon on stone"),
    ("kept: cross", "a checkered green cross on snow"),
    ("kept: ring", "a striped orange ring on coal"),
)


def sprites_of(shapes, count, seed):
    """`count` sprites that take the given shapes in turn, each other attribute evenly spread."""
    rng = np.random.default_rng(seed)

    def spread(names):
        return rng.permutation(np.resize(np.arange(len(names)), count))

    return world.Sprites(
        np.resize(shapes, count), spread(world.COLOURS), spread(world.TEXTURES), spread(world.BACKGROUNDS)
    )


def sprite_pictures(pngs):
    """Saved pictures -> sprites (n, 16, 16, 3) in [0, 1]: the mean of each block of 8 x 8."""
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(p)).convert("RGB"), np.float32) for p in pngs]) / 255
    block = pictures.shape[1] // world.SIZE
    return pictures.reshape(len(pictures), world.SIZE, block, world.SIZE, block, 3).mean((2, 4))


class Client:
    """Queues the workflow with another model (a key of MODELS), other prompts and seeds, as any script would."""

    def __init__(self, server, model):
        self.server = server
        self.workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
        self.workflow[MODEL]["inputs"]["variant"] = MODELS[model]

    @property
    def settings(self):
        """The widgets of the erasing node, without its links."""
        return {k: v for k, v in self.workflow[ERASE]["inputs"].items() if not isinstance(v, list)}

    def run(self, text, seed, batch):
        """PNGs of the original and of the erased model, `batch` each."""
        workflow = json.loads(json.dumps(self.workflow))
        workflow[PROMPT]["inputs"]["text"] = text
        workflow[LATENT]["inputs"]["batch_size"] = batch
        workflow[COMPARE]["inputs"]["seed"] = seed
        entry = self.server.wait(self.server.queue(workflow))
        pictures = dict(original=[], erased=[])
        for node, key in ((SAVE_ORIGINAL, "original"), (SAVE_ERASED, "erased")):
            one = {**entry, "outputs": {node: entry["outputs"][node]}}
            pictures[key] = [data for _, data in self.server.images(one)]
        return pictures["original"], pictures["erased"]


def measure(client, sprites, first_seed, say):
    """Answers of the classifier for pictures of the sprites' captions: {"original", "erased"} -> {attribute: right}."""
    judge = classifier.load()
    pictures = {"original": [], "erased": []}
    captions = world.plain_captions(sprites)
    for i, text in enumerate(captions):
        say(f"{i + 1} of {len(captions)}: {text}")
        for key, pngs in zip(pictures, client.run(text, first_seed + i * BATCH, BATCH)):
            pictures[key] += pngs
    truth = {a: np.repeat(getattr(sprites, a), BATCH) for a in world.ATTRIBUTES}
    result = {}
    for key, pngs in pictures.items():
        answers = classifier.read(judge, sprite_pictures(pngs))
        result[key] = {a: answers[a] == truth[a] for a in world.ATTRIBUTES}
    return result


def percent(right):
    return round(100 * float(np.mean(right)), 2)


def figures_of(concept, kept):
    """The report's figures (percent and points) and counts."""
    both = {
        k: {a: np.concatenate([concept[k][a], kept[k][a]]) for a in world.ATTRIBUTES} for k in ("original", "erased")
    }
    drops = {a: percent(both["original"][a]) - percent(both["erased"][a]) for a in world.ATTRIBUTES if a != "shape"}
    figures = {
        "erased_before": percent(concept["original"]["shape"]),
        "erased_after": percent(concept["erased"]["shape"]),
        "kept_drop_points": round(percent(kept["original"]["shape"]) - percent(kept["erased"]["shape"]), 2),
        "attributes_drop_points": round(max(drops.values()), 2),
    }
    counts = {
        "concept_pictures": len(concept["original"]["shape"]),
        "concept_recognised_before": int(concept["original"]["shape"].sum()),
        "concept_recognised_after": int(concept["erased"]["shape"].sum()),
        "kept_pictures": len(kept["original"]["shape"]),
        "kept_recognised_before": int(kept["original"]["shape"].sum()),
        "kept_recognised_after": int(kept["erased"]["shape"].sum()),
    }
    for a in world.ATTRIBUTES[1:]:
        counts |= {
            f"{a}_right_before": int(both["original"][a].sum()),
            f"{a}_right_after": int(both["erased"][a].sum()),
        }
    return figures, counts


def grid(columns, rows):
    """Labelled picture: columns [(label, prompt)], rows [(label, [PNG bytes, one a column])]."""
    tile, gap, left, top = 192, 12, 110, 84
    width = left + len(columns) * (tile + gap)
    height = top + len(rows) * (tile + gap)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    bold, small = ImageFont.load_default(18), ImageFont.load_default(13)
    for i, (label, prompt) in enumerate(columns):
        x = left + i * (tile + gap)
        draw.text((x, 10), label, "black", bold)
        words, lines = prompt.split(), [""]
        for word in words:
            longer = f"{lines[-1]} {word}".strip()
            if draw.textlength(longer, small) > tile:
                lines.append(word)
            else:
                lines[-1] = longer
        draw.multiline_text((x, 36), "\n".join(lines), "#444444", small)
    for j, (label, pngs) in enumerate(rows):
        y = top + j * (tile + gap)
        draw.multiline_text((10, y + tile // 2 - 20), label, "black", bold)
        for i, png in enumerate(pngs):
            picture = Image.open(io.BytesIO(png)).convert("RGB").resize((tile, tile), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + i * (tile + gap), y))
    return sheet


def write(path, write_to):
    """Writes a file whole or not at all."""
    handle, temporary = tempfile.mkstemp(suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        write_to(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def measured(client, say):
    """(figures, counts) of a model, as figures_of gives them."""
    concept = world.SHAPES.index(CONCEPT)
    others = [i for i in range(len(world.SHAPES)) if i != concept]
    say(f"measuring {ERASED_PROMPTS * BATCH} pictures of the erased concept")
    erased = measure(client, sprites_of([concept], ERASED_PROMPTS, 21), 1000, say)
    say(f"measuring {KEPT_PROMPTS * BATCH} pictures of the kept ones")
    kept = measure(client, sprites_of(others, KEPT_PROMPTS, 22), 5000, say)
    return figures_of(erased, kept)


def table(model, counts):
    """What was counted of a model, for the console."""
    n, k = counts["concept_pictures"], counts["kept_pictures"]
    head = (model, "original", "erased")
    rows = [
        (f"{CONCEPT} recognised, of {n}", counts["concept_recognised_before"], counts["concept_recognised_after"]),
        (f"other shapes right, of {k}", counts["kept_recognised_before"], counts["kept_recognised_after"]),
        *(
            (f"{a} right, of {n + k}", counts[f"{a}_right_before"], counts[f"{a}_right_after"])
            for a in world.ATTRIBUTES[1:]
        ),
    ]
    return "\n".join(f"{label:34}{before:>10}{after:>10}" for label, before, after in [head, *rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "output")
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of the ComfyUI to run on")
    args = parser.parse_args()
    start = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)

    def say(text):
        print(f"  {time.monotonic() - start:5.0f} s  {text}", flush=True)

    say("starting ComfyUI")
    rows, models = [], {}
    with Server(args.comfyui) as server:
        clients = {model: Client(server, model) for model in MODELS}
        say("drawing the before/after picture")
        for model, client in clients.items():
            drawn = [client.run(prompt, 7, 1) for _, prompt in COLUMNS]
            for i, state in enumerate(("original", "erased")):
                rows.append((f"{model}\n{state}", [pictures[i][0] for pictures in drawn]))
        write(args.out / "before_after.png", grid(COLUMNS, rows).save)
        for model, client in clients.items():
            say(f"the {model}")
            figures, counts = measured(client, say)
            models[model] = {"figures": figures, "counts": counts, "settings": client.settings}
    report = {
        "models": models,
        "units": "erased_*: percent of pictures in which the classifier sees the concept; *_points: points",
        "seconds": round(time.monotonic() - start, 1),
        "columns": [prompt for _, prompt in COLUMNS],
    }
    write(
        args.out / "report.json",
        lambda path: Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8"),
    )
    print("", *(table(model, found["counts"]) + "\n" for model, found in models.items()), sep="\n")
    print(f"picture: {args.out / 'before_after.png'}\nreport:  {args.out / 'report.json'}")


if __name__ == "__main__":
    try:
        main()
    except ServerError as error:
        sys.exit(str(error))
