"""T5's encoder, written for training on a CPU.

Parameter names and arithmetic are those of the host's ``T5`` (a test compares the two). Bidirectional,
without positions of its own: the attention's scores get a bias that depends on the distance. Padding is
attended to like any word. Reference: Raffel et al., "Exploring the Limits of Transfer Learning with a
Unified Text-to-Text Transformer", JMLR 2020, section 2.1; gated GELU: Shazeer, "GLU Variants Improve
Transformer", 2020.
"""

import math

import torch
import torch.nn.functional as F
from torch.nn import Embedding, Linear, Module, ModuleList, Parameter

BUCKETS, MAX_DISTANCE = 32, 128


def buckets(length):
    """Bucket (length, length) of the distance from each row to each other: 8 exact ones, then logarithmic, each way."""
    place = torch.arange(length)
    distance = place[None] - place[:, None]
    half, exact = BUCKETS // 2, BUCKETS // 4
    far = exact + (distance.abs().clamp(min=1) / exact).log() / math.log(MAX_DISTANCE / exact) * (half - exact)
    near = torch.where(distance.abs() < exact, distance.abs(), far.long().clamp(max=half - 1))
    return near + half * (distance > 0)


class Norm(Module):
    """Root-mean-square norm."""

    def __init__(self, width):
        super().__init__()
        self.weight = Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(Module):
    def __init__(self, width, inner, heads, first):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (Linear(width, inner, bias=False) for _ in range(3))
        self.o = Linear(inner, width, bias=False)
        if first:
            self.relative_attention_bias = Embedding(BUCKETS, heads)

    def forward(self, x, bias):
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(y.transpose(1, 2).flatten(2))


class AttentionLayer(Module):
    def __init__(self, width, inner, heads, first):
        super().__init__()
        self.SelfAttention = Attention(width, inner, heads, first)
        self.layer_norm = Norm(width)

    def forward(self, x, bias):
        return x + self.SelfAttention(self.layer_norm(x), bias)


class GatedGELU(Module):
    def __init__(self, width, inner):
        super().__init__()
        self.wi_0, self.wi_1 = Linear(width, inner, bias=False), Linear(width, inner, bias=False)
        self.wo = Linear(inner, width, bias=False)

    def forward(self, x):
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class FeedForwardLayer(Module):
    def __init__(self, width, inner):
        super().__init__()
        self.DenseReluDense = GatedGELU(width, inner)
        self.layer_norm = Norm(width)

    def forward(self, x, bias):
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(Module):
    def __init__(self, config, first):
        super().__init__()
        width, heads = config["d_model"], config["num_heads"]
        self.layer = ModuleList(
            [
                AttentionLayer(width, config["d_kv"] * heads, heads, first),
                FeedForwardLayer(width, config["d_ff"]),
            ]
        )

    def forward(self, x, bias):
        for layer in self.layer:
            x = layer(x, bias)
        return x


class Stack(Module):
    def __init__(self, config):
        super().__init__()
        self.block = ModuleList([Block(config, i == 0) for i in range(config["num_layers"])])
        self.final_layer_norm = Norm(config["d_model"])


class T5(Module):
    """config: the keys of the host's T5 that matter here (assets/pixel_world/config.json, "t5")."""

    def __init__(self, config):
        super().__init__()
        self.width, self.heads = config["d_model"], config["num_heads"]
        self.encoder = Stack(config)
        self.shared = Embedding(config["vocab_size"], config["d_model"])
        self.initialise()

    def initialise(self):
        """The published scales, except for smaller word embeddings, which leave the rows to their context."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
            if name.endswith("SelfAttention.q.weight"):
                p.data /= (p.shape[0] / self.heads) ** 0.5  # the scores are not scaled
        torch.nn.init.normal_(self.shared.weight, std=0.3)

    def embed(self, tokens):
        """Token ids (B, T) -> token embeddings (B, T, d_model)."""
        return self.shared(tokens)

    def forward(self, x):
        """Token embeddings (B, T, d_model), padding included -> hidden states (B, T, d_model) after the final norm."""
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        bias = table(buckets(x.shape[1]).to(x.device)).permute(2, 0, 1)[None]
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)
