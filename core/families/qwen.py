"""Qwen-Image (2507, 2512, Edit, Layered) and 2.1, Mage-Flow, Krea 2, and others that read a Qwen or Ministral.

Qwen-Image, Wu et al. 2025 (arXiv 2508.02324). The rows of the language model pass a norm before the linear layer that
reads them, in all but Ernie-Image and JoyImage.
"""

from . import joint
from .family import Family
from .transformers import words

BLOCKS = (
    (r"^transformer_blocks_\d+_attn_add_q_proj$", "text_attention.query"),
    (r"^transformer_blocks_\d+_attn_add_k_proj$", "text_attention.key"),
    (r"^transformer_blocks_\d+_attn_add_v_proj$", "text_attention.value"),
    (r"^transformer_blocks_\d+_attn_to_add_out$", "text_attention.out"),
    (r"^transformer_blocks_\d+_attn_to_q$", "image_attention.query"),
    (r"^transformer_blocks_\d+_attn_to_k$", "image_attention.key"),
    (r"^transformer_blocks_\d+_attn_to_v$", "image_attention.value"),
    (r"^transformer_blocks_\d+_attn_to_out_0$", "image_attention.out"),
    (r"^transformer_blocks_\d+_txt_mlp_net_0_proj$", "text_feed_forward.up"),
    (r"^transformer_blocks_\d+_txt_mlp_net_2$", "text_feed_forward.down"),
    (r"^transformer_blocks_\d+_img_mlp_net_0_proj$", "feed_forward.up"),
    (r"^transformer_blocks_\d+_img_mlp_net_2$", "feed_forward.down"),
)
TRAINED = r"_attn_add_[qkv]_proj$"
QWEN_VL = "Qwen2.5-VL-7B"

QWEN_IMAGE = Family(
    "QwenImage",
    "Qwen-Image",
    ("QwenImage",),
    (words(QWEN_VL, r"^txt_in$", norm="txt_norm"),),
    BLOCKS,
    TRAINED,
    joint=joint.QWEN_IMAGE,
)
# text rows are read at time 0 and do not change during a sampling; the host keeps them from the first step on
QWEN_IMAGE_21 = Family(
    "QwenImage21", "Qwen-Image 2.1", ("QwenImage21",),
    (words("Qwen3-VL-8B", r"^txt_in\.in_layer$", norm="txt_in.text_norm"),),
    cache="qwen_image21_cache", joint=joint.QWEN_IMAGE_21,
)  # fmt: skip
MAGE_FLOW = Family(
    "MageFlow", "Mage-Flow", ("MageFlow",), (words("", r"^txt_in$", norm="txt_norm"),), joint=joint.QWEN_IMAGE
)
# twelve layers of the language model, joined by a small transformer before the layer that the map acts at
KREA2 = Family(
    "Krea2",
    "Krea 2",
    ("Krea2",),
    (words("Qwen3-VL-4B", r"^txtmlp\.1$", norm="txtfusion and txtmlp.0"),),
    joint=joint.KREA2,
)
CAPTIONS = r"caption_embedder\.1$", "caption_embedder.0"
OMNIGEN2 = Family(
    "Omnigen2", "OmniGen2", ("Omnigen2",), (words("Qwen2.5-VL-3B", CAPTIONS[0], norm=CAPTIONS[1]),),
    joint=joint.OMNIGEN2,
)  # fmt: skip
BOOGU = Family(
    "Boogu", "Boogu", ("Boogu",), (words("Boogu's Qwen3-VL", CAPTIONS[0], norm=CAPTIONS[1]),), joint=joint.BOOGU
)
ERNIE = Family(
    "ErnieImage", "Ernie-Image", ("ErnieImage",), (words("Ministral3-3B", r"^text_proj$"),), joint=joint.ERNIE
)
JOY_IMAGE = Family("JoyImage", "JoyImage", ("JoyImage",), (words("", r"text_embedder\.linear_1$"),))
IDEOGRAM4 = Family(
    "Ideogram4",
    "Ideogram 4",
    ("Ideogram4",),
    (words("Qwen3-VL-8B", r"^llm_cond_proj$", norm="llm_cond_norm"),),
    joint=joint.IDEOGRAM4,
)
LENS = Family("Lens", "Lens", ("Lens",), (words("GPT-OSS-20B", r"^txt_in$", norm="txt_norm"),))
PIXELDIT = Family("PixelDiTT2I", "PixelDiT", ("PixelDiTT2I",), (words("Gemma2-2B", r"^y_embedder\.proj$"),))
