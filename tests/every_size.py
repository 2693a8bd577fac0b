"""Sizes of the tiny models of every architecture: by field, by architecture, and variants."""

from __future__ import annotations

from typing import Any

from tiny import tiny_tokenizer

_WORDS = len(tiny_tokenizer())

#: Sizes by names of configuration fields, for whichever architecture has a field of that name.
SMALL: dict[str, Any] = {
    # layers
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 3),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), 3),
    **dict.fromkeys(("encoder_layers", "depth"), 2),
    # hidden sizes
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "n_embed", "embed_dim"), 64),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "lru_width"), 64),
    "attention_hidden_size": 64,
    # FFNs
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "mlp_intermediate_size"), 96),
    **dict.fromkeys(("dense_intermediate_size",), 96),
    "intermediate_size_mlp": 80,
    # heads
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "global_head_dim", "swa_head_dim"), 16),
    "rotary_dim": 8,
    # compressed attention, and what chooses tokens for it
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 64,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    "top_k_experts": 2,
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 48),
    "moe_shared_expert_intermediate_size": 48,
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "first_k_dense_replace"), 1),
    # linear attention and state spaces
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    "mamba_d_ssm": 128,
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "time_step_rank"), 8),
    "mamba_dt_rank": 8,
    **dict.fromkeys(("mamba_expand", "expand", "n_mamba_heads"), 2),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    "conv_kernel": 4,
    # positions
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(("max_sequence_length", "context_length"), 256),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 32),
    # tokens
    "vocab_size": _WORDS,
    "vocab_size_per_layer_input": _WORDS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # embeddings for each layer
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "num_kv_shared_layers": 0,
    # images
    "image_size": 16,
    "patch_size": 8,
    "temporal_patch_size": 1,
    "spatial_merge_size": 2,
    **dict.fromkeys(("projection_dim", "out_hidden_size", "vision_output_dim"), 64),
    "mm_hidden_size": 64,
}

#: For an exception: the field keeps its default.
LEFT_OUT = object()


def _layers(*kinds: str) -> dict[str, Any]:
    return {"layer_types": list(kinds)}


def _sections(*sizes: int, **more: Any) -> dict[str, Any]:
    """Rotary positions in time, height and width."""
    rotary = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": list(sizes)}
    return {"rope_parameters": {**rotary, **more}}


_MIXED = _layers("linear_attention", "full_attention", "linear_attention")
_SLIDING = _layers("sliding_attention", "full_attention", "sliding_attention")
_DECODER = {"is_decoder": True}
_BY_LAYER_TYPE = {
    kind: {"rope_type": "default", "rope_theta": 10_000.0}
    for kind in ("full_attention", "sliding_attention")
}

#: What an architecture needs besides, by the model type of its configuration.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # With three layers the defaults would give only one of the two kinds.
    **dict.fromkeys(
        (
            "bailing_hybrid",
            "granitemoehybrid",
            "kimi_linear",
            "qwen3_5_moe_text",
            "qwen3_next",
        ),
        _MIXED,
    ),
    **dict.fromkeys(
        (
            "afmoe",
            "cohere2",
            "cohere2_moe",
            "exaone4",
            "exaone_moe",
            "gemma3_text",
            "gemma3n_text",
            "kolibri1",
            "laguna",
            "mellum",
            "ministral",
            "olmo3",
            "step3p7_text",
        ),
        _SLIDING,
    ),
    # Without this they look at the tokens to come.
    **dict.fromkeys(
        (
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
        ),
        _DECODER,
    ),
    "qwen3_5_text": {**_MIXED, **_sections(2, 1, 1, partial_rotary_factor=0.5)},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {**_layers("conv", "full_attention", "conv"), "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**_layers("conv", "full_attention", "conv"), "num_dense_layers": 1},
    "llama4_text": {"moe_layers": [1], "no_rope_layers": [1, 0, 1]},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "n_mamba_heads": 8,
        "num_mem_blocks": 1,
    },
    # Sizes that have to agree with one another.
    "apertus1p5": {"image_token_offset": 300, "audio_token_offset": 350},
    "apertus1p5_vision_tokenizer": {
        "codebook_size": 50,
        "base_channels": 32,
        "num_res_blocks": 1,
        "channel_multiplier": [1, 1],
    },
    "wavtokenizer_encoder": {
        "codebook_size": 50,
        "codebook_dim": 64,
        "decoder_hidden_size": 64,
        "decoder_intermediate_size": 96,
        "decoder_num_layers": 1,
    },
    "dots1": {"n_shared_experts": 1},
    "glm5_next_text": {"qk_rope_head_dim": 0, "head_dim": 0},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense"] * 3,
        "per_layer_config": {},
        "adapter_in_dim": 64,
        "adapter_out_dim": 64,
    },
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "window_size": 8},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "molmo2_adapter": {"text_hidden_size": 64, "vision_feature_layer": [-1]},
    "qwen4_exp_text": {
        **_MIXED,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [],
        "ngram_vocab_size_base": 500,
        "hc_lowrank": 8,
    },
    "reformer": {
        "is_decoder": True,
        "attention_head_size": 16,
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 48],
        "attn_layers": ["local", "lsh", "local"],
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
    "inkling2_vision": {"text_hidden_size": 64},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [16, 16, 32, 32]},
    "radio": {"video_temporal_patch_size": 2, "max_img_size": 64},
    "nemotron_h_omni": {"projector_hidden_size": 64, "vision_hidden_size": 64},
    # Positions of several kinds, or by kind of layer.
    "cohere_compass_text": {"rope_parameters": _BY_LAYER_TYPE},
    "cosmos3_edge_text": _sections(3, 3, 2),
    "hy_v4_vl_text": _sections(2, 1, 1),
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32], **_sections(2, 2, 4)},
    "glm4v_moe_text": _sections(1, 1, 2, partial_rotary_factor=0.5),
    **dict.fromkeys(
        (
            "glm4v_text",
            "glm_ocr_text",
            "paddleocr_vl_text",
            "qwen2_5_omni_text",
            "qwen2_5_vl_text",
            "qwen2_vl_text",
        ),
        _sections(2, 3, 3),
    ),
    # What has no default.
    "chameleon": {"vocabulary_map": {"<image>": 392}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "xmod": {"default_language": "en_XX", **_DECODER},
    "dbrx": {
        "attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_hidden_layers": 3,
            "num_kv_shared_layers": 3,
        },
        "backbone_hidden_size": 64,
    },
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "hunyuan_vl_text": _sections(2, 2, 2, 2),
    # Image towers.
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "blt_local_decoder": {"hidden_size_global": 64},
    "blt_local_encoder": {"hidden_size_global": 64},
    "chameleon_vqgan": {"base_channels": 32, "num_embeddings": 64, "embed_dim": 64},
    "florence_vision": {
        "patch_size": LEFT_OUT,
        "depths": [1, 1, 1, 1],
        "embed_dim": [16, 16, 32, 32],
        "num_heads": [2, 2, 2, 2],
        "num_groups": [2, 2, 2, 2],
    },
    "janus_vqgan": {"base_channels": 32, "num_embeddings": 64},
    "molmo2_vision": {"image_size": [16, 16]},
}

#: Other shapes of an architecture: its model type, and changes to its decoder's configuration.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom_post_residual": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "deepseek_v3_without_query_compression": ("deepseek_v3", {"q_lora_rank": None}),
    "falcon_alibi": ("falcon", {"alibi": True, "parallel_attn": False, "bias": True}),
    "falcon_grouped": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_sequential": ("falcon", {"parallel_attn": False}),
    "gemma4_moe": (
        "gemma4_text",
        {"enable_moe_block": True, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True},
    ),
    "gpt_bigcode_many_heads": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox_sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "granitemoehybrid_dense": ("granitemoehybrid", {"num_local_experts": 0}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "nemotron_h_latent": ("nemotron_h", {"moe_latent_size": 24}),
    "opt_post_norm": ("opt", {"do_layer_norm_before": False}),
    "phi_norms_of_queries": ("phi", {"qk_layernorm": True}),
    "qwen2_moe_dense_first": ("qwen2_moe", {"mlp_only_layers": [0]}),
    "qwen3_5_moe_wrapper": ("qwen3_5_moe", {}),
    "qwen3_5_wrapper": ("qwen3_5", {}),
    "stablelm_parallel": ("stablelm", {"use_parallel_residual": True}),
    "t5_gated": ("t5", {"feed_forward_proj": "gated-gelu"}),
}
