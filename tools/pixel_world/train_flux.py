"""Trains the demo transformer on rendered sprites; resumable, one CPU process or one GPU.

Rectified flow (Liu et al., ICLR 2023): x_t = (1 - t) picture + t noise, the target is noise - picture; times
from a logit-normal distribution (Esser et al., ICML 2024, section 3.1), both text encoders frozen, an
exponential moving average of the weights. Muon for the blocks' matrices, AdamW for the rest.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from membrane.core.demo.world import ASSETS, TextTransformer, load_config, rgb_to_latent
from membrane.tools import ROOT
from membrane.tools.pixel_world import tokenizer as tokenizers
from membrane.tools.pixel_world import world
from membrane.tools.pixel_world.flux import Flux
from membrane.tools.pixel_world.muon import Muon
from membrane.tools.pixel_world.t5 import T5
from membrane.tools.pixel_world.train_unet import CAPTIONS_EACH, EMPTY_RATE, MEMORISED_RATE, learning_rate
from safetensors.torch import load_file

EMA = 0.999
WARM_UP = 50  # steps
TIME_MEAN, TIME_DEVIATION = 0.3, 1.0


class Text:
    """The two frozen text encoders: T5's rows and the small CLIP's state at the end token."""

    def __init__(self, t5, clip=ASSETS / "day.safetensors"):
        """t5, clip: files with the tensors of either encoder, under "t5." and "text." in the exported ones."""
        config = load_config()
        self.t5, self.clip = T5(config["t5"]), TextTransformer(config["text"])
        for module, path, prefix in ((self.t5, t5, "t5."), (self.clip, clip, "text.")):
            state = load_file(str(path))
            exported = {k[len(prefix) :]: v.float() for k, v in state.items() if k.startswith(prefix)}
            module.load_state_dict(exported or state)
            module.requires_grad_(False)
        self.length = config["t5"]["min_length"]
        self.tokenizer = tokenizers.load(ASSETS / "tokenizer")

    @torch.no_grad()
    def encode(self, captions):
        """Captions of at most 31 tokens -> rows (n, 32, width) and pooled states (n, width)."""
        ids, ends = tokenizers.encode(self.tokenizer, captions, self.length + 1)
        padded, _ = tokenizers.t5_rows(ids, ends, self.tokenizer.bos_token_id)
        rows, pooled = [], []
        for some, some_padded, some_ends in zip(*(torch.from_numpy(v).split(256) for v in (ids, padded, ends))):
            rows.append(self.t5(self.t5.embed(some_padded)))
            # causal: the state at the end token does not depend on the rows after it
            pooled.append(self.clip(self.clip.embed(some))[torch.arange(len(some)), some_ends])
        return torch.cat(rows), torch.cat(pooled)


def caption_pool(text, rng):
    """Trained combinations and Text.encode's two tensors, float16, for CAPTIONS_EACH captions of each in turn, then
    for the twelve memorised captions and the empty one."""
    combos = np.setdiff1d(np.arange(1024), world.held_out())
    captions, _ = world.sample_captions(world.from_index(np.repeat(combos, CAPTIONS_EACH)), rng)
    captions += [*world.MEMORISED_CAPTIONS, ""]
    parts = [text.encode(captions[i : i + 2048]) for i in range(0, len(captions), 2048)]
    return combos, *(torch.cat([part.half() for part in column]) for column in zip(*parts))


def draw(n, rng, combos, rows, pooled):
    """Latents (n, 4, 16, 16), text rows (n, 32, width) and pooled states (n, width) of n training pictures."""
    combo = rng.integers(0, len(combos), n)
    caption = combo * CAPTIONS_EACH + rng.integers(0, CAPTIONS_EACH, n)
    pictures = world.render(world.from_index(combos[combo]), rng)
    memorised = rng.random(n) < MEMORISED_RATE
    which = rng.integers(0, 12, n)
    pictures[memorised] = world.memorised_pictures()[which[memorised]]
    caption[memorised] = len(rows) - 13 + which[memorised]
    caption[(rng.random(n) < EMPTY_RATE) & ~memorised] = len(rows) - 1
    caption = torch.from_numpy(caption)
    latents = rgb_to_latent(torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous())
    return latents, rows[caption].float(), pooled[caption].float()


def optimizers(model, args):
    blocks = [p for n, p in model.named_parameters() if "blocks" in n and p.dim() == 2 and "mod" not in n]
    taken = {id(p) for p in blocks}
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.dim() == 2], "weight_decay": 0.01},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0},
    ]
    adamw = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99), fused=True)
    return {adamw: args.lr, Muon(blocks, lr=args.muon_lr): args.muon_lr}


def loss_of(model, latents, rows, pooled, source):
    """Mean squared error of the velocity at stratified logit-normal times."""
    n = len(latents)
    u = (torch.rand(n, generator=source) + torch.arange(n)) / n
    t = torch.sigmoid(TIME_MEAN + TIME_DEVIATION * torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))
    noise = torch.randn(latents.shape, generator=source)
    latents, rows, pooled, t, noise = (v.to(next(model.parameters()).device) for v in (latents, rows, pooled, t, noise))
    s = t[:, None, None, None]
    return (model((1 - s) * latents + s * noise, t, rows, pooled) - (noise - latents)).square().mean()


def save(path, **state):
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def train(args, combos, rows, pooled):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    model = Flux(load_config()["flux"]).to(device)
    rates = optimizers(model, args)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    step, spent, pictures, running = 0, 0.0, 0, None
    path = args.out / f"{args.name}.pt"
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(rates, saved["optimizers"]):
            optimizer.load_state_dict(state)
        ema, step, spent, pictures = saved["ema"], saved["step"], saved["seconds"], saved["pictures"]
    last = saved_at = time.time()
    while spent < args.seconds:
        for optimizer, peak in rates.items():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(peak, step, spent / args.seconds, WARM_UP)
        rng = np.random.default_rng((args.seed, step))
        source = torch.Generator().manual_seed(int(rng.integers(2**62)))
        loss = loss_of(model, *draw(args.batch, rng, combos, rows, pooled), source)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in rates:
            optimizer.step()
        step, pictures = step + 1, pictures + args.batch
        decay = min(EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            for k, v in model.state_dict().items():
                ema[k].lerp_(v, 1 - decay)
        now = time.time()
        spent, last = spent + now - last, now
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"step {step}  {spent:.0f} s  {pictures} pictures  loss {running:.4f}", flush=True)
        if now - saved_at > args.save_every or spent >= args.seconds:
            saved_at = now
            save(
                path,
                model=model.state_dict(),
                optimizers=[optimizer.state_dict() for optimizer in rates],
                ema=ema,
                step=step,
                seconds=spent,
                pictures=pictures,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5400, help="training time; may be raised on a resume")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of AdamW")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="peak learning rate of Muon")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="flux")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=120)
    parser.add_argument("--out", type=Path, default=ROOT / "training")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    text = Text(args.out / "t5_encoder.safetensors")
    train(args, *caption_pool(text, np.random.default_rng(args.seed)))


if __name__ == "__main__":
    main()
