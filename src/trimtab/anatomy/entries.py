"""The architectures that are known by name: the only file that knows names of modules.

An entry spares a model the search for its parts. It is proved like what is found without any
(`proof.py`), and where it does not hold the parts are looked for (`discovery.py`).
"""

from __future__ import annotations

from dataclasses import replace

from trimtab.anatomy.architectures import (
    Architecture,
    attention,
    ffn,
    mixer,
    mixture,
    registered,
)
from trimtab.anatomy.description import Block, Branch


def _block(*branches: Branch, scale: float | str = 1.0) -> Block:
    return Block(branches, scale)


def _inside(architecture: Architecture, body: str = "model.language_model") -> Architecture:
    """The text decoder inside of a multimodal model."""
    return replace(architecture, body=body)


_LLAMA = Architecture()

_GEMMA = Architecture(
    layers=(
        _block(
            attention(post_norm="post_attention_layernorm"),
            ffn(norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm"),
        ),
    ),
    embedding_factor="hidden_size**0.5",
)

#: Norms after the branches and none before: a branch reads the stream itself.
_POST_NORM = Architecture(
    layers=(
        _block(
            attention(norm=None, post_norm="post_attention_layernorm"),
            ffn(norm=None, post_norm="post_feedforward_layernorm"),
        ),
    )
)

_MIXTURE = Architecture(layers=(_block(attention(), mixture()),))

#: The first layers dense, then mixtures with an expert that all tokens share.
_SHARED = mixture(shared="shared_experts")
_DEEPSEEK = Architecture(
    layers=tuple(
        _block(attention(readers=readers), branch)
        # Queries may be compressed, as keys and values always are.
        for readers in (("q_a_proj", "kv_a_proj_with_mqa"), ("q_proj", "kv_a_proj_with_mqa"))
        for branch in (_SHARED, ffn())
    )
)

#: Linear attention in most layers; FFNs, or mixtures with a gated shared expert.
_GATED = mixture(shared="shared_expert", gate="shared_expert_gate")


def _qwen_hybrid(*linear_readers: str) -> Architecture:
    linear = mixer("linear_attn", "input_layernorm", linear_readers, "out_proj")
    return Architecture(
        layers=tuple(
            _block(first, second) for first in (linear, attention()) for second in (_GATED, ffn())
        )
    )


_QWEN3_5 = _qwen_hybrid("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")

_GPT_NEOX = Architecture(
    body="gpt_neox",
    embeddings=("embed_in",),
    final_norm="final_layer_norm",
    layers=tuple(
        _block(
            attention("attention", readers=("query_key_value",), writer="dense"),
            ffn(readers=("dense_h_to_4h",), writer="dense_4h_to_h", act="act", reads=reads),
        )
        for reads in ((), (0,))  # parallel, or one after the other
    ),
)

#: One norm for both branches, which do not see each other.
_PARALLEL = Architecture(layers=(_block(attention(), ffn(norm="input_layernorm", reads=())),))

_GRANITE = Architecture(
    layers=(_block(attention(factor="residual_multiplier"), ffn(factor="residual_multiplier")),),
    embedding_factor="embedding_multiplier",
    logit_factor="logits_scaling**-1",
)


def _granite_hybrid() -> Architecture:
    times = "residual_multiplier"
    mamba = mixer("mamba", "input_layernorm", ("in_proj",), "out_proj", factor=times)
    dense = ffn(
        "shared_mlp", readers=("input_linear",), writer="output_linear", act="activation",
        factor=times,
    )  # fmt: skip
    sparse = mixture("block_sparse_moe", router="router", factor=times)
    return replace(
        _GRANITE,
        layers=tuple(
            _block(first, *rest)
            for first in (mamba, attention(factor=times))
            for rest in ((sparse, dense), (dense,))
        ),
    )


def _gemma4() -> Architecture:
    """A third branch adds what each layer has of each token (per-layer embeddings); the last
    layers read the keys and values of earlier ones; some use their keys as values."""
    per_layer = Branch(
        "ffn",
        None,
        writer="per_layer_projection",
        post_norm="post_per_layer_input_norm",
        reads=(0, 1),
        readers=("per_layer_input_gate",),
        act="act_fn",
    )
    own = ("q_proj", "k_proj", "v_proj")
    mixed = Branch("ffn", None, post_norm="post_feedforward_layernorm")
    dense = ffn(norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm")
    return replace(
        _GEMMA,
        layers=tuple(
            _block(
                attention(post_norm="post_attention_layernorm", readers=readers),
                *rest,
                scale="layer_scalar",
            )
            for readers in (own, own[:2], own[:1])
            for rest in ((dense, per_layer), (dense,), (mixed,))
        ),
    )


ENTRIES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, llama_alike=True),
    "qwen2": replace(_LLAMA, llama_alike=True),
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "ministral3": _LLAMA,
    "ernie4_5": _LLAMA,
    "hunyuan_v1_dense": _LLAMA,
    "mistral3": _inside(_LLAMA),
    "qwen2_5_vl": _inside(_LLAMA),
    "qwen3_vl": _inside(_LLAMA),
    "qwen3_moe": Architecture(layers=(_block(attention(), mixture()), _block(attention(), ffn()))),
    "mixtral": _MIXTURE,
    "olmoe": _MIXTURE,
    "gpt_oss": Architecture(layers=(_block(attention(), mixture(router="router")),)),
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": Architecture(
        layers=(_block(attention(), _SHARED), _block(attention(), ffn())),
    ),
    "llama4_text": Architecture(
        layers=(
            _block(
                attention(),
                mixture("feed_forward", router="router", shared="shared_expert"),
            ),
            _block(attention(), ffn("feed_forward", act="activation_fn")),
        )
    ),
    "qwen3_next": _qwen_hybrid("in_proj_qkvz", "in_proj_ba"),
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe_text": _QWEN3_5,
    "qwen3_5": _inside(_QWEN3_5),
    "qwen3_5_moe": _inside(_QWEN3_5),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma3": _inside(_GEMMA),
    "gemma4_text": _gemma4(),
    "gemma4": _inside(_gemma4()),
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "exaone4": _POST_NORM,
    "glm4": Architecture(
        layers=(
            _block(
                attention(post_norm="post_self_attn_layernorm"),
                ffn(
                    readers=("gate_up_proj",),
                    act="activation_fn",
                    post_norm="post_mlp_layernorm",
                ),
            ),
        )
    ),
    "phi3": Architecture(
        layers=(
            _block(
                attention(readers=("qkv_proj",)),
                ffn(readers=("gate_up_proj",), act="activation_fn"),
            ),
        )
    ),
    "cohere2": replace(_PARALLEL, logit_factor="logit_scale"),
    "phi": Architecture(
        final_norm="final_layernorm",
        layers=(
            _block(
                attention(writer="dense"),
                ffn(
                    norm="input_layernorm",
                    readers=("fc1",),
                    writer="fc2",
                    act="activation_fn",
                    reads=(),
                ),
            ),
        ),
    ),
    "gptj": Architecture(
        body="transformer",
        blocks="h",
        embeddings=("wte",),
        final_norm="ln_f",
        layers=(
            _block(
                attention("attn", "ln_1", writer="out_proj"),
                ffn(norm="ln_1", readers=("fc_in",), writer="fc_out", act="act", reads=()),
            ),
        ),
    ),
    "gpt_neox": _GPT_NEOX,
    "gpt2": Architecture(
        body="transformer",
        blocks="h",
        embeddings=("wte", "wpe"),
        final_norm="ln_f",
        layers=(
            _block(
                attention("attn", "ln_1", ("c_attn",), "c_proj"),
                ffn("mlp", "ln_2", ("c_fc",), "c_proj", "act"),
            ),
        ),
    ),
    "opt": Architecture(
        body="model.decoder",
        embeddings=("embed_tokens", "embed_positions"),
        final_norm="final_layer_norm",
        layers=(
            _block(
                attention(norm="self_attn_layer_norm", writer="out_proj"),
                Branch(  # linear maps of the block's own
                    "ffn",
                    None,
                    writer="fc2",
                    norm="final_layer_norm",
                    reads=(0,),
                    readers=("fc1",),
                    act="activation_fn",
                ),
            ),
        ),
    ),
    "bloom": Architecture(  # whose branches add the stream themselves
        body="transformer",
        blocks="h",
        embeddings=(),
        final_norm="ln_f",
        layers=(
            _block(
                attention(
                    "self_attention",
                    readers=("query_key_value",),
                    writer="dense",
                    output="self_attention.dense",
                ),
                ffn(
                    readers=("dense_h_to_4h",),
                    writer="dense_4h_to_h",
                    act="gelu_impl",
                    output="mlp.dense_4h_to_h",
                ),
            ),
        ),
    ),
    "granite": _GRANITE,
    "granitemoehybrid": _granite_hybrid(),
    "lfm2": Architecture(
        final_norm="embedding_norm",
        layers=tuple(
            _block(
                first,
                ffn("feed_forward", "ffn_norm", ("w1", "w3"), "w2", act=None),
            )
            for first in (
                mixer("conv", "operator_norm", ("in_proj",), "out_proj"),
                attention(norm="operator_norm", writer="out_proj"),
            )
        ),
    ),
    "falcon_h1": Architecture(  # attention and a state space side by side
        final_norm="final_layernorm",
        layers=(
            _block(
                mixer("mamba", "input_layernorm", (), "out_proj", factor="ssm_out_multiplier"),
                attention(
                    input_factor="attention_in_multiplier", factor="attention_out_multiplier"
                ),
                ffn(
                    "feed_forward",
                    "pre_ff_layernorm",
                    writer_factor="mlp_multipliers.1",
                    reads=(0, 1),
                ),
            ),
        ),
        embedding_factor="embedding_multiplier",
        logit_factor="lm_head_multiplier",
    ),
    "nemotron_h": Architecture(  # one branch to a layer
        embeddings=("embeddings",),
        final_norm="norm_f",
        layers=(
            _block(mixer("mixer", "norm", ("in_proj",), "out_proj")),
            _block(attention("mixer", "norm")),
            _block(
                mixture(
                    "mixer",
                    "norm",
                    shared="shared_experts",
                    shared_readers=("up_proj",),
                    reads=(),
                )
            ),
            _block(ffn("mixer", "norm", ("up_proj",), reads=())),
        ),
    ),
}


def known() -> list[str]:
    """The model types that are known by name, sorted; others are found by how they compute."""
    return sorted({*ENTRIES, *registered()})
