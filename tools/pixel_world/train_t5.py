"""Trains the demo transformer's T5-style text encoder, as train_text.py trains its small CLIP, then freezes it.

The caption is read at the end token half the time, else at a padding row or at any word's row. So every
row must know the whole caption: as in a real T5, a concept spreads over the sentence and into the padding.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from membrane.core.demo.world import ASSETS, load_config
from membrane.tools import ROOT
from membrane.tools.pixel_world import tokenizer as tokenizers
from membrane.tools.pixel_world import world
from membrane.tools.pixel_world.t5 import T5
from membrane.tools.pixel_world.train_text import Contrastive, batch, fit
from safetensors.torch import save_file

END_RATE, PADDING_RATE = 0.5, 0.25


def read_rows(ends, length, rng):
    """One row (n,) per caption to read it at: its end (n,), a padding row up to `length`, or a word's row."""
    choice = rng.random(len(ends))
    padding = rng.integers(np.minimum(ends + 1, length - 1), length)
    words = rng.integers(0, np.maximum(ends, 1))
    return np.where(choice < END_RATE, ends, np.where(choice < END_RATE + PADDING_RATE, padding, words))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--out", type=Path, default=ROOT / "training")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    tokenizer = tokenizers.load(ASSETS / "tokenizer")
    config = load_config()["t5"]
    length = config["min_length"]
    model = Contrastive(T5(config))

    def examples(_):
        pictures, ids, ends, fits = batch(args.batch, rng, tokenizer)
        ids, ends = tokenizers.t5_rows(ids, ends, tokenizer.bos_token_id)
        return pictures, ids[:, :length], read_rows(np.minimum(ends, length - 1), length, rng), fits

    step = fit(model, args.seconds, examples)
    print(f"{step} steps; held-out combinations read right out of 104, by the row that is read:")
    for name, row in {"first word": 0, "end": None, "last padding": length - 1}.items():
        print(f"  {name}: {check(model, tokenizer, rng, length, row)}")
    args.out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.text.state_dict().items()}, str(args.out / "t5_encoder.safetensors"))


@torch.no_grad()
def check(model, tokenizer, rng, length, row):
    """Zero-shot reading of pictures of held-out combinations, captions read at one row (None: at their end tokens)."""
    sprites = world.from_index(world.held_out())
    seen = model.picture(torch.from_numpy(world.render(sprites, rng)).permute(0, 3, 1, 2))
    combos = world.from_index(np.arange(1024))
    ids, ends = tokenizers.t5_rows(
        *tokenizers.encode(tokenizer, world.plain_captions(combos), length + 1), tokenizer.bos_token_id
    )
    rows = ends if row is None else np.full_like(ends, row)
    best = (seen @ model.captions(torch.from_numpy(ids), torch.from_numpy(rows)).T).argmax(1).numpy()
    return {a: int((getattr(combos, a)[best] == getattr(sprites, a)).sum()) for a in world.ATTRIBUTES}


if __name__ == "__main__":
    main()
