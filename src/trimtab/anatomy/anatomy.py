"""Where the sites of a model are, per architecture: the only file that knows module names.

A *site* is a place where an activation can be read or changed, written `layers.12.ffn_out`,
`embed` or `final_norm`. In the order in which a token passes them:

    embed           what the first block receives (embedding, GPT-2's positions, Gemma's scaling)
    attn_norm_in    what the norm before attention reads: the residual stream, seen by that norm
                    only, so that a change there leaves the stream alone (OLMo 2 has no such norm)
    attn_norm       what attention reads: the output of that norm (OLMo 2: attention's own input)
    heads           input of the attention output projection: all heads side by side, which is
                    n_heads * head_dim units and not always hidden_size
    attn_out        output of that projection (before Gemma's and OLMo 2's norm on the branch)
    attn_post_norm  output of that norm on the branch (Gemma and OLMo 2 only)
    ffn_norm_in     what the norm before the FFN reads: the stream between attention and FFN
    ffn_norm        what the FFN reads (OLMo 2: the FFN's own input)
    ffn_in          input of the FFN down projection; with experts, all experts side by side, zero
                    where a token was not routed
    ffn_out         output of the FFN (before Gemma's and OLMo 2's norm on the branch)
    ffn_post_norm   output of that norm on the branch (Gemma and OLMo 2 only)
    resid           output of the block
    final_norm      what the unembedding reads

One place can be read and not steered, which is what SADI ranks units by:

    ffn_act         output of the FFN's activation function: of a gated FFN act(gate), which is
                    multiplied by another map to give `ffn_in`; with experts as `ffn_in`

Besides places, anatomy knows which linear maps write or read a site, which is what baking needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.errors import TrimtabError, shown
from trimtab.plugins import Extended

#: What a hook does to an activation [rows, tokens, units]: a new one, or None to leave it.
Edit = Callable[[Tensor], Tensor | None]

#: Site kinds inside a block, in the order of the computation.
BLOCK_KINDS = (
    "attn_norm_in", "attn_norm", "heads", "attn_out", "attn_post_norm",
    "ffn_norm_in", "ffn_norm", "ffn_in", "ffn_out", "ffn_post_norm", "resid",
)  # fmt: skip
#: All site kinds.
KINDS = ("embed", *BLOCK_KINDS, "final_norm")
#: What a block has that can be read and is no site; `ffn_act` comes just before `ffn_in`.
READ_ONLY = "ffn_act"


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


_GEMMA = Architecture(
    ffn_norm="pre_feedforward_layernorm",
    # Gemma's `post_attention_layernorm` is the norm on the attention branch, not the FFN's.
    attn_post_norm="post_attention_layernorm",
    ffn_post_norm="post_feedforward_layernorm",
)

_ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(),
    "mistral": Architecture(),
    "qwen2": Architecture(),
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


def parse_site(site: str) -> tuple[int | None, str]:
    """`layers.12.ffn_out` -> (12, "ffn_out"); `embed` -> (None, "embed")."""
    if site in ("embed", "final_norm"):
        return None, site
    # One spelling for each site: no 007, and no digits but these ten.
    match = re.fullmatch(r"layers\.(0|[1-9][0-9]{0,4})\.([a-z_]+)", site)
    if match is not None and match[2] == READ_ONLY:
        raise TrimtabError(
            f"{site} can be read and not steered: steer layers.{match[1]}.ffn_in, where scaling a "
            "unit does the same"
        )
    if match is None or match[2] not in BLOCK_KINDS:
        raise TrimtabError(
            f"unknown site '{shown(site, 40)}': write layers.N.KIND with a kind of "
            f"{', '.join(BLOCK_KINDS)}, or embed, or final_norm"
        )
    return int(match[1]), match[2]


def site_order(site: str) -> tuple[float, float]:
    """Sort key: sites, and what can only be read, in the order in which a token passes them."""
    if site.endswith(f".{READ_ONLY}"):
        layer, place = site_order(_ffn_in_after(site))
        return (layer, place - 0.5)
    number, kind = parse_site(site)
    if number is None:
        return (-1, 0) if kind == "embed" else (float("inf"), 0)
    return (number, BLOCK_KINDS.index(kind))


def _ffn_in_after(site: str) -> str:
    """The site that follows an `ffn_act`, of the same width."""
    return site.removesuffix(READ_ONLY) + "ffn_in"


@dataclass(frozen=True)
class Point:
    """Where a hook goes to see one site: a module's input or output, of `width` units.

    `side="experts"` is the input of a mixture's down projections, which no module boundary shows,
    and "expert_acts" what its activation functions put out, which an edit can only read.
    """

    site: str
    module: nn.Module
    side: Literal["input", "output", "experts", "expert_acts"]
    width: int


@dataclass(frozen=True)
class LinearMap:
    """A linear map's weights, seen as [..., out, in] whatever the module's own layout.

    Layouts: "linear" [out, in]; "conv1d" [in, out] (GPT-2); "embedding" [tokens, out], a map from
    a token's one-hot; "experts" [experts, out, in]; "joint_experts", the same weights seen as one
    [out, experts * in], the reader of `ffn_in`.
    """

    owner: nn.Module
    weight: str = "weight"
    bias: str | None = "bias"
    layout: Literal["linear", "conv1d", "embedding", "experts", "joint_experts"] = "linear"

    def read(self) -> Tensor:
        weight: Tensor = getattr(self.owner, self.weight).detach()
        if self.layout in ("conv1d", "embedding"):
            return weight.T
        if self.layout == "joint_experts":
            return weight.permute(1, 0, 2).flatten(1)
        return weight

    def write(self, value: Tensor) -> None:
        old = getattr(self.owner, self.weight)
        if self.layout in ("conv1d", "embedding"):
            value = value.T
        elif self.layout == "joint_experts":
            value = value.unflatten(1, (old.shape[0], old.shape[2])).permute(1, 0, 2)
        new = nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
        setattr(self.owner, self.weight, new)


class Anatomy:
    """The sites of one model in memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        config: Any = model.config
        self.name: str = config.model_type
        architecture = _ARCHITECTURES.get(self.name) or _ADDED.get(self.name)
        if architecture is None:
            raise TrimtabError(
                f"unknown architecture {self.name!r}: known are {', '.join(known())}; "
                f"register it with trimtab.anatomy.register({self.name!r}, "
                "trimtab.anatomy.Architecture(...)), naming the modules that differ from Llama's"
            )
        self.architecture = architecture
        self.config: Any = config.get_text_config()
        try:
            self.body = model.get_submodule(self.architecture.body)
            blocks = self.body.get_submodule(self.architecture.blocks)
        except AttributeError as error:
            raise TrimtabError(
                f"this {self.name} model ({type(model).__name__}) has no module "
                f"{self.architecture.body}.{self.architecture.blocks}: trimtab steers causal "
                "language models; load it with AutoModelForCausalLM"
            ) from error
        self.blocks = list(blocks.children())
        self.layers = len(self.blocks)
        if not self.layers:
            raise TrimtabError(f"this {self.name} model ({type(model).__name__}) has no blocks")
        self.hidden_size: int = self.config.hidden_size

    # -- sites --------------------------------------------------------------------------------

    def check(self, site: str) -> tuple[int | None, str]:
        """Parse a site and make sure that this model has it."""
        layer, kind = parse_site(site)
        if layer is not None and layer >= self.layers:
            raise TrimtabError(
                f"layer {layer} is out of range: this model has layers 0 to {self.layers - 1}"
            )
        return layer, kind

    def sites(self, kind: str, layers: tuple[int, ...] | None = None) -> list[str]:
        """All sites of a kind, or those of `layers` in their order (negative: from the end)."""
        if kind not in KINDS:
            raise TrimtabError(f"unknown site kind {kind!r}: known are {', '.join(KINDS)}")
        if kind in ("embed", "final_norm"):
            return [kind]
        if not self.has(kind):
            raise TrimtabError(f"{self.name} has no {kind}: its blocks have no such norm")
        if layers is None:
            chosen = list(range(self.layers))
        else:
            chosen = [layer + self.layers if layer < 0 else layer for layer in layers]
            for given, layer in zip(layers, chosen, strict=True):
                if not 0 <= layer < self.layers:
                    raise TrimtabError(
                        f"layer {given} is out of range: this model has layers "
                        f"0 to {self.layers - 1}"
                    )
        return [f"layers.{layer}.{kind}" for layer in chosen]

    def has(self, kind: str) -> bool:
        """Whether this architecture has sites of a kind; only norms may be missing."""
        norm = kind.removesuffix("_in")
        # Without a norm there, `attn_norm` and `ffn_norm` are what the branch itself reads.
        if not norm.endswith("_norm") or kind in ("attn_norm", "ffn_norm", "final_norm"):
            return True
        return getattr(self.architecture, norm) is not None

    @property
    def heads(self) -> int:
        """Attention heads per block; each has `width("layers.0.heads") // heads` units."""
        return int(self.config.num_attention_heads)

    @property
    def stream_writers(self) -> list[str]:
        """The sites whose sum is the residual stream: the embedding and every branch's output."""
        sites = ["embed"]
        for layer in range(self.layers):
            for branch in ("attn", "ffn"):
                normed = self.has(f"{branch}_post_norm")
                sites.append(f"layers.{layer}.{branch}_{'post_norm' if normed else 'out'}")
        return sites

    def block_input(self, layer: int) -> str:
        """The site that block `layer` reads: the residual stream before it."""
        return "embed" if layer == 0 else f"layers.{layer - 1}.resid"

    def width(self, site: str) -> int:
        """How many units a site has."""
        return self.point(site).width

    def point(self, site: str) -> Point:
        """Where to hook to see the site."""
        layer, kind = self.check(site)
        names, hidden = self.architecture, self.hidden_size
        if kind == "embed":
            return Point(site, self.blocks[0], "input", hidden)
        if kind == "final_norm":
            return Point(site, self.body.get_submodule(names.final_norm), "output", hidden)
        assert layer is not None
        block = self.blocks[layer]
        if kind == "resid":
            return Point(site, block, "output", hidden)
        if not self.has(kind):
            raise TrimtabError(f"{self.name} has no {site}: its blocks have no such norm")
        if kind.endswith("_norm_in"):
            before: str = getattr(names, kind.removesuffix("_in"))
            return Point(site, block.get_submodule(before), "input", hidden)
        if kind.endswith("_post_norm"):
            return Point(site, block.get_submodule(getattr(names, kind)), "output", hidden)
        if kind in ("attn_norm", "ffn_norm"):
            norm = names.attn_norm if kind == "attn_norm" else names.ffn_norm
            if norm is not None:
                return Point(site, block.get_submodule(norm), "output", hidden)
            reader = names.attention if kind == "attn_norm" else names.ffn
            return Point(site, block.get_submodule(reader), "input", hidden)
        if kind == "ffn_out":
            return Point(site, block.get_submodule(names.ffn), "output", hidden)
        if kind == "ffn_in":
            experts = self._experts(layer)
            if experts is not None:
                width = experts.down_proj.shape[0] * experts.down_proj.shape[2]
                return Point(site, block.get_submodule(names.ffn), "experts", width)
            projection = block.get_submodule(names.ffn_proj)
            return Point(site, projection, "input", _in_width(projection))
        projection = block.get_submodule(names.attn_proj)
        if kind == "heads":
            return Point(site, projection, "input", _in_width(projection))
        return Point(site, projection, "output", hidden)  # attn_out

    def read_point(self, site: str) -> Point:
        """Where to hook to read a site, or what can only be read."""
        if not site.endswith(f".{READ_ONLY}"):
            return self.point(site)
        after = self.point(_ffn_in_after(site))
        if after.side == "experts":
            return replace(after, site=site, side="expert_acts")
        layer, _ = self.check(after.site)
        assert layer is not None
        name = self.architecture.ffn_act
        try:
            module = self.blocks[layer].get_submodule(name)
        except AttributeError as error:
            raise TrimtabError(
                f"the blocks of this {self.name} model have no module {name}: name the FFN's "
                "activation function, trimtab.anatomy.Architecture(ffn_act=...)"
            ) from error
        return Point(site, module, "output", after.width)

    def _experts(self, layer: int) -> Any:
        """The fused experts of a mixture layer, None in a dense one."""
        ffn = self.blocks[layer].get_submodule(self.architecture.ffn)
        experts = getattr(ffn, "experts", None)
        if hasattr(experts, "base_layer"):  # their weights alone are not what they compute
            raise TrimtabError(
                f"the experts of layer {layer} carry an adapter, so that their activations cannot "
                "be shown: merge it first (merge_and_unload)"
            )
        return experts

    # -- linear maps, for baking --------------------------------------------------------------

    def writer(self, site: str) -> LinearMap | None:
        """The linear map whose output is exactly this site, None where there is no such map."""
        layer, kind = self.check(site)
        if layer is None or kind not in ("attn_out", "ffn_out"):
            return None
        if kind == "attn_out":
            return _linear(self.blocks[layer].get_submodule(self.architecture.attn_proj))
        experts = self._experts(layer)
        if experts is not None:
            # The router's weights mix the experts' outputs linearly, so a linear map of the sum
            # is the same map of each expert's output.
            return LinearMap(experts, weight="down_proj", bias=None, layout="experts")
        return _linear(self.blocks[layer].get_submodule(self.architecture.ffn_proj))

    def readers(self, site: str) -> list[LinearMap]:
        """The linear maps that read this site, when nothing else reads it; else an empty list."""
        layer, kind = self.check(site)
        names = self.architecture
        if kind == "final_norm":
            head: Any = self.model
            return [_linear(head.get_output_embeddings())]
        if layer is None:
            return []
        block, experts = self.blocks[layer], self._experts(layer)
        if kind == "attn_norm":
            return [_linear(block.get_submodule(name)) for name in names.attn_readers]
        if kind == "heads":
            return [_linear(block.get_submodule(names.attn_proj))]
        if kind == "ffn_norm":
            if experts is not None:
                router: Any = block.get_submodule(names.ffn).get_submodule("gate")
                inputs = LinearMap(experts, weight="gate_up_proj", bias=None, layout="experts")
                return [LinearMap(router, bias=None), inputs]
            return [_linear(block.get_submodule(name)) for name in names.ffn_readers]
        if kind == "ffn_in":
            if experts is not None:
                joint: Literal["joint_experts"] = "joint_experts"
                return [LinearMap(experts, weight="down_proj", bias=None, layout=joint)]
            return [_linear(block.get_submodule(names.ffn_proj))]
        return []

    def added_before_resid(self, layer: int) -> str | None:
        """The site of the last branch that is added to block `layer`'s output as it is.

        None where a norm stands between the branch and the residual stream (Gemma, OLMo 2).
        """
        return None if self.architecture.ffn_post_norm else f"layers.{layer}.ffn_out"

    @property
    def tables(self) -> list[LinearMap]:
        """The embedding tables whose rows are summed to the site `embed`, scaling apart."""
        return [
            LinearMap(self.body.get_submodule(name), bias=None, layout="embedding")
            for name in self.architecture.embeddings
        ]

    @property
    def embedding_scale(self) -> float:
        """What a row of the embedding table is multiplied by on its way to `embed` (Gemma)."""
        table: Any = self.body.get_submodule(self.architecture.embeddings[0])
        scale: Tensor | None = getattr(table, "embed_scale", None)
        # Gemma rounds the factor to the weights' dtype.
        return 1.0 if scale is None else float(scale.to(table.weight.dtype))


def experts_forward(block: Any, edits: list[tuple[str, Edit]], hidden_states: Tensor) -> Tensor:
    """A mixture's forward pass that shows `ffn_in`, the input of its experts' down projections.

    The fused experts never leave their inner activations on a module boundary, so a hook cannot
    see them. This is transformers' own eager loop over experts with the activations gathered as
    [rows, tokens, experts * intermediate], zero where a token was not routed, and handed to each
    of `edits` in turn (which return a new tensor, or None to leave it). An edit comes with the
    side of its `Point`; at "expert_acts" it sees `ffn_act`, and what it returns is not used.
    """
    experts = block.experts
    rows, length, hidden = hidden_states.shape
    flat = hidden_states.reshape(-1, hidden)
    _, routing, selected = block.gate(flat)  # [tokens, top_k] both
    count, _, width = experts.down_proj.shape
    inner = flat.new_zeros(flat.shape[0], count, width)
    readers = [edit for side, edit in edits if side == "expert_acts"]
    acts = torch.zeros_like(inner) if readers else None
    # Where each expert was routed: pairs of (token, place among the token's top k).
    routed = [torch.where(selected == expert) for expert in range(count)]
    for expert, (token, _) in enumerate(routed):
        gate, up = nn.functional.linear(flat[token], experts.gate_up_proj[expert]).chunk(2, dim=-1)
        active = experts.act_fn(gate)
        if acts is not None:
            acts[token, expert] = active
        inner[token, expert] = active * up
    if acts is not None:
        for read in readers:
            read(acts.view(rows, length, count * width))
    activation = inner.view(rows, length, count * width)
    for side, edit in edits:
        edited = edit(activation) if side == "experts" else None
        activation = activation if edited is None else edited
    inner = activation.view(-1, count, width)
    output = torch.zeros_like(flat)
    for expert, (token, place) in enumerate(routed):
        down = nn.functional.linear(inner[token, expert], experts.down_proj[expert])
        output.index_add_(0, token, down * routing[token, place, None])
    return output.view(rows, length, hidden)


def _linear(module: nn.Module) -> LinearMap:
    # GPT-2's Conv1D is a linear map with the transposed weight; it has nf and nx, no in_features.
    layout: Literal["linear", "conv1d"] = "conv1d" if hasattr(module, "nf") else "linear"
    return LinearMap(module, layout=layout)


def _in_width(projection: Any) -> int:
    width = getattr(projection, "in_features", None)
    return int(projection.weight.shape[0] if width is None else width)
