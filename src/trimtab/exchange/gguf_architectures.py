"""Models as llama.cpp knows them: its names of their weights, how it stores them, and what else it
has to be told; what it computes in another way is refused.

The sources are llama.cpp's converter (convert_hf_to_gguf.py, conversion/) and its graphs
(src/models): rows of q and k in Llama's order of rotary pairs, norms of Gemma stored as 1 + w, a
window in five of six layers of Gemma 3 and in every other one of Gemma 2.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    #: Whether the LM head may be another table than the embeddings.
    untied: bool = True


_LLAMA = Architecture(
    "llama",
    "silu",
    permuted=True,
    biased=(*_QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
)
#: By transformers' model_type.
_ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", "silu", biased=_QKV),
    "qwen3": Architecture("qwen3", "silu"),
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


# -- weights -------------------------------------------------------------------------------------


class Names:
    """llama.cpp's names of a model's weights."""

    def __init__(self, architecture: Architecture, config: Any) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        arch = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}[architecture.name]
        self.architecture, self.config = architecture, config
        self._names = get_tensor_name_map(arch, config.num_hidden_layers)

    def of(self, weight: str) -> str:
        """The name of a weight or bias, from its name in the model."""
        module, _, own = weight.rpartition(".")
        name = self._names.get_name(module)
        leaf = (name or "").rpartition(".")[2]
        if name is None or own not in ("weight", "bias"):
            raise TrimtabError(f"llama.cpp has no place for {shown(weight)}")
        if own == "bias" and leaf not in self.architecture.biased:
            raise TrimtabError(
                f"llama.cpp has no place for {shown(weight)}: it gives {self.architecture.name} no "
                "bias there; attach the steering instead"
            )
        return f"{name}.{own}"

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """A weight's or bias' numbers [rows, ...], as llama.cpp has them."""
        if self.architecture.plus_one and name.endswith("norm.weight"):
            return tensor.float() + 1
        heads = self.heads(name)
        return tensor if heads is None else permuted(tensor, heads)

    def heads(self, name: str) -> int | None:
        """How many heads a weight has whose rows llama.cpp has in another order."""
        if not self.architecture.permuted:
            return None
        of = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        wanted = of.get(name.rpartition(".")[0].rpartition(".")[2])
        return None if wanted is None else int(getattr(self.config, wanted))


def permuted(tensor: Tensor, heads: int) -> Tensor:
    """Rows of heads whose rotary pairs are halves apart [first half, second half] in the order that
    has each pair side by side."""
    pairs: Tensor = tensor.unflatten(0, (heads, 2, -1))
    return pairs.transpose(1, 2).flatten(0, 2).contiguous()


# -- hyperparameters -----------------------------------------------------------------------------


def hyperparameters(architecture: Architecture, model: Any) -> dict[str, Any]:
    """What llama.cpp has to be told of a model, by key; refused is what it cannot be told."""
    config = model.config
    _check(architecture, config)
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
    }
    width = _head_size(config)
    values |= {"attention.key_length": width, "attention.value_length": width}
    if architecture is _LLAMA:
        values["rope.dimension_count"] = width
    if architecture.plus_one:
        values |= _of_gemma(config)
    rope = _rope(config)
    values["rope.freq_base"] = float(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return {f"{architecture.name}.{key}": value for key, value in values.items()}


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
    known = ("default", "linear", "llama3") if architecture is _LLAMA else ("default", "linear")
    rope = _rope(config)["rope_type"]
    if rope not in known:
        _refuse(architecture, f"rotary positions of type {shown(rope)} are not written here")
    window = getattr(config, "sliding_window", None)
    kinds = list(getattr(config, "layer_types", None) or ())
    if architecture.plus_one:
        _check_gemma(architecture, config, kinds)
    elif window is not None and window < config.max_position_embeddings:
        slides = "sliding_attention" in kinds or (config.model_type == "mistral" and not kinds)
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


def rotary_factors(model: Any) -> Tensor | None:
    """By what llama.cpp divides the rotary frequencies [head size / 2], for Llama 3's scaling."""
    if _rope(model.config)["rope_type"] != "llama3":
        return None
    width, theta = _head_size(model.config), _rope(model.config)["rope_theta"]
    places = torch.arange(0, width, 2, dtype=torch.float64) / width
    scaled: Tensor = model.get_decoder().rotary_emb.inv_freq.double().cpu()
    return torch.pow(theta, -places).div(scaled).float()
