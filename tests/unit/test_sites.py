"""One spelling of a layer for all programs."""

import pytest
from membrane.core.families.sites import site
from membrane.core.families.table import role

DIFFUSERS = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
LDM = "input_blocks_1_1_transformer_blocks_0_attn2_to_k"
PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{PATH}.to_k", DIFFUSERS),
        (f"{PATH}.to_k.weight", DIFFUSERS),
        (f"unet.{PATH}.to_k.bias", DIFFUSERS),
        (f"lora_unet_{DIFFUSERS}", DIFFUSERS),
        (f"lycoris_{DIFFUSERS}", DIFFUSERS),
        (f"base_model.model.{PATH}.to_k", DIFFUSERS),
        (f"base_model.model.unet.{PATH}.to_k", DIFFUSERS),
        (f"{PATH}.processor.to_k", DIFFUSERS),
        (f"{PATH}.processor.to_out", DIFFUSERS.replace("to_k", "to_out_0")),
        (f"{PATH}.to_out.0", DIFFUSERS.replace("to_k", "to_out_0")),
        (f"lora_unet_{LDM}", LDM),
        ("input_blocks.1.1.transformer_blocks.0.attn2.to_k", LDM),
        ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k", LDM),
        ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", LDM),
        # Flux: sliders put diffusers' block names under kohya's prefix, PEFT and the host have their own
        ("lora_unet_transformer_blocks_0_attn_to_q", "transformer_blocks_0_attn_to_q"),
        ("lora_transformer_transformer_blocks_0_attn_to_q", "transformer_blocks_0_attn_to_q"),
        ("transformer.transformer_blocks.0.attn.add_k_proj", "transformer_blocks_0_attn_add_k_proj"),
        ("transformer_blocks.0.attn.to_add_out", "transformer_blocks_0_attn_to_add_out"),
        ("lora_unet_single_transformer_blocks_0_attn_to_k", "single_transformer_blocks_0_attn_to_k"),
        ("double_blocks.0.img_attn.qkv.weight", "double_blocks_0_img_attn_qkv"),
        ("context_embedder.weight", "context_embedder"),
    ],
)
def test_site(name, expected):
    assert site(name) == expected
    assert site(expected) == expected


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("attn2_to_k", "cross_attention.key"),
        ("attn2_to_v", "cross_attention.value"),
        ("attn2_to_q", "cross_attention.query"),
        ("attn2_to_out_0", "cross_attention.out"),
        ("attn1_to_k", "self_attention.key"),
        ("attn1_to_out_0", "self_attention.out"),
        ("ff_net_0_proj", "feed_forward.up"),
        ("ff_net_2", "feed_forward.down"),
    ],
)
def test_roles_of_a_transformer_block(ending, expected):
    assert role(f"up_blocks_3_attentions_2_transformer_blocks_0_{ending}") == expected
    assert role(f"output_blocks_11_1_transformer_blocks_0_{ending}") == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("down_blocks_0_attentions_0_proj_in", "proj_in"),
        ("middle_block_1_proj_out", "proj_out"),
        ("proj_out", "proj_out"),
        ("down_blocks_0_resnets_0_conv1", "other"),
        ("input_blocks_1_0_in_layers_2", "other"),
        ("transformer_blocks_0_attn_add_k_proj", "text_attention.key"),
        ("transformer_blocks_0_norm1_linear", "other"),
    ],
)
def test_other_roles(name, expected):
    assert role(name) == expected
