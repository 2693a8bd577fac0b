"""Writes a model as a GGUF file, which llama.cpp and what is built on it run.

A model that came from a GGUF file takes that file's metadata along; of any other they are made of
its configuration and tokenizer. Matrices are stored in the type that is asked for, norms and biases
in float32.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trimtab.checkpoints import (
    BAKED,
    Metadata,
    baked_content,
    metadata_of,
    tokenizer_metadata,
)
from trimtab.errors import TrimtabError, shown
from trimtab.exchange.gguf_architectures import (
    Architecture,
    architecture_of,
    hyperparameters,
    rotary_factors,
)
from trimtab.exchange.gguf_names import ROUTERS, Names
from trimtab.files import whole_file
from trimtab.model import LanguageModel, plain_copy

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

#: How matrices may be stored: gguf's names of the type, and of a file that is mostly of it.
TYPES = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
#: Matrices that are float32 in any case: what chooses experts, and what is added to embeddings.
_WIDE = (*ROUTERS, "position_embd")
#: Tokens without which llama.cpp loads no file whose name has phi3 or phi-3 in it.
_OF_PHI3 = {"</s>", "<unk>", "<s>", "<|endoftext|>"}
#: What is said anew of a file whatever the one said that the model came from.
_OWN = ("general.architecture", "general.name", "general.file_type", BAKED)


def save_gguf(
    language_model: LanguageModel,
    path: str | Path,
    *,
    type: str = "f32",
    overwrite: bool = False,
) -> Path:
    """Write a model, as `tt.bake` makes one, as a GGUF file; returns its path.

    `type` says how matrices are stored: f32, f16, bf16 or q8_0 (8 bits and a scale for each 32
    numbers; f16 where rows are no multiple of 32). Norms, biases and routers are float32 in any
    case.

    Written are Llama, Mistral and Mixtral (as llama.cpp's llama), Qwen2 and Qwen3 with and without
    experts, Gemma 2 and Gemma 3, Phi-3 and GPT-2, with tokenizers of byte-pair encoding,
    sentencepiece's or byte-level. TrimtabError says why another model is not, and where llama.cpp
    would compute something else than the model does.
    """
    if type not in TYPES:
        raise TrimtabError(f"type is {shown(type)!r}: known are {', '.join(TYPES)}")
    target = Path(path)
    name = language_model.name
    if language_model.quantised:
        raise TrimtabError(
            f"{shown(name)} is quantised, and its weights are no plain numbers: write the GGUF "
            "file of the unquantised model (q8_0 quantises it)"
        )
    architecture = architecture_of(language_model.model)
    model = plain_copy(language_model.model, name)
    origin = metadata_of(Path(str(getattr(model.config, "_name_or_path", "") or "")))
    values = _metadata(language_model, model, architecture, origin)
    names = Names(architecture, model)
    weights = _weights(model, architecture, names)
    values["general.name"] = _unmistakable(_name(language_model, origin), language_model.tokenizer)
    values["general.file_type"] = _file_type(type)
    if language_model.baked:
        values[BAKED] = baked_content(language_model.baked)
    beside = _beside(model, origin)
    with whole_file(target, overwrite) as temporary:
        writer = _opened(temporary, architecture, values, origin)
        _write(writer, {**weights, **beside}, names, type)
    return target


def _name(language_model: LanguageModel, origin: Metadata | None) -> str:
    """What the model is called, without where it lies on this machine."""
    baked = language_model.baked
    if not baked:
        said = {} if origin is None else origin.values
        return str(said.get("general.name") or Path(language_model.name).name)
    base = Path(str(baked[0]["base"]["name"])).name
    return " + ".join([base, *(str(record["label"]) for record in baked)])


def _unmistakable(name: str, tokenizer: Any) -> str:
    """A name that llama.cpp does not take for Phi-3's, whose tokens it wants by their texts, unless
    they are there."""
    if tokenizer.get_vocab().keys() >= _OF_PHI3:
        return name
    return re.sub("phi-?3", "phi 3", name, flags=re.IGNORECASE)


def _file_type(type: str) -> int:
    from gguf import LlamaFileType

    return int(LlamaFileType[TYPES[type][1]])


# -- metadata ------------------------------------------------------------------------------------


def _metadata(
    language_model: LanguageModel, model: Any, architecture: Architecture, origin: Metadata | None
) -> dict[str, Any]:
    """What is said of the model, as far as its origin does not say it."""
    values = hyperparameters(architecture, model)
    rows = model.get_input_embeddings().weight.shape[0]
    if origin is None:
        ends = getattr(model.generation_config, "eos_token_id", None) or ()
        ends = [ends] if isinstance(ends, int) else list(ends)
        return values | tokenizer_metadata(language_model.tokenizer, rows, ends)
    tokens = len(origin.values.get("tokenizer.ggml.tokens", ()))
    if tokens != rows:
        raise TrimtabError(
            f"{shown(language_model.name)} has embeddings of {rows} tokens, and the GGUF file that "
            f"it came from {tokens}: save it as a checkpoint (save_pretrained), load that, and "
            "write the GGUF file from there"
        )
    return values


def _opened(
    file: Path, architecture: Architecture, values: dict[str, Any], origin: Metadata | None
) -> GGUFWriter:
    """A GGUF file with its metadata; what its origin says counts more than what is made up."""
    from gguf import GGUFWriter

    writer = GGUFWriter(file, architecture.name)
    carried: dict[str, str] = {}
    if origin is not None:
        said = origin.values
        before = f"{said.get('general.architecture')}."
        carried = {
            key: f"{architecture.name}.{key.removeprefix(before)}"
            if key.startswith(before)
            else key
            for key in said
            if key not in _OWN
        }
        origin.carry(writer, carried)
    for key, value in values.items():
        if key not in carried.values():
            put(writer, key, value)
    return writer


def put(writer: GGUFWriter, key: str, value: Any) -> None:
    """Put a value into a file's metadata, in the type of GGUF that is usual for it."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _beside(model: Any, origin: Metadata | None) -> dict[str, Tensor]:
    """Tensors that are no weights of the model."""
    if origin is not None:
        return {name: torch.tensor(each) for name, each in origin.beside.items()}
    return rotary_factors(model)


# -- weights -------------------------------------------------------------------------------------


def _weights(model: Any, architecture: Architecture, names: Names) -> dict[str, Tensor]:
    """The model's weights by llama.cpp's names, still as the model has them."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is table.weight
    if not tied and not architecture.untied:
        raise TrimtabError(
            f"llama.cpp has {architecture.name} with one table for embeddings and LM head, and "
            "this model has two (as after baking at embed or final_norm): attach the steering "
            "instead"
        )
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        weights |= names.parts(name, parameter.detach())
    if tied and not architecture.tied:
        weights["output.weight"] = table.weight.detach()
    return weights


def _write(writer: GGUFWriter, tensors: dict[str, Tensor], names: Names, type: str) -> None:
    """Write the tensors one after the other, so that no second model is held in memory."""
    from gguf import GGML_QUANT_SIZES

    kinds = {name: _kind(name, tensor, type) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        elements, octets = GGML_QUANT_SIZES[kinds[name]]
        size = tensor.numel() // elements * octets
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, kinds[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            writer.write_tensor_data(_numbers(name, names.stored(name, tensor), kinds[name]))
    finally:
        writer.close()


def _kind(name: str, tensor: Tensor, type: str) -> GGMLQuantizationType:
    """How a tensor is stored."""
    from gguf import GGMLQuantizationType as Kind

    if tensor.dim() < 2 or name.split(".")[-2] in _WIDE:
        return Kind.F32
    kind = Kind[TYPES[type][0]]
    return Kind.F16 if kind is Kind.Q8_0 and tensor.shape[-1] % 32 else kind


def _numbers(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> Any:
    from gguf import GGMLQuantizationType as Kind
    from gguf import quantize

    wide = tensor.to(device="cpu", dtype=torch.float32).contiguous()
    largest = 65504 if kind is not Kind.F32 and kind is not Kind.BF16 else torch.finfo().max
    if not bool((wide.abs() <= largest).all()):
        raise TrimtabError(
            f"{name} holds what {kind.name} cannot: numbers that are NaN, infinite or too large; "
            "turn the dial down, or choose f32 (--gguf-type)"
        )
    return quantize(wide.numpy(), kind)
