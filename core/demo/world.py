"""The demo model's own parts that no host provides: its small CLIP text encoder, and its exact VAE.

Host-free: the layer classes come in as ``operations`` (the host's ``comfy.ops`` or ``torch.nn``), so
that the training tools and the nodes build the same modules.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn import Module, ModuleList

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "pixel_world"


def load_config():
    """The demo model's configuration, assets/pixel_world/config.json."""
    return json.loads((ASSETS / "config.json").read_text(encoding="utf-8"))


class _Attention(Module):
    def __init__(self, width, heads, operations, **factory):
        super().__init__()
        self.heads = heads
        self.q_proj = operations.Linear(width, width, **factory)
        self.k_proj = operations.Linear(width, width, **factory)
        self.v_proj = operations.Linear(width, width, **factory)
        self.out_proj = operations.Linear(width, width, **factory)

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class _MLP(Module):
    def __init__(self, width, operations, **factory):
        super().__init__()
        self.fc1 = operations.Linear(width, width * 4, **factory)
        self.fc2 = operations.Linear(width * 4, width, **factory)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # quick GELU, as in CLIP-L


class _Layer(Module):
    def __init__(self, width, heads, operations, **factory):
        super().__init__()
        self.layer_norm1 = operations.LayerNorm(width, **factory)
        self.self_attn = _Attention(width, heads, operations, **factory)
        self.layer_norm2 = operations.LayerNorm(width, **factory)
        self.mlp = _MLP(width, operations, **factory)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Namespace(Module):
    """A module that only holds others, to spell CLIP's published parameter names."""


class TextTransformer(Module):
    """CLIP's text transformer (Radford et al. 2021, section 2.4) with the published parameter names.

    config: {"vocab_size", "positions", "width", "layers", "heads"}.
    """

    def __init__(self, config, operations=torch.nn, **factory):
        super().__init__()
        width = config["width"]
        self.width, self.num_layers = width, config["layers"]
        self.text_model = model = _Namespace()
        model.embeddings = _Namespace()
        model.embeddings.token_embedding = operations.Embedding(config["vocab_size"], width, **factory)
        model.embeddings.position_embedding = operations.Embedding(config["positions"], width, **factory)
        model.encoder = _Namespace()
        model.encoder.layers = ModuleList(
            [_Layer(width, config["heads"], operations, **factory) for _ in range(self.num_layers)]
        )
        model.final_layer_norm = operations.LayerNorm(width, **factory)

    def embed(self, tokens):
        """Token ids (B, T) -> token embeddings (B, T, width), without positions."""
        return self.text_model.embeddings.token_embedding(tokens)

    def forward(self, embeddings, stop_at=None):
        """Token embeddings (B, T, width) -> hidden states (B, T, width), after the final LayerNorm.

        stop_at: number of layers to run (clip skip); None runs all of them.
        """
        model = self.text_model
        positions = torch.arange(embeddings.shape[1], device=embeddings.device)
        x = embeddings + model.embeddings.position_embedding(positions).to(embeddings.dtype)
        for layer in model.encoder.layers[:stop_at]:
            x = layer(x)
        return model.final_layer_norm(x)


LATENT_SCALE = 1.75  # gives the latents of the world's pictures about unit variance
_MIX = torch.tensor([[1, 1, 1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1]], dtype=torch.float32) / 2  # orthonormal columns


def rgb_to_latent(rgb):
    """Sprites (B, 3, H, W) in [0, 1] -> the U-Net's latents (B, 4, H, W)."""
    return torch.einsum("lc,bchw->blhw", _MIX.to(rgb), rgb * 2 - 1) * LATENT_SCALE


def latent_to_rgb(latent):
    """The U-Net's latents (B, 4, H, W) -> sprites (B, 3, H, W), clamped to [0, 1]."""
    rgb = torch.einsum("lc,blhw->bchw", _MIX.to(latent), latent) / LATENT_SCALE
    return ((rgb + 1) / 2).clamp(0, 1)


LATENT_RGB_FACTORS = (_MIX / LATENT_SCALE).tolist()  # (4, 3): the latents' share in RGB from -1 to 1, for live previews
_TAESD_SCALE = 2.0**-12  # latents of the world then reach 0.004 at TAESD's tanh, which bends them by less than 1e-6


def taesd_state_dict(scale_factor=0.18215):
    """The demo model's VAE as the weights of a TAESD, so that the host's own VAE class runs it.

    decode is latent_to_rgb followed by nearest x8 enlargement, encode the mean over 8x8 pixels followed
    by rgb_to_latent; the two are exact inverses on pictures made of 8x8 blocks. Red, green and blue
    travel in the first three of TAESD's 64 channels, in [0, 1], where its ReLUs leave them alone; all
    residual branches are zero. Layer order: madebyollin/taesd, taesd.py.

    scale_factor: of the host's latent format (VAE latents = U-Net latents / scale_factor).
    Returns {name: float32 tensor}.
    """
    width, state, rgb = 64, {}, torch.eye(3)

    def conv(name, matrix, outputs=width, inputs=width, bias=None, taps=((1, 1),)):
        weight = torch.zeros(outputs, inputs, 3, 3)
        for y, x in taps:
            weight[: len(matrix), : matrix.shape[1], y, x] = matrix / len(taps)
        state[f"{name}.weight"] = weight
        if bias is not None:
            state[f"{name}.bias"] = F.pad(bias, (0, outputs - len(bias)))

    def idle(prefix, *blocks):
        for block in blocks:
            for layer in (0, 2, 4):
                conv(f"{prefix}.{block}.conv.{layer}", torch.zeros(3, 3), bias=torch.zeros(width))

    halve = ((1, 1), (1, 2), (2, 1), (2, 2))  # a stride-2 convolution with padding 1 sees pixels 2i - 1 to 2i + 1
    to_latent = _MIX * LATENT_SCALE * (_TAESD_SCALE / scale_factor)
    conv("taesd_encoder.0", rgb, inputs=3, bias=torch.zeros(3))
    for layer in (2, 6, 10):
        conv(f"taesd_encoder.{layer}", rgb, taps=halve)
    conv("taesd_encoder.14", to_latent * 2, outputs=4, bias=-to_latent.sum(1))
    idle("taesd_encoder", 1, 3, 4, 5, 7, 8, 9, 11, 12, 13)

    to_rgb = _MIX.T / LATENT_SCALE * (scale_factor / _TAESD_SCALE)
    conv("taesd_decoder.1", to_rgb / 2, inputs=4, bias=torch.full((3,), 0.5))
    for layer in (7, 12, 17):
        conv(f"taesd_decoder.{layer}", rgb)
    conv("taesd_decoder.19", rgb, outputs=3, bias=torch.zeros(3))
    idle("taesd_decoder", 3, 4, 5, 8, 9, 10, 13, 14, 15, 18)
    state["vae_scale"], state["vae_shift"] = torch.tensor(_TAESD_SCALE), torch.tensor(0.0)
    return state
