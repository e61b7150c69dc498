"""Transformers that join the text's stream with the picture's: HiDream, HunyuanVideo and HunyuanImage, Kandinsky 5,
AuraFlow, Mochi, CogVideoX, MiniMax, and Stable Cascade.

HiDream-I1, Cai et al. 2025 (arXiv 2505.22705); HunyuanVideo, Kong et al. 2024 (arXiv 2412.03603).
"""

from . import joint
from .family import LATER, Family, TextEntry
from .flux import BLOCKS, POOLED, TRAINED
from .transformers import T5, pooled, sentence, text, words

LLAMA_LAYERS = 32
HIDREAM_BLOCKS = 48  # each reads a layer of the language model; from the last on all read that


def _llama(layer):
    """The entry of one layer of HiDream's language model, which one block reads, the last one all that remain."""
    blocks = range(layer, HIDREAM_BLOCKS if layer == LLAMA_LAYERS - 1 else layer + 1)
    return TextEntry(
        f"llama.{layer}", "conditioning_llama3", "encoder_hidden_states_llama3",
        tuple(rf"^caption_projection\.{block}\.linear$" for block in blocks),
        layer=layer, encoder="Llama-3.1-8B", stream="llama", reach=LATER, pads=True,
    )  # fmt: skip


HIDREAM = Family(
    "HiDream", "HiDream-I1", ("HiDream",),
    (
        sentence(T5, rf"^caption_projection\.{HIDREAM_BLOCKS}\.linear$", stream="t5xxl", pads=True),
        *(_llama(layer) for layer in range(LLAMA_LAYERS)),
        pooled(r"^p_embedder\.pooled_embedder\.linear_1$", encoder="CLIP-L and CLIP-G"),
    ),
    joint=joint.HIDREAM,
)  # fmt: skip
HIDREAM_O1 = Family(
    "HiDreamO1", "HiDream-O1", ("HiDreamO1",), (),
    refused="it enters as token ids of the language model that paints the picture, not as vectors",
)  # fmt: skip
# the second reader gets the mean of the rows
REFINER = (r"^txt_in\.input_embedder$", r"^txt_in\.c_embedder\.in_layer$")
# text in quotes, which is to be written in the picture
GLYPHS = TextEntry(
    "byt5", "conditioning_byt5small", "txt_byt5", (r"^byt5_in\.fc1$",), norm="byt5_in.layernorm",
    encoder="ByT5-small", stream="byt5", reach="all",
)  # fmt: skip
HUNYUAN_VIDEO = Family(
    "HunyuanVideo",
    "HunyuanVideo",
    ("HunyuanVideo",),
    (words("Llama-3-8B", *REFINER), POOLED),
    BLOCKS,
    TRAINED,
    joint=joint.HUNYUAN,
)
HUNYUAN_IMAGE = Family(
    "HunyuanImage21", "HunyuanImage 2.1 and HunyuanVideo 1.5", ("HunyuanImage21", "HunyuanImage21Refiner",
    "HunyuanVideo15", "HunyuanVideo15_SR_Distilled"), (words("Qwen2.5-VL-7B", *REFINER), GLYPHS), BLOCKS, TRAINED,
    joint=joint.HUNYUAN,
)  # fmt: skip
KANDINSKY5 = Family(
    "Kandinsky5", "Kandinsky 5", ("Kandinsky5",),
    (
        words("Qwen2.5-VL-7B", r"^text_embeddings\.in_layer$", stream="qwen25_7b"),
        pooled(r"^pooled_text_embeddings\.in_layer$"),
    ),
)  # fmt: skip
AURA_FLOW = Family(
    "AuraFlow", "AuraFlow", ("AuraFlow",), (sentence("Pile-T5-XL", r"^cond_seq_linear$"),), joint=joint.AURAFLOW
)
MOCHI = Family("GenmoMochi", "Mochi", ("GenmoMochi",), (sentence(T5, r"^t5_yproj$", r"^t5_y_embedder\.to_(kv|q)$"),))
COGVIDEOX = Family(
    "CogVideoX",
    "CogVideoX",
    ("CogVideoX_T2V",),
    (sentence(T5, r"^patch_embed\.text_proj$", pads=True),),
    joint=joint.COGVIDEOX,
)
# its refiner runs inside `extra_conds`; the blocks read the rows as it gives them
MINIMAX_H3 = Family("MiniMaxH3", "MiniMax H3", ("MiniMaxH3",), (words("Qwen3-VL-32B", prepared=True),))
STABLE_CASCADE = Family(
    "StableCascade", "Stable Cascade", ("Stable_Cascade_C",),
    (
        TextEntry("text", "cross_attn", "clip_text", (r"^clip_txt_mapper$",), encoder="CLIP-G"),
        pooled(r"^clip_txt_pooled_mapper$", "clip_text_pooled", "CLIP-G projected", asked=True),
    ),
)  # fmt: skip
STABLE_CASCADE_B = Family(
    "StableCascadeB", "Stable Cascade B", ("Stable_Cascade_B",), (),
    refused="this stage only sharpens what stage C painted; erase it from stage C",
)  # fmt: skip
# what a model of no known family is tried as
UNKNOWN = Family("", "unknown", (), (text(reach="all"),))
