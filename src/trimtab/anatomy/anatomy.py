"""What one model in memory has: its sites, where to hook them, and the linear maps at them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.anatomy.architectures import find_registered
from trimtab.anatomy.behaviour import in_width
from trimtab.anatomy.description import Block, Branch
from trimtab.anatomy.drawing import ranges
from trimtab.anatomy.entries import ENTRIES
from trimtab.anatomy.experts import layout_of
from trimtab.anatomy.knowing import Known, know
from trimtab.anatomy.maps import (
    Gain,
    LinearMap,
    experts_joint_reader,
    experts_readers,
    experts_writer,
    gain_of,
    linear_map,
)
from trimtab.anatomy.outer import cap_of, capped
from trimtab.anatomy.routers import Router
from trimtab.anatomy.sites import (
    CHOICE,
    KINDS,
    Point,
    Side,
    parse_site,
    read_only,
    site_beside,
)
from trimtab.errors import TrimtabError


class Anatomy:
    """The sites of one model in memory.

    What it says of the model is proved by numbers when it is made; a copy of a model whose weights
    alone are other ones takes over what is known (`like`).
    """

    def __init__(self, model: nn.Module, like: Anatomy | None = None) -> None:
        self.model = model
        config: Any = model.config
        self.name: str = config.model_type
        self.config: Any = config.get_text_config(decoder=True)
        self.known: Known = know(model) if like is None else like.known
        described = self.known.description
        self.body = model.get_submodule(described.body)
        listed = list(model.get_submodule(described.blocks).children())
        self.layers = len(described.layers)
        self.blocks = listed[: self.layers]
        self.hidden_size: int = self.known.width

    # -- sites --------------------------------------------------------------------------------

    def check(self, site: str) -> tuple[int | None, str]:
        """Parse a site and make sure that this model has such a layer."""
        layer, kind = parse_site(site)
        if layer is not None and layer >= self.layers:
            raise TrimtabError(
                f"layer {layer} is out of range: this model has layers 0 to {self.layers - 1}"
            )
        return layer, kind

    def sites(self, kind: str, layers: tuple[int, ...] | None = None) -> list[str]:
        """The sites of a kind: of every layer that has one, or of all of `layers` in their order
        (negative: from the end)."""
        if kind not in KINDS:
            raise TrimtabError(f"unknown site kind {kind!r}: known are {', '.join(KINDS)}")
        if kind in ("embed", "final_norm"):
            self._refuse_missing(None, kind)
            return [kind]
        if layers is None:
            chosen = [layer for layer in range(self.layers) if self.missing(layer, kind) is None]
            if not chosen:
                raise TrimtabError(f"{self.name} has no {kind}: {self.missing(0, kind)}")
        else:
            chosen = [layer + self.layers if layer < 0 else layer for layer in layers]
            for given, layer in zip(layers, chosen, strict=True):
                if not 0 <= layer < self.layers:
                    raise TrimtabError(
                        f"layer {given} is out of range: this model has layers "
                        f"0 to {self.layers - 1}"
                    )
                self._refuse_missing(layer, kind)
        return [f"layers.{layer}.{kind}" for layer in chosen]

    def has(self, kind: str) -> bool:
        """Whether any layer has a site of this kind."""
        if kind in ("embed", "final_norm"):
            return self.missing(None, kind) is None
        return any(self.missing(layer, kind) is None for layer in range(self.layers))

    def missing(self, layer: int | None, kind: str) -> str | None:
        """Why there is no such site in a layer (None: of the whole model), None where there is."""
        if kind == "embed":
            return None
        if kind == "final_norm":
            if self.known.description.final_norm is None:
                return "no norm is proved to stand between the last block and the unembedding"
            return self.known.around.get("final_norm")
        assert layer is not None
        if kind == "resid":
            return None
        if kind == "router":
            router = self.known.routers[layer]
            return router if isinstance(router, str) else None
        problems = self.known.layers[layer]
        if (None, "stream") in problems:
            return problems[None, "stream"]
        found = self._branch(layer, kind)
        if found is None:
            return f"the block has no {_PARTS[_part(kind)]} branch"
        i, branch = found
        for aspect in _RELIES_ON[kind]:
            if (i, aspect) in problems:
                return problems[i, aspect]
        return self._missing_place(self._block(layer), i, branch, kind)

    def _missing_place(self, block: Block, i: int, branch: Branch, kind: str) -> str | None:
        part = _PARTS["attn" if branch.kind != "ffn" else "ffn"]
        if kind.endswith("_norm_in"):
            if branch.norm is None:
                return "its blocks have no such norm"
            if block.shares_norm(i):
                return f"its blocks have no such norm for {part} alone: {branch.norm} is shared"
        elif kind.endswith("_post_norm") and branch.post_norm is None:
            return "its blocks have no such norm"
        elif kind.endswith("_out") and branch.out == branch.post_norm:
            return f"what {branch.post_norm} reads is no module's output"
        elif kind == "heads":
            if branch.kind != "attn":
                return f"{branch.out} mixes tokens in another way than attention, without heads"
            if branch.writer is None:
                return f"no linear map writes {branch.out}"
        elif kind == "ffn_in" and branch.writer is None and branch.experts is None:
            return f"no linear map, and no experts of a known layout, write {branch.out}"
        elif kind in ("attn_norm", "ffn_norm") and self._input_place(block, i) is None:
            return "what the branch reads is not to be seen at a module of its own"
        return None

    def _refuse_missing(self, layer: int | None, kind: str) -> None:
        reason = self.missing(layer, kind)
        if reason is None:
            return
        where = kind if layer is None else f"layers.{layer}.{kind}"
        if layer is not None and self.has(kind):
            others = [n for n in range(self.layers) if self.missing(n, kind) is None]
            reason += f"; the layers that have one are {ranges(others)}"
        raise TrimtabError(f"{self.name} has no {where}: {reason}")

    @property
    def heads(self) -> int:
        """Attention heads per block; each has `width("layers.0.heads") // heads` units."""
        heads = getattr(self.config, "num_attention_heads", None)
        if not isinstance(heads, int):
            raise TrimtabError(f"{self.name} has no attention heads")
        return heads

    @property
    def stream_writers(self) -> list[str]:
        """The sites whose sum is the residual stream: the embedding and every branch's output."""
        sites = ["embed"]
        for layer in range(self.layers):
            block = self._block(layer)
            if (None, "stream") in self.known.layers[layer]:
                reason = self.known.layers[layer][None, "stream"]
                raise TrimtabError(f"layer {layer} of {self.name} is no sum of branches: {reason}")
            sites += [f"layers.{layer}.{kind}" for kind in self._writers_of(layer, block)]
        return sites

    def _writers_of(self, layer: int, block: Block) -> list[str]:
        """The kinds of site at which the branches of a block are written."""
        kinds = []
        named = {block.attention: "attn", block.ffn: "ffn"}
        for i, branch in enumerate(block.branches):
            part = named.get(i)
            if part is None:
                raise TrimtabError(
                    f"layer {layer} of {self.name} has a branch without a site of its own "
                    f"({branch.out}), so that the sites are not all that writes the stream: steer "
                    "at resid or at the norms instead"
                )
            kinds.append(f"{part}_{'out' if branch.post_norm is None else 'post_norm'}")
        return kinds

    def block_input(self, layer: int) -> str:
        """The site that block `layer` reads: the residual stream before it."""
        return "embed" if layer == 0 else f"layers.{layer - 1}.resid"

    def width(self, site: str) -> int:
        """How many units a site has."""
        return self.point(site).width

    def point(self, site: str) -> Point:
        """Where to hook to see the site."""
        layer, kind = self.check(site)
        hidden = self.hidden_size
        self._refuse_missing(layer, kind)
        if kind == "embed":
            return Point(site, self.blocks[0], "input", hidden)
        if kind == "final_norm":
            return Point(site, self.final_norm, "output", hidden)
        assert layer is not None
        block = self.blocks[layer]
        if kind == "resid":
            return Point(site, block, "output", hidden)
        if kind == "router":
            router = self.router(site)
            return Point(site, self._module(layer, router.path), "router", router.width, block)
        found = self._branch(layer, kind)
        assert found is not None
        i, branch = found
        if kind == "ffn_in" and branch.experts is not None:
            experts = self._experts(layer, branch)
            width = layout_of(experts).width  # type: ignore[union-attr]
            return Point(site, experts, "experts", width, block)
        if kind in ("heads", "ffn_in"):
            assert branch.writer is not None
            width = in_width(self._module(layer, branch.writer))
            return self._point(site, layer, branch.writer, "input", width)
        if kind in ("attn_norm", "ffn_norm"):
            place = self._input_place(self._block(layer), i)
            assert place is not None
            return self._point(site, layer, *place, hidden)
        if kind.endswith("_norm_in"):
            return self._point(site, layer, branch.norm, "input", hidden)
        path = branch.post_norm if kind.endswith("_post_norm") else self._output_path(branch)
        return self._point(site, layer, path, "output", hidden)

    def router(self, site: str) -> Router:
        """The router whose logits a site is."""
        layer, kind = self.check(site)
        if kind != "router":
            raise TrimtabError(f"{site} is no router: only routers choose experts")
        self._refuse_missing(layer, kind)
        router = None if layer is None else self.known.routers[layer]
        assert isinstance(router, Router)
        return router

    def choice_point(self, site: str) -> Point:
        """Where to hook to change by which scores the router of a site chooses experts."""
        return replace(self.point(site), side="router_choice")

    def _point(self, site: str, layer: int, path: str | None, side: Side, width: int) -> Point:
        """A module's input or output; where it sees all tokens in one list, their rows are known
        from the block around it."""
        assert path is not None
        around = self.blocks[layer] if path in self.known.flat[layer] else None
        return Point(site, self._module(layer, path), side, width, around)

    def _output_path(self, branch: Branch) -> str:
        """Where a branch's output is seen: at its writer, where that is the branch as it is."""
        if branch.kind == "attn" and branch.writer is not None and branch.writer_factor == 1.0:
            return branch.writer
        return branch.out

    def _input_place(self, block: Block, i: int) -> tuple[str, Side] | None:
        """The module and side at which what a branch reads is seen, and by it alone: whatever else
        reads the norm's output does not see a change there."""
        branch = block.branches[i]
        if branch.module is not None:
            return branch.module, "input"
        if len(branch.readers) == 1:
            return branch.readers[0], "input"
        if branch.norm is not None and not block.shares_norm(i) and branch.input_factor == 1.0:
            return branch.norm, "output"
        return None

    def read_point(self, site: str) -> Point:
        """Where to hook to read a site, or what can only be read."""
        kind = read_only(site)
        if kind is None:
            return self.point(site)
        after = self.point(site_beside(site))
        if kind == CHOICE:
            return replace(self.choice_point(after.site), site=site)
        if after.side == "experts":
            return replace(after, site=site, side="expert_acts")
        layer, _ = self.check(after.site)
        assert layer is not None
        found = self._branch(layer, "ffn_in")
        assert found is not None
        if found[1].act is None:
            raise TrimtabError(
                f"{self.name} has no {site}: no module of its FFN is its activation function"
            )
        return self._point(site, layer, found[1].act, "output", after.width)

    # -- parts --------------------------------------------------------------------------------

    @property
    def body_path(self) -> str:
        return self.known.description.body

    @property
    def final_norm(self) -> nn.Module:
        """The norm that the unembedding reads."""
        path = self.known.description.final_norm
        if path is None:
            self._refuse_missing(None, "final_norm")
        assert path is not None
        return self.model.get_submodule(path)

    def _block(self, layer: int) -> Block:
        return self.known.description.layers[layer]

    def _branch(self, layer: int, kind: str) -> tuple[int, Branch] | None:
        """The branch that a kind of site in a block belongs to, with its number."""
        block = self._block(layer)
        i = block.attention if _part(kind) == "attn" else block.ffn
        return None if i is None else (i, block.branches[i])

    def _module(self, layer: int, path: str | None) -> nn.Module:
        assert path is not None
        try:
            return self.blocks[layer].get_submodule(path)
        except AttributeError as error:
            raise TrimtabError(
                f"block {layer} of this {self.name} model has no module {path} any more: the model "
                "was changed after it was wrapped; wrap it again"
            ) from error

    def _experts(self, layer: int, branch: Branch) -> Any:
        """The fused experts of a mixture layer."""
        experts = self._module(layer, branch.experts)
        if hasattr(experts, "base_layer"):  # their weights alone are not what they compute
            raise TrimtabError(
                f"the experts of layer {layer} carry an adapter, so that their activations cannot "
                "be shown: merge it first (merge_and_unload)"
            )
        return experts

    @property
    def llama_alike(self) -> bool:
        """Whether it computes what Llama computes, but has no room for some of its biases."""
        entry = find_registered(self.name) or ENTRIES.get(self.name)
        return entry is not None and entry.llama_alike

    # -- linear maps, for baking --------------------------------------------------------------

    def writers(self, site: str) -> list[LinearMap]:
        """The linear maps whose sum, up to a factor, is exactly this site; none where there are
        none."""
        layer, kind = self.check(site)
        if layer is not None and kind == "router":
            return self._router_map(layer, self.router(site))
        if layer is None or kind not in ("attn_out", "ffn_out"):
            return []
        found = self._branch(layer, kind)
        if found is None:
            return []
        branch = found[1]
        if branch.experts is not None:
            # The router's weights mix the experts' outputs linearly, so a linear map of the sum
            # is the same map of each expert's output, and of what stands beside them.
            written = experts_writer(self._experts(layer, branch))
            beside = [linear_map(self._module(layer, path)) for path in branch.beside]
            # What stands beside may be weighed by a gate, so that a constant is none there.
            return (
                [] if written is None else [written, *(replace(b, constant=False) for b in beside)]
            )
        return [] if branch.writer is None else [linear_map(self._module(layer, branch.writer))]

    def _router_map(self, layer: int, router: Router) -> list[LinearMap]:
        if router.owner is None:
            return []
        owner = self._module(layer, f"{router.path}.{router.owner}".strip("."))
        return [LinearMap(owner, bias="bias" if router.biased else None)]

    def writer_factor(self, site: str) -> float:
        """What the maps that write a site are multiplied by to give it."""
        layer, kind = self.check(site)
        found = None if layer is None or kind == "router" else self._branch(layer, kind)
        return 1.0 if found is None else float(found[1].writer_factor)

    def readers(self, site: str) -> list[LinearMap]:
        """The linear maps that read this site, when nothing else reads it; else an empty list."""
        layer, kind = self.check(site)
        if kind == "final_norm":
            head: Any = self.model
            unembedding = self.model.get_submodule(self.known.description.unembedding)
            read = head.get_output_embeddings() is unembedding
            return [linear_map(unembedding)] if read else []
        if layer is None or kind not in ("attn_norm", "heads", "ffn_norm", "ffn_in"):
            return []
        found = self._branch(layer, kind)
        if found is None:
            return []
        i, branch = found
        if kind in ("heads", "ffn_in"):
            if branch.experts is not None:
                joint = experts_joint_reader(self._experts(layer, branch))
                return [] if joint is None else [joint]
            return [linear_map(self._module(layer, branch.writer))]
        if (i, "readers") in self.known.layers[layer]:
            return []
        maps = [_reader(self._module(layer, path)) for path in branch.readers]
        if branch.experts is not None:
            maps += experts_readers(self._experts(layer, branch))
        return maps

    def gain(self, site: str) -> Gain | None:
        """The gain of the norm whose output a site is, None where it is no norm's, or is not
        known."""
        layer, kind = self.check(site)
        if kind == "final_norm":
            return gain_of(self.final_norm)
        found = None if layer is None else self._branch(layer, kind)
        if found is None or not kind.endswith("_post_norm") or found[1].post_norm is None:
            return None
        assert layer is not None
        return gain_of(self._module(layer, found[1].post_norm))

    def added_to_resid(self, layer: int) -> tuple[str, float] | None:
        """A site whose branch is added to block `layer`'s output, read by no other branch, and
        what a constant there is multiplied by until it is in that output.

        None where a norm stands between every such branch and the residual stream (Gemma, OLMo 2).
        """
        block = self._block(layer)
        if block.scale is None or (None, "stream") in self.known.layers[layer]:
            return None
        for part, i in (("ffn", block.ffn), ("attn", block.attention)):
            if i is None:
                continue
            branch = block.branches[i]
            read = any(i in other.reads for other in block.branches)
            written = branch.writer is not None or branch.experts is not None
            if not read and branch.post_norm is None and written:
                factor = float(block.scale) * float(branch.factor)
                return f"layers.{layer}.{part}_out", factor
        return None

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits in float32 (of a float64 model in float64) of what the body returns, with the
        factors and the soft-cap that the model has."""
        described = self.known.description
        if described.final_factor != 1:
            hidden = hidden * float(described.final_factor)
        logits: Tensor = self.model.get_submodule(described.unembedding)(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if described.logit_factor != 1:
            logits = logits * float(described.logit_factor)
        return capped(logits, cap_of(self.model))

    @property
    def final_factor(self) -> float:
        """What the final norm's output is multiplied by before the unembedding reads it."""
        return float(self.known.description.final_factor)

    @property
    def tables(self) -> list[LinearMap]:
        """The embedding tables whose rows are summed to the site `embed`, scaling apart."""
        return [
            LinearMap(self.model.get_submodule(name), bias=None, transposed=True)
            for name in self.known.description.tables
        ]

    @property
    def embedding_scale(self) -> float:
        """What a row of the embedding table is multiplied by on its way to `embed` (Gemma)."""
        described = self.known.description
        table: Any = self.model.get_submodule(described.tables[0])
        scale = getattr(table, "embed_scale", None)
        if scale is None:
            return float(described.embedding_factor)
        # Gemma rounds the factor to the weights' dtype.
        return float(scale.to(table.weight.dtype) if hasattr(scale, "to") else scale)


#: What the parts of a block are called in messages.
_PARTS = {"attn": "attention", "ffn": "FFN"}

#: What has to hold of a branch for each kind of site to be what it says.
_RELIES_ON = {
    "attn_norm_in": ("read", "norm"),
    "attn_norm": ("read", "norm"),
    "heads": ("kind", "writer"),
    "attn_out": ("kind",),
    "attn_post_norm": ("kind", "post_norm"),
    "ffn_norm_in": ("read", "norm"),
    "ffn_norm": ("read", "norm"),
    "ffn_in": ("kind", "writer", "experts"),
    "ffn_out": ("kind",),
    "ffn_post_norm": ("kind", "post_norm"),
}


def _part(kind: str) -> str:
    """The part of a block that a kind of site belongs to."""
    return "attn" if kind == "heads" else kind.partition("_")[0]


def _reader(module: nn.Module) -> LinearMap:
    """A linear map, or a router, of which only the weight reads."""
    made = linear_map(module)
    return made if hasattr(module, "bias") else replace(made, bias=None)
