"""Samples the demo model and scores it with the independent classifier; writes a contact sheet.

The U-Net's sampler is Euler over the discrete schedule of Stable Diffusion 1, as the host's "euler"/"normal"
(Karras et al. 2022, algorithm 1 without churn); the transformer's is Euler over equal steps of the flow's time, as
the host's "euler"/"simple". 200 prompts of attribute combinations that training never showed, and the memorised
captions.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from membrane.core.demo.world import ASSETS, TextTransformer, latent_to_rgb, load_config
from membrane.tools import ROOT
from membrane.tools.pixel_world import classifier, world
from membrane.tools.pixel_world import tokenizer as tokenizers
from membrane.tools.pixel_world.flux import Flux
from membrane.tools.pixel_world.train_flux import Text
from membrane.tools.pixel_world.train_unet import alphas_cumprod
from membrane.tools.pixel_world.unet import UNet
from PIL import Image
from safetensors.torch import load_file

BATCH = 100  # pictures at a time


class Sampler:
    def __init__(self, unet, text, tokenizer):
        self.unet, self.text, self.tokenizer = unet, text, tokenizer
        a = alphas_cumprod().double()
        self.sigmas = ((1 - a) / a).sqrt()

    @torch.no_grad()
    def encode(self, captions):
        ids, _ = tokenizers.encode(self.tokenizer, captions)
        return torch.cat([self.text(self.text.embed(c)) for c in torch.from_numpy(ids).split(256)])

    @torch.no_grad()
    def sample(self, context, empty, steps, cfg, generator):
        """context (B, 77, width), empty (1, 77, width) -> pictures (B, 16, 16, 3) in [0, 1]."""
        t = torch.linspace(999, 0, steps, dtype=torch.float64)
        low = t.floor().long()
        high = t.ceil().long()
        log = self.sigmas.log()
        sigmas = torch.cat([(log[low] + (t - low) * (log[high] - log[low])).exp(), torch.zeros(1, dtype=torch.float64)])
        n = len(context)
        both = torch.cat([context, empty.expand(n, -1, -1)])
        x = torch.randn(n, 4, world.SIZE, world.SIZE, generator=generator) * (1 + sigmas[0] ** 2).sqrt().float()
        for i in range(steps):
            s, s_next = sigmas[i].float(), sigmas[i + 1].float()
            scaled = x / (s**2 + 1).sqrt()
            step_t = t[i].float().expand(2 * n)
            on, off = self.unet(torch.cat([scaled, scaled]), step_t, both).chunk(2)
            x = x + (off + cfg * (on - off)) * (s_next - s)
        return latent_to_rgb(x).permute(0, 2, 3, 1).numpy()

    def draw(self, captions, steps, cfg, generator):
        """Captions -> pictures (B, 16, 16, 3) in [0, 1]."""
        empty = self.encode([""])
        parts = [self.sample(c, empty, steps, cfg, generator) for c in self.encode(captions).split(BATCH)]
        return np.concatenate(parts)


class FlowSampler:
    def __init__(self, flux, text):
        """flux: tools.pixel_world.flux.Flux; text: tools.pixel_world.train_flux.Text."""
        self.flux, self.text = flux, text

    @torch.no_grad()
    def draw(self, captions, steps, cfg, generator):
        """Captions -> pictures (B, 16, 16, 3) in [0, 1]."""
        empty = self.text.encode([""])
        return np.concatenate(
            [
                self._sample(*given, *empty, steps, cfg, generator)
                for given in zip(*(part.split(BATCH) for part in self.text.encode(captions)))
            ]
        )

    def _sample(self, rows, pooled, empty_rows, empty_pooled, steps, cfg, generator):
        n = len(rows)
        rows = torch.cat([rows, empty_rows.expand(n, -1, -1)])
        pooled = torch.cat([pooled, empty_pooled.expand(n, -1)])
        x = torch.randn(n, 4, world.SIZE, world.SIZE, generator=generator)
        times = torch.linspace(1, 0, steps + 1)
        for t, following in zip(times[:-1], times[1:]):
            on, off = self.flux(torch.cat([x, x]), t.expand(2 * n), rows, pooled).chunk(2)
            x = x + (off + cfg * (on - off)) * (following - t)
        return latent_to_rgb(x).permute(0, 2, 3, 1).numpy()


def held_out_prompts(count, seed=3):
    """Sprites of held-out combinations, repeated to `count`."""
    index = np.random.default_rng(seed).permutation(np.resize(world.held_out(), count))
    return world.from_index(index)


def trained(path, prefix):
    """The averaged weights of a training checkpoint (.pt), or the tensors of one part of an exported file, float32."""
    if path.suffix == ".pt":
        return torch.load(path, map_location="cpu", weights_only=True)["ema"]
    return {k.removeprefix(prefix): v.float() for k, v in load_file(str(path)).items() if k.startswith(prefix)}


def load_unet(path):
    unet = UNet(load_config()["unet"])
    unet.load_state_dict(trained(path, "unet."))
    return unet.train(False)


def load_flux(path):
    flux = Flux(load_config()["flux"])
    flux.load_state_dict(trained(path, "flux."))
    return flux.train(False)


def load_text(path):
    text = TextTransformer(load_config()["text"])
    state = load_file(str(path))
    text.load_state_dict({k.removeprefix("text."): v.float() for k, v in state.items() if "text_model." in k})
    return text.train(False)


def score(sampler, count, steps, cfg):
    """(pictures, memorised pictures, {attribute: share that the judge reads right, "memorised_...": the worst of twelve
    of the error to the own picture, and of that over the error to the nearest other})."""
    generator = torch.Generator().manual_seed(1)
    sprites = held_out_prompts(count)
    pictures = sampler.draw(world.plain_captions(sprites), steps, cfg, generator)
    answers = classifier.read(classifier.load(), pictures)
    result = {a: float((answers[a] == getattr(sprites, a)).mean()) for a in world.ATTRIBUTES}
    memorised = sampler.draw(list(world.MEMORISED_CAPTIONS), steps, cfg, generator)
    distance = ((memorised[:, None] - world.memorised_pictures()[None]) ** 2).mean((2, 3, 4))
    own = distance.diagonal()
    others = np.where(np.eye(12, dtype=bool), np.inf, distance).min(1)
    result["memorised_own_mse_max"] = float(own.max())
    result["memorised_ratio_max"] = float((own / others).max())
    return pictures, memorised, result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--unet", type=Path, default=ROOT / "training" / "unet.pt")
    parser.add_argument("--text", type=Path, default=ROOT / "training" / "text_encoder.safetensors")
    parser.add_argument("--flux", type=Path, help="score the transformer in this file instead of the U-Net")
    parser.add_argument("--t5", type=Path, default=ROOT / "training" / "t5_encoder.safetensors")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=1.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sheet", type=Path, help="PNG to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.flux:
        sampler = FlowSampler(load_flux(args.flux), Text(args.t5))
    else:
        sampler = Sampler(load_unet(args.unet), load_text(args.text), tokenizers.load(ASSETS / "tokenizer"))
    pictures, memorised, result = score(sampler, args.count, args.steps, args.cfg)
    print(json.dumps(result))
    if args.sheet:
        show = np.concatenate([pictures[:96], memorised])
        Image.fromarray(world.contact_sheet(show, 12)).save(args.sheet)


if __name__ == "__main__":
    main()
