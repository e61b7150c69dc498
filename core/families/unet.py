"""Stable Diffusion 1, 2 and XL: U-Nets that read the text of CLIP encoders by cross-attention.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.3; Podell et al. 2023,
"SDXL", section 2.1 (two encoders side by side, and the pooled vector of the second beside the sizes).
"""

from .family import Family, TextEntry

TEXT = TextEntry("text", "cross_attn", "c_crossattn", (r"attn2\.to_k$", r"attn2\.to_v$"), width="context_dim")
# the first inputs of the label embedding; the sizes of the picture follow
POOLED = TextEntry("pooled", "pooled_output", "y", (r"label_emb\.0\.0$",), pooled=True, asked=True)

ATTENTIONS = {"1": "self_attention", "2": "cross_attention"}
PROJECTIONS = {"q": "query", "k": "key", "v": "value", "out_0": "out"}
ROLES = (
    *((rf"(?:^|_)attn{n}_to_{p}$", f"{attention}.{projection}")
      for n, attention in ATTENTIONS.items() for p, projection in PROJECTIONS.items()),
    (r"(?:^|_)ff_net_0_proj$", "feed_forward.up"),
    (r"(?:^|_)ff_net_2$", "feed_forward.down"),
    (r"(?:^|_)proj_in$", "proj_in"),
    (r"(?:^|_)proj_out$", "proj_out"),
)  # fmt: skip
TRAINED = r"transformer_blocks|proj_(in|out)$"  # as SPM adapts them


def _unet(name, title, configs, width, architectures, *entries):
    return Family(name, title, configs, entries, ROLES, TRAINED, width, architectures)


SD1 = _unet(
    "SD1", "Stable Diffusion 1", ("SD15",), 768, (("SD1", "sd_v1", "stable-diffusion-v1"),), TEXT
)  # fmt: skip
SD2 = _unet(
    "SD2", "Stable Diffusion 2", ("SD20",), 1024, (("SD2", "sd_v2", "stable-diffusion-v2-512"),), TEXT
)  # fmt: skip
SDXL = _unet(
    "SDXL", "Stable Diffusion XL", ("SDXL", "SDXLRefiner"), 2048,
    (("SDXLRefiner", "", "stable-diffusion-xl-v1-refiner"), ("SDXL", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base")),
    TEXT, POOLED,
)  # fmt: skip
