"""Where the text stands in the layers that text and picture share, network by network: data for Family.joint.

Layers have the host's names here. Modulations, which read the time and one vector a picture, are not among them.
"""

import re
from dataclasses import replace

from .family import ALL, FIRST, LAST, TextRows

CONTEXT = ("c_crossattn", "")
LLAMA = ("encoder_hidden_states_llama3", "")

# Flux.1, Flux.2, Chroma, LongCat, Ovis: blocks with a stream for the text, then text and picture in one
FLUX = (
    TextRows(r"^double_blocks_\d+_txt_(attn|mlp)_|^txt_in$", ALL),
    TextRows(r"^single_blocks_\d+_linear[12]$", FIRST, (CONTEXT,)),
)
# HunyuanVideo, HunyuanImage: also the letters that ByT5 reads, and what a vision encoder says of a picture
HUNYUAN = (
    TextRows(r"^double_blocks_\d+_txt_(attn|mlp)_", ALL),
    TextRows(
        r"^single_blocks_\d+_linear[12]$", FIRST,
        (CONTEXT, ("txt_byt5", "byt5_in"), ("clip_fea", "vision_in")), moved=True,
    ),
)  # fmt: skip
# Lumina 2 and NewBie; Z-Image pads each text to a multiple of 32 rows
_LUMINA = TextRows(
    r"^layers_\d+_(attention|feed_forward)_", FIRST, (CONTEXT, ("ref_contexts", "")), pictures="ref_latents"
)
_REFINED = TextRows(r"^context_refiner_\d+_(attention|attn|feed_forward)_", ALL)
LUMINA = (_REFINED, _LUMINA)
Z_IMAGE = (_REFINED, replace(_LUMINA, multiple=32))
QWEN_IMAGE = (TextRows(r"^transformer_blocks_\d+_(attn_add_._proj|attn_to_add_out|txt_mlp_)|^txt_in$", ALL),)
QWEN_IMAGE_21 = (
    TextRows(
        r"^transformer_blocks_\d+_(attn_to|img_mlp)_", FIRST, (CONTEXT,), splits="image_slots",
    ),
)  # fmt: skip
KREA2 = (
    TextRows(r"^txtfusion_refiner_blocks_\d+_(attn|mlp)_|^txtmlp_", ALL),
    TextRows(r"^blocks_\d+_(attn|mlp)_", FIRST, (CONTEXT,)),
)
SD3 = (TextRows(r"^joint_blocks_\d+_context_block_(attn|mlp)_|^context_embedder$", ALL),)
AURAFLOW = (
    TextRows(r"^double_layers_\d+_(attn_w1|mlpC_)|^cond_seq_linear$", ALL),
    TextRows(r"^single_layers_\d+_(attn_w1|mlp_)", FIRST, (CONTEXT,), added=8),  # register tokens
)
# after the picture: T5, the last layer of Llama, and the layer of Llama that is the block's own
HIDREAM = (
    TextRows(r"^double_stream_blocks_\d+_block_(attn1?_to_(q|k|v|out)_t(_0)?$|ff_t_)|^caption_projection_", ALL),
    TextRows(r"^single_stream_blocks_\d+_block_attn1?_to_", LAST, (CONTEXT, LLAMA, LLAMA)),
)
OMNIGEN2 = (_REFINED, TextRows(r"^layers_\d+_(attn|feed_forward)_", FIRST, (CONTEXT,)))
BOOGU = (_REFINED, TextRows(r"^single_stream_layers_\d+_(attn|feed_forward)_", FIRST, (CONTEXT,)))
ERNIE = (TextRows(r"^layers_\d+_(self_attention|mlp)_", LAST, (CONTEXT,)),)
COGVIDEOX = (TextRows(r"^blocks_\d+_(q|k|v|attn_out|ff_proj|ff_out)$", FIRST, (CONTEXT,)),)
IDEOGRAM4 = (TextRows(r"^layers_\d+_(attention|feed_forward)_", FIRST, (CONTEXT,)),)
# keys and values of a cross-attention see the text alone
WAN = (TextRows(r"^blocks_\d+_cross_attn_[kv]$|^text_embedding_", ALL),)
COSMOS = (TextRows(r"^blocks_\d+_cross_attn_[kv]_proj$|^llm_adapter_", ALL),)

# layers that get the batch in another order than picture by picture: experts the rows that were chosen for them, the
# keys and values of PixArt all texts as one, those of Cosmos 1 the frames first, pixel blocks pieces of pictures
_MIXED = re.compile(
    r"_experts_\d+_|_cross_attn_kv_linear$|^pooler_|_linear_pos$|^blocks_block\d+_blocks_\d+_block_|^pixel_blocks_"
    r"|_time_stack_.*emb_layers"
)


def mixed(site):
    """Whether the first dimension of what the layer at a site gets is none of pictures, or not in their order."""
    return _MIXED.search(site) is not None
