"""Makes a plain checkpoint (safetensors and tokenizer) of a GGUF file.

transformers dequantises the weights; what it does not read of the configuration is read here. What
the file says of itself is kept beside the checkpoint, for when it becomes a GGUF file again.
"""

from __future__ import annotations

import io
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trimtab.checkpoints.baked import RECORD
from trimtab.checkpoints.gguf_header import DamagedError, Header, check_header
from trimtab.checkpoints.gguf_metadata import BAKED, keep_metadata, read_metadata
from trimtab.checkpoints.gguf_tokenizer import read_tokenizer
from trimtab.errors import TrimtabError, TrimtabWarning, first_line, os_reason, shown

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


R = TypeVar("R")


def convert_gguf(gguf: Path, destination: Path) -> None:
    """Writes configuration, weights (safetensors, dequantised) and tokenizer to `destination`.

    The weights are stored in the smallest type that holds every value exactly: a file of half
    precision stays one; the blocks of a quantised file (fp16 scale times integer) need float32.
    """
    from transformers import GenerationConfig

    header = _checked(gguf)
    metadata = _read(gguf, read_metadata)
    values = metadata.values
    _warn_of_losses(header)
    destination.mkdir(parents=True, exist_ok=True)
    model = _load_weights(gguf, destination, header)
    try:
        tokenizer = read_tokenizer(values, model.config.max_position_embeddings)
    except TrimtabError:
        raise
    except Exception as error:  # ids, scores or merges that do not fit together
        raise TrimtabError(
            f"cannot build the tokenizer of the GGUF file {shown(gguf, 150)}: {_reason(error)}"
        ) from error

    # The end of a turn or message ends generation too, where the file tells them apart.
    named = (values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))
    ends = {tokenizer.eos_token_id, *named} - {None}
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": sorted(ends) if len(ends) > 1 else tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.config.update(tokens)
    model.generation_config = GenerationConfig(**tokens)
    try:
        with redirect_stderr(io.StringIO()):  # hides a bar that cannot be turned off
            model.to(_smallest_lossless(model)).save_pretrained(destination)
        tokenizer.save_pretrained(destination)
        _shorten(destination / "tokenizer.json")
        keep_metadata(metadata, destination)
        if isinstance(values.get(BAKED), str):
            (destination / RECORD).write_text(values[BAKED], encoding="utf-8")
        for weights in destination.glob("*.safetensors"):  # safetensors lets the owner only
            shutil.copymode(destination / "config.json", weights)
    except Exception as error:  # a full disk comes as safetensors' own error
        raise TrimtabError(f"cannot write to {destination}: {os_reason(error)}") from error


def check_is_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise TrimtabError(f"cannot read {shown(path, 200)}: {error.strerror or error}") from error
    if magic != b"GGUF":
        raise TrimtabError(
            f"{shown(path, 150)} is not a GGUF file: it begins with {magic!r}, not b'GGUF'"
        )


def gguf_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a small GGUF file by name, each a copy in float32, and the plain values and
    strings of its header. Quantised tensors are refused."""
    import numpy as np
    import torch

    header = _checked(path)
    tensors = {}
    for tensor in _read(path, lambda reader: reader.tensors):
        numbers = np.asarray(tensor.data)
        if numbers.dtype.kind != "f":
            raise TrimtabError(
                f"{shown(path, 150)}: tensor '{shown(tensor.name)}' is of type "
                f"{tensor.tensor_type.name}, not of plain floats"
            )
        tensors[str(tensor.name)] = torch.from_numpy(numbers.astype(np.float32))
    return tensors, header.values


def _checked(path: Path) -> Header:
    """The header of a file that can hold what it says that it holds."""
    check_is_gguf(path)
    try:
        return check_header(path)
    except DamagedError as error:
        raise _damaged(path, error) from error


def _read(path: Path, what: Callable[[Any], R]) -> R:
    """What is read of a file."""
    from gguf import GGUFReader

    try:
        return what(GGUFReader(path))
    except Exception as error:  # whatever it reads in a way of its own
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> TrimtabError:
    return TrimtabError(
        f"{shown(path, 150)} is a truncated or damaged GGUF file ({shown(error, 120)}): "
        "fetch it again"
    )


def _warn_of_losses(header: Header) -> None:
    scaling = [key for key in header.values if key.endswith(".rope.scaling.type")]
    scaled = any(header.values[key] != "none" for key in scaling)
    factors = header.values.get("general.architecture") != "phi3"  # of which they are read
    factors = factors and "rope_factors_long.weight" in header.tensors
    if scaled or factors or "rope_freqs.weight" in header.tensors:
        warnings.warn(
            "this GGUF file scales its rotary frequencies for long contexts, which the conversion "
            "does not carry over: long texts will come out worse than in the original model",
            TrimtabWarning,
            stacklevel=3,
        )


def _load_weights(gguf: Path, empty: Path, header: Header) -> PreTrainedModel:
    import torch
    import transformers

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # later than 5.16
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # From the empty directory: files that lie beside a user's GGUF must not count.
    place: dict[str, Any] = {"gguf_file": str(gguf.absolute()), "local_files_only": True}
    try:
        config = transformers.AutoConfig.from_pretrained(str(empty), **place)
        _complete(config, header)
        if config.model_type == "phi3" and "rope_factors_long.weight" in header.tensors:
            _read_long_rope(config, gguf, header)
        _check_size(config, header)
        # The redirection hides a bar that cannot be turned off.
        with redirect_stderr(io.StringIO()):
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                str(empty),
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                **place,
                **options,
            )
        model: PreTrainedModel = loaded[0]
        _check_complete(model, loaded[1])
    except Exception as error:
        raise TrimtabError(
            f"cannot load the GGUF file {shown(gguf, 150)}: {_reason(error)}"
        ) from error
    # Its mark as quantised, which makes saving fail, though every weight is plain by now.
    model.hf_quantizer = None  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


#: Sizes of a mixture that are read of no file.
_OF_EXPERTS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
#: Layers of Gemma's largest models, whose attention llama.cpp scales by another size than a head's.
_LARGEST_GEMMAS = {"gemma2": 46, "gemma3_text": 62}


def _complete(config: Any, header: Header) -> None:
    """What transformers leaves at a default whatever the file says."""
    said = _of_architecture(header.values)
    if config.model_type == "llama":
        config.attention_bias = "blk.0.attn_q.bias" in header.tensors
        config.mlp_bias = "blk.0.ffn_gate.bias" in header.tensors
    if config.model_type == "qwen3" and "attention.key_length" in said:
        config.head_dim = said["attention.key_length"]
    if config.model_type == "gpt2":
        config.n_positions = said.get("context_length", config.n_positions)
        config.n_inner = said.get("feed_forward_length", config.n_inner)
    if config.model_type == "phi3" and "rope.dimension_count" in said:
        width = config.hidden_size // config.num_attention_heads
        config.rope_parameters["partial_rotary_factor"] = said["rope.dimension_count"] / width
    for key, name in _OF_EXPERTS.items():
        if key in said and hasattr(config, name):
            setattr(config, name, said[key])
    if config.model_type in _LARGEST_GEMMAS:
        config.query_pre_attn_scalar = attention_scale(config)
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if name in said:
                setattr(config, name, said[name])
    if config.model_type == "gemma3_text" and "rope.freq_base_swa" in said:
        config.rope_parameters["sliding_attention"]["rope_theta"] = said["rope.freq_base_swa"]


def _read_long_rope(config: Any, gguf: Path, header: Header) -> None:
    """Phi-3's scaling of rotary frequencies, by factors that lie among the tensors."""
    said = _of_architecture(header.values)
    factors = {
        str(tensor.name): tensor.data.tolist()
        for tensor in _read(gguf, lambda reader: reader.tensors)
        if str(tensor.name).startswith("rope_factors_")
    }
    original = said.get("rope.scaling.original_context_length", config.max_position_embeddings)
    config.original_max_position_embeddings = original
    config.rope_parameters |= {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "attention_factor": said.get("rope.scaling.attn_factor", 1.0),
        "long_factor": factors["rope_factors_long.weight"],
        "short_factor": factors["rope_factors_short.weight"],
    }
    config.validate_rope()


def attention_scale(config: Any) -> int:
    """The size by whose root llama.cpp divides the logits of a Gemma's attention."""
    if config.num_hidden_layers == _LARGEST_GEMMAS[config.model_type]:
        return int(config.hidden_size // config.num_attention_heads)
    return int(config.head_dim)


def _of_architecture(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file's architecture, without its name in front."""
    before = f"{values.get('general.architecture')}."
    return {
        key.removeprefix(before): value for key, value in values.items() if key.startswith(before)
    }


def _check_size(config: Any, header: Header) -> None:
    """Refuse sizes that are none of the file's, before there is room made for them."""
    import torch
    import transformers

    with torch.device("meta"):  # which takes no memory
        sketch = transformers.AutoModelForCausalLM.from_config(config)
    wanted = sum(parameter.numel() for parameter in sketch.parameters())
    # A few more than the file's are right where an architecture adds something to its files.
    if wanted > 1.5 * header.elements:
        raise DamagedError(
            f"by its sizes it is a model of {wanted} numbers, and it holds {header.elements}"
        )


def _check_complete(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Refuse a model that does not have all of its weights from the file."""
    missing = sorted(map(str, info.get("missing_keys", ())))
    if missing:
        raise DamagedError(f"it lacks {len(missing)} of the model's tensors, {missing[0]} first")
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise DamagedError(f"{name} holds NaN or infinity")


def _reason(error: Exception) -> str:
    return shown(first_line(error) or type(error).__name__, 150)


def _smallest_lossless(model: PreTrainedModel) -> Any:
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(weight, weight.to(dtype).float()) for weight in model.parameters()):
            return dtype
    return torch.float32


def _shorten(tokenizer: Path) -> None:
    """Without the indentation and with each merge as one string, Gemma's loads twice as fast."""
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    merges = content["model"]["merges"]
    if not any(" " in piece for merge in merges for piece in merge):
        content["model"]["merges"] = [" ".join(merge) for merge in merges]
    short = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    tokenizer.write_text(short, encoding="utf-8", newline="\n")
