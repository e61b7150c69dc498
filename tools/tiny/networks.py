"""Tiny networks of every family that a host knows: its own classes with random weights, no download.

    model = build("flux")                 # MODEL, float32 on the CPU, always the same weights
    clip = text_encoder("flux")           # CLIP: words.py at the family's width, with all that its encoders give
    cond, uncond = predict(model, positive, negative, "flux")

The host has to be importable (tools/host_library.py).
"""

import contextlib
import functools
import importlib
import inspect
import json
import math
import re
from dataclasses import dataclass, field, replace

import torch

from . import words

CPU = torch.device("cpu")


class NotInThisHost(LookupError):
    """The host is older than the family."""


@dataclass(frozen=True)
class Network:
    """What a tiny model is made of.

    config: name of the host's model configuration; unet: its unet_config. latent: (C, H, W) or (C, T, H, W); sound: of
    the sound that is sampled with it, or None; rows: the most pictures that it takes at once. reads:
    pattern of the names of all linear layers that a text tensor of the conditioning reaches first, "" where an edit of
    weights is not the same as one of the text. width: of the text vectors; extra: what its encoders give beside them;
    padded: tokens of every prompt, None for as many as it has. settings: what its configuration gets after it was made;
    parameters: where the host lists the names of `unet` that it knows, (module, class); needs: those without which it
    is another family. longest: the most tokens of a prompt.
    """

    config: str
    unet: dict
    latent: tuple
    reads: str
    width: int = 48
    extra: object = None
    padded: int | None = 8
    settings: dict = field(default_factory=dict)
    parameters: tuple = ()
    needs: tuple = ()
    longest: int = words.LONGEST
    sound: tuple | None = None
    rows: int = 2


UNET = dict(
    image_size=32, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[1, 1], channel_mult=[1, 2],
    transformer_depth=[1, 1], transformer_depth_output=[1, 1, 1, 1], transformer_depth_middle=1,
    use_spatial_transformer=True, legacy=False, adm_in_channels=None, use_temporal_attention=False,
    use_linear_in_transformer=False, context_dim=48,
)  # fmt: skip
WIDE = dict(UNET, use_linear_in_transformer=True, model_channels=64)  # these classes fix 64 channels a head
XL = dict(WIDE, num_classes="sequential")
FLUX = dict(
    image_model="flux", in_channels=16, out_channels=16, vec_in_dim=32, context_in_dim=48, hidden_size=64,
    mlp_ratio=4.0, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=[8, 12, 12], theta=10000, patch_size=2,
    qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
)  # fmt: skip
FLUX2 = dict(
    image_model="flux2", in_channels=128, out_channels=128, axes_dim=[8, 8, 8, 8], num_heads=2, mlp_ratio=3.0,
    theta=2000, global_modulation=True, mlp_silu_act=True, qkv_bias=False, ops_bias=False, default_ref_method="index",
    ref_index_scale=10.0, txt_ids_dims=[3], patch_size=1, hidden_size=64, context_in_dim=48, vec_in_dim=None, depth=2,
    depth_single_blocks=2, guidance_embed=True,
)  # fmt: skip
CHROMA = dict(
    image_model="chroma", in_channels=64, out_channels=64, context_in_dim=48, hidden_size=64, mlp_ratio=4.0,
    num_heads=2, depth=2, depth_single_blocks=2, axes_dim=[8, 12, 12], theta=10000, patch_size=2, qkv_bias=True,
    in_dim=64, out_dim=64, hidden_dim=64, n_layers=2, txt_ids_dims=[], vec_in_dim=None,
)  # fmt: skip
RADIANCE = dict(
    CHROMA, image_model="chroma_radiance", in_channels=3, out_channels=3, patch_size=16, nerf_hidden_size=16,
    nerf_mlp_ratio=2, nerf_depth=2, nerf_max_freqs=4, nerf_tile_size=512, nerf_final_head_type="conv",
    nerf_embedder_dtype=torch.float32, use_x0=False, use_sequential_txt_ids=False,
)  # fmt: skip
HUNYUAN = dict(
    image_model="hunyuan_video", in_channels=16, patch_size=[1, 2, 2], out_channels=16, vec_in_dim=32,
    axes_dim=[16, 56, 56], meanflow=False, context_in_dim=48, hidden_size=128, mlp_ratio=4.0, num_heads=1, depth=1,
    depth_single_blocks=1, theta=256, qkv_bias=True, byt5=False, guidance_embed=True, use_cond_type_embedding=False,
    vision_in_dim=None, meanflow_sum=False,
)  # fmt: skip
LUMINA = dict(
    image_model="lumina2", patch_size=2, in_channels=16, dim=64, n_heads=2, n_kv_heads=2, axes_dims=[8, 12, 12],
    axes_lens=[300, 512, 512], rope_theta=10000.0, ffn_dim_multiplier=1.0, multiple_of=16, cap_feat_dim=48, n_layers=2,
    qk_norm=True, n_refiner_layers=2,
)  # fmt: skip
WAN = dict(
    image_model="wan2.1", model_type="t2v", dim=64, out_dim=16, num_heads=2, ffn_dim=128, num_layers=2,
    patch_size=(1, 2, 2), freq_dim=64, window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6, in_dim=16,
    text_dim=48, text_len=16,
)  # fmt: skip
COSMOS = dict(
    max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1,
    model_channels=64, concat_padding_mask=True, crossattn_emb_channels=48, pos_emb_cls="rope3d",
    pos_emb_interpolation="crop", use_adaln_lora=True, adaln_lora_dim=16, num_blocks=2, num_heads=2,
)  # fmt: skip
PREDICT2 = dict(
    COSMOS, image_model="cosmos_predict2", pos_emb_learnable=True, min_fps=1, max_fps=30,
    extra_per_block_abs_pos_emb=False, rope_h_extrapolation_ratio=4.0, rope_w_extrapolation_ratio=4.0,
    rope_t_extrapolation_ratio=1.0, extra_h_extrapolation_ratio=1.0, extra_w_extrapolation_ratio=1.0,
    extra_t_extrapolation_ratio=1.0, rope_enable_fps_modulation=False,
)  # fmt: skip
KANDINSKY = dict(
    image_model="kandinsky5", model_dim=64, axes_dims=(8, 12, 12), time_dim=32, ff_dim=128, visual_embed_dim=132,
    num_text_blocks=1, num_visual_blocks=2, in_text_dim=48, in_text_dim2=32,
)  # fmt: skip
SD3 = dict(
    in_channels=16, patch_size=2, out_channels=16, depth=2, input_size=None, adm_in_channels=32, num_patches=64,
    pos_embed_max_size=8, pos_embed_scaling_factor=None, qk_norm="rms", x_block_self_attn_layers=[],
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 128}},
)  # fmt: skip
PIXART = dict(
    num_heads=2, patch_size=2, in_channels=4, depth=2, model_max_length=16, input_size=16, pe_interpolation=1,
    caption_channels=48,
)  # fmt: skip

OF_FLUX, OF_CHROMA = ("flux.model", "FluxParams"), ("chroma.model", "ChromaParams")
OF_RADIANCE, OF_HUNYUAN = (
    ("chroma_radiance.model", "ChromaRadianceParams"),
    ("hunyuan_video.model", "HunyuanVideoParams"),
)
CROSS_ATTENTION = r".*\.attn2\.to_[kv]"
PIXART_READS = r"y_embedder\.y_proj\.fc1"
HUNYUAN_READS = r"txt_in\.(input_embedder|c_embedder\.in_layer)"
KANDINSKY_READS = r"(pooled_)?text_embeddings\.in_layer"
WAN_READS = r"text_embedding\.0"
COSMOS_READS = r"blocks\.\d+\.cross_attn\.[kv]_proj"

NETWORKS = {
    "sd15": Network("SD15", UNET, (4, 16, 16), CROSS_ATTENTION),
    "sd21_v": Network("SD20", WIDE, (4, 16, 16), CROSS_ATTENTION, settings={"model_type": "V_PREDICTION"}),
    "sdxl": Network(
        "SDXL", dict(XL, adm_in_channels=32 + 6 * 256), (4, 16, 16), rf"{CROSS_ATTENTION}|label_emb\.0\.0",
        extra=words.pooled(32),
    ),
    "sdxl_refiner": Network(
        "SDXLRefiner", dict(XL, adm_in_channels=32 + 5 * 256), (4, 16, 16), rf"{CROSS_ATTENTION}|label_emb\.0\.0",
        extra=words.pooled(32),
    ),
    "sd3": Network("SD3", SD3, (16, 8, 8), r"context_embedder|y_embedder\.mlp\.0", extra=words.pooled(32)),
    "sd35_medium": Network(
        "SD3", dict(SD3, x_block_self_attn_layers=[0]), (16, 8, 8), r"context_embedder|y_embedder\.mlp\.0",
        extra=words.pooled(32),
    ),
    "auraflow": Network(
        "AuraFlow",
        dict(max_seq=64, cond_seq_dim=48, n_double_layers=1, n_layers=2, dim=64, n_heads=4, global_conddim=64),
        (4, 8, 8), "cond_seq_linear",
    ),
    "pixart_alpha": Network(
        "PixArtAlpha", dict(PIXART, image_model="pixart_alpha", hidden_size=72, micro_condition=True), (4, 40, 40),
        PIXART_READS, extra=lambda ids, g: {"width": 64, "height": 64},
    ),
    "pixart_sigma": Network(
        "PixArtSigma", dict(PIXART, image_model="pixart_sigma", hidden_size=64, micro_condition=False), (4, 40, 40),
        PIXART_READS,
    ),
    # its blocks read the rows of CLIP and of mT5 side by side, and places are added to them first
    "hunyuan_dit": Network(
        "HunyuanDiT",
        dict(image_model="hydit", depth=4, hidden_size=64, num_heads=2, text_states_dim=48, text_states_dim_t5=40,
             text_len=8, text_len_t5=8),
        (4, 8, 8), "",
        extra=words.both(words.mask, words.rows("conditioning_mt5xl", 40, "attention_mask_mt5xl")),
    ),
    "flux_dev": Network(
        "Flux", FLUX, (16, 8, 8), r"txt_in|vector_in\.in_layer", extra=words.pooled(32), parameters=OF_FLUX
    ),
    "flux_schnell": Network(
        "FluxSchnell", dict(FLUX, guidance_embed=False), (16, 8, 8), r"txt_in|vector_in\.in_layer",
        extra=words.pooled(32), parameters=OF_FLUX,
    ),
    "longcat": Network(
        "LongCatImage", dict(FLUX, guidance_embed=False, vec_in_dim=None, txt_ids_dims=[1, 2]), (16, 8, 8), "txt_in",
        padded=None, parameters=OF_FLUX,
    ),
    "ovis": Network(
        "Flux", dict(FLUX, guidance_embed=False, vec_in_dim=None, txt_ids_dims=[1, 2], yak_mlp=True, txt_norm=True),
        (16, 8, 8), "txt_in", padded=None, parameters=OF_FLUX, needs=("txt_norm",),
    ),
    "flux2": Network("Flux2", FLUX2, (128, 6, 6), "txt_in", padded=None, parameters=OF_FLUX),
    "chroma": Network("Chroma", CHROMA, (16, 8, 8), "txt_in", padded=None, parameters=OF_CHROMA),
    "chroma_radiance": Network(
        "ChromaRadiance", RADIANCE, (3, 32, 32), "txt_in", padded=None, parameters=OF_RADIANCE
    ),
    "mochi": Network(
        "GenmoMochi",
        dict(image_model="mochi_preview", depth=2, patch_size=2, num_heads=2, hidden_size_x=64, hidden_size_y=32,
             mlp_ratio_x=192.0, mlp_ratio_y=192.0, learn_sigma=False, in_channels=12, qk_norm=True, qkv_bias=False,
             out_bias=True, attn_drop=0.0, patch_embed_bias=True, posenc_preserve_area=True, timestep_mlp_bias=True,
             attend_to_padding=False, timestep_scale=1000.0, use_t5=True, t5_feat_dim=48, t5_token_length=8,
             rope_theta=10000.0),
        (12, 2, 8, 8), r"t5_yproj|t5_y_embedder\.to_kv|t5_y_embedder\.to_q", extra=words.mask,
    ),
    "ltxv": Network(
        "LTXV",
        dict(image_model="ltxv", num_layers=2, attention_head_dim=16, num_attention_heads=4, cross_attention_dim=64,
             caption_channels=48, in_channels=128),
        (128, 2, 4, 4), r"caption_projection\.linear_1", extra=words.mask,
    ),
    # video alone, as the host also samples it
    "ltxav": Network(
        "LTXAV",
        dict(image_model="ltxav", num_layers=2, attention_head_dim=16, num_attention_heads=4, cross_attention_dim=64,
             audio_attention_head_dim=8, audio_num_attention_heads=4, audio_cross_attention_dim=32, caption_channels=48,
             in_channels=128, connector_attention_head_dim=24, connector_num_attention_heads=2,
             connector_num_layers=1),
        (128, 2, 4, 4), "", padded=None,
    ),
    "hunyuan_video": Network(
        "HunyuanVideo", HUNYUAN, (16, 2, 8, 8), rf"{HUNYUAN_READS}|vector_in\.in_layer", extra=words.pooled(32),
        padded=None, parameters=OF_HUNYUAN,
    ),
    "hunyuan_video15": Network(
        "HunyuanVideo15",
        dict(HUNYUAN, patch_size=[1, 1, 1], in_channels=65, out_channels=32, vec_in_dim=None, guidance_embed=False,
             use_cond_type_embedding=True, vision_in_dim=48, meanflow_sum=True, byt5=True),
        (32, 2, 4, 4), rf"{HUNYUAN_READS}|byt5_in\.fc1", padded=None, parameters=OF_HUNYUAN,
        extra=words.rows("conditioning_byt5small", 1472),
    ),
    "hunyuan_image": Network(
        "HunyuanImage21",
        dict(HUNYUAN, patch_size=[1, 1], in_channels=64, out_channels=64, vec_in_dim=None, guidance_embed=False,
             byt5=True, axes_dim=[64, 64]),
        (64, 4, 4), rf"{HUNYUAN_READS}|byt5_in\.fc1", padded=None, parameters=OF_HUNYUAN,
        extra=words.rows("conditioning_byt5small", 1472),
    ),
    "cosmos1": Network(
        "CosmosT2V",
        dict(COSMOS, image_model="cosmos", pos_emb_learnable=False, block_config="FA-CA-MLP", block_x_format="THWBD",
             affline_emb_norm=True, extra_per_block_abs_pos_emb=True, extra_per_block_abs_pos_emb_type="learnable"),
        (16, 2, 8, 8), r"blocks\.block\d+\.blocks\.1\.block\.attn\.to_[kv]\.0",
    ),
    "cosmos_predict2": Network("CosmosT2IPredict2", PREDICT2, (16, 1, 8, 8), COSMOS_READS),
    "anima": Network(
        "Anima", dict(PREDICT2, image_model="anima"), (16, 1, 8, 8), COSMOS_READS, extra=words.token_ids, padded=None
    ),
    "lumina2": Network("Lumina2", LUMINA, (16, 8, 8), r"cap_embedder\.1", extra=words.mask, padded=None),
    "newbie": Network(
        "Lumina2", dict(LUMINA, clip_text_dim=32), (16, 8, 8), r"cap_embedder\.1|clip_text_pooled_proj\.1",
        extra=words.both(words.mask, words.pooled(32)), padded=None, parameters=("lumina.model", "NextDiT"),
        needs=("clip_text_dim",),
    ),
    "z_image": Network(
        "ZImage",
        dict(LUMINA, z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32, rope_theta=256.0, dim=256,
             axes_dims=[32, 48, 48]),
        (16, 8, 8), r"cap_embedder\.1", padded=None,
    ),
    "wan21": Network("WAN21_T2V", WAN, (16, 2, 8, 8), WAN_READS),
    "wan21_i2v": Network("WAN21_I2V", dict(WAN, model_type="i2v", in_dim=36), (16, 2, 8, 8), WAN_READS),
    "wan21_vace": Network(
        "WAN21_Vace", dict(WAN, model_type="vace", vace_in_dim=96, vace_layers=1), (16, 2, 8, 8), WAN_READS
    ),
    "wan22_5b": Network("WAN22_T2V", dict(WAN, out_dim=48, in_dim=48), (48, 2, 8, 8), WAN_READS),
    # as many blocks as the real one, each of which reads a layer of its language model
    "hidream": Network(
        "HiDream",
        dict(image_model="hidream", attention_head_dim=32, axes_dims_rope=[16, 8, 8], caption_channels=[48, 48],
             max_resolution=[16, 16], in_channels=16, llama_layers=[*range(32), *[31] * 16], num_attention_heads=2,
             num_routed_experts=2, num_activated_experts=1, num_layers=16, num_single_layers=32, out_channels=16,
             patch_size=2, text_emb_dim=32),
        (16, 8, 8), r"caption_projection\.\d+\.linear|p_embedder\.pooled_embedder\.linear_1",
        extra=words.both(words.pooled(32), words.layers(32, 48)),
    ),
    "omnigen2": Network(
        "Omnigen2",
        dict(image_model="omnigen2", hidden_size=64, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
             num_kv_heads=1, multiple_of=16, axes_dim_rope=[8, 12, 12], axes_lens=[64, 64, 64], text_feat_dim=48,
             timestep_scale=1000.0, in_channels=16),
        (16, 8, 8), r"time_caption_embed\.caption_embedder\.1", extra=words.every, padded=None,
    ),
    "boogu": Network(
        "Boogu",
        dict(image_model="boogu", hidden_size=64, num_layers=2, num_double_stream_layers=1, num_refiner_layers=1,
             num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=[8, 12, 12], axes_lens=[64, 64, 64],
             instruction_feat_dim=48),
        (16, 8, 8), r"time_caption_embed\.caption_embedder\.1", extra=words.every, padded=None,
    ),
    "qwen_image": Network(
        "QwenImage",
        dict(image_model="qwen_image", in_channels=64, num_layers=2, attention_head_dim=32, num_attention_heads=2,
             joint_attention_dim=48, axes_dims_rope=[8, 12, 12]),
        (16, 1, 8, 8), "txt_in", padded=None,
    ),
    "mage_flow": Network(
        "MageFlow",
        dict(image_model="mage_flow", in_channels=128, num_layers=2, attention_head_dim=32, num_attention_heads=2,
             joint_attention_dim=48, axes_dims_rope=[8, 12, 12]),
        (128, 6, 6), "txt_in", padded=None,
    ),
    "kandinsky5_video": Network(
        "Kandinsky5", KANDINSKY, (16, 2, 8, 8), KANDINSKY_READS, extra=words.both(words.pooled(32), words.mask),
        padded=None,
    ),
    "kandinsky5_image": Network(
        "Kandinsky5Image", dict(KANDINSKY, visual_embed_dim=64), (16, 1, 8, 8), KANDINSKY_READS,
        extra=words.pooled(32), padded=None,
    ),
    "krea2": Network(
        "Krea2",
        dict(image_model="krea2", features=128, tdim=32, txtdim=64, heads=2, kvheads=1, multiplier=2, layers=2, patch=2,
             channels=16, txtlayers=2, txtheads=2, txtkvheads=2),
        (16, 1, 8, 8), r"txtmlp\.1", width=128, padded=None,
    ),
    "ernie": Network(
        "ErnieImage",
        dict(image_model="ernie", hidden_size=64, num_attention_heads=2, num_layers=2, ffn_hidden_size=128,
             in_channels=128, out_channels=128, text_in_dim=48, rope_axes_dim=(8, 12, 12)),
        (128, 6, 6), "text_proj", padded=None,
    ),
    "cogvideox": Network(
        "CogVideoX_T2V",
        dict(image_model="cogvideox", num_attention_heads=2, attention_head_dim=32, in_channels=16, time_embed_dim=32,
             num_layers=2, text_embed_dim=48, use_rotary_positional_embeddings=True, patch_size=2),
        (16, 2, 8, 8), r"patch_embed\.text_proj",
    ),
    "joyimage": Network(
        "JoyImage",
        dict(image_model="joyimage", in_channels=16, hidden_size=64, patch_size=[1, 2, 2], num_layers=2,
             num_attention_heads=2, text_dim=48),
        (16, 1, 8, 8), r"condition_embedder\.text_embedder\.linear_1", padded=None,
        settings={"rope_dim_list": [8, 12, 12]},
    ),
    "pixeldit": Network(
        "PixelDiTT2I",
        dict(image_model="pixeldit_t2i", num_groups=2, hidden_size=64, pixel_hidden_size=16, pixel_attn_hidden_size=64,
             pixel_num_groups=2, patch_depth=2, pixel_depth=1, patch_size=16, txt_embed_dim=48, txt_max_length=16),
        (3, 32, 32), r"y_embedder\.proj", padded=None,
    ),
    "ideogram4": Network(
        "Ideogram4", dict(image_model="ideogram4", in_channels=128, num_layers=2), (128, 4, 4), "llm_cond_proj",
        padded=None,
        settings=dict(num_attention_heads=2, attention_head_dim=32, intermediate_size=128, adaln_dim=32,
                      llm_features_dim=48, mrope_section=(4, 6, 6)),
    ),
    "lens": Network(
        "Lens",
        dict(image_model="lens", in_channels=128, out_channels=32, num_layers=2, attention_head_dim=32,
             num_attention_heads=2, enc_hidden_dim=24, axes_dims_rope=(8, 12, 12), selected_layer_index=(0, 1)),
        (128, 6, 6), "txt_in", padded=None,
    ),
    "minimax_h3": Network(
        "MiniMaxH3",
        dict(image_model="minimax_h3", hidden_size=64, num_layers=2, token_refiner_num_layers=1, num_attention_heads=2,
             attention_head_dim=32, ffn_hidden_size=128, text_dim=48, timestep_input_dim=32, time_embed_hidden_size=64,
             time_embed_dim=32, rope_inv_freq_len=4),
        (24, 2, 8, 8), "", padded=None, sound=(32, 2, 4), rows=1,
    ),
}  # fmt: skip


def _full(name, latent, width, padded, extra=None, **sizes):
    """A network of NETWORKS in the size of its checkpoints, with prompts of `padded` tokens."""
    made = NETWORKS[name]
    return replace(
        made, unet={**made.unet, **sizes}, latent=latent, width=width, padded=padded, extra=extra, longest=padded
    )


# as the checkpoints have them: no tests build these, but what measures speed and memory does
FULL = {
    "sd15_full": _full(
        "sd15", (4, 64, 64), 768, 77, model_channels=320, num_res_blocks=[2] * 4, channel_mult=[1, 2, 4, 4],
        num_heads=8, transformer_depth=[1] * 6 + [0] * 2, transformer_depth_output=[1] * 9 + [0] * 3, context_dim=768,
    ),
    "sdxl_full": _full(
        "sdxl", (4, 128, 128), 2048, 77, words.pooled(1280), model_channels=320, num_res_blocks=[2] * 3,
        channel_mult=[1, 2, 4], transformer_depth=[0, 0, 2, 2, 10, 10], transformer_depth_middle=10,
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], context_dim=2048, adm_in_channels=2816,
    ),
    "flux_full": _full(
        "flux_dev", (16, 128, 128), 4096, 512, words.pooled(768), vec_in_dim=768, context_in_dim=4096,
        hidden_size=3072, num_heads=24, depth=19, depth_single_blocks=38, axes_dim=[16, 56, 56],
    ),
}  # fmt: skip


def network(name):
    """The Network of a name in NETWORKS or FULL."""
    return NETWORKS.get(name) or FULL[name]


# layers that bring the text to the picture; of random weights, text that is few rows among many would hardly be heard
HEARD = re.compile(
    r"(txt_attn|context_block\.attn)\.qkv|attn\.txt_qkv|(add_v_proj|cross_attn\.v_proj|attn\.w1v|self_attention\.to_v)\."
    r"|^blocks\.\d+\.v\.|label_emb\.0\.0|y_embedder\.mlp\.0"
)
LOUDER = 8


def fill(module, seed=0, device=CPU):
    """Gives every parameter numbers of a sensible size, always the same for a seed and the device that draws them."""
    generator = torch.Generator(device).manual_seed(seed)
    stored = module.state_dict().keys()  # buffers that come from a checkpoint have no numbers of their own either
    buffers = [(name, b) for name, b in module.named_buffers() if name in stored and "inv_freq" not in name]
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *buffers]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator, device=device)
            if tensor.dim() >= 2 and name.endswith("weight"):
                noise = noise / math.sqrt(max(1, tensor[0].numel())) * (LOUDER if HEARD.search(name) else 1)
            elif name.endswith(("weight", "scale", "gamma")):
                noise = 1 + 0.1 * noise
            else:
                noise = 0.1 * noise
            tensor.copy_(noise.to(tensor.dtype))


def _known(network):
    """The unet_config of a Network without what this host's class does not know."""
    if not network.parameters:
        return dict(network.unet)
    module, kind = network.parameters
    try:
        known = inspect.signature(getattr(importlib.import_module(f"comfy.ldm.{module}"), kind)).parameters
    except (ImportError, AttributeError):
        raise NotInThisHost(f"this host has no {network.config}") from None
    lacking = [name for name in network.needs if name not in known]
    if lacking:
        raise NotInThisHost(f"this host's {network.config} has no {lacking[0]}")
    return {name: value for name, value in network.unet.items() if name in known or name == "image_model"}


def configuration(name, **sizes):
    """The host's configuration of a family, of its tiny sizes; sizes: others of its unet_config."""
    import comfy.model_base
    import comfy.supported_models

    made = network(name)
    kind = getattr(comfy.supported_models, made.config, None)
    if kind is None:
        raise NotInThisHost(f"this host has no {made.config}")
    config = kind({**_known(made), **sizes})
    settings = dict(made.settings)
    if "model_type" in settings:
        found = comfy.model_base.ModelType[settings.pop("model_type")]
        config.model_type = lambda state, prefix="": found
    config.unet_config.update(settings)
    return config


@contextlib.contextmanager
def _smaller(made):
    """Layers that prepare the text, whose size the host's classes fix: Anima's adapter small, and LTX-2's connectors
    without the thousand rows of their own, among which a short text would hardly be heard."""
    sizes = {
        "Anima": ("anima.model", "LLMAdapter", dict.fromkeys(("source_dim", "target_dim", "model_dim"), made.width)
                  | {"num_layers": 1, "num_heads": 2}),
        "LTXAV": ("lightricks.av_model", "Embeddings1DConnector", {"num_learnable_registers": None}),
    }  # fmt: skip
    if made.config not in sizes:
        yield
        return
    name, kind, settings = sizes[made.config]
    module = importlib.import_module(f"comfy.ldm.{name}")
    before = getattr(module, kind)
    setattr(module, kind, functools.partial(before, **settings))
    try:
        yield
    finally:
        setattr(module, kind, before)


def base_model(name, seed=0, dtype=torch.float32, manual_cast=None, device=CPU, **options):
    """The host's BaseModel of a family with random weights.

    options: operations (a class of the host's), quant_config (of its mixed operations; weights are left empty then),
    and sizes of its unet_config.
    """
    made = network(name)
    operations, quantised = options.pop("operations", None), options.pop("quant_config", None)
    config = configuration(name, **options)
    if hasattr(config, "set_inference_dtype"):
        config.set_inference_dtype(dtype, manual_cast)
    if operations is not None:
        config.custom_operations = operations
    if quantised is not None:
        config.quant_config = quantised
    with _smaller(made):
        model = config.get_model({}, "", device=device)
    if quantised is None:
        fill(model.diffusion_model, seed, device)
    if made.config == "MiniMaxH3":  # a checkpoint brings the numbers that other classes make themselves
        rope = model.diffusion_model.rope.inv_freq
        rope.copy_(10000.0 ** -torch.linspace(0, 1, len(rope)))
    return model


def build(name, seed=0, dynamic=True, device=CPU, **options):
    """MODEL of a family. dynamic: the host's patcher as it would take it, else its plain one; device: where it is made
    and runs."""
    return _patcher(base_model(name, seed, device=device, **options), dynamic, device)


def _patcher(model, dynamic=True, device=CPU):
    import comfy.model_patcher

    plain = comfy.model_patcher.ModelPatcher
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", plain) if dynamic else plain
    return kind(model, load_device=device, offload_device=CPU)


def reading(model, name):
    """Names of the linear layers of a MODEL that a text tensor reaches first."""
    layers = model.model.diffusion_model.named_modules()
    return [path for path, m in layers if hasattr(m, "in_features") and re.fullmatch(NETWORKS[name].reads, path)]


# ---------------------------------------------------------------- stored in other numbers


LAYOUTS = {
    "float8_e4m3fn": "TensorCoreFP8E4M3Layout",
    "nvfp4": "TensorCoreNVFP4Layout",
    "mxfp8": "TensorCoreMXFP8Layout",
    "int8_tensorwise": "TensorWiseINT8Layout",
}
BLOCK = {"nvfp4": 16, "mxfp8": 32}  # weights that share a scale


def quantised(name, kind, seed=0, dynamic=True):
    """(MODEL of a family whose linear layers are stored as one of LAYOUTS, {key: the numbers they stand for})."""
    try:
        from comfy.quant_ops import QuantizedTensor, get_layout_class

        get_layout_class(LAYOUTS[kind])
    except (ImportError, KeyError):
        raise NotInThisHost(f"this host stores no {kind}") from None
    state, numbers = {}, {}
    for key, weight in base_model(name, seed).diffusion_model.state_dict().items():
        state[key] = weight
    for path, module in base_model(name, seed).diffusion_model.named_modules():
        step = BLOCK.get(kind, 1)
        if not isinstance(module, torch.nn.Linear) or module.in_features % step or module.out_features % step:
            continue
        tensor = QuantizedTensor.from_float(module.weight.detach().clone(), LAYOUTS[kind], scale="recalculate")
        state |= tensor.state_dict(f"{path}.weight")
        said = json.dumps({"format": kind}).encode()
        state[f"{path}.comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
        numbers[f"diffusion_model.{path}.weight"] = tensor.dequantize().float()
    model = base_model(name, seed, manual_cast=torch.float32, quant_config={"mixed_ops": True})
    missing, unexpected = model.diffusion_model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise RuntimeError(f"{name} as {kind}: missing {missing[:3]}, unexpected {unexpected[:3]}")
    return _patcher(model, dynamic), numbers


# ---------------------------------------------------------------- text, and one step


def text_encoder(name, padded="as the family"):
    """CLIP of words.py for a family. padded: tokens of every prompt, None for as many as it has."""
    made = network(name)
    return words.clip(made.width, made.extra, made.padded if padded == "as the family" else padded, made.longest)


def _noise(made, rows, generator):
    """(noise as the sampler has it, an empty latent) of a network, with its sound's where it has one."""
    noise = torch.randn(rows, *made.latent, generator=generator)
    if made.sound is None:
        return noise, torch.zeros_like(noise)
    from comfy.nested_tensor import NestedTensor
    from comfy.utils import pack_latents

    both = [noise, torch.randn(rows, *made.sound, generator=generator)]
    return pack_latents(both)[0], NestedTensor([torch.zeros_like(part) for part in both])


@torch.no_grad()
def predict(model, positive, negative, name, rows=1, at=0.4, cfg=3.0, seed=0):
    """(cond, uncond), latents (rows, C, ...) that a MODEL predicts at a part of the sampling, by the host's sampler."""
    import comfy.sample
    import comfy.samplers

    sampling = model.model.model_sampling
    sigma = torch.as_tensor(sampling.percent_to_sigma(at), dtype=torch.float32).item()
    noise, empty = _noise(NETWORKS[name], rows, torch.Generator().manual_seed(100 + seed))
    seen, listening = {}, model.clone()

    def listen(args):
        seen.update({side: args[f"{side}_denoised"].clone() for side in ("cond", "uncond")})
        return args["denoised"]

    def once(net, x, sigmas, extra_args=None, callback=None, disable=None):
        net(noise * sigma, torch.full((rows,), sigma), **(extra_args or {}))
        return x

    listening.set_model_sampler_post_cfg_function(listen, disable_cfg1_optimization=True)
    comfy.sample.sample_custom(
        listening, empty, cfg, comfy.samplers.KSAMPLER(once), torch.tensor([sigma, 0.0]), positive, negative, empty,
        disable_pbar=True, seed=seed,
    )  # fmt: skip
    return seen["cond"], seen["uncond"]
