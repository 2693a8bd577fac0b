"""Models as llama.cpp knows them, and what it has to be told of them beside their weights; what it
computes in another way is refused.

The sources are llama.cpp's converter (convert_hf_to_gguf.py, conversion/) and its graphs
(src/models): a window in five of six layers of Gemma 3 and in every other one of Gemma 2, weights
of the chosen experts that sum to 1 in Mixtral and Qwen3 and not in Qwen2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.checkpoints import attention_scale
from trimtab.errors import TrimtabError, shown

_QKV = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp has a model."""

    #: Its name there.
    name: str
    activation: str
    #: Rows of q and k are in another order: rotary pairs beside each other.
    permuted: bool = False
    #: Norms hold the 1 that the model adds to their weight.
    plus_one: bool = False
    #: The weights that may have a bias.
    biased: tuple[str, ...] = ()
    #: Whether the LM head may be another table than the embeddings, and whether it may be that one.
    untied: bool = True
    tied: bool = True
    #: Of a mixture: whether the weights of the chosen experts sum to 1.
    normed: bool | None = None


_LLAMA = Architecture(
    "llama",
    "silu",
    permuted=True,
    biased=(*_QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
)
_GPT2 = Architecture(
    "gpt2",
    "gelu_new",
    biased=(
        "attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "output_norm",
    ),
)  # fmt: skip
#: By transformers' model_type.
_ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": replace(_LLAMA, biased=(*_QKV, "attn_output"), normed=True),
    "qwen2": Architecture("qwen2", "silu", biased=_QKV),
    "qwen2_moe": Architecture("qwen2moe", "silu", biased=_QKV, tied=False, normed=False),
    "qwen3": Architecture("qwen3", "silu"),
    "qwen3_moe": Architecture("qwen3moe", "silu", normed=True),
    "phi3": Architecture("phi3", "silu"),
    "gpt2": _GPT2,
    "gemma2": Architecture("gemma2", "gelu_pytorch_tanh", plus_one=True, untied=False),
    "gemma3_text": Architecture("gemma3", "gelu_pytorch_tanh", plus_one=True),
}


def architecture_of(model: Any) -> Architecture:
    """How llama.cpp has a model, or TrimtabError where that is not known here."""
    config = model.config
    known = _ARCHITECTURES.get(config.model_type)
    if known is None:
        raise TrimtabError(
            f"no GGUF file is written of {shown(config.model_type)}, only of "
            f"{', '.join(_ARCHITECTURES)}: write a checkpoint or an adapter of peft instead (leave "
            "--to gguf out, or --to lora), and convert that with llama.cpp's converter"
        )
    return known


# -- hyperparameters -----------------------------------------------------------------------------


def hyperparameters(architecture: Architecture, model: Any) -> dict[str, Any]:
    """What llama.cpp has to be told of a model, by key; refused is what it cannot be told."""
    config = model.config
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }
    if architecture is _GPT2:
        values |= _of_gpt2(config)
    else:
        values |= _of_rotary(architecture, model)
    return {f"{architecture.name}.{key}": value for key, value in values.items()}


def _of_gpt2(config: Any) -> dict[str, Any]:
    """What is said of positions that are learned, and of norms that take the mean away."""
    if config.activation_function != _GPT2.activation:
        act = shown(config.activation_function)
        _refuse(_GPT2, f"its activation is {_GPT2.activation}, not {act}")
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        _refuse(_GPT2, "it scales attention by the root of a head's size, and by nothing else")
    return {
        "feed_forward_length": config.n_inner or 4 * config.hidden_size,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }


def _of_rotary(architecture: Architecture, model: Any) -> dict[str, Any]:
    """What is said of all others, whose positions are rotary."""
    config = model.config
    _check(architecture, config)
    values = {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    width = _head_size(config)
    values |= {"attention.key_length": width, "attention.value_length": width}
    rope = _rope(config)
    if architecture.name in ("llama", "phi3"):
        values["rope.dimension_count"] = int(width * rope.get("partial_rotary_factor", 1.0))
    if architecture.plus_one:
        values |= _of_gemma(config)
    if architecture.normed is not None:
        values |= _of_mixture(architecture, config)
    values["rope.freq_base"] = float(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "longrope":
        values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        values["rope.scaling.attn_factor"] = float(_rotary(model).attention_scaling)
    return values


def _rotary(model: Any) -> Any:
    return model.get_decoder().rotary_emb


def _of_mixture(architecture: Architecture, config: Any) -> dict[str, Any]:
    values = {"expert_used_count": config.num_experts_per_tok}
    if config.model_type == "mixtral":  # which has experts in each block, of weights that sum to 1
        return values | {"expert_count": config.num_local_experts}
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        _refuse(architecture, "each of its layers has experts, and some of this model have none")
    if config.norm_topk_prob is not architecture.normed:
        sums = "sum to 1" if architecture.normed else "are not made to sum to 1"
        _refuse(architecture, f"the weights of a token's experts {sums}")
    values["expert_count"] = config.num_experts
    values["expert_feed_forward_length"] = config.moe_intermediate_size
    if config.model_type == "qwen2_moe":
        values["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    return values


def _head_size(config: Any) -> int:
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)


def _of_gemma(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"attention.sliding_window": config.sliding_window}
    if config.attn_logit_softcapping:
        values["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
    if config.final_logit_softcapping:
        values["final_logit_softcapping"] = float(config.final_logit_softcapping)
    sliding = _rope(config, "sliding_attention")
    if config.model_type == "gemma3_text":
        values["rope.freq_base_swa"] = float(sliding["rope_theta"])
    return values


def _rope(config: Any, kind: str = "full_attention") -> dict[str, Any]:
    """The rotary parameters of a kind of layer."""
    parameters: dict[str, Any] = config.rope_parameters
    own: dict[str, Any] = parameters.get(kind, parameters)
    return own


def _check(architecture: Architecture, config: Any) -> None:
    """Refuse what llama.cpp computes in another way than this model."""
    act = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if act != architecture.activation:
        _refuse(architecture, f"its activation is {architecture.activation}, not {shown(act)}")
    more = {"phi3": ("longrope",), "llama": ("linear", "llama3")}
    known = ("default", *more.get(architecture.name, ("linear",)))
    rope = _rope(config)["rope_type"]
    if rope not in known:
        _refuse(architecture, f"rotary positions of type {shown(rope)} are not written here")
    window = getattr(config, "sliding_window", None)
    kinds = list(getattr(config, "layer_types", None) or ())
    if architecture.plus_one:
        _check_gemma(architecture, config, kinds)
    elif window is not None and window < config.max_position_embeddings:
        always = config.model_type in ("mistral", "mixtral", "phi3")
        slides = "sliding_attention" in kinds or (always and not kinds)
        if slides:
            _refuse(architecture, f"it has no sliding window, and this model one of {window}")


def _check_gemma(architecture: Architecture, config: Any, kinds: list[str]) -> None:
    scale = attention_scale(config)
    if config.query_pre_attn_scalar != scale:
        _refuse(
            architecture,
            f"it scales attention by the root of {scale}, not of {config.query_pre_attn_scalar}",
        )
    every = 6 if config.model_type == "gemma3_text" else 2
    wanted = [
        "sliding_attention" if (layer + 1) % every else "full_attention"
        for layer in range(config.num_hidden_layers)
    ]
    if kinds != wanted:
        _refuse(architecture, f"every {every}th of its layers is without a window, and no other")
    if config.model_type == "gemma3_text":
        if config.attn_logit_softcapping:
            _refuse(architecture, "it caps no logits of attention")
        if _rope(config, "sliding_attention")["rope_type"] != "default":
            _refuse(architecture, "it scales no rotary positions where there is a window")
    elif not (config.attn_logit_softcapping and config.final_logit_softcapping):
        _refuse(architecture, "it caps the logits of attention and of the head")


def _refuse(architecture: Architecture, why: str) -> None:
    raise TrimtabError(
        f"llama.cpp would compute another model than this one ({architecture.name} there: {why}); "
        "bake a checkpoint instead (leave --to gguf out)"
    )


def rotary_factors(model: Any) -> dict[str, Tensor]:
    """By what llama.cpp divides the rotary frequencies [head size / 2], by its names: of Llama 3's
    scaling, and of Phi-3's, which has some for long texts and some for short ones."""
    config = model.config
    kind = "default" if config.model_type == "gpt2" else _rope(config)["rope_type"]
    if kind == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(_rope(config)[f"{length}_factor"])
            for length in ("long", "short")
        }
    if kind != "llama3":
        return {}
    width, theta = _head_size(config), _rope(config)["rope_theta"]
    places = torch.arange(0, width, 2, dtype=torch.float64) / width
    scaled: Tensor = _rotary(model).inv_freq.double().cpu()
    return {"rope_freqs.weight": torch.pow(theta, -places).div(scaled).float()}
