"""What one model in memory has: its sites, where to hook them, and the linear maps at them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from trimtab.anatomy.architectures import find_architecture
from trimtab.anatomy.experts import layout_of
from trimtab.anatomy.maps import (
    LinearMap,
    experts_joint_reader,
    experts_readers,
    experts_writer,
    linear_map,
)
from trimtab.anatomy.sites import (
    KINDS,
    READ_ONLY,
    Point,
    ffn_in_after,
    parse_site,
)
from trimtab.errors import TrimtabError

#: For each kind of site in a block the module of an `Architecture` that has it, and where.
_PLACES: dict[str, tuple[str, Literal["input", "output"]]] = {
    "attn_norm_in": ("attn_norm", "input"),
    "attn_norm": ("attn_norm", "output"),
    "heads": ("attn_proj", "input"),
    "attn_out": ("attn_proj", "output"),
    "attn_post_norm": ("attn_post_norm", "output"),
    "ffn_norm_in": ("ffn_norm", "input"),
    "ffn_norm": ("ffn_norm", "output"),
    "ffn_in": ("ffn_proj", "input"),
    "ffn_out": ("ffn", "output"),
    "ffn_post_norm": ("ffn_post_norm", "output"),
}


class Anatomy:
    """The sites of one model in memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        config: Any = model.config
        self.name: str = config.model_type
        self.architecture = find_architecture(self.name)
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
        experts = self._experts(layer) if kind == "ffn_in" else None
        if experts is not None:
            layout = layout_of(experts)
            if layout is None:
                raise TrimtabError(
                    f"{self.name} has no {site}: its experts ({type(experts).__name__}) keep their "
                    "weights in a layout that is not known"
                )
            around = block.get_submodule(names.ffn)
            return Point(site, experts, "experts", layout.width, around)
        name, side = _PLACES[kind]
        if getattr(names, name) is None:  # the branch reads the residual stream without a norm
            name, side = {"attn_norm": "attention", "ffn_norm": "ffn"}[name], "input"
        module = block.get_submodule(getattr(names, name))
        width = _in_width(module) if kind in ("heads", "ffn_in") else hidden
        return Point(site, module, side, width)

    def read_point(self, site: str) -> Point:
        """Where to hook to read a site, or what can only be read."""
        if not site.endswith(f".{READ_ONLY}"):
            return self.point(site)
        after = self.point(ffn_in_after(site))
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
            return linear_map(self.blocks[layer].get_submodule(self.architecture.attn_proj))
        experts = self._experts(layer)
        if experts is not None:
            return experts_writer(experts)
        return linear_map(self.blocks[layer].get_submodule(self.architecture.ffn_proj))

    def readers(self, site: str) -> list[LinearMap]:
        """The linear maps that read this site, when nothing else reads it; else an empty list."""
        layer, kind = self.check(site)
        names = self.architecture
        if kind == "final_norm":
            head: Any = self.model
            return [linear_map(head.get_output_embeddings())]
        if layer is None:
            return []
        block, experts = self.blocks[layer], self._experts(layer)
        if kind == "attn_norm":
            return [linear_map(block.get_submodule(name)) for name in names.attn_readers]
        if kind == "heads":
            return [linear_map(block.get_submodule(names.attn_proj))]
        if kind == "ffn_norm":
            if experts is not None:
                router: Any = block.get_submodule(names.ffn).get_submodule("gate")
                return [LinearMap(router, bias=None), *experts_readers(experts)]
            return [linear_map(block.get_submodule(name)) for name in names.ffn_readers]
        if kind == "ffn_in":
            if experts is not None:
                joint = experts_joint_reader(experts)
                return [] if joint is None else [joint]
            return [linear_map(block.get_submodule(names.ffn_proj))]
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
            LinearMap(self.body.get_submodule(name), bias=None, transposed=True)
            for name in self.architecture.embeddings
        ]

    @property
    def embedding_scale(self) -> float:
        """What a row of the embedding table is multiplied by on its way to `embed` (Gemma)."""
        table: Any = self.body.get_submodule(self.architecture.embeddings[0])
        scale: Tensor | None = getattr(table, "embed_scale", None)
        # Gemma rounds the factor to the weights' dtype.
        return 1.0 if scale is None else float(scale.to(table.weight.dtype))


def _in_width(projection: Any) -> int:
    width = getattr(projection, "in_features", None)
    return int(projection.weight.shape[0] if width is None else width)
