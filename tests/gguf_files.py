"""Tiny models that can be written as GGUF files, and what such files hold, as gguf reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

import trimtab as tt
from tiny import tiny_model, tiny_tokenizer

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
}  # fmt: skip


def tiny(name: str, **options: Any) -> tt.LanguageModel:
    model = tiny_model(name, **{**MODELS.get(name, {}), **options})
    return tt.wrap(model, tiny_tokenizer())


def tensors(path: Path) -> dict[str, Any]:
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


def values(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
