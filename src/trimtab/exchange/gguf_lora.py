"""An adapter as a GGUF file, which llama.cpp adds to a model's weights (--lora FILE).

llama.cpp adds `adapter.lora.alpha / rank` times lora_b lora_a to the weight of the name in front of
them: lora_a [rank, in], lora_b [out, rank], with the rows of lora_b in the order in which it has
those of the weight (src/llama-adapter.cpp, convert_lora_to_gguf.py). Of experts both are stacked,
as the weights are (build_lora_mm_id).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from trimtab.errors import TrimtabError, shown
from trimtab.exchange.gguf_architectures import (
    Architecture,
    architecture_of,
)
from trimtab.exchange.gguf_names import Names, permuted
from trimtab.exchange.lora import Adapter, adapter_of, refuse_conditions, refuse_model
from trimtab.exchange.request import Exported, Request
from trimtab.files import whole_file


def write(request: Request) -> Exported:
    """A LoRA adapter for llama.cpp, in float32."""
    model, output = request.language_model.model, request.output
    refuse_model(request.language_model)
    refuse_conditions(request.steerings)
    architecture = architecture_of(model)
    adapter = adapter_of(request)
    tensors = _tensors(adapter, Names(architecture, model))
    with whole_file(output, request.overwrite) as temporary:
        _write(temporary, architecture, adapter, tensors)
    return Exported(
        "gguf-lora",
        (output,),
        left_out=tuple(map(str, adapter.left)),
        details=adapter.details,
        use=(f"llama-cli -m MODEL.gguf --lora {output}",),
    )


def _tensors(adapter: Adapter, names: Names) -> dict[str, Tensor]:
    """The adapter's factors by llama.cpp's names, as it has them: of a mixture's experts one after
    the other [experts, ...]."""
    tensors, rank = {}, adapter.config["r"]
    for target in adapter.targets:
        for name, rows in names.rows(target.weight, target.changed.up).items():
            if not rows.any():  # as of a gate where only what stands beside it changes
                continue
            heads, more = names.heads(name), rank - target.changed.rank
            up = nn.functional.pad(rows, (0, more))
            tensors[f"{name}.lora_a"] = nn.functional.pad(target.changed.down, (0, 0, 0, more))
            tensors[f"{name}.lora_b"] = up if heads is None else permuted(up, heads)
    for name, factor in tensors.items():
        if not torch.isfinite(factor.float()).all():
            raise TrimtabError(f"{shown(name)} is NaN or infinite in float32: turn the dial down")
    return tensors


def _write(
    file: Path, architecture: Architecture, adapter: Adapter, tensors: Mapping[str, Tensor]
) -> None:
    from gguf import GGUFType, GGUFWriter

    writer = GGUFWriter(file, architecture.name)
    try:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_name(adapter.details["steering"])
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(adapter.config["lora_alpha"]))
        writer.add_string("trimtab.adapter", json.dumps(adapter.record, ensure_ascii=False))
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.float().cpu().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
