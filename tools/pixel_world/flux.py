"""The Flux transformer, written for training on a CPU.

Parameter names and arithmetic are those of the host's ``Flux`` (a test compares the two), but nothing is
done in place, so that gradients flow. Text and picture run as two streams that share their attention
("double blocks"), then as one ("single blocks"); the time and the pooled text state shift, scale and gate
every block. References: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image
Synthesis", ICML 2024 (double blocks); Dehghani et al., "Scaling Vision Transformers to 22 Billion
Parameters", ICML 2023 (parallel attention and MLP); Su et al., "RoFormer", 2021 (rotary positions).
"""

import math

import torch
import torch.nn.functional as F
from torch.nn import GELU, Linear, Module, ModuleList, Parameter, Sequential, SiLU

TIME_WIDTH = 256


def timestep_embedding(t, width=TIME_WIDTH, max_period=10000):
    """Sinusoidal embedding of flow times (B,) in [0, 1] -> (B, width), cosines first."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = 1000 * t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotations(rows, height, width, axes, theta):
    """Angles (rows + height * width, sum(axes) / 2) of the rotary positions: text rows all stand at the origin."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.cat([torch.zeros(rows, 3), torch.stack([torch.zeros_like(x), y, x], -1).reshape(-1, 3)])
    rates = [theta ** -(torch.arange(0, n, 2, dtype=torch.float64) / n) for n in axes]
    return torch.cat([places[:, i, None] * rate for i, rate in enumerate(rates)], dim=1)


def rotate(x, cos, sin):
    """Turns the pairs of neighbouring channels of x (..., T, 2 n) by angles given as cos and sin (T, n)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def attend(q, k, v, turn):
    """Queries, keys, values (B, heads, T, n) -> (B, T, heads * n)."""
    y = F.scaled_dot_product_attention(rotate(q, *turn), rotate(k, *turn), v)
    return y.transpose(1, 2).flatten(2)


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class RMSNorm(Module):
    def __init__(self, width):
        super().__init__()
        self.scale = Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale


class QKNorm(Module):
    def __init__(self, width):
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(width), RMSNorm(width)

    def forward(self, qkv, heads):
        """(B, T, 3 * width) -> queries, keys, values (B, heads, T, width / heads), the first two normed."""
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        return self.query_norm(q), self.key_norm(k), v


class Embedder(Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.in_layer, self.out_layer = Linear(inputs, width), Linear(width, width)

    def forward(self, x):
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(Module):
    def __init__(self, width, parts):
        super().__init__()
        self.parts = parts
        self.lin = Linear(width, parts * width)

    def forward(self, vec):
        """(B, width) -> parts of (B, 1, width): shift, scale, gate, and the same once more in double blocks."""
        return self.lin(F.silu(vec))[:, None].chunk(self.parts, dim=-1)


class Attention(Module):
    def __init__(self, width, heads, bias):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, width * 3, bias=bias)
        self.norm = QKNorm(width // heads)
        self.proj = Linear(width, width)

    def project(self, x):
        return self.norm(self.qkv(x), self.heads)


def feed_forward(width, inner):
    return Sequential(Linear(width, inner), GELU(approximate="tanh"), Linear(inner, width))


class DoubleBlock(Module):
    def __init__(self, width, heads, inner, bias):
        super().__init__()
        self.img_mod, self.txt_mod = Modulation(width, 6), Modulation(width, 6)
        self.img_attn, self.txt_attn = Attention(width, heads, bias), Attention(width, heads, bias)
        self.img_mlp, self.txt_mlp = feed_forward(width, inner), feed_forward(width, inner)

    def forward(self, img, txt, vec, turn):
        i_shift, i_scale, i_gate, *i_second = self.img_mod(vec)
        t_shift, t_scale, t_gate, *t_second = self.txt_mod(vec)
        t_qkv = self.txt_attn.project(norm(txt) * (1 + t_scale) + t_shift)
        i_qkv = self.img_attn.project(norm(img) * (1 + i_scale) + i_shift)
        y = attend(*(torch.cat(pair, dim=2) for pair in zip(t_qkv, i_qkv)), turn)
        t_y, i_y = y.split([txt.shape[1], img.shape[1]], dim=1)
        img = img + i_gate * self.img_attn.proj(i_y)
        txt = txt + t_gate * self.txt_attn.proj(t_y)
        return self._mlp(img, self.img_mlp, *i_second), self._mlp(txt, self.txt_mlp, *t_second)

    @staticmethod
    def _mlp(x, mlp, shift, scale, gate):
        return x + gate * mlp(norm(x) * (1 + scale) + shift)


class SingleBlock(Module):
    def __init__(self, width, heads, inner):
        super().__init__()
        self.width, self.heads = width, heads
        self.linear1 = Linear(width, width * 3 + inner)
        self.linear2 = Linear(width + inner, width)
        self.norm = QKNorm(width // heads)
        self.modulation = Modulation(width, 3)

    def forward(self, x, vec, turn):
        shift, scale, gate = self.modulation(vec)
        h = self.linear1(norm(x) * (1 + scale) + shift)
        qkv, inner = h.split([3 * self.width, h.shape[-1] - 3 * self.width], dim=-1)
        y = attend(*self.norm(qkv, self.heads), turn)
        return x + gate * self.linear2(torch.cat([y, F.gelu(inner, approximate="tanh")], dim=-1))


class LastLayer(Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.linear = Linear(width, outputs)
        self.adaLN_modulation = Sequential(SiLU(), Linear(width, 2 * width))

    def forward(self, x, vec):
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(norm(x) * (1 + scale) + shift)


class Flux(Module):
    """config: the keys of the host's Flux that matter here (assets/pixel_world/config.json, "flux")."""

    def __init__(self, config):
        super().__init__()
        width, heads = config["hidden_size"], config["num_heads"]
        inner, self.patch = int(width * config["mlp_ratio"]), config["patch_size"]
        self.axes, self.theta = config["axes_dim"], config["theta"]
        self.img_in = Linear(config["in_channels"] * self.patch**2, width)
        self.time_in = Embedder(TIME_WIDTH, width)
        self.vector_in = Embedder(config["vec_in_dim"], width)
        self.txt_in = Linear(config["context_in_dim"], width)
        self.double_blocks = ModuleList(
            [DoubleBlock(width, heads, inner, config["qkv_bias"]) for _ in range(config["depth"])]
        )
        self.single_blocks = ModuleList(
            [SingleBlock(width, heads, inner) for _ in range(config["depth_single_blocks"])]
        )
        self.final_layer = LastLayer(width, config["out_channels"] * self.patch**2)
        self.initialise()

    def initialise(self):
        """Xavier everywhere; modulations and the last layer start at zero, so that every block starts as the identity
        (Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, section 3.2)."""
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                torch.nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)
                if "mod" in name or name == "final_layer.linear":
                    torch.nn.init.zeros_(module.weight)

    def forward(self, x, t, context, pooled):
        """Latents x (B, C, H, W), flow times t (B,) in [0, 1], text rows context (B, T, context_in_dim), pooled text
        states (B, vec_in_dim) -> predicted velocity, noise minus picture (B, C, H, W)."""
        p, (height, width) = self.patch, (n // self.patch for n in x.shape[-2:])
        img = x.unflatten(3, (width, p)).unflatten(2, (height, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        img, txt = self.img_in(img), self.txt_in(context)
        vec = self.time_in(timestep_embedding(t)) + self.vector_in(pooled)
        angles = rotations(txt.shape[1], height, width, self.axes, self.theta)
        turn = angles.cos().to(img), angles.sin().to(img)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, turn)
        h = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            h = block(h, vec, turn)
        out = self.final_layer(h[:, txt.shape[1] :], vec)
        return (
            out.unflatten(1, (height, width))
            .unflatten(3, (-1, p, p))
            .permute(0, 3, 1, 4, 2, 5)
            .flatten(4)
            .flatten(2, 3)
        )
