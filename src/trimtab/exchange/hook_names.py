"""Places as TransformerLens names them, and what tools that use its names keep: dictionaries of
vectors by hook name, and Neuronpedia's vectors.

`blocks.N.hook_resid_pre` is the residual stream before block N, which is what block N - 1 puts out
(for N = 0 the embedding); `hook_resid_post` is what block N puts out, and `hook_resid_mid` what
lies between, to which one adds by adding to the attention's output. `hook_attn_out` and
`hook_mlp_out` are the branches as they are added, after the norms that Gemma 2 and 3 have there.

Neuronpedia's vector has `hookName` (its requests: `layerNumber` and `hookType`), the vector, and
the strength that it is steered with unless its user says another (`vectorDefaultSteerStrength`);
what is added is their product, at every token.

https://github.com/TransformerLensOrg/TransformerLens, https://pypi.org/project/neuronpedia
(np_vector.py, requests/vector_request.py), https://github.com/hijohnnylin/neuronpedia
(apps/inference/.../steer/completion.py: resid_pre[X] is resid_post[X-1])
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from trimtab.errors import TrimtabError, shown
from trimtab.exchange.containers import (
    Container,
    as_floats,
    as_layer,
    as_number,
    as_vector,
    json_shown,
)
from trimtab.exchange.vectors import Found, adds, chosen
from trimtab.model import LanguageModel

_HOOK = re.compile(r"blocks\.(0|[1-9][0-9]{0,5})\.(hook_[a-z_]+)")
_HOOKS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
#: What a vector and its strength are called: in answers, in the library's records, in exports.
_VECTOR = ("vector", "values")
_STRENGTH = ("vectorDefaultSteerStrength", "defaultSteerStrength", "default_steer_strength")
_NAME, _LABEL, _MODEL = ("hookName", "hook_name"), ("vectorLabel", "label"), ("modelId", "model_id")


def site_of(hook: Any, lm: LanguageModel, where: str) -> str:
    """The site that a hook name means in this model."""
    match = _HOOK.fullmatch(hook) if isinstance(hook, str) else None
    if match is None or match[2] not in _HOOKS:
        raise TrimtabError(
            f"{where}: the hook is {shown(json_shown(hook), 60)}: known are blocks.N.X with X of "
            f"{', '.join(_HOOKS)}"
        )
    layer = as_layer(match[1], lm.anatomy.layers, f"{where}: the layer of {hook}")
    if match[2] == "hook_resid_pre":
        before: str = lm.anatomy.block_input(layer)
        return before
    if match[2] == "hook_resid_post":
        return f"layers.{layer}.resid"
    if match[2] == "hook_resid_mid" and not _lies_between(lm, layer):
        raise TrimtabError(f"{where}: block {layer} of this {lm.anatomy.name} has no {match[2]}")
    part = "ffn" if match[2] == "hook_mlp_out" else "attn"
    normed = f"{part}_post_norm"
    there = lm.anatomy.missing(layer, normed) is None
    return f"layers.{layer}.{normed if there else f'{part}_out'}"


def _lies_between(lm: LanguageModel, layer: int) -> bool:
    """Whether a block adds its attention to the stream, as it is, before the FFN reads that."""
    block = lm.anatomy.known.description.layers[layer]
    if block.attention is None or block.ffn is None or block.scale != 1:
        return False
    first = block.branches[block.attention]
    return first.factor == 1 and block.attention in block.branches[block.ffn].reads


def is_transformer_lens(container: Container) -> bool:
    """Whether a file has tensors by hook name."""
    content = container.content
    return (
        container.kind in ("pickle", "safetensors")
        and isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(name, str) and name.startswith("blocks.") for name in content)
    )


def read_transformer_lens(container: Container, lm: LanguageModel, sites: Sequence[str]) -> Found:
    """Vectors by hook name."""
    there: dict[str, tuple[Tensor, float]] = {}
    for hook, tensor in container.content.items():
        site = site_of(hook, lm, container.named)
        vector = as_floats(tensor, f"{container.named}: {hook}", (1,))
        if site in there:
            raise container.refused(f"{hook} is {site}, which another hook is, too")
        if vector.any():
            there[site] = (vector, 1.0)
    return adds(chosen(container, there, sites, together=True))


def is_neuronpedia(container: Container) -> bool:
    """Whether a file is a vector as Neuronpedia answers, exports or asks for it."""
    record = _record(container)
    return record is not None and (
        _first(record, _NAME) is not None or {"layerNumber", "hookType"} <= record.keys()
    )


def _record(container: Container) -> dict[str, Any] | None:
    """The vector's own fields, which an answer has one level down."""
    content = container.content
    if container.kind != "json" or not isinstance(content, dict):
        return None
    inner = content.get("vector")
    return inner if isinstance(inner, dict) else content


def _first(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def read_neuronpedia(container: Container, lm: LanguageModel, sites: Sequence[str]) -> Found:
    """One vector, at its default strength."""
    record = _record(container)
    if record is None:
        raise container.refused("it is not a JSON object")
    hook = _first(record, _NAME)
    if hook is None:
        hook = f"blocks.{record.get('layerNumber')}.{record.get('hookType')}"
    site = site_of(hook, lm, container.named)
    vector = as_vector(_first(record, _VECTOR), f"{container.named}: its vector")
    strength = _first(record, _STRENGTH)
    number = 1.0 if strength is None else as_number(strength, f"{container.named}: its strength")
    there = {site: (vector, number)} if vector.any() else {}
    says = {"label": _first(record, _LABEL), "made_for": _first(record, _MODEL)}
    picked = chosen(container, there, sites, together=True)
    return adds(picked, says={name: str(said) for name, said in says.items() if said})
