"""Sizes of tiny models, by the names that configurations give their fields, and what some types need besides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

VOCAB = 64

_OF_EACH_NAME: dict[str | int, Sequence[str]] = {
    VOCAB: ("vocab_size", "vocab_size_per_layer_input", "audio_vocab_size", "unpadded_vocab_size"),
    128: (
        "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "original_max_position_embeddings",
        "max_target_positions", "encoder_hash_byte_group_vocab",
    ),
    48: (
        "intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "dim_ff", "dff", "n_inner", "d_inner",
        "feed_forward_size", "ffn_hidden_size", "intermediate_size_mlp", "shared_intermediate_size",
        "dense_intermediate_size", "prefix_dense_intermediate_size", "mlp_dim",
    ),
    32: (
        "hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "embedding_size", "dim_model_base",
        "out_hidden_size", "output_channels",
    ),
    24: (
        "moe_intermediate_size", "shared_expert_intermediate_size", "shared_experts_intermediate_size",
        "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size",
    ),
    16: ("kv_lora_rank", "q_lora_rank", "o_lora_rank"),
    12: ("v_head_dim",),
    8: (
        "head_dim", "dim_head", "swa_head_dim", "kv_channels", "d_head", "attention_head_size", "qk_nope_head_dim",
        "qk_rope_head_dim", "index_head_dim", "index_topk", "linear_key_head_dim", "linear_value_head_dim",
        "linear_head_dim", "mamba_head_dim", "mamba_d_head", "ssm_state_size", "mamba_d_state", "state_size",
        "mamba_n_heads", "mamba_num_heads", "n_mamba_heads",
        "index_n_heads",  # scores that are zero in all heads would be ties
    ),
    6: (  # windows, which the text outgrows
        "sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size", "local_attention",
        "window_size",
    ),
    4: (
        "num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads", "num_heads",
        "num_encoder_attention_heads", "num_decoder_attention_heads", "swa_num_attention_heads", "attention_heads",
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "rotary_dim",
    ),
    2: (
        "num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers", "num_layers", "depth",
        "num_encoder_layers", "num_decoder_layers", "num_blocks", "num_key_value_heads", "swa_num_key_value_heads",
        "num_experts_per_tok", "moe_topk", "moe_k", "n_group", "linear_num_key_heads", "linear_num_value_heads",
        "linear_num_heads", "eos_token_id",
    ),
    1: ("topk_group", "bos_token_id", "max_window_layers", "use_sliding_window"),
    0: ("pad_token_id", "tie_word_embeddings"),
}  # fmt: skip
SIZES = {name: size for size, names in _OF_EACH_NAME.items() for name in names}
SWITCHES = ("use_sliding_window", "tie_word_embeddings")
# Fields that give every layer a kind; a tiny model has one layer of each kind, and two at least.
KINDS = ("layer_types", "layers_block_type")

# Classes whose configuration, as the mapping has it, is that of a larger model: their own is the decoder's.
OWN_CONFIG = ("musicgen", "musicgen_melody")
NOT_BUILT = {
    "gemma3n": "its vision tower is timm's, which is not installed; Gemma3nForCausalLM is built",
    "gemma4_assistant": "transformers 5.23 builds none: all of its layers must share keys, and then none makes them",
}

_LATENT = {"num_key_value_heads": 4}
BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
_TWICE = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SECTIONS = {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}
_FEWER = {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}}
_SMALL = {"image_size": 28, "patch_size": 14}
_OF_QWEN = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "hy_v4",
         "minicpm3", "youtu", "kimi_linear"), _LATENT,
    ),
    **dict.fromkeys(
        ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text", "glm4v_text",
         "paddleocr_vl_text", "qwen2_5_omni_text", "qwen3_omni_moe_text"), _SECTIONS,
    ),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), _OF_QWEN),
    "clip_vision_model": _SMALL,
    "siglip_vision_model": _SMALL,
    "glm4v_moe_text": _FEWER,
    "glm_ocr_text": _FEWER,
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"], "qk_rope_head_dim": 4},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {**BOTH, "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "cpmant": {"prompt_length": 4, "prompt_types": 4},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 24, "moe_top_k": 2}},
    "deepseek_v4": {"num_key_value_heads": 1, "o_groups": 2,
                    "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {**_LATENT, "layer_types": ["indexed_attention", "sliding_attention"], "per_layer_config": {
        1: {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 16,
            "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_rope_head_dim": 8}}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense", "sparse"]},
    "gemma3n_text": {**_TWICE, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "laurel_rank": 8},
    "gemma4_unified_assistant": {"backbone_hidden_size": 32, "text_config": {**_TWICE, "num_kv_shared_layers": 2}},
    "gemma4_text": {**_TWICE, "num_kv_shared_layers": 2},
    "gemma3": {"mm_tokens_per_image": 4, "image_token_index": 60},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "llava": {"image_token_index": 60},
    "longcat_flash": {**_LATENT, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "nemotron_h": {"n_groups": 2, "sliding_window": None},
    "phi4_multimodal": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "image_size": 28, "crop_size": 28},
        "audio_config": {"hidden_size": 32, "intermediate_size": 48, "num_blocks": 1, "num_attention_heads": 4,
                         "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32}},
    "qwen2_vl_vision": {"embed_dim": 32},
    "qwen2_5_vl_vision": {"fullatt_block_indexes": [1], "window_size": 56},
    "qwen3_vl_vision": {"deepstack_visual_indexes": [0]},
    "qwen3_vl_moe_vision": {"deepstack_visual_indexes": [0]},
    "qwen4_exp_text": {"hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
                       "indexer_budget": 8, "indexer_compress_ratio": 4},
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 1},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 16],
                 "axial_pos_embds_dim": [16, 16]},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
    "roc_bert": {"pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB, "pronunciation_embed_dim": 8,
                 "shape_embed_dim": 8},
    "xlstm": {"embedding_dim": 64, "hidden_size": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 5,
              "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16, "sliding_window": None},
}  # fmt: skip
