"""The tensors of a checkpoint by name, read one at a time: from the files of a directory, where two
checkpoints name their tensors alike, else from models that were loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.checkpoints import CheckpointError, check_files, is_adapter, read_config, read_json
from trimtab.errors import TrimtabError, first_line, shown
from trimtab.model import LanguageModel, directory_of, load, plain_copy

#: A checkpoint as a user names it: a pack, a directory, a .gguf file, a hub id, or a loaded model.
Source = str | Path | LanguageModel
#: What a configuration says that is no part of what the model computes.
_ASIDE = {
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache",
    "model_type", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "name",
}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """A checkpoint's tensors: `shapes` by name, and `read` for one of them. `tied` are names of a
    tensor that has another name, too; `model` is the one that was loaded, if one was."""

    name: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    vocabulary: Callable[[], Mapping[str, int] | None]
    tied: frozenset[str] = frozenset()
    model: LanguageModel | None = None

    @property
    def kind(self) -> str:
        return str(self.config.get("model_type"))


def both(
    base: Source, other: Source, loaded: bool = False, trust_remote_code: bool = False
) -> tuple[Weights, Weights]:
    """Two checkpoints whose tensors are those of one architecture, or a TrimtabError in one line.
    With `loaded` as models, BASE in the type of OTHER."""
    one, two = _from_files(base), _from_files(other)
    if one is not None and two is not None:
        if _misfit(one, two) is None:
            _refuse_other_tokens(one, two)
            if not loaded:
                return one, two
        elif _hopeless(one, two):  # before memory is filled with them
            raise _unlike(one, two)
    second = of_model(_loaded(other, "checkpoint", trust_remote_code))
    assert second.model is not None
    first = of_model(_loaded(base, second.model.dtype, trust_remote_code))
    if _misfit(first, second) is not None:
        raise _unlike(first, second)
    _refuse_other_tokens(first, second)
    return first, second


def _unlike(base: Weights, other: Weights) -> TrimtabError:
    return TrimtabError(
        f"{shown(base.name)} and {shown(other.name)} cannot be compared: {_misfit(base, other)}"
    )


def _hopeless(base: Weights, other: Weights) -> bool:
    """Whether two checkpoints do not go together whatever their files are read as: a tensor of one
    name has two sizes, or most names of two architectures are in only one of them."""
    common = base.shapes.keys() & other.shapes.keys()
    if any(base.shapes[name] != other.shapes[name] for name in common):
        return True
    return base.kind != other.kind and 2 * len(common) < len(base.shapes)


def _loaded(source: Source, dtype: Any, trust_remote_code: bool) -> LanguageModel:
    if isinstance(source, LanguageModel):
        return source
    return load(source, dtype=dtype, device="cpu", trust_remote_code=trust_remote_code)


# -- from files -----------------------------------------------------------------------------------


def _from_files(source: Source) -> Weights | None:
    """The tensors of a directory; None where a model must be loaded to have them."""
    if isinstance(source, LanguageModel):
        return None
    directory = directory_of(source)
    if directory is None or is_adapter(directory):
        return None
    try:
        check_files(directory)
        config = _config_in(directory)
        places = dict(_places(directory))
    except CheckpointError as error:
        raise TrimtabError(f"cannot read {shown(source, 150)}: {error}") from error
    if config.get("quantization_config") is not None:
        raise _quantised(str(source))

    def read(name: str) -> Tensor:
        file, _ = places[name]
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    return Weights(
        str(source),
        config,
        {name: shape for name, (_, shape) in places.items()},
        read,
        lambda: _vocabulary_in(directory),
    )


def _config_in(directory: Path) -> dict[str, Any]:
    """A configuration with all that it leaves to its architecture; of an architecture that is not
    known here, or comes as code, what its file says."""
    raw = read_json(directory / "config.json")
    try:
        config = read_config(str(directory), trust_remote_code=False, local_files_only=True)
    except CheckpointError:
        return raw
    return _whole(config)


def _whole(config: Any) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return whole


def _places(directory: Path) -> Iterator[tuple[str, tuple[Path, tuple[int, ...]]]]:
    """In which file each tensor is, and its shape."""
    index = directory / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if not (directory / "model.safetensors").exists():
        names = set(read_json(index)["weight_map"].values())
    for name in sorted(names):
        try:
            with safe_open(directory / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    yield key, (directory / name, tuple(file.get_slice(key).get_shape()))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {name}: {first_line(error)}") from error


def _vocabulary_in(directory: Path) -> Mapping[str, int] | None:
    file = directory / "tokenizer.json"
    if not file.exists():
        return None
    from tokenizers import Tokenizer

    try:
        vocabulary: dict[str, int] = Tokenizer.from_file(str(file)).get_vocab()
    except Exception as error:  # whatever a damaged file makes of it
        raise TrimtabError(f"cannot read {shown(file, 150)}: {first_line(error)}") from error
    return vocabulary


def _quantised(name: str) -> TrimtabError:
    return TrimtabError(
        f"{shown(name, 150)} is quantised, and its numbers stand for others: compare the "
        "unquantised checkpoints"
    )


# -- from models ----------------------------------------------------------------------------------


def of_model(language_model: LanguageModel) -> Weights:
    """The tensors of a model, with adapters merged into them."""
    if language_model.quantised:
        raise _quantised(language_model.name)
    model = plain_copy(language_model.model, language_model.name)
    state: dict[str, Tensor] = {
        name: tensor.detach().cpu() for name, tensor in model.state_dict().items()
    }
    seen: dict[int, str] = {}
    tied = {
        name
        for name, tensor in model.state_dict().items()
        if tensor.numel() and seen.setdefault(tensor.data_ptr(), name) != name
    }
    return Weights(
        language_model.name,
        _whole(model.config),
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        state.__getitem__,
        lambda: language_model.tokenizer.get_vocab(),
        frozenset(tied),
        language_model,
    )


# -- whether two go together ----------------------------------------------------------------------


def _misfit(base: Weights, other: Weights) -> str | None:
    """Why two checkpoints are not of one architecture. Biases that only one of them has are zeros
    in the other, as baking leaves them."""
    alone = sorted(base.shapes.keys() ^ other.shapes.keys())
    alone = [name for name in alone if not name.endswith("bias")]
    common = base.shapes.keys() & other.shapes.keys()
    for name in sorted(common):
        if base.shapes[name] != other.shapes[name]:
            sizes = list(base.shapes[name]), list(other.shapes[name])
            return f"{shown(name)} is {sizes[0]} in the one and {sizes[1]} in the other"
    if alone:
        kinds = (
            "" if base.kind == other.kind else f"the one is {base.kind}, the other {other.kind}: "
        )
        one = "tensor is" if len(alone) == 1 else "tensors are"
        return f"{kinds}{len(alone)} {one} in only one of them, {shown(alone[0])} first"
    return None


def _refuse_other_tokens(base: Weights, other: Weights) -> None:
    one, two = base.vocabulary(), other.vocabulary()
    if one is None or two is None or one == two:
        return
    odd = sorted(token for token in one.keys() | two.keys() if one.get(token) != two.get(token))
    raise TrimtabError(
        f"{shown(base.name)} and {shown(other.name)} cannot be compared: their tokenizers differ "
        f"in {len(odd)} tokens, {shown(odd[0], 30)!r} first"
    )


def config_changes(base: Weights, other: Weights) -> dict[str, tuple[Any, Any]]:
    """What the two configurations say differently of what a model computes."""
    names = sorted((base.config.keys() | other.config.keys()) - _ASIDE)
    found = {name: (base.config.get(name), other.config.get(name)) for name in names}
    return {name: (one, two) for name, (one, two) in found.items() if _differ(one, two)}


def _differ(one: Any, two: Any) -> bool:
    # What is left out, and what is off, is the same.
    return one != two and not (one in (None, False) and two in (None, False))


def side_by_side(name: str, *weights: Weights) -> list[Tensor]:
    """A tensor of some checkpoints, in the type of the last one's; a bias that one lacks is
    zero."""
    held = [each.read(name) if name in each.shapes else None for each in weights]
    like = next(tensor for tensor in reversed(held) if tensor is not None)
    return [torch.zeros_like(like) if one is None else one.to(like.dtype) for one in held]
