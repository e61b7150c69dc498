"""Trains the independent judge of Pixel World, which reads shape, colour, texture and background off a picture.

Trained on rendered pictures only (day and night palettes, with noise, blur and shifts), never on
anything the demo model made. "shape" has a ninth answer, "none", for pictures without one.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from membrane.core.demo.judge import ANSWERS, PATH, Classifier, load, read
from membrane.tools.pixel_world import world
from safetensors.torch import save_file


def shapeless(sprites, rng, palette):
    """Pictures without one of the eight shapes: bare grounds, blobs of overlapping discs, scattered pixels."""
    n = len(sprites)
    colours, grounds = (np.array(list(p.values()), np.float32) for p in world.PALETTES[palette])
    y, x = np.mgrid[: world.SIZE, : world.SIZE] + 0.5
    mask = np.zeros((n, world.SIZE, world.SIZE), np.float32)
    for i in range(n):
        kind = rng.integers(3)
        if kind == 1:
            for _ in range(rng.integers(2, 5)):
                cx, cy, r = rng.uniform(3, 13), rng.uniform(3, 13), rng.uniform(1.2, 3)
                mask[i] = np.maximum(mask[i], np.clip(r + 0.5 - np.hypot(x - cx, y - cy), 0, 1))
        elif kind == 2:
            mask[i] = rng.random((world.SIZE, world.SIZE)) < rng.uniform(0.05, 0.5)
    dark = world.texture_bank()[sprites.texture][..., None]
    fore = colours[sprites.colour][:, None, None] * (1 - dark * (1 - world.DARK))
    return grounds[sprites.background][:, None, None] * (1 - mask[..., None]) + fore * mask[..., None]


def batch(n, rng):
    palette = "day" if rng.random() < 0.6 else "night"
    sprites = world.from_index(rng.integers(0, 1024, n))
    pictures = world.render(sprites, rng, palette)
    truth = {a: torch.from_numpy(getattr(sprites, a).copy()) for a in ANSWERS}
    empty = rng.random(n) < 0.12
    pictures[empty] = shapeless(sprites, rng, palette)[empty]
    truth["shape"][torch.from_numpy(empty)] = len(world.SHAPES)
    for a in ("colour", "texture"):  # a bare ground has neither
        truth[a][torch.from_numpy(empty)] = -100
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    if rng.random() < 0.3:
        x = torch.lerp(x, F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1), float(rng.uniform(0, 0.6)))
    dx, dy = rng.integers(-1, 2, 2)
    x = torch.roll(F.pad(x, (1, 1, 1, 1), mode="replicate"), (int(dy), int(dx)), (2, 3))[:, :, 1:-1, 1:-1]
    noise = torch.from_numpy(rng.normal(0, 1, x.shape).astype(np.float32)) * float(rng.uniform(0, 0.08))
    tint = torch.from_numpy(rng.normal(0, 0.02, (n, 3, 1, 1)).astype(np.float32))
    return (x + noise + tint).clamp(0, 1), truth


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=args.steps)
    for step in range(args.steps):
        x, truth = batch(args.batch, rng)
        logits = model(x)
        loss = sum(F.cross_entropy(logits[a], truth[a]) for a in ANSWERS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}  loss {loss.item():.4f}", flush=True)
    model.train(False)
    PATH.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}, str(PATH)
    )
    PATH.chmod(0o644)
    for palette in world.PALETTES:
        sprites = world.from_index(np.arange(1024))
        answers = read(load(), world.render(sprites, np.random.default_rng(5), palette))
        print(palette, {a: f"{(answers[a] == getattr(sprites, a)).mean():.4f}" for a in ANSWERS})


if __name__ == "__main__":
    main()
