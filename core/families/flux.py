"""Flux.1 (dev, schnell, Fill, Kontext, Krea), Flux.2, and their relatives Chroma, LongCat-Image and Ovis-Image.

Black Forest Labs 2024 and 2025: a text stream and an image stream in double blocks, one stream in single blocks. The
rows enter by `txt_in`; Flux.1 reads CLIP's pooled vector beside them, and attends to T5's padding.
"""

from . import joint
from .family import Family
from .transformers import T5, pooled, sentence, words

BLOCKS = (
    (r"^double_blocks_\d+_txt_attn_qkv$", "text_attention.qkv"),
    (r"^double_blocks_\d+_txt_attn_proj$", "text_attention.out"),
    (r"^double_blocks_\d+_txt_mlp_0$", "text_feed_forward.up"),
    (r"^double_blocks_\d+_txt_mlp_2$", "text_feed_forward.down"),
    (r"^double_blocks_\d+_img_attn_qkv$", "image_attention.qkv"),
    (r"^double_blocks_\d+_img_attn_proj$", "image_attention.out"),
    (r"^double_blocks_\d+_img_mlp_0$", "feed_forward.up"),
    (r"^double_blocks_\d+_img_mlp_2$", "feed_forward.down"),
    (r"^single_blocks_\d+_linear1$", "joint_attention.qkv"),
    (r"^single_blocks_\d+_linear2$", "joint_attention.out"),
)
# the single blocks read the text's rows as well, and only what changes where these enter reaches them unhindered
TRAINED = r"^(txt_in|double_blocks_\d+_txt_attn_qkv)$"
POOLED = pooled(r"^vector_in\.in_layer$")
READER = r"^txt_in$"

FLUX = Family(
    "Flux", "Flux.1", ("Flux",), (sentence(T5, READER, pads=True), POOLED), BLOCKS, TRAINED, joint=joint.FLUX,
    architectures=(("FluxSchnell", "flux1", "flux-1-schnell"), ("Flux2", "", "Flux2"), ("Flux", "flux1", "flux-1-dev")),
)  # fmt: skip
CHROMA = Family("Chroma", "Chroma", ("Chroma",), (sentence(T5, READER, pads=True),), BLOCKS, TRAINED, joint=joint.FLUX)
# the rows are those of three layers of a language model side by side; the host fills up with zero rows on the left.
# dev and klein have different language models, of different width
FLUX2 = Family("Flux2", "Flux.2", ("Flux2",), (words("", READER),), BLOCKS, TRAINED, joint=joint.FLUX)
LONGCAT = Family(
    "LongCat", "LongCat-Image", ("LongCatImage",), (words("Qwen2.5-VL-7B", READER),), BLOCKS, TRAINED, joint=joint.FLUX
)
OVIS = Family(
    "Ovis",
    "Ovis-Image",
    ("Flux",),
    (words("Ovis2.5", READER, norm="txt_norm"),),
    BLOCKS,
    TRAINED,
    marks=("txt_norm",),
    joint=joint.FLUX,
)
