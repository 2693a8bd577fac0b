"""Tiny models that can be written as GGUF files, and what such files hold, as gguf reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2MoeConfig

import trimtab as tt
from tiny import randomise, tiny_model, tiny_tokenizer
from tiny_curated import curated_model

_SPECIAL = ("bos", "eos", "pad")

#: Tiny models that llama.cpp computes: of Gemma with its own windows and scale of attention.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {
        "query_pre_attn_scalar": 16, "num_hidden_layers": 7, "sliding_window_pattern": 6,
        "final_logit_softcapping": 3.0,
    },
    "qwen2_moe": {
        "hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2,
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {"mlp_only_layers": []},
    "phi3": {},
    "gpt2": {},
}  # fmt: skip

#: Those that transformers reads of no GGUF file: it takes Mixtral for a Llama without experts.
WRITTEN_ONLY = ("mixtral",)


def tiny(name: str, **options: Any) -> tt.LanguageModel:
    options = {**MODELS.get(name, {}), **options}
    if name == "mixtral":
        model = curated_model(name, **options)
    elif name == "qwen2_moe":
        model = _qwen2_moe(**options)
    else:
        model = tiny_model(name, **options)
    return tt.wrap(model, tiny_tokenizer())


def _qwen2_moe(**options: Any) -> PreTrainedModel:
    """A mixture with an expert that is asked each time."""
    tokenizer = tiny_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in _SPECIAL}
    shared = {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256}
    config = Qwen2MoeConfig(**shared, **ids, vocab_size=len(tokenizer), **options)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, torch.Generator().manual_seed(5))
    return model.eval()


def tensors(path: Path) -> dict[str, Any]:
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


def values(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
