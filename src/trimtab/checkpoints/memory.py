"""How much memory a model's weights take, told before they are read: from the headers of its files,
or from what the hub says of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.checkpoints.directory import CONFIG, INDEX, WEIGHTS, CheckpointError, read_json

#: How many numbers there are, by how safetensors calls their type and by whether they are of a
#: linear map, which quantising makes smaller.
Counts = dict[tuple[str, bool], int]

_FLOATS = {"F64": 8.0, "F32": 4.0, "BF16": 2.0, "F16": 2.0}
#: Bytes of a number of other types; sub-byte ones are stored in bytes.
_OTHERS = {"I64": 8.0, "U64": 8.0, "I32": 4.0, "U32": 4.0, "I16": 2.0, "U16": 2.0}
#: Tables, which stay as they are when linear maps are quantised.
_TABLE = re.compile(r"(^|\.)(embed\w*|wte|wpe|lm_head|\w*embeddings?|output)(\.|$)")
#: Bytes of a quantised number: of four bits 64 share a scale in float32.
QUANTISED = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}


def counted(directory: Path) -> tuple[Counts, bool]:
    """The numbers in a model's directory, and whether they are quantised in its files."""
    files = [directory / WEIGHTS]
    if not files[0].exists():
        files = [
            directory / name for name in set(read_json(directory / INDEX)["weight_map"].values())
        ]
    counts: Counts = {}
    for file in files:
        for name, tensor in _header(file).items():
            if name != "__metadata__":
                linear = len(tensor["shape"]) > 1 and not _TABLE.search(name)
                key = tensor["dtype"], linear
                counts[key] = counts.get(key, 0) + math.prod(tensor["shape"])
    return counts, "quantization_config" in read_json(directory / CONFIG)


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """What a safetensors file says of its tensors."""
    try:
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            header: dict[str, dict[str, Any]] = json.loads(content.read(length))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file.name}: {error}") from error
    return header


def counted_on_hub(parameters: Mapping[str, int]) -> Counts:
    """The same from what the hub knows: which of them are linear maps it does not say, and most
    are."""
    return {(dtype, True): count for dtype, count in parameters.items()}


def weight_bytes(counts: Counts, size: int | None, quantise: str | None = None) -> float:
    """Bytes of the weights in memory: `size` of each floating-point number (None: as stored), and
    less for linear maps that are quantised to "4bit" or "8bit"."""
    total = 0.0
    for (dtype, linear), count in counts.items():
        if dtype not in _FLOATS:
            each = _OTHERS.get(dtype, 1.0)
        elif linear and quantise is not None:
            each = QUANTISED[quantise]
        else:
            each = _FLOATS[dtype] if size is None else size
        total += count * each
    return total
