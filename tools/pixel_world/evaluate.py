"""Samples the demo model and scores it with the independent classifier; writes a contact sheet.

The sampler is Euler over the discrete schedule of Stable Diffusion 1, as the host's "euler"/"normal"
(Karras et al. 2022, algorithm 1 without churn). 200 prompts of attribute combinations that training
never showed, and the memorised captions.
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
from membrane.tools.pixel_world.train_unet import alphas_cumprod
from membrane.tools.pixel_world.unet import UNet
from PIL import Image
from safetensors.torch import load_file


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


def held_out_prompts(count, seed=3):
    """Sprites of held-out combinations, repeated to `count`."""
    index = np.random.default_rng(seed).permutation(np.resize(world.held_out(), count))
    return world.from_index(index)


def load_unet(path):
    unet = UNet(load_config()["unet"])
    if path.suffix == ".pt":
        state = torch.load(path, map_location="cpu", weights_only=True)["ema"]
    else:
        state = {k.removeprefix("unet."): v.float() for k, v in load_file(str(path)).items() if k.startswith("unet.")}
    unet.load_state_dict(state)
    return unet.train(False)


def load_text(path):
    text = TextTransformer(load_config()["text"])
    state = load_file(str(path))
    text.load_state_dict({k.removeprefix("text."): v.float() for k, v in state.items() if "text_model." in k})
    return text.train(False)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--unet", type=Path, default=ROOT / "training" / "unet.pt")
    parser.add_argument("--text", type=Path, default=ROOT / "training" / "text_encoder.safetensors")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=1.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sheet", type=Path, help="PNG to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sampler = Sampler(load_unet(args.unet), load_text(args.text), tokenizers.load(ASSETS / "tokenizer"))
    generator = torch.Generator().manual_seed(1)
    empty = sampler.encode([""])
    sprites = held_out_prompts(args.count)
    captions = world.plain_captions(sprites)
    pictures = np.concatenate(
        [sampler.sample(c, empty, args.steps, args.cfg, generator) for c in sampler.encode(captions).split(100)]
    )
    answers = classifier.read(classifier.load(), pictures)
    result = {a: float((answers[a] == getattr(sprites, a)).mean()) for a in world.ATTRIBUTES}
    memorised = sampler.sample(sampler.encode(list(world.MEMORISED_CAPTIONS)), empty, args.steps, args.cfg, generator)
    distance = ((memorised[:, None] - world.memorised_pictures()[None]) ** 2).mean((2, 3, 4))
    own = distance.diagonal()
    others = np.where(np.eye(12, dtype=bool), np.inf, distance).min(1)
    result["memorised_own_mse_max"] = float(own.max())
    result["memorised_ratio_max"] = float((own / others).max())
    print(json.dumps(result))
    if args.sheet:
        show = np.concatenate([pictures[:96], memorised])
        Image.fromarray(world.contact_sheet(show, 12)).save(args.sheet)


if __name__ == "__main__":
    main()
