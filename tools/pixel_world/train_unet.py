"""Trains the demo model's U-Net on rendered sprites; resumable, on one GPU or on several CPU processes.

Noise prediction on Stable Diffusion 1's noise schedule, min-SNR weighting with gamma 5 (Hang et al.,
ICCV 2023, eq. 9) with a floor, the text encoder frozen, an exponential moving average of the weights.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from membrane.core.demo.world import ASSETS, TextTransformer, load_config, rgb_to_latent
from membrane.tools import ROOT
from membrane.tools.pixel_world import tokenizer as tokenizers
from membrane.tools.pixel_world import world
from membrane.tools.pixel_world.unet import UNet
from safetensors.torch import load_file

CAPTIONS_EACH = 24  # captions per attribute combination in the pool
EMPTY_RATE, MEMORISED_RATE = 0.10, 0.05
EMA = 0.999
# a sprite of 256 pixels shows its mean colour at much higher noise than a large picture does: draw late
# timesteps more often, and do not let the weight of the clean picture's error fall below a floor
HIGH_NOISE_BIAS = 0.75
SNR_FLOOR, SNR_CEILING = 0.05, 5.0


def alphas_cumprod():
    """Stable Diffusion 1's schedule: 1000 betas, linear in their square roots."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


@torch.no_grad()
def caption_pool(text, tokenizer, rng):
    """Embeddings (combinations * CAPTIONS_EACH + 13, 77, width) float16 of captions of every trained
    combination in turn, then of the twelve memorised captions and the empty one."""
    combos = np.setdiff1d(np.arange(1024), world.held_out())
    captions, _ = world.sample_captions(world.from_index(np.repeat(combos, CAPTIONS_EACH)), rng)
    captions += [*world.MEMORISED_CAPTIONS, ""]
    ids, _ = tokenizers.encode(tokenizer, captions)
    device = next(text.parameters()).device
    out = []
    for chunk in torch.from_numpy(ids).split(256):
        out.append(text(text.embed(chunk.to(device))).half().cpu())
    return combos, torch.cat(out)


def draw(n, rng, combos, pool, palette):
    """Latents (n, 4, 16, 16) and caption embeddings (n, 77, width)."""
    combo = rng.integers(0, len(combos), n)
    row = combo * CAPTIONS_EACH + rng.integers(0, CAPTIONS_EACH, n)
    pictures = world.render(world.from_index(combos[combo]), rng, palette)
    if palette == "day":
        memorised = rng.random(n) < MEMORISED_RATE
        which = rng.integers(0, 12, n)
        pictures[memorised] = world.memorised_pictures()[which[memorised]]
        row[memorised] = len(pool) - 13 + which[memorised]
        row[(rng.random(n) < EMPTY_RATE) & ~memorised] = len(pool) - 1
    else:
        row[rng.random(n) < EMPTY_RATE] = len(pool) - 1
    return rgb_to_latent(torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()), pool[
        torch.from_numpy(row)
    ].float()


def learning_rate(peak, step, done, warm_up=200):
    """Warm-up, constant, then linear to zero over the last 40 %."""
    return peak * min(1, (step + 1) / warm_up) * min(1, (1 - done) / 0.4)


def worker(rank, workers, args, combos, pool):
    if workers > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(args.port))
        dist.init_process_group("gloo", rank=rank, world_size=workers)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = UNet(load_config()["unet"])
    if args.start:
        state = load_file(str(args.start))
        model.load_state_dict({k[5:]: v.float() for k, v in state.items() if k.startswith("unet.")})
    model.to(device)
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99), fused=True)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    step, spent, pictures = 0, 0.0, 0
    path = args.out / f"{args.name}.pt"
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        ema, step, spent, pictures = saved["ema"], saved["step"], saved["seconds"], saved["pictures"]
    signal = alphas_cumprod().to(device)
    snr = signal / (1 - signal)
    weight_of = snr.clamp(SNR_FLOOR, SNR_CEILING) / snr
    n = args.batch // workers
    last = saved_at = time.time()
    running = None
    while spent < args.seconds:
        done = spent / args.seconds
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, step, done)
        rng = np.random.default_rng((args.seed, rank, step))
        noise_source = torch.Generator().manual_seed(int(rng.integers(2**62)))
        x, context = draw(n, rng, combos, pool, args.palette)
        u = (torch.rand(n, generator=noise_source) + torch.arange(n)) / n
        t = (u**HIGH_NOISE_BIAS * 1000).long().clamp(max=999)
        noise = torch.randn(x.shape, generator=noise_source)
        x, context, t, noise = (v.to(device) for v in (x, context, t, noise))
        a = signal[t][:, None, None, None]
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            predicted = model(a.sqrt() * x + (1 - a).sqrt() * noise, t, context)
        loss = ((predicted.float() - noise).square().mean((1, 2, 3)) * weight_of[t]).mean()
        optimizer.zero_grad()
        loss.backward()
        if workers > 1:
            flat = torch.cat([p.grad.flatten() for p in params])
            dist.all_reduce(flat)
            flat /= workers
            for p, g in zip(params, flat.split([p.numel() for p in params])):
                p.grad.copy_(g.view_as(p))
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        step += 1
        pictures += n * workers
        decay = min(EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            for k, v in model.state_dict().items():
                ema[k].lerp_(v, 1 - decay)
        now = time.time()
        # every process must take the same path, so the clock of the first one counts
        clock = torch.tensor([now - last], dtype=torch.float64)
        last = now
        if workers > 1:
            dist.broadcast(clock, 0)
        spent += clock.item()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if rank == 0:
            if step % 100 == 0:
                print(f"step {step}  {spent:.0f} s  {pictures} pictures  loss {running:.4f}", flush=True)
            if now - saved_at > args.save_every or spent >= args.seconds:
                saved_at = now
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "ema": ema,
                    "step": step,
                    "seconds": spent,
                    "pictures": pictures,
                }
                torch.save(state, path.with_suffix(".tmp"))
                path.with_suffix(".tmp").replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3300, help="training time; may be raised on a resume")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=2, help="CPU processes; 1 on a GPU")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each")
    parser.add_argument("--palette", choices=sorted(world.PALETTES), default="day")
    parser.add_argument("--start", type=Path, help="exported weights to begin with (fine-tuning)")
    parser.add_argument("--name", default="unet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--port", type=int, default=29613)
    parser.add_argument("--save-every", type=float, default=120)
    parser.add_argument("--out", type=Path, default=ROOT / "training")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    config = load_config()
    text = TextTransformer(config["text"])
    text.load_state_dict(load_file(str(args.out / "text_encoder.safetensors")))
    combos, pool = caption_pool(text, tokenizers.load(ASSETS / "tokenizer"), np.random.default_rng(args.seed))
    pool.share_memory_()
    if torch.cuda.is_available() or args.workers == 1:
        worker(0, 1, args, combos, pool)
    else:
        mp.spawn(worker, (args.workers, args, combos, pool), nprocs=args.workers)


if __name__ == "__main__":
    main()
