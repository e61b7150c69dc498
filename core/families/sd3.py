"""Stable Diffusion 3 and 3.5: joint blocks that read CLIP's rows and, behind them, T5's by one layer.

Esser et al. 2024 (arXiv 2403.03206). Rows of both encoders have the same width, CLIP's filled up with zeros; the pooled
vectors of the two CLIPs stand beside them.
"""

from . import joint
from .family import Family
from .transformers import pooled, sentence

BLOCKS = tuple(
    (rf"^joint_blocks_\d+_{stream}_block_{layer}$", role)
    for stream, kind in (("context", "text_"), ("x", "image_"))
    for layer, role in (
        (r"attn2?_qkv", f"{kind}attention.qkv"),
        (r"attn2?_proj", f"{kind}attention.out"),
        ("mlp_fc1", f"{kind.replace('image_', '')}feed_forward.up"),
        ("mlp_fc2", f"{kind.replace('image_', '')}feed_forward.down"),
    )
)
ENCODER = "CLIP and T5-XXL of Stable Diffusion 3"

SD3 = Family(
    "SD3", "Stable Diffusion 3", ("SD3",),
    (sentence(ENCODER, r"^context_embedder$", pads=True), pooled(r"^y_embedder\.mlp\.0$", encoder="CLIP-L and CLIP-G")),
    BLOCKS, r"_context_block_attn_qkv$", joint=joint.SD3,
)  # fmt: skip
