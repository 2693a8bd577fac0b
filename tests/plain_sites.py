"""Where the sites of tiny models are, by hand: read from transformers' code, not found by trimtab.

A table names for each layer the module of each site, and whether its input or its output is the
site. Plain hooks of torch capture and change what is there. What stands in fused experts' inside
no boundary of modules shows: a loop over the experts' own weights, written out here, does. A
router's logits are what torch's `linear` returns while the router runs.

Not in the table is what an architecture has not, in that layer: heads where nothing is attention;
the norm's input where two branches share the norm, because a change there would change both; FFN
sites where a block is all attention; norms before a branch where the norms come after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

Change = Callable[[Tensor], Tensor]

#: A module's path in its block, and the side of it, "in", "out", "experts" or "router", that is
#: the site.
Place = tuple[str, str]
Layer = Mapping[str, Place]


# -- one branch -------------------------------------------------------------------------------


def _attention(
    module: str = "self_attn",
    proj: str = "o_proj",
    norm: str | None = "input_layernorm",
    post: str | None = None,
) -> dict[str, Place]:
    sites = {
        "attn_norm": (module, "in"),
        "heads": (f"{module}.{proj}", "in"),
        "attn_out": (f"{module}.{proj}", "out"),
    }
    return sites | _norms("attn", norm, post)


def _mixer(module: str, norm: str = "input_layernorm") -> dict[str, Place]:
    """Linear attention, a state space, a convolution: no heads."""
    return {"attn_norm": (module, "in"), "attn_out": (module, "out")} | _norms("attn", norm, None)


def _ffn(
    module: str = "mlp",
    proj: str = "down_proj",
    norm: str | None = "post_attention_layernorm",
    post: str | None = None,
) -> dict[str, Place]:
    sites = {
        "ffn_norm": (module, "in"),
        "ffn_in": (f"{module}.{proj}", "in"),
        "ffn_out": (module, "out"),
    }
    return sites | _norms("ffn", norm, post)


def _moe(
    module: str = "mlp",
    norm: str | None = "post_attention_layernorm",
    router: str = "gate",
) -> dict[str, Place]:
    """Experts, with or without shared ones; all of it is the FFN."""
    sites = {
        "ffn_norm": (module, "in"),
        "router": (f"{module}.{router}", "router"),
        "ffn_in": (f"{module}.experts", "experts"),
        "ffn_out": (module, "out"),
    }
    return sites | _norms("ffn", norm, None)


def _norms(branch: str, norm: str | None, post: str | None) -> dict[str, Place]:
    sites = {} if norm is None else {f"{branch}_norm_in": (norm, "in")}
    return sites if post is None else {**sites, f"{branch}_post_norm": (post, "out")}


# -- one model --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plain:
    """Where the blocks of a model are, and the sites of each of its layers."""

    layers: tuple[Layer, ...]
    blocks: str = "model.layers"


_LLAMA = _attention() | _ffn()
_MIXTURE = _attention() | _moe()
_GEMMA = _attention(post="post_attention_layernorm") | _ffn(
    norm="pre_feedforward_layernorm", post="post_feedforward_layernorm"
)
_NORMS_AFTER = _attention(norm=None, post="post_attention_layernorm") | _ffn(
    norm=None, post="post_feedforward_layernorm"
)
_IN_WRAPPER = "model.language_model.layers"

# What reads the norm that two branches share is seen at the branches' own modules.
_PARALLEL = _attention(norm=None) | _ffn(norm=None)

_NEOX = Plain(
    (_attention("attention", "dense") | _ffn(proj="dense_4h_to_h"),) * 3, "gpt_neox.layers"
)

# The block adds two FFNs, the mixture and the shared one, that read one norm: sites are the
# mixture's.
_GRANITE_MOE = _moe("block_sparse_moe", norm=None, router="router")
_GRANITE_DENSE = _ffn("shared_mlp", "output_linear")

_GEMMA4 = (_GEMMA,) * 4

_DELTA, _CONV = _mixer("linear_attn"), _mixer("conv", "operator_norm")
_LFM_FFN = _ffn("feed_forward", "w2", "ffn_norm")

#: Every tiny model.
PLAIN: dict[str, Plain] = {
    # Attention and FFN return the stream with their output added.
    "bloom": Plain(
        (
            _attention("self_attention", "dense")
            | _ffn(proj="dense_4h_to_h")
            | {"ffn_out": ("mlp.dense_4h_to_h", "out")},
        )
        * 3,
        "transformer.h",
    ),
    "cohere2": Plain((_PARALLEL,) * 3),
    "deepseek_v3": Plain((_LLAMA, _MIXTURE, _MIXTURE)),
    "ernie4_5": Plain((_LLAMA,) * 3),
    "exaone4": Plain((_NORMS_AFTER,) * 3),
    # A Mamba beside attention reads the same norm, and has no sites of its own.
    "falcon_h1": Plain(
        (_attention(norm=None) | _ffn("feed_forward", norm="pre_ff_layernorm"),) * 3
    ),
    "gemma2": Plain((_GEMMA,) * 4),
    "gemma3": Plain((_GEMMA,) * 4),
    "gemma3_wrapper": Plain((_GEMMA,) * 3, _IN_WRAPPER),
    "gemma4": Plain(_GEMMA4),
    # The FFN is the sum of a dense one and of experts, each with norms of its own: no module
    # returns it, and the norm after it reads it.
    "gemma4_moe": Plain(
        (
            _attention(post="post_attention_layernorm")
            | {
                "router": ("router", "router"),
                "ffn_post_norm": ("post_feedforward_layernorm", "out"),
            },
        )
        * 4
    ),
    "gemma4_wrapper": Plain(_GEMMA4, _IN_WRAPPER),
    "glm4": Plain(
        (_attention(post="post_self_attn_layernorm") | _ffn(post="post_mlp_layernorm"),) * 3
    ),
    "glm4_moe": Plain((_LLAMA, _MIXTURE, _MIXTURE)),
    "gpt2": Plain(
        (_attention("attn", "c_proj", "ln_1") | _ffn(proj="c_proj", norm="ln_2"),) * 3,
        "transformer.h",
    ),
    # In parallel, but each branch with a norm of its own.
    "gpt_neox": _NEOX,
    "gpt_neox_sequential": _NEOX,
    "gpt_oss": Plain((_attention() | _moe(router="router"),) * 3),
    "gptj": Plain(
        (_attention("attn", "out_proj", norm=None) | _ffn(proj="fc_out", norm=None),) * 3,
        "transformer.h",
    ),
    "granite": Plain((_LLAMA,) * 3),
    "granitemoehybrid": Plain(
        tuple(mix | _GRANITE_MOE for mix in (_mixer("mamba"), _attention(), _mixer("mamba")))
    ),
    "granitemoehybrid_dense": Plain(
        tuple(mix | _GRANITE_DENSE for mix in (_mixer("mamba"), _attention(), _mixer("mamba")))
    ),
    "hunyuan_v1_dense": Plain((_LLAMA,) * 3),
    "lfm2": Plain(
        (
            _CONV | _LFM_FFN,
            _attention(proj="out_proj", norm="operator_norm") | _LFM_FFN,
            _CONV | _LFM_FFN,
        )
    ),
    "llama": Plain((_LLAMA,) * 3),
    "llama4_text": Plain(
        (_attention() | _ffn("feed_forward"), _attention() | _moe("feed_forward", router="router"))
        * 2
    ),
    "ministral3": Plain((_LLAMA,) * 3),
    "mistral": Plain((_LLAMA,) * 3),
    "mistral3": Plain((_LLAMA,) * 3, _IN_WRAPPER),
    "mixtral": Plain((_MIXTURE,) * 3),
    "nemotron_h": Plain(
        (
            _mixer("mixer", "norm"),
            _attention("mixer", norm="norm"),
            _moe("mixer", "norm"),
            _ffn("mixer", norm="norm"),
            _mixer("mixer", "norm"),
        )
    ),
    "olmo2": Plain((_NORMS_AFTER,) * 3),
    "olmo3": Plain((_NORMS_AFTER,) * 3),
    "olmoe": Plain((_MIXTURE,) * 3),
    # The FFN's maps are the block's own.
    "opt": Plain(
        (
            _attention(proj="out_proj", norm="self_attn_layer_norm")
            | {
                "ffn_norm_in": ("final_layer_norm", "in"),
                "ffn_norm": ("fc1", "in"),
                "ffn_in": ("fc2", "in"),
                "ffn_out": ("fc2", "out"),
            },
        )
        * 3,
        "model.decoder.layers",
    ),
    "phi": Plain((_attention(proj="dense", norm=None) | _ffn(proj="fc2", norm=None),) * 3),
    "phi3": Plain((_LLAMA,) * 3),
    "qwen2": Plain((_LLAMA,) * 3),
    "qwen2_5_vl": Plain((_LLAMA,) * 3, _IN_WRAPPER),
    "qwen3": Plain((_LLAMA,) * 3),
    "qwen3_5": Plain((_DELTA | _ffn(), _LLAMA, _DELTA | _ffn())),
    "qwen3_5_moe": Plain((_DELTA | _moe(), _MIXTURE, _DELTA | _moe())),
    "qwen3_5_wrapper": Plain((_DELTA | _ffn(), _LLAMA, _DELTA | _ffn()), _IN_WRAPPER),
    "qwen3_moe": Plain((_LLAMA, _MIXTURE, _MIXTURE)),
    "qwen3_next": Plain((_DELTA | _ffn(), _MIXTURE, _DELTA | _moe())),
    "qwen3_vl": Plain((_LLAMA,) * 3, _IN_WRAPPER),
    "smollm3": Plain((_LLAMA,) * 3),
}


def plain_sites(name: str) -> list[str]:
    """All sites of a tiny model, in the order of the layers."""
    layers = enumerate(PLAIN[name].layers)
    inside = [f"layers.{i}.{kind}" for i, layer in layers for kind in (*layer, "resid")]
    return ["embed", *inside, "final_norm"]


def _place(model: Any, name: str, site: str) -> tuple[nn.Module, str]:
    blocks = model.get_submodule(PLAIN[name].blocks)
    if site == "embed":
        return blocks[0], "in"
    if site == "final_norm":  # what the unembedding reads
        return model.get_output_embeddings(), "in"
    _, layer, kind = site.split(".")
    path, side = {**PLAIN[name].layers[int(layer)], "resid": ("", "out")}[kind]
    return blocks[int(layer)].get_submodule(path), side


# -- plain hooks ------------------------------------------------------------------------------


@torch.no_grad()
def plain_capture(model: PreTrainedModel, name: str, ids: list[int]) -> dict[str, Tensor]:
    """Every site in one pass over one sequence, each [tokens, units]; and the "logits"."""
    seen: dict[str, Tensor] = {}

    def keep(site: str) -> Change:
        def read(x: Tensor) -> Tensor:
            seen[site] = x.reshape(-1, x.shape[-1]).clone()
            return x

        return read

    handles = [_hook(*_place(model, name, site), keep(site)) for site in plain_sites(name)]
    try:
        seen["logits"] = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return seen


@contextmanager
def plain_edit(model: PreTrainedModel, name: str, site: str, function: Change) -> Iterator[None]:
    """Change what is at a site while the block lasts.

    `function` gets [rows, tokens, units] or [rows * tokens, units], as the model has it.
    """
    handle = _hook(*_place(model, name, site), function)
    try:
        yield
    finally:
        handle.remove()


def at_positions(change: Change, positions: str, end: int) -> Change:
    """A change of those tokens of one sequence that positions name, where the prompt has `end`;
    for [1, tokens, units] and [tokens, units]."""
    first = {"all": 0, "prompt": 0, "generated": end, "last": end - 1}.get(positions)
    if first is None:
        assert positions == "prompt[:5] | prompt[-5:]"
        ends = sorted({*range(min(5, end)), *range(max(0, end - 5), end)})
        return lambda x: x.index_copy(-2, torch.tensor(ends), change(x[..., ends, :]))

    def edit(x: Tensor) -> Tensor:
        stop = end if positions == "prompt" else x.shape[-2]
        changed = change(x[..., first:stop, :])
        return torch.cat((x[..., :first, :], changed, x[..., stop:, :]), dim=-2)

    return edit


class _Linear:
    """torch's `linear`, whose result is changed while a router runs."""

    def __init__(self, router: nn.Module, function: Change) -> None:
        self._function = function
        self._patched = mock.patch("torch.nn.functional.linear", self._call)
        self._handles = [
            router.register_forward_pre_hook(lambda *_: self._start()),
            router.register_forward_hook(lambda *_: self._stop()),
        ]

    def _start(self) -> None:
        self._patched.start()

    def _stop(self) -> None:
        self._patched.stop()

    def _call(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._function(linear(*args, **kwargs))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _hook(module: nn.Module, side: str, function: Change) -> Any:
    if side == "router":
        return _Linear(module, function)
    if side == "in":

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if args:
                return (function(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": function(kwargs["hidden_states"])}

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if side == "experts":
            return _experts_by_hand(module, function, *args, **kwargs)
        if isinstance(output, tuple):
            return (function(output[0]), *output[1:])
        return function(output)

    return module.register_forward_hook(after, with_kwargs=True)


# -- fused experts ----------------------------------------------------------------------------


def _experts_by_hand(
    experts: Any,
    function: Change,
    hidden: Tensor,
    chosen: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """What fused experts return, with what their down projections read shown to `function`, as
    [tokens, experts * units] with zeros where a token was not routed."""
    count = len(experts.down_proj)
    if chosen is None:  # Llama 4: all tokens for each expert in turn, weighed, most of them by zero
        reads = hidden.view(count, -1, hidden.shape[-1])
        routed = [x.any(-1, keepdim=True) for x in reads]
        shares = [torch.ones(1)] * count
    else:
        assert weights is not None
        reads = [hidden] * count
        here = [chosen == expert for expert in range(count)]
        routed = [x.any(-1, keepdim=True) for x in here]
        shares = [(weights * x).sum(-1, keepdim=True) for x in here]
    inside = [_inside(experts, expert, reads[expert]) * routed[expert] for expert in range(count)]
    changed = function(torch.cat(inside, -1)).chunk(count, -1)
    outside = [
        _outside(experts, expert, x) * routed[expert] * shares[expert]
        for expert, x in enumerate(changed)
    ]
    whole = torch.cat(outside) if chosen is None else torch.stack(outside).sum(0)
    return whole.to(hidden.dtype)  # a router's weights may be in float32


def _inside(experts: Any, expert: int, x: Tensor) -> Tensor:
    """What one expert's down projection reads, [tokens, units]."""
    kind = type(experts).__name__
    if kind == "NemotronHExperts":  # no gate
        return experts.act_fn(linear(x, experts.up_proj[expert]))
    if kind == "GptOssExperts":  # in turns: gate, up, gate, up
        both = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        gate = both[:, 0::2].clamp(max=experts.limit)
        up = both[:, 1::2].clamp(-experts.limit, experts.limit)
        return (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
    if kind == "Llama4TextExperts":
        gate, up = (x @ experts.gate_up_proj[expert]).chunk(2, -1)
    else:
        gate, up = linear(x, experts.gate_up_proj[expert]).chunk(2, -1)
    return experts.act_fn(gate) * up


def _outside(experts: Any, expert: int, inside: Tensor) -> Tensor:
    kind = type(experts).__name__
    if kind == "GptOssExperts":
        return inside @ experts.down_proj[expert] + experts.down_proj_bias[expert]
    if kind == "Llama4TextExperts":
        return inside @ experts.down_proj[expert]
    return linear(inside, experts.down_proj[expert])
