"""Vectors that PyTorch saved: persona vectors, and those of steering-vectors.

Persona vectors are one tensor [layers + 1, units]: differences of transformers' hidden states, of
which number L is what block L - 1 puts out and 0 the embedding. Their users take one row L and add
it, times a coefficient, to the output of block L - 1 (`layer_idx=layer-1`), the last row too,
though transformers reads its hidden states after the final norm. Row 0 would come to block -1,
which Python takes for the last one: it is neither written nor read.

steering-vectors has no file of its own. Its SteeringVector has two fields, which are written and
read here as a dictionary: `torch.save(vars(vector), FILE)` makes it, and
`SteeringVector(**torch.load(FILE))` the vector again. Vector N is added to the output of block N,
counted from 0, or of the block's module that `layer_type` says, at every token; its sign is that
of positive minus negative.

https://github.com/safety-research/persona_vectors (generate_vec.py, activation_steer.py,
eval/eval_persona.py), https://github.com/steering-vectors/steering-vectors (steering_vector.py,
layer_matching.py)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError, shown
from trimtab.exchange.containers import Container, as_floats, as_layer
from trimtab.exchange.harness import saved
from trimtab.exchange.modules import sites_by_module
from trimtab.exchange.request import Exported, Request
from trimtab.exchange.vectors import Found, adds, chosen, in_stream
from trimtab.files import write_whole
from trimtab.model import LanguageModel

#: What a module of a block is called whose output a `layer_type` means.
_CALLED = {
    "self_attn": ("attn", "attention"),
    "mlp": ("mlp",),
    "input_layernorm": ("ln_1", "input_layernorm"),
    "post_attention_layernorm": ("ln_2", "post_attention_layernorm"),
}


def write_persona(request: Request) -> Exported:
    """A tensor [layers + 1, units] with the dial folded in, zero where nothing is added; `rows` of
    the result are the numbers of the others, which the tool calls layers."""
    anatomy = request.language_model.anatomy
    added, left_out = in_stream(request, "a persona vector")
    rows = torch.zeros(anatomy.layers + 1, anatomy.hidden_size)
    for block, one in added.items():
        rows[block + 1] = one.folded
    file = write_whole(request.output, saved(rows), request.overwrite)
    details = {"rows": [block + 1 for block in added]}
    use = tuple(
        f'ActivationSteerer(model, torch.load("{file}")[{block + 1}], coeff=1, layer_idx={block})'
        for block in added
    )
    return Exported("persona-vectors", (file,), left_out=left_out, details=details, use=use)


def write_steering_vectors(request: Request) -> Exported:
    """The fields of a SteeringVector, the dial folded in."""
    added, left_out = in_stream(request, "a vector of steering-vectors")
    activations = {block: one.folded.cpu().clone() for block, one in added.items()}
    fields = {"layer_activations": activations, "layer_type": "decoder_block"}
    file = write_whole(request.output, saved(fields), request.overwrite)
    use = f'with SteeringVector(**torch.load("{file}")).apply(model): ...'
    return Exported("steering-vectors", (file,), left_out=left_out, use=(use,))


def is_rows(container: Container) -> bool:
    """Whether a file is a tensor with several rows."""
    content = container.content
    return container.kind == "pickle" and isinstance(content, Tensor) and content.dim() == 2


def read_persona(container: Container, lm: LanguageModel, sites: Sequence[str]) -> Found:
    """The rows that are wanted of a persona vector."""
    rows = as_floats(container.content, container.named, (2,))
    blocks = lm.anatomy.layers
    if len(rows) != blocks + 1:
        raise container.refused(
            f"it has {len(rows)} rows, and persona vectors of this model have {blocks + 1}"
        )
    there = {f"layers.{n}.resid": (rows[n + 1], 1.0) for n in range(blocks) if rows[n + 1].any()}
    return adds(chosen(container, there, sites, together=False))


def is_steering_vectors(container: Container) -> bool:
    """Whether a file has the fields of a SteeringVector."""
    content = container.content
    return (
        container.kind == "pickle"
        and isinstance(content, Mapping)
        and "layer_activations" in content
    )


def read_steering_vectors(container: Container, lm: LanguageModel, sites: Sequence[str]) -> Found:
    """All layers of a SteeringVector."""
    content, layers = container.content, lm.anatomy.layers
    kind, activations = content.get("layer_type", "decoder_block"), content["layer_activations"]
    if not isinstance(activations, Mapping):
        raise container.refused("its layer_activations are no dictionary")
    there = {}
    for number, tensor in activations.items():
        where = f"{container.named}: layer {shown(number, 20)}"
        if isinstance(number, int) and -layers <= number < 0:
            number += layers
        site = _site(lm, as_layer(number, layers, f"{container.named}: a layer"), kind, where)
        vector = as_floats(tensor, where, (1,))
        if site in there:
            raise TrimtabError(f"{where} is there twice")
        if vector.any():
            there[site] = (vector, 1.0)
    return adds(chosen(container, there, sites, together=True))


def _site(lm: LanguageModel, layer: int, kind: Any, where: str) -> str:
    """The site that is the output of what a `layer_type` means in a block."""
    if kind == "decoder_block":
        return f"layers.{layer}.resid"
    if not isinstance(kind, str) or kind not in _CALLED:
        raise TrimtabError(
            f"{where}: layer_type is {shown(kind, 40)}: known are decoder_block, "
            f"{', '.join(_CALLED)}"
        )
    block = lm.anatomy.blocks[layer]
    named = [
        name for name, _ in block.named_modules() if any(part in name for part in _CALLED[kind])
    ]
    module = min(named, key=len, default="")
    site = sites_by_module(lm, block).get(module)
    if not module or site is None:
        raise TrimtabError(f"{where}: {kind} of this {lm.anatomy.name} is no site")
    return site
