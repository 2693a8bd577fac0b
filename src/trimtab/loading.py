"""Opens models: a pack by name, a directory, a .gguf file, a model of the hub, or one at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from trimtab import packs
from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel
from trimtab.paths import user_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def wrap(model: Any, tokenizer: Any, name: str | None = None) -> LanguageModel:
    """A model that the user already holds, with its tokenizer."""
    path = name or getattr(model, "name_or_path", "") or type(model).__name__
    return LanguageModel(model.eval(), tokenizer, str(path))


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str = "auto",
    device_map: Any = None,
) -> LanguageModel:
    """Load a pack by name, a local directory, a .gguf file, or a model of the hub by its id.

    `dtype` is float32, bfloat16 or float16; `device` is auto (CUDA, else MPS, else CPU) or a
    torch device; `device_map` spreads a model over several cards as in transformers.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = str(source)
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise TrimtabError(f"unknown dtype {dtype!r}: known are {', '.join(DTYPES)}")
    precision = DTYPES[dtype] if isinstance(dtype, str) else dtype
    path, place = _locate(name), _device(device)
    options: dict[str, Any] = {"dtype": precision}
    if device_map is not None:
        options["device_map"] = device_map
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        # What damaged files cause is not always an OSError, and then says little by itself.
        reason = (str(error).strip().splitlines() or [""])[0]
        if not (reason and isinstance(error, OSError | ValueError)):
            reason = f"{type(error).__name__}: {reason}"
        raise TrimtabError(
            f"cannot load the model {name!r}: {reason} (packs: {', '.join(packs.PACKS)}; or a "
            "directory, a .gguf file, a hub id)"
        ) from error
    if device_map is None:
        try:
            model = model.to(place)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            reason = str(error).strip().splitlines()[0]
            raise TrimtabError(f"cannot move {name!r} to {place}: {reason}") from error
    return LanguageModel(model.eval(), tokenizer, name)


def _locate(name: str) -> str:
    """Where the files of a model are: a directory, or the hub id as it is."""
    if name in packs.PACKS:
        return str(packs.ensure(name))
    path = user_path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise TrimtabError(f"no such file: {name}")
        return str(packs.gguf_cached(path))
    if path.is_dir():
        return str(path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise TrimtabError(f"{name} is not a model's directory, nor a .gguf file")
    return name


def _device(device: str) -> torch.device:
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    unknown = TrimtabError(f"unknown device {device!r}: auto, cpu, cuda, cuda:1, mps")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise unknown from error
    if chosen.type == "meta":  # a place without numbers, on which nothing runs
        raise unknown
    return chosen
