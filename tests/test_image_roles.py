"""Stack, layer and role of modules in diffusion models."""

from __future__ import annotations

import pytest

from lorascope.schema.module_roles import parse, position

UNET = "down_blocks.1.attentions.0.transformer_blocks.0"
NAMES = {
    f"unet.{UNET}.attn1.to_q": ("down", 1, "q"),
    f"unet.{UNET}.attn2.to_k": ("down", 1, "cross_k"),
    f"{UNET}.attn2.to_out.0": ("down", 1, "cross_o"),
    f"{UNET}.ff.net.0.proj": ("down", 1, "ffn_in"),
    f"{UNET}.ff.net.2": ("down", 1, "ffn_out"),
    f"{UNET}.norm1": ("down", 1, "norm"),
    "unet.up_blocks.2.resnets.0.conv1": ("up", 2, "other"),
    "unet.mid_block.attentions.0.proj_out": ("mid", 0, "other"),
    "unet.conv_in": ("", None, "other"),
    f"lora_unet_{UNET.replace('.', '_')}_attn1_to_v": ("down", 1, "v"),
    f"lora_unet_{UNET.replace('.', '_')}_attn2_to_out_0": ("down", 1, "cross_o"),
    f"lora_unet_{UNET.replace('.', '_')}_ff_net_0_proj": ("down", 1, "ffn_in"),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": ("mid", 0, "q"),
    "lora_unet_input_blocks_7_1_transformer_blocks_3_attn2_to_v": ("down", 7, "cross_v"),
    "lora_unet_middle_block_1_transformer_blocks_3_ff_net_2": ("mid", 0, "ffn_out"),
    "lora_unet_output_blocks_11_0_in_layers_2": ("up", 11, "other"),
    "lora_te1_text_model_encoder_layers_11_self_attn_k_proj": ("te1", 11, "k"),
    "lora_te2_text_model_encoder_layers_31_mlp_fc1": ("te2", 31, "ffn_in"),
    "lora_te_text_model_encoder_layers_0_self_attn_out_proj": ("te1", 0, "o"),
    "text_encoder.text_model.encoder.layers.3.mlp.fc2": ("te1", 3, "ffn_out"),
    "text_encoder_2.text_model.encoder.layers.3.self_attn.q_proj": ("te2", 3, "q"),
    "text_encoder_3.encoder.block.2.layer.0.SelfAttention.q": ("te3", 2, "q"),
    "text_encoders.clip_g.transformer.text_model.encoder.layers.3.self_attn.v_proj": ("te2", 3, "v"),
    "lora_unet_double_blocks_18_img_attn_qkv": ("", 18, "qkv"),
    "lora_unet_double_blocks_18_txt_attn_proj": ("", 18, "o"),
    "lora_unet_double_blocks_18_img_mlp_0": ("", 18, "ffn_in"),
    "lora_unet_single_blocks_37_linear2": ("single", 37, "ffn_out"),
    "diffusion_model.double_blocks.3.img_attn.qkv": ("", 3, "qkv"),
    "diffusion_model.single_blocks.3.linear1": ("single", 3, "ffn_in"),
    "transformer.transformer_blocks.3.attn.add_q_proj": ("", 3, "q"),
    "transformer.transformer_blocks.3.attn.to_add_out": ("", 3, "o"),
    "transformer.transformer_blocks.3.ff_context.net.0.proj": ("", 3, "ffn_in"),
    "transformer.transformer_blocks.3.norm1.linear": ("", 3, "other"),
    "transformer.single_transformer_blocks.3.proj_out": ("single", 3, "ffn_out"),
    "transformer.single_transformer_blocks.3.proj_mlp": ("single", 3, "ffn_in"),
    "transformer.blocks.4.attn2.to_k": ("", 4, "cross_k"),
    "lora_unet_blocks_4_cross_attn_k": ("", 4, "cross_k"),
    "diffusion_model.blocks.4.self_attn.o": ("", 4, "o"),
    "diffusion_model.blocks.4.ffn.0": ("", 4, "ffn_in"),
    "diffusion_model.joint_blocks.4.x_block.attn.qkv": ("", 4, "qkv"),
    "lora_transformer_single_transformer_blocks_9_attn_to_q": ("single", 9, "q"),
    # Modulations scale and shift by the time step; their names differ in whether they contain "norm".
    "lora_transformer_transformer_blocks_3_norm1_linear": ("", 3, "other"),
    "lora_transformer_transformer_blocks_3_norm1_context_linear": ("", 3, "other"),
    "lora_transformer_single_transformer_blocks_9_norm_linear": ("single", 9, "other"),
    "transformer.single_transformer_blocks.9.norm.linear": ("single", 9, "other"),
    "diffusion_model.single_blocks.9.modulation.lin": ("single", 9, "other"),
    "diffusion_model.double_blocks.3.img_attn.norm.query_norm": ("", 3, "norm"),
    "lora_transformer_norm_out_linear": ("", None, "other"),
    "transformer.norm_out.linear": ("", None, "other"),
    "diffusion_model.final_layer.adaLN_modulation.1": ("", None, "other"),
    "lora_unet_final_layer_adaLN_modulation_1": ("", None, "other"),
    # The first and the last linear layers
    **dict.fromkeys(
        ("diffusion_model.img_in", "lora_unet_txt_in", "transformer.x_embedder", "lora_transformer_context_embedder"),
        ("", None, "embed"),
    ),
    **dict.fromkeys(
        ("diffusion_model.final_layer.linear", "lora_unet_final_layer_linear", "transformer.proj_out"),
        ("", None, "head"),
    ),
    "lora_transformer_proj_out": ("", None, "head"),
    "lora_transformer_single_transformer_blocks_9_proj_out": ("single", 9, "ffn_out"),
    "lora_unet_down_blocks_0_attentions_0_proj_out": ("down", 0, "other"),
}


@pytest.mark.parametrize("name", NAMES)
def test_place_of_a_module(name: str) -> None:
    assert parse(name) == NAMES[name]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("transformer.h.0.attn.c_attn", "qkv"),
        ("transformer.blocks.0.attn.Wqkv", "qkv"),
        ("transformer.layer.0.attention.q_lin", "q"),
        ("blocks.0.attn.proj", "other"),
    ],
)
def test_other_models_keep_their_roles(name: str, role: str) -> None:
    assert parse(name) == ("", 0, role)


def test_stacks_are_in_the_order_of_the_model() -> None:
    stacks = ["te1", "te2", "down", "mid", "up"]
    assert sorted(reversed(stacks), key=lambda stack: position(stack, 0, "q")) == stacks
    assert position("", 9, "q") < position("single", 0, "q")
