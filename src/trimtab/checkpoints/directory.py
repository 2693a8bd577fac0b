"""Reads a model's directory with transformers, and makes sure that the model is what the files say.

transformers fills tensors that a checkpoint lacks with random numbers, and what damaged files do
inside it is anybody's guess. Here the files are looked at first, nothing of a directory is run, and
a model that is not all there is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from trimtab.errors import first_line

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: The files that tokenizers are in, each enough by itself.
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
    "spiece.model", "sentencepiece.bpe.model", "tekken.json", "tokenizer.tiktoken",
)  # fmt: skip


class CheckpointError(Exception):
    """Why a directory is no model, in one line."""


# -- files ---------------------------------------------------------------------------------------


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter of peft."""
    return (directory / ADAPTER_CONFIG).exists()


def has_weights(directory: Path) -> bool:
    """Whether a directory holds weights of a whole model."""
    return any((directory / name).exists() for name in (WEIGHTS, INDEX))


def check_files(directory: Path) -> None:
    """Whether a configuration and weights are there that can be read, by their headers alone."""
    _check_what_is_there(directory)
    config = read_json(directory / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{CONFIG} names no model_type")
    if (directory / WEIGHTS).exists():
        tensors = _names(directory / WEIGHTS)
    elif (directory / INDEX).exists():
        tensors = _indexed(directory)
    elif list(directory.glob("*.bin")):
        raise CheckpointError(
            "its weights are pickles (.bin), which may hold code; write them as safetensors with "
            "transformers' save_pretrained"
        )
    else:
        raise CheckpointError(f"there is no {WEIGHTS}")
    # Before the architecture is built: a number that is too large would fill the memory.
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for name in ("num_hidden_layers", "n_layer"):
            layers = part.get(name, 1)
            if isinstance(layers, int) and not 1 <= layers <= len(tensors):
                raise CheckpointError(
                    f"{CONFIG} says {name} {layers}, and the files hold {len(tensors)} tensors"
                )


def _check_what_is_there(directory: Path) -> None:
    """Say all that a directory lacks of a model, and where one is inside it."""
    if (directory / CONFIG).exists():
        return
    lacks = CONFIG if has_weights(directory) else f"{CONFIG} and no {WEIGHTS}"
    inside = sorted(file.parent.name for file in directory.glob(f"*/{CONFIG}"))
    there = f"; there is one in {inside[0]}/" if inside else ""
    raise CheckpointError(
        f"there is no {lacks} in it (a model's directory has {CONFIG}, weights as safetensors, and "
        f"a tokenizer){there}"
    )


def check_tokenizer_files(directory: Path) -> None:
    """Whether there is a tokenizer, in one of the ways in which models have it."""
    if not any((directory / name).exists() for name in _TOKENIZERS):
        raise CheckpointError(
            f"there is no tokenizer in it (none of {', '.join(_TOKENIZERS)}): copy the files of "
            "the model that it was made from"
        )


def check_adapter_files(directory: Path) -> dict[str, Any]:
    """The configuration of an adapter whose weights can be read."""
    config = read_json(directory / ADAPTER_CONFIG)
    if not isinstance(config.get("peft_type"), str):
        raise CheckpointError(f"{ADAPTER_CONFIG} names no peft_type")
    if config.get("megatron_config") is not None:
        raise CheckpointError(f"{ADAPTER_CONFIG} names a module to import (megatron_core)")
    if not (directory / ADAPTER_WEIGHTS).exists():
        raise CheckpointError(f"there is no {ADAPTER_WEIGHTS}")
    _names(directory / ADAPTER_WEIGHTS)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no {path.name}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path.name}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} is no JSON object")
    return content


def _indexed(directory: Path) -> list[str]:
    """The tensors of a checkpoint in several files."""
    places = read_json(directory / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise CheckpointError(f"{INDEX} has no weight_map of tensors and files")
    held: list[str] = []
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{INDEX} names {file!r}, which is not a file of this directory")
        if not (directory / file).exists():
            raise CheckpointError(f"{INDEX} names {file!r}, and there is no such file")
        held += _names(directory / file)
    lost = sorted(set(places) - set(held))
    if lost:
        raise CheckpointError(f"{INDEX} names {lost[0]!r}, which is in none of the files")
    return held


def _names(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise CheckpointError(f"cannot read {path.name}: {reason}") from error


# -- transformers ----------------------------------------------------------------------------


def read_config(source: str, **options: Any) -> Any:
    """The configuration of a model's directory, or of a model of the hub."""
    from transformers import AutoConfig

    with damage_is_said():
        config: Any = AutoConfig.from_pretrained(source, **options)
        # Such names are of code on the hub, which transformers would fetch and run.
        code = "/" in str(getattr(config, "_attn_implementation", None))
    if code and not options["trust_remote_code"]:
        raise CheckpointError(
            f"{CONFIG} wants attention code from the hub; read it, then load the model with "
            "trust_remote_code=True (--trust-remote-code)"
        )
    return config


def read_model(model_class: Any, source: str, **options: Any) -> tuple[Any, Misfit]:
    """A model, and what does not fit between its files and its architecture."""
    with damage_is_said():
        model, found = model_class.from_pretrained(
            source,
            use_safetensors=True,
            output_loading_info=True,
            # Said here, with the names.
            ignore_mismatched_sizes=True,
            **options,
        )
        return model, Misfit(model, found)


class Misfit:
    """What does not fit between files and an architecture: names of tensors, sorted."""

    def __init__(self, model: Any, found: dict[str, Any]) -> None:
        parameters = {name for name, _ in model.named_parameters()}
        #: What an architecture has and the files lack; random numbers are in their place.
        self.missing = sorted(found["missing_keys"] & parameters)
        #: Tensors that are computed when a model is built, and usually not learnt.
        self.buffers = sorted(found["missing_keys"] - parameters)
        unexpected = found["unexpected_keys"]
        patterns = {_pattern(name) for name in model.state_dict()}
        #: Blocks and experts of which the configuration knows fewer than the files.
        self.left_out = sorted(name for name in unexpected if _pattern(name) in patterns)
        self.unexpected = sorted(unexpected - set(self.left_out))
        self.sizes = sorted(found["mismatched_keys"])

    def check(self) -> None:
        """Refuse a model of which a part is made up."""
        if self.sizes:
            name, held, wanted = self.sizes[0]
            raise CheckpointError(
                f"{_count(self.sizes, 'tensor has', 'tensors have')} another size than {CONFIG} "
                f"says: {name} is {list(held)}, not {list(wanted)}"
            )
        if self.missing:
            raise CheckpointError(
                f"{_count(self.missing, 'tensor is', 'tensors are')} missing from the files: "
                f"{some(self.missing)}"
            )
        if self.left_out:
            raise CheckpointError(
                f"{_count(self.left_out, 'tensor is', 'tensors are')} left out by {CONFIG}, which "
                f"knows fewer of their kind: {some(self.left_out)}"
            )


def _pattern(name: str) -> str:
    """A tensor's name without its numbers."""
    return re.sub(r"\d+", "#", name)


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _count(names: Sequence[Any], one: str, more: str) -> str:
    return f"{len(names)} {one if len(names) == 1 else more}"


def not_finite(model: Any) -> list[str]:
    """The parameters that hold NaN or infinity."""
    return [
        name
        for name, tensor in model.named_parameters()
        if tensor.is_floating_point()
        and tensor.element_size() > 1
        and not tensor.is_meta
        # A sum is not finite where a part is not, and is found faster.
        and not torch.isfinite(tensor.detach().sum(dtype=torch.float32))
        and not torch.isfinite(tensor.detach()).all()
    ]


@contextmanager
def damage_is_said() -> Iterator[None]:
    """Whatever transformers raises while it reads files, the files are the reason."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its table of missing tensors is many lines
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise CheckpointError(
                "it brings Python code of its own (auto_map), which is not run unasked; read it, "
                "then load the model with trust_remote_code=True (--trust-remote-code)"
            ) from error
        reason = first_line(error)
        if not (reason and isinstance(error, OSError | ValueError)):
            reason = f"{type(error).__name__}: {reason}"
        raise CheckpointError(reason) from error
    finally:
        transformers_logging.set_verbosity(level)
