"""Opens models: a pack by name, a directory, a .gguf file, or a model of the hub."""

from __future__ import annotations

import difflib
import inspect
import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers.utils.import_utils import is_peft_available

from trimtab.checkpoints import (
    ADAPTER_CONFIG,
    CheckpointError,
    Found,
    Misfit,
    check_adapter_files,
    check_files,
    check_tokenizer_files,
    counted,
    counted_on_hub,
    damage_is_said,
    find_on_hub,
    has_weights,
    is_adapter,
    not_finite,
    packs,
    read_baked,
    read_config,
    read_json,
    read_model,
    some,
)
from trimtab.errors import TrimtabError, TrimtabWarning, first_line
from trimtab.files import exists, user_path
from trimtab.model.holding import (
    Quantise,
    bits_of,
    device_of,
    how_held,
    places_of,
    say_size,
)
from trimtab.model.images import image_tokens
from trimtab.model.language_model import LanguageModel
from trimtab.model.plain import is_quantised
from trimtab.model.saving import recover
from trimtab.model.wrapping import wrap
from trimtab.terminal import note, status

#: What `load` hands on to transformers: of where files are, and of how a model is made of them.
_OF_ORIGIN = ("token", "cache_dir", "local_files_only", "force_download")
_OF_MODEL = (
    "attn_implementation", "quantization_config", "max_memory", "offload_folder", "offload_buffers"
)  # fmt: skip


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = "auto",
    device: str = "auto",
    device_map: Any = None,
    quantise: Quantise | None = None,
    revision: str | None = None,
    chat_options: Mapping[str, Any] | None = None,
    system: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> LanguageModel:
    """Load a pack by name, a local directory, a .gguf file, or a model of the hub by its id.

    A directory may hold a whole model or an adapter of peft.

    `dtype` is auto (None is the same): the checkpoint's own on CUDA and MPS, and float32 on a CPU,
    where half precision is slow; checkpoint: its own everywhere; or float32, bfloat16, float16.
    `device` is auto (CUDA, else MPS, else CPU) or a torch device; `device_map` spreads a model over
    several instead, as in transformers ("auto", "balanced", a map of modules and devices).
    `quantise` stores linear maps in 4 or 8 bits with bitsandbytes (extra `quantised`); such a model
    is steered as any other, and cannot be baked.

    `revision` is a branch, tag or commit of a model of the hub, whose name is then ID@REVISION
    everywhere, and may be given so. `chat_options` are variables of the chat template, as in
    {"enable_thinking": False}, and `system` is the system message of every conversation that has
    none; `LanguageModel.with_chat` changes both. Python code that comes with a model runs only if
    `trust_remote_code` says so.

    `options` go to transformers' from_pretrained: attn_implementation, quantization_config,
    max_memory, offload_folder, offload_buffers; token, cache_dir, local_files_only,
    force_download.

    How much memory the weights take is said where it is much, and warned about where it is more
    than is free. Raises TrimtabError, in one line, with what cannot be loaded and why.
    """
    name, revision = _name_and_revision(str(source), revision)
    _check_options(options)
    if device_map is not None and device != "auto":
        raise TrimtabError("device_map says where a model goes: leave device out")
    place = device_of(device)
    making = {key: options.pop(key) for key in _OF_MODEL if key in options}
    making |= how_held(dtype, place, device_map, quantise, making.get("quantization_config"))
    opening = _Opening(
        {**options, "trust_remote_code": trust_remote_code is True},
        making,
        bits_of(making.get("quantization_config")),
        places_of(place, making.get("device_map")),
    )
    path = _locate(name)
    if revision is not None and Path(path).is_dir():
        raise TrimtabError(f"{name} is not of the hub: it has no revision {revision!r}")
    full = name
    if revision is not None:
        full, opening = f"{name}@{revision}", opening.at(revision=revision)
    try:
        with _shown(full):
            model, readers = _read(path, opening)
    except CheckpointError as error:
        raise TrimtabError(
            f"cannot load the model {full!r}: {error} (packs: {', '.join(packs.PACKS)}; or a "
            "directory, a .gguf file, a hub id)"
        ) from error
    if "device_map" not in making:
        try:
            model = model.to(place)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            reason = first_line(error)
            raise TrimtabError(f"cannot move {full!r} to {place}: {reason}") from error
    language_model = wrap(
        model, readers.tokenizer, full, chat_options, system, processor=readers.processor
    )
    language_model.no_processor = readers.no_processor
    language_model.baked = read_baked(Path(path))
    return language_model


def _shown(name: str) -> AbstractContextManager[Any]:
    """That a model is loaded, unless transformers shows it with bars of its own."""
    from transformers.utils.logging import is_progress_bar_enabled

    return nullcontext() if is_progress_bar_enabled() else status(f"loading {name}")


@dataclass(frozen=True)
class _Opening:
    """How the files of a model are read: `origin` says where they are, `making` how a model is made
    of them, which then takes memory at `places`, in fewer `bits` or not."""

    origin: dict[str, Any]
    making: dict[str, Any]
    bits: str | None
    places: tuple[torch.device, ...]

    def at(self, **origin: Any) -> _Opening:
        """The same with more said about where the files are."""
        return replace(self, origin={**self.origin, **origin})


def _name_and_revision(name: str, revision: str | None) -> tuple[str, str | None]:
    """ID@REVISION apart, unless a file or directory is called so."""
    before, at, after = name.rpartition("@")
    if not at or not before or not after or exists(user_path(name)):
        return name, revision
    if revision is not None:
        raise TrimtabError(f"{name} names a revision, and revision= {revision!r}: give one of them")
    return before, after


def _check_options(options: Mapping[str, Any]) -> None:
    known = (*_OF_MODEL, *_OF_ORIGIN)
    unknown = [key for key in options if key not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], (*_OWN, *known), 1)
        meant = f", did you mean {near[0]}?" if near else ":"
        raise TrimtabError(
            f"load has no argument {unknown[0]!r}{meant} it hands on {', '.join(known)}; for "
            "others load the model with transformers, and wrap(model, tokenizer)"
        )


#: The files that an image processor is in, each enough by itself.
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_OWN = tuple(inspect.signature(load).parameters)


@dataclass(frozen=True)
class _Readers:
    """What makes a model's inputs: its tokenizer, and of one that sees images its processor, or
    why there is none."""

    tokenizer: Any
    processor: Any = None
    no_processor: str = ""


def _read(path: str, opening: _Opening) -> tuple[Any, _Readers]:
    """A directory's or a hub id's model, and what makes its inputs."""
    directory = Path(path)
    if directory.is_dir():
        if is_adapter(directory):
            return _read_adapter(directory, opening)
        opening = opening.at(local_files_only=True)
    else:
        path, opening = _asked_hub(path, opening)
    model = _read_whole(path, opening)
    return model, _read_readers(path, opening, model)


def _asked_hub(name: str, opening: _Opening) -> tuple[str, _Opening]:
    """From where and how a model of the hub is read, once the hub has been asked for it."""
    note(f"looking for {name} on the hub")
    found = find_on_hub(name, opening.origin)
    if not found.reached:
        note(f"{name} is taken from the cache of the hub's files")
        opening = opening.at(local_files_only=True)
    _say_size_of_found(name, found, opening)
    if found.reached or found.cached is None:
        return name, opening
    # By its name transformers asks the hub for an adapter in any case, many times.
    return str(found.cached), opening.at(revision=None)


def _say_size_of_found(name: str, found: Found, opening: _Opening) -> None:
    if found.cached is not None:
        with suppress(CheckpointError):  # some of its files are not here yet
            return _say_size(name, found.cached, opening)
    if found.parameters:
        counts = counted_on_hub(found.parameters)
        return say_size(name, counts, opening.making["dtype"], opening.bits, opening.places)
    return note(f"how much memory the weights of {name} take is not known before they are here")


def _say_size(name: str, directory: Path, opening: _Opening) -> None:
    counts, quantised = counted(directory)
    dtype = None if quantised else opening.making["dtype"]
    say_size(name, counts, dtype, None if quantised else opening.bits, opening.places)


def _read_whole(path: str, opening: _Opening) -> Any:
    if Path(path).is_dir():
        check_files(Path(path))
        _say_size(Path(path).name, Path(path), opening)
    _check_attention(opening)
    config = read_config(path, **opening.origin)
    if opening.bits is not None and getattr(config, "quantization_config", None) is not None:
        raise CheckpointError("it is quantised already, in its files: leave quantising out")
    model, found = read_model(
        _class_for(config), path, config=config, **opening.origin, **opening.making
    )
    found.check()
    _warn(model, found, path)
    return model


def _class_for(config: Any) -> Any:
    """The class of transformers that reads a model: with its images, where the checkpoint is one
    that has them (others of the same kind are its text decoder alone)."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    seeing = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    if seeing is not None and seeing in (config.architectures or ()):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _check_attention(opening: _Opening) -> None:
    """Code of the hub is not run unasked, by whatever name."""
    wanted = opening.making.get("attn_implementation")
    if "/" in str(wanted) and not opening.origin["trust_remote_code"]:
        raise CheckpointError(
            f"attn_implementation {wanted!r} is code of the hub; read it, then load the model with "
            "trust_remote_code=True (--trust-remote-code)"
        )


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


def _read_tokenizer(path: str, opening: _Opening) -> Any:
    from transformers import AutoTokenizer

    if Path(path).is_dir():
        check_tokenizer_files(Path(path))
    with damage_is_said():
        return AutoTokenizer.from_pretrained(path, **opening.origin)


def _read_readers(path: str, opening: _Opening, model: Any) -> _Readers:
    """The tokenizer, and the processor of a model that sees images."""
    return _Readers(_read_tokenizer(path, opening), *_read_processor(path, opening, model))


def _read_processor(path: str, opening: _Opening, model: Any) -> tuple[Any, str]:
    """The processor of a model that sees images, or why there is none: it still reads text."""
    from transformers import AutoProcessor

    if not image_tokens(model.config):
        return None, ""
    lacking = f"there is no image processor among its files ({' or '.join(_PROCESSORS)})"
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in _PROCESSORS):
        return None, lacking
    try:
        with damage_is_said():
            processor = AutoProcessor.from_pretrained(path, **opening.origin)
    except CheckpointError as error:
        # Those that read films too need it, and do not say so.
        install = "" if find_spec("torchvision") else "; try after pip install torchvision"
        return None, f"its processor cannot be loaded: {error}{install}"
    if getattr(processor, "image_processor", None) is None:
        return None, lacking
    return processor, ""


def _read_adapter(directory: Path, opening: _Opening) -> tuple[Any, _Readers]:
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
    own = any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    here = opening.at(local_files_only=True)
    if Path(base).is_dir():
        of_base = here
    else:
        revision = config.get("revision")
        base, of_base = _asked_hub(base, opening.at(revision=revision) if revision else opening)
    model = _read_whole(base, of_base)
    with damage_is_said():
        Misfit(model, model.load_adapter(str(directory)).to_dict()).check()
    tokenizer = _read_tokenizer(str(directory), here) if own else _read_tokenizer(base, of_base)
    return model, _Readers(tokenizer, *_read_processor(base, of_base, model))


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
    near = packs.similar(name)
    if near:  # before the hub is asked for what it does not have
        raise TrimtabError(
            f"cannot load the model {name!r}: it is no pack (did you mean {near}?) and no "
            "directory here; a model of the hub is OWNER/NAME"
        )
    return name


def directory_of(source: str | Path) -> Path | None:
    """The directory that a pack, a directory or a .gguf file is read from; None for what is a
    model of the hub, if it is one."""
    path = Path(_locate(str(source)))
    return path if path.is_dir() else None


def locations(name: str) -> list[str]:
    """The directories that a model of this name would be read from, nothing downloaded."""
    if name in packs.PACKS:
        return [str(packs.location(name))]
    found = [os.path.expanduser(name)]
    with suppress(CheckpointError, KeyError):
        found.append(str(read_json(Path(found[0]) / ADAPTER_CONFIG)["base_model_name_or_path"]))
    return found
