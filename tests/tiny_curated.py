"""Tiny random models of the architectures beyond `tiny.TINY` whose descriptions are kept by hand.

As in `tiny`, text means nothing and structure is the real one, with the details on which wrong
code breaks: multipliers other than one, layers of several kinds, widths that differ by layer,
experts beside shared experts, square experts that may be transposed unseen, biases, norms that two
branches share, norms after branches, embeddings for each layer, text decoders inside of wrappers.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from tiny import randomise, tiny_tokenizer

_LAYERS = {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256}

# 4 heads of 16 make 64 inputs of the output projection for a hidden size of 48.
_WIDE = {
    **_LAYERS,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_key_value_heads": 2,
    "head_dim": 16,
}

# Where the configuration has no size of heads of its own: 4 heads of 16 are the hidden size.
_PLAIN = {**_LAYERS, "hidden_size": 64, "intermediate_size": 96}

_GROUPED = {**_PLAIN, "num_key_value_heads": 2}

# Two of four experts see each token; expert width differs from every other width.
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}

# 8 tokens, so that a short prompt already leaves the window.
_SLIDING = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

# Gated delta rule: values are as many as keys twice over.
_DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}

# No bias on the way in: transformers would let it into the state through padding.
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 16,
}


def _rotary(*sections: int, **more: Any) -> dict[str, Any]:
    """Positions in time, height and width; of text all three are the same."""
    return {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": list(sections),
        **more,
    }


# Half of the 16 units of a head are turned.
_QWEN3_5 = {**_WIDE, **_DELTA, "rope_parameters": _rotary(2, 1, 1, partial_rotary_factor=0.5)}

# Sigmoid routers in two groups of two, of which the better one is taken.
_GROUPS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
}

# The second half of the layers reuses keys and values of the first one, and has a wider FFN; heads
# of layers that see everything are wider.
_GEMMA4 = {
    **_WIDE,
    "num_hidden_layers": 4,
    "global_head_dim": 24,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 8,
    "final_logit_softcapping": 2.0,
}

# Token ids of images and the like: control characters, which are in no text.
_IMAGES = {"image_token_id": 196, "video_token_id": 197}
_QWEN_IMAGES = {**_IMAGES, "vision_start_token_id": 198, "vision_end_token_id": 199}

_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 8,
    "temporal_patch_size": 1,
}

_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}

_GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.3,
    "logits_scaling": 0.5,
}

_GRANITE_HYBRID = {
    **_WIDE,
    **_GRANITE,
    **_MAMBA,
    "intermediate_size": 40,
    "shared_intermediate_size": 56,
    "num_experts_per_tok": 2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "attention_bias": True,
}

_NEOX = {**_PLAIN, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}

#: Model type and configuration by name; a wrapper's text decoder is its "text_config".
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    # Untied, because its normalised embeddings would make it repeat itself.
    "bloom": ("bloom", {**_LAYERS, "hidden_size": 64, "tie_word_embeddings": False}),
    "cohere2": (
        "cohere2",
        {**_GROUPED, **_SLIDING, "logit_scale": 0.5, "attention_bias": True},
    ),
    "deepseek_v3": (
        "deepseek_v3",  # heads put out 4 * 12 units; queries, keys and values are compressed
        {
            **_PLAIN,
            **_GROUPS,
            "q_lora_rank": 24,
            "kv_lora_rank": 20,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "attention_bias": True,
        },
    ),
    "ernie4_5": ("ernie4_5", {**_WIDE, "use_bias": True}),
    "exaone4": ("exaone4", {**_WIDE, **_SLIDING}),
    "falcon_h1": (
        "falcon_h1",  # attention and a Mamba side by side
        {
            **_WIDE,
            **_MAMBA,
            "mamba_d_ssm": 96,
            "projectors_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 2.5,
            "lm_head_multiplier": 0.7,
            "attention_in_multiplier": 0.8,
            "attention_out_multiplier": 1.3,
            "key_multiplier": 0.6,
            "mlp_multipliers": [0.7, 1.4],
            "ssm_in_multiplier": 1.2,
            "ssm_out_multiplier": 0.6,
            "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
        },
    ),
    "gemma3_wrapper": (
        "gemma3",
        {
            "text_config": {**_WIDE, **_SLIDING, "query_pre_attn_scalar": 1},
            "vision_config": {**_VISION, "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
            "boi_token_index": 194,
            "eoi_token_index": 195,
            "image_token_index": 196,
        },
    ),
    "gemma4": ("gemma4_text", _GEMMA4),
    "gemma4_moe": (
        "gemma4_text",  # experts beside the FFN, each with norms of its own; values are the keys
        {
            **_GEMMA4,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 40,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
        },
    ),
    "gemma4_wrapper": (
        "gemma4",
        {
            "text_config": _GEMMA4,
            "vision_config": {**_VISION, "head_dim": 8, "num_key_value_heads": 2, "patch_size": 8},
            "audio_config": None,
            **_IMAGES,
            "boi_token_id": 394,
            "eoi_token_id": 395,
            "boa_token_id": 396,
            "audio_token_id": 397,
            "eoa_token_index": 398,
        },
    ),
    # post_attention_layernorm is the norm before the FFN, and there is a norm after each branch
    "glm4": ("glm4", _WIDE),
    "glm4_moe": (
        "glm4_moe",
        {**_WIDE, **_GROUPS, "use_qk_norm": True, "attention_bias": True},
    ),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neox_sequential": ("gpt_neox", {**_NEOX, "use_parallel_residual": False}),
    "gpt_oss": (
        "gpt_oss",  # expert width is the hidden size: a transposed weight has the same shape
        {
            **_WIDE,
            **_SLIDING,
            "intermediate_size": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "swiglu_limit": 1.0,
        },
    ),
    "gptj": ("gptj", {"n_embd": 64, "n_inner": 96, "n_layer": 3, "n_head": 4, "rotary_dim": 8}),
    "granite": (
        "granite",
        {**_WIDE, **_GRANITE, "attention_bias": True, "mlp_bias": True},
    ),
    "granitemoehybrid": ("granitemoehybrid", {**_GRANITE_HYBRID, "num_local_experts": 4}),
    "granitemoehybrid_dense": ("granitemoehybrid", {**_GRANITE_HYBRID, "num_local_experts": 0}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {**_WIDE, "attention_bias": True}),
    "lfm2": (
        "lfm2",
        {
            **_GROUPED,
            "layer_types": ["conv", "full_attention", "conv"],
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "llama4_text": (
        "llama4_text",  # the second layer has experts; the third has no rotary positions
        {
            **_WIDE,
            "num_hidden_layers": 4,
            "intermediate_size": 40,
            "intermediate_size_mlp": 80,
            "moe_layers": [1, 3],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "no_rope_layers": [1, 1, 0, 1],
            "attention_chunk_size": 8,
            "attention_bias": True,
        },
    ),
    "ministral3": (
        "ministral3",  # queries grow beyond the original context, here of 8 tokens
        {
            **_WIDE,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 8,
                "max_position_embeddings": 256,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
    "mistral3": (
        "mistral3",
        {
            "text_config": {"model_type": "mistral", **_WIDE, "sliding_window": None},
            "vision_config": {**_VISION, "model_type": "pixtral", "image_size": 32},
            "image_token_index": 196,
            "tie_word_embeddings": False,
        },
    ),
    "mixtral": (
        "mixtral",
        {**_WIDE, "intermediate_size": 40, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "nemotron_h": (
        "nemotron_h",  # one branch a block; experts without a gate
        {
            **_WIDE,
            **_GROUPS,
            "layers_block_type": [
                "linear_attention",
                "full_attention",
                "moe",
                "mlp",
                "linear_attention",
            ],
            "moe_shared_expert_intermediate_size": 56,
            "mamba_num_heads": 8,
            "mamba_head_dim": 12,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 16,
            "mlp_bias": True,
        },
    ),
    "olmo3": ("olmo3", {**_GROUPED, **_SLIDING}),
    "olmoe": (
        "olmoe",
        {**_GROUPED, "intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "opt": ("opt", {**_LAYERS, "hidden_size": 64, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "phi": ("phi", {**_GROUPED, "qk_layernorm": True}),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {
            "text_config": {**_GROUPED, "rope_parameters": _rotary(2, 3, 3)},
            "vision_config": {
                **_QWEN_VISION,
                "out_hidden_size": 64,
                "window_size": 32,
                "fullatt_block_indexes": [1],
            },
            **_QWEN_IMAGES,
        },
    ),
    "qwen3_5": ("qwen3_5_text", _QWEN3_5),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        {**_QWEN3_5, **_EXPERTS, "shared_expert_intermediate_size": 56},
    ),
    "qwen3_5_wrapper": (
        "qwen3_5",
        {
            "text_config": _QWEN3_5,
            "vision_config": {
                **_QWEN_VISION,
                "out_hidden_size": 48,
                "num_position_embeddings": 16,
            },
            **_QWEN_IMAGES,
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        {**_WIDE, **_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 56}
        | {"mlp_only_layers": [0]},
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {
            "text_config": {**_WIDE, "rope_parameters": _rotary(4, 2, 2)},
            "vision_config": {
                **_QWEN_VISION,
                "out_hidden_size": 48,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
            },
            **_QWEN_IMAGES,
        },
    ),
    "smollm3": (
        "smollm3",  # every second layer without rotary positions
        {
            **_WIDE,
            **_SLIDING,
            "use_sliding_window": True,
            "no_rope_layer_interval": 2,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
}

CURATED = tuple(_CONFIGS)

#: Those that hold a text decoder beside a vision tower.
WRAPPERS = tuple(name for name in CURATED if "text_config" in _CONFIGS[name][1])

# Buffers that a checkpoint carries, and that start as ones or zeros.
_BUFFERS = {"layer_scalar": (0.8, 0.1), "e_score_correction_bias": (0.0, 0.1)}


def curated_model(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **config_overrides: Any
) -> PreTrainedModel:
    """A random model of architecture `name`, in eval mode on the CPU.

    `config_overrides` go to the configuration, a wrapper's to that of its text decoder:
    `curated_model("granite", residual_multiplier=1.0)`. The same arguments give the same weights;
    the global random state is left as it was.
    """
    if name not in _CONFIGS:
        raise ValueError(f"no curated model {name!r}; there are {', '.join(CURATED)}")
    model_type, sizes = _CONFIGS[name]
    tokenizer = tiny_tokenizer()
    common = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if name in WRAPPERS:
        sizes = {**sizes, "text_config": {**sizes["text_config"], **common, **config_overrides}}
        auto = AutoModelForImageTextToText
    else:
        sizes = {**sizes, **common, **config_overrides}
        auto = AutoModelForCausalLM
    if name.startswith("gemma4"):
        (sizes.get("text_config") or sizes)["vocab_size_per_layer_input"] = len(tokenizer)
    config = AutoConfig.for_model(model_type, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    randomise(model, generator)
    _randomise_buffers(model, generator)
    return model.eval()


@torch.no_grad()
def _randomise_buffers(model: nn.Module, generator: torch.Generator) -> None:
    for path, buffer in model.named_buffers():
        if (kind := path.rpartition(".")[2]) in _BUFFERS:
            middle, spread = _BUFFERS[kind]
            buffer.copy_(middle + spread * torch.randn(buffer.shape, generator=generator))
