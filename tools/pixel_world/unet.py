"""The Stable Diffusion 1 U-Net, written for training on a CPU.

Parameter names and arithmetic are those of the host's ``UNetModel`` (a test compares the two),
but nothing is done in place, so that gradients flow, and attention goes through
``scaled_dot_product_attention``. Reference: Rombach et al., "High-Resolution Image Synthesis with
Latent Diffusion Models", CVPR 2022, appendix E.
"""

import math

import torch
import torch.nn.functional as F
from torch.nn import Conv2d, Dropout, GroupNorm, Identity, LayerNorm, Linear, Module, ModuleList, Sequential, SiLU


def timestep_embedding(timesteps, width, max_period=10000):
    """Sinusoidal embedding of timesteps (B,) -> (B, width), cosines first."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32) / half)
    angles = timesteps[:, None].float() * frequencies[None].to(timesteps.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(Module):
    def __init__(self, channels, emb_channels, out_channels):
        super().__init__()
        self.in_layers = Sequential(GroupNorm(32, channels), SiLU(), Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = Sequential(SiLU(), Linear(emb_channels, out_channels))
        self.out_layers = Sequential(
            GroupNorm(32, out_channels), SiLU(), Dropout(0), Conv2d(out_channels, out_channels, 3, padding=1)
        )
        self.skip_connection = Identity() if channels == out_channels else Conv2d(channels, out_channels, 1)

    def forward(self, x, emb):
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(Module):
    def __init__(self, width, text_width, heads):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(text_width, width, bias=False)
        self.to_v = Linear(text_width, width, bias=False)
        self.to_out = Sequential(Linear(width, width), Dropout(0))

    def forward(self, x, context):
        def split(t):
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        y = F.scaled_dot_product_attention(split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context)))
        return self.to_out(y.transpose(1, 2).flatten(2))


class GEGLU(Module):
    def __init__(self, width, inner):
        super().__init__()
        self.proj = Linear(width, inner * 2)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(Module):
    def __init__(self, width):
        super().__init__()
        self.net = Sequential(GEGLU(width, width * 4), Dropout(0), Linear(width * 4, width))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(Module):
    def __init__(self, width, text_width, heads):
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, text_width, heads)
        self.norm1, self.norm2, self.norm3 = LayerNorm(width), LayerNorm(width), LayerNorm(width)

    def forward(self, x, context):
        n = self.norm1(x)
        x = x + self.attn1(n, n)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(Module):
    def __init__(self, channels, text_width, heads, depth):
        super().__init__()
        self.norm = GroupNorm(32, channels, eps=1e-6)
        self.proj_in = Conv2d(channels, channels, 1)
        self.transformer_blocks = ModuleList([TransformerBlock(channels, text_width, heads) for _ in range(depth)])
        self.proj_out = Conv2d(channels, channels, 1)

    def forward(self, x, context):
        h = self.proj_in(self.norm(x))
        size = h.shape[-2:]
        h = h.flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, size))


class Downsample(Module):
    def __init__(self, channels):
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Upsample(Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class UNet(Module):
    """config: the keys of the host's U-Net config that matter here (assets/pixel_world.json)."""

    def __init__(self, config):
        super().__init__()
        width, context, heads = config["model_channels"], config["context_dim"], config["num_heads"]
        mults, blocks = config["channel_mult"], config["num_res_blocks"]
        depth, depth_out = list(config["transformer_depth"]), list(config["transformer_depth_output"])
        self.model_channels = width
        emb = width * 4
        self.time_embed = Sequential(Linear(width, emb), SiLU(), Linear(emb, emb))
        self.input_blocks = ModuleList([ModuleList([Conv2d(config["in_channels"], width, 3, padding=1)])])
        channels, skips = width, [width]
        for level, mult in enumerate(mults):
            for _ in range(blocks[level]):
                layers = [ResBlock(channels, emb, width * mult)]
                channels = width * mult
                if n := depth.pop(0):
                    layers.append(SpatialTransformer(channels, context, heads, n))
                self.input_blocks.append(ModuleList(layers))
                skips.append(channels)
            if level != len(mults) - 1:
                self.input_blocks.append(ModuleList([Downsample(channels)]))
                skips.append(channels)
        self.middle_block = ModuleList(
            [
                ResBlock(channels, emb, channels),
                SpatialTransformer(channels, context, heads, config["transformer_depth_middle"]),
                ResBlock(channels, emb, channels),
            ]
        )
        self.output_blocks = ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            for i in range(blocks[level] + 1):
                layers = [ResBlock(channels + skips.pop(), emb, width * mult)]
                channels = width * mult
                if n := depth_out.pop():
                    layers.append(SpatialTransformer(channels, context, heads, n))
                if level and i == blocks[level]:
                    layers.append(Upsample(channels))
                self.output_blocks.append(ModuleList(layers))
        self.out = Sequential(GroupNorm(32, channels), SiLU(), Conv2d(channels, config["out_channels"], 3, padding=1))
        self.initialise()

    def initialise(self):
        """Every residual branch starts at zero, as in the published U-Net."""
        for module in self.modules():
            if isinstance(module, ResBlock):
                torch.nn.init.zeros_(module.out_layers[3].weight)
            elif isinstance(module, SpatialTransformer):
                torch.nn.init.zeros_(module.proj_out.weight)
        torch.nn.init.zeros_(self.out[2].weight)

    @staticmethod
    def run(layers, h, emb, context):
        for layer in layers:
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, context)
            else:
                h = layer(h)
        return h

    def forward(self, x, timesteps, context):
        """x (B, 4, H, W), timesteps (B,) in [0, 1000), context (B, T, context_dim) -> predicted noise (B, 4, H, W)."""
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        h, skips = x, []
        for layers in self.input_blocks:
            h = self.run(layers, h, emb, context)
            skips.append(h)
        h = self.run(self.middle_block, h, emb, context)
        for layers in self.output_blocks:
            h = self.run(layers, torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)
