"""Transformers whose blocks read the text by cross-attention, as U-Nets do: Wan, Cosmos, Anima, LTX, PixArt.

Wan 2.1, Wan Team 2025 (arXiv 2503.20314); Cosmos-Predict2, NVIDIA 2025; LTX-Video, HaCohen et al. 2025 (arXiv
2501.00103); PixArt-alpha, Chen et al. 2024 (arXiv 2310.00426); HunyuanDiT, Li et al. 2024 (arXiv 2405.08748).
"""

from . import joint
from .family import Family, TextEntry
from .transformers import T5, UMT5, sentence

ATTENTIONS = (("self_attn", "self_attention"), ("cross_attn", "cross_attention"))
PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "out"}
WAN_ROLES = (
    *((rf"_{attention}_{p}$", f"{role}.{projection}")
      for attention, role in ATTENTIONS for p, projection in PROJECTIONS.items()),
    (r"^blocks_\d+_ffn_0$", "feed_forward.up"),
    (r"^blocks_\d+_ffn_2$", "feed_forward.down"),
)  # fmt: skip
COSMOS_ROLES = (
    *((rf"_{attention}_{p}(_proj)?$", f"{role}.{projection}")
      for attention, role in ATTENTIONS
      for p, projection in {"q": "query", "k": "key", "v": "value", "output": "out"}.items()),
    (r"^blocks_\d+_mlp_layer1$", "feed_forward.up"),
    (r"^blocks_\d+_mlp_layer2$", "feed_forward.down"),
)  # fmt: skip
LTX_ROLES = (
    (r"^transformer_blocks_\d+_ff_net_0_proj$", "feed_forward.up"),
    (r"^transformer_blocks_\d+_ff_net_2$", "feed_forward.down"),
)
WAN_TRAINED, COSMOS_TRAINED = r"^blocks_\d+_cross_attn_[kv]$", r"^blocks_\d+_cross_attn_[kv]_proj$"
READERS = (r"^blocks\.\d+\.cross_attn\.k_proj$", r"^blocks\.\d+\.cross_attn\.v_proj$")

WAN = Family(
    "WAN21", "Wan 2.1 and 2.2", ("WAN21_T2V",), (sentence(UMT5, r"^text_embedding\.0$"),), WAN_ROLES, WAN_TRAINED,
    joint=joint.WAN,
    note="Wan 2.2 with 14 billion weights is two models, for high and for low noise: erase from both.",
)  # fmt: skip
COSMOS1 = Family("Cosmos", "Cosmos 1", ("CosmosT2V",), (sentence("T5-11B", r"\.blocks\.1\.block\.attn\.to_[kv]\.0$"),))
COSMOS2 = Family(
    "CosmosPredict2",
    "Cosmos-Predict2",
    ("CosmosT2IPredict2",),
    (sentence("T5-11B", *READERS),),
    COSMOS_ROLES,
    COSMOS_TRAINED,
    joint=joint.COSMOS,
)
# an adapter inside `extra_conds` reads a language model by the tokens of T5, and gives the rows
ANIMA = Family(
    "Anima",
    "Anima",
    ("Anima",),
    (sentence("Anima's adapter", *READERS, prepared=True, stream="t5xxl"),),
    COSMOS_ROLES,
    COSMOS_TRAINED,
    joint=joint.COSMOS,
)
LTXV = Family("LTXV", "LTX-Video", ("LTXV",), (sentence(T5, r"^caption_projection\.linear_1$"),), LTX_ROLES)
LTXAV = Family(
    "LTXAV", "LTX-2", ("LTXAV",), (sentence("Gemma 3 with LTX-2's connectors", prepared=True),), LTX_ROLES,
    note="The text of LTX-2 models is mapped behind their connectors, which no measurement has covered.",
)  # fmt: skip
PIXART = Family("PixArt", "PixArt", ("PixArtAlpha",), (sentence(T5, r"^y_embedder\.y_proj\.fc1$"),))
# its blocks read CLIP's and mT5's rows side by side, and add places to them first: no edit of weights is the same
HUNYUAN_DIT = Family(
    "HunyuanDiT", "HunyuanDiT", ("HunyuanDiT",),
    (
        sentence("HunyuanDiT's CLIP", pads=True),
        TextEntry("mt5", "conditioning_mt5xl", "encoder_hidden_states_t5", encoder="mT5-XL", stream="mt5xl",
                  reach="all"),
    ),
)  # fmt: skip
