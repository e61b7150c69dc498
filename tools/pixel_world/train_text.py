"""Trains the demo model's text encoder contrastively on captions and rendered pictures, then freezes it.

As CLIP (Radford et al. 2021), with one difference: a caption that leaves words out fits many pictures
of a batch, so the targets are all fitting pictures instead of only the one it was written for.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from membrane.core.demo.world import ASSETS, TextTransformer, load_config
from membrane.tools import ROOT
from membrane.tools.pixel_world import tokenizer as tokenizers
from membrane.tools.pixel_world import world
from safetensors.torch import save_file
from torch.nn import GELU, Conv2d, Flatten, Linear, Module, Parameter, Sequential

EMBEDDING = 64
SHORT = 20  # tokens; no caption of the world is longer


class PictureEncoder(Module):
    """(B, 3, 16, 16) in [0, 1] -> (B, 64), unit length."""

    def __init__(self):
        super().__init__()
        self.net = Sequential(
            Conv2d(3, 32, 3, padding=1),
            GELU(),
            Conv2d(32, 64, 3, stride=2, padding=1),
            GELU(),
            Conv2d(64, 128, 3, stride=2, padding=1),
            GELU(),
            Flatten(),
            Linear(128 * 16, EMBEDDING),
        )

    def forward(self, x):
        return F.normalize(self.net(x * 2 - 1), dim=-1)


class Contrastive(Module):
    def __init__(self, text):
        super().__init__()
        self.text = text
        self.picture = PictureEncoder()
        self.projection = Linear(text.width, EMBEDDING, bias=False)
        self.scale = Parameter(torch.tensor(2.3))

    def captions(self, ids, rows):
        """Unit vectors (B, 64) of the captions, read at one row (B,) each."""
        states = self.text(self.text.embed(ids))
        return F.normalize(self.projection(states[torch.arange(len(ids)), rows]), dim=-1)


def batch(n, rng, tokenizer):
    """Pictures, captions' ids and ends, and which caption fits which picture (captions, pictures)."""
    memorised = rng.random(n) < 0.06
    which = rng.integers(0, 12, n)
    sprites = world.sample_sprites(n, rng)
    pictures = world.render(sprites, rng)
    pictures[memorised] = world.memorised_pictures()[which[memorised]]
    captions, named = world.sample_captions(sprites, rng)
    for i in range(n):
        if memorised[i]:
            captions[i] = world.MEMORISED_CAPTIONS[which[i]]
        elif rng.random() < 0.03:  # strange words must not matter
            strange = "".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(3, 8)))
            captions[i] = f"{strange} {captions[i]}" if rng.random() < 0.5 else f"{captions[i]}, {strange}"
    values = np.stack([sprites.shape, sprites.colour, sprites.texture, sprites.background], 1)
    fits = ((values[:, None] == values[None]) | ~named[:, None]).all(-1)
    fits &= ~memorised[:, None] & ~memorised[None]
    fits |= memorised[:, None] & memorised[None] & (which[:, None] == which[None])
    ids, ends = tokenizers.encode(tokenizer, captions)
    return pictures, ids, ends, fits


def soft_cross_entropy(logits, fits):
    target = fits.float() / fits.sum(1, keepdim=True).clamp(min=1)
    return -(target * logits.log_softmax(1)).sum(1).mean()


def fit(model, seconds, examples):
    """Trains a Contrastive for so long; the number of steps it took.

    examples(step) gives pictures (B, 16, 16, 3), the captions' ids (B, N), the row (B,) to read each at, and which
    caption fits which picture (B, B).
    """
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0}])
    start, step = time.time(), 0
    while (done := (time.time() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, (step + 1) / 50) * (0.5 + 0.5 * np.cos(np.pi * done))
        pictures, ids, rows, fits = examples(step)
        texts = model.captions(torch.from_numpy(ids), torch.from_numpy(rows))
        seen = model.picture(torch.from_numpy(pictures).permute(0, 3, 1, 2))
        logits = model.scale.exp() * texts @ seen.T
        fits = torch.from_numpy(fits)
        loss = soft_cross_entropy(logits, fits) + soft_cross_entropy(logits.T, fits.T)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.scale.data.clamp_(max=4.6)
        step += 1
        if step % 50 == 0:
            print(f"step {step}  {done:.0%}  loss {loss.item():.3f}  scale {model.scale.exp().item():.1f}", flush=True)
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--out", type=Path, default=ROOT / "training")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    tokenizers.build(ASSETS / "tokenizer")
    tokenizer = tokenizers.load(ASSETS / "tokenizer")
    model = Contrastive(TextTransformer(load_config()["text"]))
    for p in model.text.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.05)

    def examples(step):
        full = step % 8 == 7  # now and then all 77 rows, so that the padding rows are trained too
        pictures, ids, ends, fits = batch(args.batch // 4 if full else args.batch, rng, tokenizer)
        length = tokenizers.LENGTH if full else SHORT + 4
        rows = np.minimum(ends, length - 1)
        padding = rng.integers(rows, length)  # every row from the end token on must know the caption
        rows = np.where(rng.random(len(rows)) < 0.5, rows, padding)
        return pictures, np.minimum(ids, tokenizer.eos_token_id)[:, :length], rows, fits

    step = fit(model, args.seconds, examples)
    accuracy = check(model, tokenizer, rng)
    print(f"{step} steps; held-out combinations read right out of 4 x 104: {accuracy}")
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.contiguous() for k, v in model.text.state_dict().items()}, str(args.out / "text_encoder.safetensors")
    )
    extra = {"picture." + k: v.contiguous() for k, v in model.picture.state_dict().items()}
    save_file(
        extra | {"projection.weight": model.projection.weight.data.contiguous()},
        str(args.out / "clip_score.safetensors"),
    )


@torch.no_grad()
def check(model, tokenizer, rng):
    """Zero-shot reading of pictures of held-out combinations: right answers per attribute."""
    sprites = world.from_index(world.held_out())
    seen = model.picture(torch.from_numpy(world.render(sprites, rng)).permute(0, 3, 1, 2))
    combos = world.from_index(np.arange(1024))
    texts = world.plain_captions(combos)
    ids, ends = tokenizers.encode(tokenizer, texts, SHORT)
    best = (seen @ model.captions(torch.from_numpy(ids), torch.from_numpy(ends)).T).argmax(1).numpy()
    return {a: int((getattr(combos, a)[best] == getattr(sprites, a)).sum()) for a in world.ATTRIBUTES}


if __name__ == "__main__":
    main()
