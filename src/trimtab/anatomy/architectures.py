"""The architectures that are known by name: the only file that knows names of modules."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trimtab.errors import TrimtabError
from trimtab.plugins import Extended


@dataclass(frozen=True)
class Architecture:
    """Names of an architecture's modules. The defaults are Llama's.

    Paths of `body` and `embeddings` start at the causal language model and at the body; the
    other paths start at a block, but for `blocks` and `final_norm`, which start at the body.
    """

    body: str = "model"
    blocks: str = "layers"
    embeddings: tuple[str, ...] = ("embed_tokens",)
    final_norm: str = "norm"
    #: None where attention or the FFN reads the residual stream without a norm.
    attn_norm: str | None = "input_layernorm"
    ffn_norm: str | None = "post_attention_layernorm"
    attention: str = "self_attn"
    attn_readers: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attn_proj: str = "self_attn.o_proj"
    ffn: str = "mlp"
    ffn_readers: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    ffn_proj: str = "mlp.down_proj"
    #: The FFN's activation function.
    ffn_act: str = "mlp.act_fn"
    #: Norms between a branch and the residual stream: an added vector does not pass them.
    attn_post_norm: str | None = None
    ffn_post_norm: str | None = None
    #: Whether it computes what Llama computes, but has no room for some of its biases.
    llama_alike: bool = False


_GEMMA = Architecture(
    ffn_norm="pre_feedforward_layernorm",
    # Gemma's `post_attention_layernorm` is the norm on the attention branch, not the FFN's.
    attn_post_norm="post_attention_layernorm",
    ffn_post_norm="post_feedforward_layernorm",
)

_ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(),
    "mistral": Architecture(llama_alike=True),
    "qwen2": Architecture(llama_alike=True),
    "qwen3": Architecture(),
    "qwen3_moe": Architecture(),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma3": replace(_GEMMA, body="model.language_model"),
    "gpt2": Architecture(
        body="transformer",
        blocks="h",
        embeddings=("wte", "wpe"),
        final_norm="ln_f",
        attn_norm="ln_1",
        ffn_norm="ln_2",
        attention="attn",
        attn_readers=("attn.c_attn",),
        attn_proj="attn.c_proj",
        ffn_readers=("mlp.c_fc",),
        ffn_proj="mlp.c_proj",
        ffn_act="mlp.act",
    ),
    "phi3": Architecture(
        attn_readers=("self_attn.qkv_proj",),
        ffn_readers=("mlp.gate_up_proj",),
        ffn_act="mlp.activation_fn",
    ),
    "olmo2": Architecture(
        attn_norm=None,
        ffn_norm=None,
        attn_post_norm="post_attention_layernorm",
        ffn_post_norm="post_feedforward_layernorm",
    ),
}


#: Architectures that installed packages add.
_ADDED = Extended(
    "architecture", _ARCHITECTURES, lambda added, name: isinstance(added, Architecture)
)


def register(model_type: str, architecture: Architecture) -> None:
    """Teach trimtab an architecture: `model_type` is what the model's config.json says.

    `register("my_model", Architecture(attn_proj="attention.out"))` names what differs from Llama.
    """
    _ARCHITECTURES[model_type] = architecture


def known() -> list[str]:
    """The model types that have an anatomy, sorted."""
    return sorted({*_ARCHITECTURES, *_ADDED})


def find_architecture(model_type: str) -> Architecture:
    """The entry of a model type."""
    architecture = _ARCHITECTURES.get(model_type) or _ADDED.get(model_type)
    if architecture is None:
        raise TrimtabError(
            f"unknown architecture {model_type!r}: known are {', '.join(known())}; "
            f"register it with trimtab.anatomy.register({model_type!r}, "
            "trimtab.anatomy.Architecture(...)), naming the modules that differ from Llama's"
        )
    return architecture
