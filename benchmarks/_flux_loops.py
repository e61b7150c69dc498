"""Trained erasure of transformers as published, written from the formulas, on the demo's transformer.

Each loop runs on tools/pixel_world/flux.py, whose layers have the host's names, with the settings of its authors where
these are known; what they leave open is said at its place. v_on is the velocity with the change that is trained, v the
one without it; c is the concept as the bare word, a its surrogate, "" the empty prompt. A roll-out is made with the
change that is trained, by Euler steps over equal times, as the host's "simple" scheduler has them.
"""

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from membrane.core.demo.world import ASSETS
from membrane.tools.pixel_world import flux as network
from membrane.tools.pixel_world import tokenizer as tokenizers
from membrane.tools.pixel_world import world
from membrane.tools.pixel_world.evaluate import load_flux
from membrane.tools.pixel_world.train_flux import Text

STEPS = 28  # of a roll-out
GUIDANCE = 3.0  # there
SHAPE = (4, 16, 16)  # of the demo's latents
QUERIES, KEYS, VALUES = range(3)


class Beside(torch.nn.Module):
    """A fused layer of queries, keys and values with a change of low rank beside some of the three.

    parts: of QUERIES, KEYS, VALUES. Input (B, T, d) -> (B, T, 3 d). The first factor is Gaussian, the second zero, so
    that the change starts closed; scale is alpha / rank.
    """

    def __init__(self, layer, parts, rank, scale, dropout, generator):
        super().__init__()
        self.layer, self.parts, self.scale, self.dropout, self.on = layer, parts, scale, dropout, True
        width = layer.in_features
        self.down = [(torch.randn(rank, width, generator=generator) / rank).requires_grad_() for _ in parts]
        self.up = [torch.zeros(width, rank).requires_grad_() for _ in parts]

    def forward(self, x):
        y = self.layer(x)
        if not self.on:
            return y
        added = [torch.zeros_like(x)] * 3
        for part, down, up in zip(self.parts, self.down, self.up):
            added[part] = self.scale * functional.dropout(x, self.dropout, torch.is_grad_enabled()) @ down.T @ up.T
        return y + torch.cat(added, dim=-1)

    def change(self):
        """The change of the weight (3 d, d)."""
        blocks = [torch.zeros(self.layer.in_features, self.layer.in_features) for _ in range(3)]
        for part, down, up in zip(self.parts, self.down, self.up):
            blocks[part] = self.scale * (up @ down).detach()
        return torch.cat(blocks)


@dataclass
class Prompt:
    """Text of one prompt: T5's rows (1, T, d), CLIP's pooled state (1, d), and how many rows are words."""

    rows: torch.Tensor
    pooled: torch.Tensor
    words: int


class Trained:
    """The demo's transformer with something to train in it.

    streams: of the double blocks, "txt" and "img"; parts, rank, alpha: of the changes of low rank in their attention,
    rank 0 for the whole weights. bytes: of the file that is kept of it, in 16 bits a number.
    """

    def __init__(self, streams, parts, rank=0, alpha=0.0, dropout=0.0, seed=0):
        self.model = load_flux(ASSETS / "transformer.safetensors").requires_grad_(False)
        self.text, self.prompts = Text(ASSETS / "transformer.safetensors"), {}
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # of the dropout
        self.layers, self.before = {}, {}
        for i, block in enumerate(self.model.double_blocks):
            for stream in streams:
                attention = getattr(block, f"{stream}_attn")
                name = f"double_blocks.{i}.{stream}_attn.qkv"
                if rank:
                    attention.qkv = Beside(attention.qkv, parts, rank, alpha / rank, dropout, self.generator)
                else:
                    self.before[name] = attention.qkv.weight.detach().clone()
                    attention.qkv.weight.requires_grad_(True)
                self.layers[name] = attention.qkv
        self.frozen = None if rank else load_flux(ASSETS / "transformer.safetensors").requires_grad_(False)

    def parameters(self):
        if self.frozen is not None:
            return [layer.weight for layer in self.layers.values()]
        return [p for layer in self.layers.values() for p in (*layer.down, *layer.up)]

    @property
    def bytes(self):
        return 2 * sum(p.numel() for p in self.parameters())

    def changes(self):
        """{name of a layer of the host's network: change of its weight}."""
        if self.frozen is not None:
            return {name: layer.weight.detach() - self.before[name] for name, layer in self.layers.items()}
        return {name: layer.change() for name, layer in self.layers.items()}

    def prompt(self, text):
        if text not in self.prompts:
            _, ends = tokenizers.encode(self.text.tokenizer, [text], self.text.length + 1)
            self.prompts[text] = Prompt(*self.text.encode([text]), int(ends[0]) - 1)
        return self.prompts[text]

    def velocity(self, x, t, texts, on=True):
        """Velocities (n, C, h, w) of n prompts in the same latents x (1, C, h, w) or in n, at time t in [0, 1]."""
        prompts = [self.prompt(text) for text in texts]
        rows, pooled = (torch.cat([getattr(p, of) for p in prompts]) for of in ("rows", "pooled"))
        model = self.frozen if self.frozen is not None and not on else self.model
        with self._switched(on):
            n = len(texts)
            return model(x.expand(n, *SHAPE), torch.full((n,), float(t)), rows, pooled)

    @contextlib.contextmanager
    def _switched(self, on):
        beside = [layer for layer in self.layers.values() if isinstance(layer, Beside)]
        for layer in beside:
            layer.on = on
        try:
            yield
        finally:
            for layer in beside:
                layer.on = True

    @torch.no_grad()
    def walk(self, text, steps, on=True):
        """(latents, time) of a roll-out from new noise for a prompt, with guidance: before each of so many steps and
        after the last of them."""
        times = torch.linspace(1, 0, STEPS + 1)
        x = torch.randn(1, *SHAPE, generator=self.generator)
        yield x, times[0]
        for t, following in zip(times[:steps], times[1:]):
            empty, toward = self.velocity(x, t, ["", text], on).chunk(2)
            x = x + (empty + GUIDANCE * (toward - empty)) * (following - t)
            yield x, following

    def drawn(self, count):
        """A whole number below `count`, by chance."""
        return int(torch.randint(count, (), generator=self.generator))

    def reached(self, text):
        """(latents, time) of a roll-out that stops at a random step before the last."""
        *_, last = self.walk(text, self.drawn(STEPS))
        return last


def esd(concept, surrogate, kept, steps=150, rate=1e-3, eta=2.0):
    """ESD (Gandikota et al. 2023), eq. 7, as its script for Flux: |v_on(c) - (v("") - eta (v(c) - v("")))|^2.

    Queries, keys and values of both streams of the double blocks, whole weights. The published rate of 1e-5 hardly
    moves so small a network in so few steps.
    """
    trained = Trained(("txt", "img"), (QUERIES, KEYS, VALUES))
    optimizer = torch.optim.Adam(trained.parameters(), lr=rate)
    for _ in range(steps):
        x, t = trained.reached(concept)
        with torch.no_grad():
            empty, toward = trained.velocity(x, t, ["", concept], on=False).chunk(2)
        loss = (trained.velocity(x, t, [concept]) - (empty - eta * (toward - empty))).square().mean()
        _step(optimizer, loss)
    return trained


def gem(concept, surrogate, kept, steps=25, rate=1e-3, gamma=100.0, eta=1.0, until=10):
    """GEM (2026): gamma max(0, |v_on(c) - v(a)| - eta |v_on(c) - v(c)|), norms over the whole latents, on each of
    the latents of one roll-out a step, over its first 10 of 28 steps; the mean of these is minimised.

    Queries and keys of both streams of the double blocks, rank and alpha 16, dropout 0.1.
    """
    trained = Trained(("txt", "img"), (QUERIES, KEYS), rank=16, alpha=16.0, dropout=0.1)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        for x, t in trained.walk(concept, until - 1):
            with torch.no_grad():
                repelled, drawn = trained.velocity(x, t, [concept, surrogate], on=False)
            (found,) = trained.velocity(x, t, [concept])
            apart = (found - drawn).norm() - eta * _norm(found - repelled)
            (gamma * torch.relu(apart) / until).backward()
        optimizer.step()
    return trained


def erase_anything(concept, surrogate, kept, steps=200, rate=1e-3, eta=1.0, seen=1e-3, flow=0.1, steer=0.1):
    """EraseAnything (Gao et al. 2025): in turn a step on the lower and one on the upper level.

    lower: |v_on(c) - (v("") - eta (v(c) - v("")))|^2 + seen sum_blocks |attention of the picture to the concept's rows|
    + flow |v_on(k) - (noise - picture)|^2; upper: |v_on(k) - v(k)|^2 + steer InfoNCE, which draws the concept's
    attention map to those of unrelated words and away from a synonym's (temperature 0.07). Queries and keys of the
    text's stream in the double blocks, rank and alpha 8. Open there, and chosen here: k is one of the kept words,
    `picture` one that the unchanged model drew for it, three other kept words are the unrelated ones.
    """
    trained = Trained(("txt",), (QUERIES, KEYS), rank=8, alpha=8.0)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=rate)
    synonym = world.SYNONYMS.get(concept, f"a {concept}")
    pictures = {}
    for word in kept:
        *_, (pictures[word], _) = trained.walk(word, STEPS, on=False)
    for _ in range(steps):
        x, t = trained.reached(concept)
        word = kept[trained.drawn(len(kept))]
        with torch.no_grad():
            empty, toward = trained.velocity(x, t, ["", concept], on=False).chunk(2)
        noise = torch.randn(1, *SHAPE, generator=trained.generator)
        noisy = (1 - t) * pictures[word] + t * noise
        with AttentionMaps(trained.model) as maps:
            found = trained.velocity(x, t, [concept])
            attention = maps.of_words(trained.prompt(concept).words)
        erased = (found - (empty - eta * (toward - empty))).square().mean()
        silent = sum(each.norm() for each in attention)
        held = (trained.velocity(noisy, t, [word]) - (noise - pictures[word])).square().mean()
        _step(optimizer, erased + seen * silent + flow * held)
        with torch.no_grad():
            still = trained.velocity(noisy, t, [word], on=False)
        kept_loss = (trained.velocity(noisy, t, [word]) - still).square().mean()
        others = [kept[i] for i in torch.randperm(len(kept), generator=trained.generator)[:3].tolist()]
        _step(optimizer, kept_loss + steer * _contrast(trained, x, t, concept, synonym, others))
    return trained


def _step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _norm(x):
    """Norm of x with the gradient 0, not NaN, where x is 0, as before the first step."""
    return x.square().sum().clamp_min(torch.finfo(x.dtype).tiny).sqrt()


def _contrast(trained, x, t, concept, synonym, others, temperature=0.07):
    """InfoNCE of the concept's attention map, unrelated words as the positives and a synonym as the negative."""
    with torch.no_grad():
        away, *toward = (_feature(trained, x, t, word) for word in (synonym, *others))
    own = _feature(trained, x, t, concept)
    near = torch.stack([own @ other for other in toward]) / temperature
    far = (own @ away)[None] / temperature
    return torch.logsumexp(torch.cat([near, far]), dim=0) - torch.logsumexp(near, dim=0)


def _feature(trained, x, t, word):
    """How much each place of the picture attends to a word, mean of blocks and heads, of length 1: (places,)."""
    with AttentionMaps(trained.model) as maps:
        trained.velocity(x, t, [word])
        found = torch.stack([each.mean(dim=(0, 1)).sum(dim=-1) for each in maps.of_words(trained.prompt(word).words)])
    return functional.normalize(found.mean(dim=0), dim=0)


class AttentionMaps:
    """What the picture attends to in the double blocks of a call of the network, inside `with`."""

    def __init__(self, model):
        self.model, self.calls, self.hooks = model, [], []

    def __enter__(self):
        for block in self.model.double_blocks:
            for attention in (block.txt_attn, block.img_attn):
                self.hooks.append(attention.norm.register_forward_hook(lambda *call: self.calls.append(call[-1])))
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def of_words(self, count):
        """[attention (B, heads, places, count) of the picture's places to a prompt's first rows], one of each block."""
        found = []
        for (_, t_keys, _), (queries, i_keys, _) in zip(self.calls[::2], self.calls[1::2]):
            side = round(queries.shape[2] ** 0.5)
            rows = t_keys.shape[2]
            angles = network.rotations(rows, side, side, self.model.axes, self.model.theta)
            cos, sin = angles.cos().to(queries), angles.sin().to(queries)
            keys = network.rotate(torch.cat([t_keys, i_keys], dim=2), cos, sin)
            queries = network.rotate(queries, cos[rows:], sin[rows:])
            weights = (queries @ keys.transpose(2, 3) * queries.shape[-1] ** -0.5).softmax(dim=-1)
            found.append(weights[..., :count])
        return found


LOOPS = {"ESD": esd, "GEM": gem, "EraseAnything": erase_anything}
