"""A model's blocks as text: what branches off the residual stream, through what, and which sites
are there; and for each kind of site the layers that have it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trimtab.anatomy.description import Block, Branch
from trimtab.anatomy.routers import Router
from trimtab.anatomy.sites import KINDS

if TYPE_CHECKING:
    from trimtab.anatomy.anatomy import Anatomy

_KINDS = {"attn": "attention", "mixer": "mixes tokens, no heads", "ffn": "FFN"}


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0 to 2, 5"."""
    parts: list[str] = []
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            first, last = numbers[start], numbers[i - 1]
            parts.append(str(first) if first == last else f"{first} to {last}")
            start = i
    return ", ".join(parts)


def blocks_drawn(anatomy: Anatomy) -> str:
    """Each kind of layer once, from top to bottom in the order of the computation."""
    shapes: dict[Any, list[int]] = {}
    for layer, block in enumerate(anatomy.known.description.layers):
        problems = tuple(sorted(map(str, anatomy.known.layers[layer].items())))
        shape = (_alike(block), problems, anatomy.known.routers[layer])
        shapes.setdefault(shape, []).append(layer)
    parts = []
    for layers in shapes.values():
        name = "layer" if len(layers) == 1 else "layers"
        parts.append(f"{name} {ranges(layers)}\n" + "\n".join(_layer(anatomy, layers[0])))
    return "\n\n".join(parts)


def _alike(block: Block) -> Any:
    """A block without its scale, which is each layer's own where it is learned (Gemma 4)."""
    return block.branches, block.scale is None, block.scale == 1


def _layer(anatomy: Anatomy, layer: int) -> Iterator[str]:
    block = anatomy.known.description.layers[layer]
    yield "  │ the residual stream"
    if (None, "stream") in anatomy.known.layers[layer] or block.scale is None:
        yield f"  │ not known inside: {anatomy.known.layers[layer][None, 'stream']}"
    else:
        for number, branch in enumerate(block.branches):
            yield from _branch(anatomy, layer, block, number, branch)
    if block.scale not in (None, 1.0):
        yield "  × a factor of the layer's own"
    yield "  │ " + _sites(anatomy, layer, ["resid"])


def _branch(
    anatomy: Anatomy, layer: int, block: Block, number: int, branch: Branch
) -> Iterator[str]:
    part = {block.attention: "attn", block.ffn: "ffn"}.get(number)

    def sites(*kinds: str) -> str:
        if part is None:
            return ""
        inner = "heads" if part == "attn" else "ffn_in"
        named = [inner if kind == "inner" else f"{part}_{kind}" for kind in kinds]
        found = _sites(anatomy, layer, named)
        return f"   {found}" if found else ""

    before = set(range(number)) - set(branch.reads)
    beside = " beside " + " and ".join(block.branches[i].out for i in before) if before else ""
    yield f"  ├─╮ {_KINDS[branch.kind]}{beside}"
    if branch.norm is not None:
        yield f"  │ │ norm      {branch.norm}{sites('norm_in', 'norm')}"
    elif branch.module is not None:
        yield f"  │ │ reads     the stream itself{sites('norm')}"
    if branch.input_factor != 1:
        yield f"  │ │ × {branch.input_factor:g}"
    if branch.readers:
        yield f"  │ │ read by   {', '.join(branch.readers)}"
    router = anatomy.known.routers[layer]
    if part == "ffn" and isinstance(router, Router):
        count = f"{router.chosen} of {router.width} experts"
        yield f"  │ │ router    {router.path}: {count}   router"
    if branch.experts is not None:
        yield f"  │ │ experts   {branch.experts}{sites('inner', 'out')}"
        if branch.beside:
            yield f"  │ │ beside    {', '.join(branch.beside)}"
    elif branch.writer is not None:
        yield f"  │ │ writer    {branch.writer}{sites('inner', 'out')}"
    else:
        yield f"  │ │ output    {branch.out}{sites('out')}"
    if branch.post_norm is not None and branch.post_norm != branch.out:
        yield f"  │ │ norm      {branch.post_norm}{sites('post_norm')}"
    for reason in _reasons(anatomy, layer, number):
        yield f"  │ │ not proved: {reason}"
    yield "  ├─╯" + ("" if branch.factor == 1 else f" × {branch.factor:g}")


def _sites(anatomy: Anatomy, layer: int, kinds: list[str]) -> str:
    return " → ".join(kind for kind in kinds if anatomy.missing(layer, kind) is None)


def _reasons(anatomy: Anatomy, layer: int, number: int) -> list[str]:
    problems = anatomy.known.layers[layer]
    return [reason for (branch, _), reason in problems.items() if branch == number]


def places(anatomy: Anatomy) -> dict[str, dict[str, Any]]:
    """For each kind of site the layers that have one (None: it is one of the whole model), and
    why the others have none, each reason with its layers."""
    found: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        if kind in ("embed", "final_norm"):
            reason = anatomy.missing(None, kind)
            missing = {} if reason is None else {reason: None}
            found[kind] = {"layers": None, "there": reason is None, "missing": missing}
            continue
        reasons: dict[str, list[int]] = {}
        layers = []
        for layer in range(anatomy.layers):
            reason = anatomy.missing(layer, kind)
            if reason is None:
                layers.append(layer)
            else:
                reasons.setdefault(reason, []).append(layer)
        found[kind] = {"layers": layers, "there": bool(layers), "missing": reasons}
    return found
