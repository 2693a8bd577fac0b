"""Vectors as JSON: those of IBM's activation-steering (.svec), and of vLLM-Lens.

A .svec file has a direction for each layer, of length 1, which its SteeringVector reads at what
layer N puts out (hidden_states[N + 1]) and its MalleableModel adds to what layer N *takes in*
(LeashLayer.forward), times `behavior_vector_strength`, at the `behavior_layer_ids` that a user
names. What is added counts here: direction N is added to the output of block N - 1, direction 0 to
the embedding, and one after the last block cannot be said.

A SteeringVector of vLLM-Lens has `activations` [layers, units] (a tensor as base64, which its own
serialisation compresses with zstd), `layer_indices`, of which N is added to the output of layer N,
counted from 0, at every token, and `scale`, which multiplies it. A file holds what `model_dump`
gives, or a list of them, as `apply_steering_vectors` of a request takes.

https://github.com/IBM/activation-steering (steering_vector.py, leash_layer.py),
https://github.com/UKGovernmentBEIS/vllm-lens (vllm_lens/_helpers, vllm_lens/_worker_ext.py)
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import TrimtabError, shown
from trimtab.exchange.containers import (
    LARGEST,
    Container,
    as_floats,
    as_layer,
    as_number,
    as_vector,
    json_shown,
)
from trimtab.exchange.request import Exported, Request
from trimtab.exchange.vectors import (
    BEFORE,
    Found,
    adds,
    after_block,
    chosen,
    in_stream,
    one_coefficient,
)
from trimtab.files import write_whole
from trimtab.model import LanguageModel

#: How numbers of a tensor are kept: NumPy's name, and what PyTorch makes of them.
_STORED = {"float16": None, "float32": None, "float64": None, "int16": torch.bfloat16}


def _content(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode()


# -- .svec ----------------------------------------------------------------------------------------


def write_svec(request: Request) -> Exported:
    """A .svec file, the dial folded in (behavior_vector_strength=1); `layer_ids` of the result are
    its behavior_layer_ids."""
    anatomy = request.language_model.anatomy
    # What the last layer puts out no layer takes in.
    added, left_out = in_stream(request, "a .svec file", BEFORE, anatomy.layers - 2)
    directions = {block + 1: one.folded.tolist() for block, one in added.items()}
    content = {
        "model_type": anatomy.name,
        "directions": directions,
        "explained_variances": dict.fromkeys(directions, 1.0),
    }
    file = write_whole(request.output, _content(content), request.overwrite)
    use = (
        f'MalleableModel(model, tokenizer).steer(SteeringVector.load("{file}"), '
        f"behavior_layer_ids={list(directions)})"
    )
    details = {"layer_ids": list(directions)}
    return Exported("svec", (file,), left_out=left_out, details=details, use=(use,))


def is_svec(container: Container) -> bool:
    """Whether a file has directions by layer."""
    return (
        container.kind == "json"
        and isinstance(container.content, dict)
        and "directions" in container.content
    )


def read_svec(container: Container, lm: LanguageModel, sites: Sequence[str]) -> Found:
    """The directions that are wanted, where activation-steering adds them."""
    content = container.content
    if not isinstance(content, dict) or not isinstance(content.get("directions"), dict):
        raise container.refused("its directions are no JSON object by layer")
    there = {}
    for number, numbers in content["directions"].items():
        layer = as_layer(number, lm.anatomy.layers, f"{container.named}: a layer")
        vector = as_vector(numbers, f"{container.named}: the direction of layer {layer}")
        if vector.any():
            there[after_block(layer - 1)] = (vector, 1.0)
    made_for = content.get("model_type")
    picked = chosen(container, there, sites, together=False)
    return adds(picked, {"model_type": made_for} if isinstance(made_for, str) else {})


# -- vLLM-Lens ------------------------------------------------------------------------------------


def write_vllm_lens(request: Request) -> Exported:
    """A JSON object that SteeringVector.model_validate takes, whose scale is the dial."""
    added, left_out = in_stream(request, "a vector of vLLM-Lens")
    scale, vectors = one_coefficient(added)
    content = {
        "activations": _as_base64(torch.stack(list(vectors.values()))),
        "layer_indices": list(vectors),
        "scale": scale,
        "norm_match": False,
        "position_indices": None,
    }
    file = write_whole(request.output, _content(content), request.overwrite)
    use = f'SamplingParams(extra_args={{"apply_steering_vectors": [json.load(open("{file}"))]}})'
    return Exported("vllm-lens", (file,), left_out=left_out, use=(use,))


def _as_base64(tensor: Tensor) -> dict[str, Any]:
    """A tensor without compression, which vLLM-Lens reads too."""
    array = tensor.cpu().contiguous().numpy()
    return {
        "data": base64.b64encode(array.tobytes()).decode("ascii"),
        "dtype": "float32",
        "original_dtype": "torch.float32",
        "shape": list(array.shape),
    }


def is_vllm_lens(container: Container) -> bool:
    """Whether a file has a SteeringVector, or a list of them."""
    return container.kind == "json" and any(
        isinstance(each, dict) and {"activations", "layer_indices"} <= each.keys()
        for each in _listed(container.content)
    )


def _listed(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [content]


def read_vllm_lens(container: Container, lm: LanguageModel, sites: Sequence[str]) -> Found:
    """All that a request would add."""
    there: dict[str, tuple[Tensor, float]] = {}
    for each in _listed(container.content):
        if not isinstance(each, dict) or not isinstance(each.get("layer_indices"), list):
            raise container.refused("one of its vectors has no list of layer_indices")
        if each.get("norm_match") or each.get("position_indices") is not None:
            raise container.refused(
                "it is scaled to each token's norm (norm_match), or for tokens by their numbers "
                "(position_indices), which no operator and no scope here do"
            )
        scale = as_number(each.get("scale", 1.0), f"{container.named}: its scale")
        rows = _from_base64(container, each.get("activations"))
        indices = each["layer_indices"]
        if len(rows) != len(indices):
            raise container.refused(f"it has {len(rows)} vectors for {len(indices)} layers")
        for number, vector in zip(indices, rows, strict=True):
            layer = as_layer(number, lm.anatomy.layers, f"{container.named}: a layer")
            site = after_block(layer)
            if site in there:
                raise container.refused(f"it has two vectors for layer {layer}")
            if vector.any():
                there[site] = (vector, scale)
    return adds(chosen(container, there, sites, together=True))


def _from_base64(container: Container, stored: Any) -> Tensor:
    """Activations [layers, units] in float32."""
    what = f"{container.named}: its activations"
    if not isinstance(stored, dict) or not isinstance(stored.get("data"), str):
        raise TrimtabError(f"{what} are no tensor in base64")
    kind, shape = stored.get("dtype"), stored.get("shape")
    if not isinstance(kind, str) or kind not in _STORED:
        known = ", ".join(_STORED)
        raise TrimtabError(f"{what} are of {shown(json_shown(kind), 40)}: known are {known}")
    if kind == "int16" and stored.get("original_dtype") != "torch.bfloat16":
        raise TrimtabError(f"{what} are whole numbers")
    if not isinstance(shape, list) or len(shape) != 2 or not all(map(_is_size, shape)):
        raise TrimtabError(f"{what} have the shape {shown(shape, 60)}, not [layers, units]")
    octets = math.prod(shape) * np.dtype(kind).itemsize
    if octets > LARGEST:
        raise TrimtabError(f"{what} have the shape {shown(shape, 60)}, which is too large")
    array = np.frombuffer(_unpacked(stored, octets, what), dtype=kind).reshape(shape)
    tensor, seen_as = torch.from_numpy(array.copy()), _STORED[kind]
    return as_floats(tensor if seen_as is None else tensor.view(seen_as), what, (2,))


def _is_size(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def _unpacked(stored: dict[str, Any], octets: int, what: str) -> bytes:
    """Just so many bytes."""
    try:
        data = base64.b64decode(stored["data"], validate=True)
        if stored.get("compression") == "zstd":
            data = _decompressed(data, octets)
    except (binascii.Error, ValueError) as error:
        raise TrimtabError(f"{what} are damaged: {shown(error, 100)}") from error
    if len(data) != octets:
        raise TrimtabError(f"{what} should have {octets} bytes and have {len(data)}")
    return data


def _decompressed(data: bytes, octets: int) -> bytes:
    """No more than one byte beyond what there should be, whatever the data claim."""
    try:
        import zstandard
    except ImportError as error:
        raise TrimtabError(
            "vectors compressed with zstd need the extra zstd: pip install 'trimtab[zstd]'"
        ) from error
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data)
        return bytes(reader.read(octets + 1))
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
