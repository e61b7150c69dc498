"""Z-Image, Lumina Image 2 and NewBie: one stream that begins with the text, which a norm and refiners prepare.

Z-Image, Tongyi Lab 2025; Lumina Image 2.0, Qin et al. 2025 (arXiv 2503.21758). The rows of a language model enter by
`cap_embedder`, a norm and a linear layer, so that a map is exact behind the norm only.
"""

from . import joint
from .family import Family
from .transformers import pooled, words

READER, NORM = r"^cap_embedder\.1$", "cap_embedder.0"
LAYERS = tuple(
    (rf"^{blocks}_\d+_{layer}$", role.format(kind))
    for blocks, kind in (("layers", "joint_"), ("context_refiner", "text_"), ("noise_refiner", "image_"))
    for layer, role in (
        ("attention_qkv", "{}attention.qkv"),
        ("attention_out", "{}attention.out"),
        ("feed_forward_w1", "feed_forward.gate"),
        ("feed_forward_w3", "feed_forward.up"),
        ("feed_forward_w2", "feed_forward.down"),
    )
)
TRAINED = r"^layers_\d+_attention_qkv$"  # one stream: the text's rows in it

Z_IMAGE = Family(
    "ZImage", "Z-Image", ("ZImage",), (words("Qwen3-4B", READER, norm=NORM),), LAYERS, TRAINED, joint=joint.Z_IMAGE
)
LUMINA2 = Family(
    "Lumina2",
    "Lumina Image 2",
    ("Lumina2",),
    (words("Gemma2-2B", READER, norm=NORM),),
    LAYERS,
    TRAINED,
    joint=joint.LUMINA,
)
NEWBIE = Family(
    "NewBie", "NewBie", ("Lumina2",),
    (
        words("Gemma3-4B", READER, norm=NORM),
        pooled(r"^clip_text_pooled_proj\.1$", "clip_text_pooled", "Jina CLIP 2", norm="clip_text_pooled_proj.0"),
    ),
    LAYERS, TRAINED, marks=("clip_text_pooled_proj",), joint=joint.LUMINA,
)  # fmt: skip
