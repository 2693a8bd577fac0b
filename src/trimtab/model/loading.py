"""Opens models: a pack by name, a directory, a .gguf file, a model of the hub, or one at hand."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils.import_utils import is_peft_available

from trimtab.checkpoints import (
    ADAPTER_CONFIG,
    CheckpointError,
    Misfit,
    check_adapter_files,
    check_files,
    damage_is_said,
    has_weights,
    is_adapter,
    not_finite,
    packs,
    read_config,
    read_json,
    read_model,
    some,
)
from trimtab.errors import TrimtabError, TrimtabWarning, first_line
from trimtab.files import user_path
from trimtab.model.language_model import LanguageModel
from trimtab.model.plain import is_quantised, unwrap
from trimtab.model.saving import recover

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def wrap(model: Any, tokenizer: Any, name: str | None = None) -> LanguageModel:
    """A model that the user already holds, with its tokenizer (or a processor that has one).

    What stands around a model (torch.compile, DataParallel, peft) is taken off; adapters that peft
    put into its layers stay and act.
    """
    plain = unwrap(_checked_model(model))
    tokenizer = _checked_tokenizer(tokenizer)
    if not callable(getattr(plain, "generate", None)) or plain.get_output_embeddings() is None:
        raise TrimtabError(
            f"{type(plain).__name__} is no causal language model: it has no LM head to write "
            "with; load it with AutoModelForCausalLM"
        )
    path = name or getattr(plain, "name_or_path", "") or type(plain).__name__
    language_model = LanguageModel(plain.eval(), tokenizer, str(path))
    _check_vocabulary(language_model)
    return language_model


def _checked_model(model: Any) -> Any:
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, str | Path):
        raise TrimtabError(f"wrap takes a model, not a name: load it with load({str(model)!r})")
    if isinstance(model, LanguageModel):
        raise TrimtabError("this model is wrapped already: use it as it is")
    if _is_tokenizer(model):
        raise TrimtabError("wrap takes the model first, and then the tokenizer: wrap(model, tok)")
    raise TrimtabError(f"wrap takes a model of transformers, not {type(model).__name__}")


def _checked_tokenizer(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise TrimtabError("wrap needs a tokenizer: AutoTokenizer.from_pretrained(...)")
    if isinstance(tokenizer, str | Path):
        raise TrimtabError(
            f"wrap takes a tokenizer, not a name: AutoTokenizer.from_pretrained({tokenizer!r})"
        )
    if _is_tokenizer(tokenizer):
        return tokenizer
    inner = getattr(tokenizer, "tokenizer", None)  # of a processor
    if _is_tokenizer(inner):
        return inner
    raise TrimtabError(
        f"wrap takes a tokenizer of transformers, not {type(tokenizer).__name__}: "
        "AutoTokenizer.from_pretrained(...)"
    )


def _is_tokenizer(given: Any) -> bool:
    wanted = ("decode", "apply_chat_template", "bos_token_id", "model_max_length")
    return callable(given) and all(hasattr(given, name) for name in wanted)


def _check_vocabulary(language_model: LanguageModel) -> None:
    """Tokens without a row in the embedding table would end in the middle of a run."""
    rows = language_model.anatomy.config.vocab_size
    tokens = getattr(language_model.tokenizer, "vocab_size", 0)  # those added later apart
    if tokens > rows:
        raise TrimtabError(
            f"the tokenizer of {language_model.name} has {tokens} tokens, the model {rows}: it is "
            "another model's tokenizer"
        )


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a pack by name, a local directory, a .gguf file, or a model of the hub by its id.

    A directory may hold a whole model or an adapter of peft. `dtype` is float32, bfloat16 or
    float16; `device` is auto (CUDA, else MPS, else CPU) or a torch device; `device_map` spreads a
    model over several cards as in transformers. Python code that comes with a model runs only if
    `trust_remote_code` says so.
    """
    name = str(source)
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise TrimtabError(f"unknown dtype {dtype!r}: known are {', '.join(DTYPES)}")
    precision = DTYPES[dtype] if isinstance(dtype, str) else dtype
    path, place = _locate(name), _device(device)
    options: dict[str, Any] = {"dtype": precision}
    if device_map is not None:
        options["device_map"] = device_map
    try:
        model, tokenizer = _read(path, options, trust_remote_code is True)
    except CheckpointError as error:
        raise TrimtabError(
            f"cannot load the model {name!r}: {error} (packs: {', '.join(packs.PACKS)}; or a "
            "directory, a .gguf file, a hub id)"
        ) from error
    if device_map is None:
        try:
            model = model.to(place)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            reason = first_line(error)
            raise TrimtabError(f"cannot move {name!r} to {place}: {reason}") from error
    return wrap(model, tokenizer, name)


def _read(path: str, options: dict[str, Any], trust: bool) -> tuple[Any, Any]:
    """Model and tokenizer of a directory or a hub id."""
    directory = Path(path)
    if directory.is_dir() and is_adapter(directory):
        return _read_adapter(directory, options, trust)
    return _read_whole(path, options, trust), _read_tokenizer(path, trust)


def _read_whole(path: str, options: dict[str, Any], trust: bool) -> Any:
    from transformers import AutoModelForCausalLM

    local = Path(path).is_dir()
    if local:
        check_files(Path(path))
    origin = {"trust_remote_code": trust, "local_files_only": local}
    config = read_config(path, **origin)
    model, found = read_model(AutoModelForCausalLM, path, config=config, **origin, **options)
    found.check()
    _warn(model, found, path)
    return model


def _warn(model: Any, found: Misfit, path: str) -> None:
    """What need not be wrong, and might be."""
    odd = [] if is_quantised(model) else not_finite(model)
    for names, what in (
        (found.unexpected, "hold tensors that the architecture does not use"),
        (found.buffers, "lack tensors that were computed instead"),
        (odd, "hold weights that are NaN or infinite in this dtype"),
    ):
        if names:
            warnings.warn(
                f"the files of {path} {what} ({len(names)}: {some(names)})",
                TrimtabWarning,
                stacklevel=5,
            )


def _read_tokenizer(path: str, trust: bool) -> Any:
    from transformers import AutoTokenizer

    with damage_is_said():
        return AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust, local_files_only=Path(path).is_dir()
        )


def _read_adapter(directory: Path, options: dict[str, Any], trust: bool) -> tuple[Any, Any]:
    """The model that an adapter was made for, with the adapter in its layers."""
    if has_weights(directory):
        raise CheckpointError(
            f"it holds a whole model and an adapter ({ADAPTER_CONFIG}): move one away"
        )
    config = check_adapter_files(directory)
    if not is_peft_available():
        raise CheckpointError(f"it is an adapter ({ADAPTER_CONFIG}): install peft to load it")
    base = config.get("base_model_name_or_path")
    if not (isinstance(base, str) and base):
        raise CheckpointError(f"{ADAPTER_CONFIG} names no model that the adapter is for")
    try:
        base = _locate(base)
    except TrimtabError as error:
        raise CheckpointError(f"the model that the adapter is for: {error}") from error
    if Path(base).is_dir() and is_adapter(Path(base)):
        raise CheckpointError(f"the model that the adapter is for, {base}, is an adapter itself")
    model = _read_whole(base, options, trust)
    with damage_is_said():
        Misfit(model, model.load_adapter(str(directory)).to_dict()).check()
    own = any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    return model, _read_tokenizer(str(directory) if own else base, trust)


def _locate(name: str) -> str:
    """Where the files of a model are: a directory, or the hub id as it is."""
    if name in packs.PACKS:
        return str(packs.ensure(name))
    try:
        path = user_path(name)
        if path.suffix == ".gguf":
            if not path.is_file():
                raise TrimtabError(f"no such file: {name}")
            return str(packs.gguf_cached(path))
        if not path.exists():
            recover(path)  # hidden by a save that was killed
        if path.is_dir():
            return str(path)
        there = path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, no permission, no such user
        reason = getattr(error, "strerror", None) or first_line(error)
        raise TrimtabError(f"{name} is not a model's directory: {reason}") from error
    if there or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise TrimtabError(f"{name} is not a model's directory, nor a .gguf file")
    return name


def locations(name: str) -> list[str]:
    """The directories that a model of this name would be read from, nothing downloaded."""
    if name in packs.PACKS:
        return [str(packs.location(name))]
    found = [os.path.expanduser(name)]
    with suppress(CheckpointError, KeyError):
        found.append(str(read_json(Path(found[0]) / ADAPTER_CONFIG)["base_model_name_or_path"]))
    return found


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
