"""PEFT's adapters: a linear steering without a constant is exactly a small LoRA adapter.

PEFT adds `lora_alpha / r` times up down to a weight. Where one steering alone is linear in its dial
at every map, up and down are those of dial 1 and lora_alpha is r times the dial, so that the dial
can be turned in adapter_config.json; else lora_alpha is r, and the dial is in the numbers. Beside
the adapter, under trimtab/, lie the steerings that it holds, and trimtab.json says what they are,
as it does of baked weights; the engines that read adapters leave both alone.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trimtab.anatomy import Anatomy
from trimtab.checkpoints import RECORD, write_record
from trimtab.errors import TrimtabError, TrimtabWarning, first_line, shown
from trimtab.exchange.changes import (
    ChangedMap,
    Left,
    changed_maps,
    left_out,
    maps_at,
    only,
    without,
)
from trimtab.exchange.directories import whole_directory
from trimtab.exchange.low_rank import is_linear_in_dial
from trimtab.exchange.request import Exported, Request
from trimtab.files import exists, json_object
from trimtab.model import LanguageModel, has_adapters, locations, plain_copy, record_of, unlike
from trimtab.steering import Steering, Steerings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: Where the steerings lie: a folder, because SGLang takes every .safetensors file beside the
#: adapter for a part of it.
OWN = "trimtab"
_NAMES = {CONFIG, WEIGHTS, RECORD, OWN}
#: In the metadata of the adapter's weights: what it is.
_KEY = "trimtab"
_FORMAT = 1
#: The ranks that vLLM makes room for.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_PRECISIONS = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def write(request: Request, *, dials: Sequence[float] = (), precision: str = "float32") -> Exported:
    """An adapter's directory for PEFT and engines that read its files.

    `dials` makes several adapters of one steering, in a directory each, named by its dial. Numbers
    are stored in float32, or in another `precision`: float64, bfloat16, float16.
    """
    if precision not in _PRECISIONS:
        raise TrimtabError(f"precision is {shown(precision)!r}: known are {', '.join(_PRECISIONS)}")
    output, dtype = request.output, _PRECISIONS[precision]
    refuse_model(request.language_model)
    refuse_conditions(request.steerings)
    if dials and len(request.steerings) > 1:
        raise TrimtabError("several dials are for one steering: export it alone, or name one dial")
    turned = [request.steerings[0].at(dial) for dial in dials]
    named = {_dial_name(steering.setting): (steering,) for steering in turned}
    adapters = {
        name: adapter_of(replace(request, steerings=steerings))
        for name, steerings in (named if dials else {"": request.steerings}).items()
    }
    with whole_directory(output, request.overwrite, _is_ours) as work:
        for name, adapter in adapters.items():
            _save(adapter, work / name, dtype)
    made = list(adapters.values())
    # Of several dials each leaves out the same.
    left = {(each.steering, id(each.intervention)): str(each) for one in made for each in one.left}
    return Exported(
        "lora",
        tuple(output / name for name in adapters),
        exact=precision in ("float32", "float64"),
        left_out=tuple(left.values()),
        details={"adapters": [one.details for one in made]} if dials else made[0].details,
        use=_use({output / name: adapter for name, adapter in adapters.items()}),
    )


def _dial_name(dial: float) -> str:
    """How a directory is named by a dial: 12, not 12.0."""
    return str(int(dial) if dial == int(dial) else dial)


def _use(adapters: Mapping[Path, Adapter]) -> tuple[str, ...]:
    """How PEFT and vLLM take the adapters."""
    configs = [adapter.config for adapter in adapters.values()]
    modules = " ".join(f"{path.name}={path}" for path in adapters)
    base = configs[0]["base_model_name_or_path"]
    here = next((place for place in locations(base) if exists(Path(place))), base)
    return (
        f'PeftModel.from_pretrained(model, "{next(iter(adapters))}")',
        f"vllm serve {here} --enable-lora "
        f"--max-lora-rank {max(config['r'] for config in configs)} --lora-modules {modules}",
    )


def refuse_model(language_model: LanguageModel) -> None:
    """Refuse weights that are no plain ones: what an adapter adds is computed from them."""
    name = shown(language_model.name)
    if language_model.quantised:
        raise TrimtabError(
            f"{name} is quantised, and what an adapter adds is computed from weights: export from "
            "the unquantised model; the adapter works on both"
        )
    if has_adapters(language_model.model):
        raise TrimtabError(
            f"{name} carries an adapter, and a second one would belong to the two together: merge "
            "it (merge_and_unload), save that model and export from it, or attach the steering"
        )


def refuse_conditions(steerings: Sequence[Steering]) -> None:
    """Refuse a steering under a condition, which no weights know."""
    for steering in steerings:
        if steering.gate is not None:
            raise TrimtabError(
                f"an adapter cannot carry the gate of a {shown(steering.method)} steering: weights "
                "act on every text alike; attach it, or take the gate away"
            )


# -- what an engine needs for it ------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """What an engine must have for an adapter: a wrapper at these modules, by their paths, and
    room for this rank."""

    modules: tuple[str, ...]
    rank: int


def needs(language_model: LanguageModel, steerings: Sequence[Steering]) -> Needs:
    """What an engine needs to take steerings as one adapter; nothing is computed by the model.
    Refuses what `write` would refuse, and experts, whose weights engines hold in other forms."""
    refuse_model(language_model)
    refuse_conditions(steerings)
    left = left_out(language_model.anatomy, steerings)
    _refuse_left(left, (), split=False)
    maps = changed_maps(language_model.anatomy, steerings)
    targets = _targets(language_model.model, maps)
    for target in targets:
        if target.parameter is not None:
            raise TrimtabError(
                f"its adapter adds to {target.path}.{target.parameter}, which is no linear map of "
                "its own, and engines read adapters of such weights in other forms: bake it, or "
                "attach it"
            )
    paths = tuple(target.path for target in targets)
    return Needs(paths, _padded(max((each.rank for each in maps), default=1)))


def modules_at(language_model: LanguageModel, sites: Sequence[str]) -> tuple[str, ...]:
    """The paths of the modules that adapters of steerings at some sites change."""
    anatomy = language_model.anatomy
    paths = {id(module): path for path, module in language_model.model.named_modules()}
    found = [
        paths[id(each.owner.get_submodule(each.weight.rpartition(".")[0]))]
        for site in sites
        for each in maps_at(anatomy, site)
    ]
    return tuple(dict.fromkeys(found))


# -- one adapter ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """What an adapter says of itself, and its tensors (float64) by PEFT's names."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    #: The same changes as the maps have them, not filled up to the rank.
    targets: tuple[Target, ...]
    record: dict[str, Any]
    #: What is in the model's own weights, and in the adapter.
    baked: tuple[dict[str, Any], ...]
    steerings: tuple[Steering, ...]
    #: What the adapter cannot carry, and the steerings with nothing but that.
    left: tuple[Left, ...]
    rest: tuple[Steering, ...]

    @property
    def details(self) -> dict[str, Any]:
        """For people and programs."""
        return {
            "steering": Steerings(self.steerings).label,
            "rank": self.config["r"],
            "lora_alpha": self.config["lora_alpha"],
            "dial_in_alpha": self.record["dial_in_alpha"],
            "weights": len(self.tensors) // 2,
        }


def adapter_of(request: Request) -> Adapter:
    """The adapter that adds what the steerings change, proved by the model's own logits."""
    lm, steerings = request.language_model, request.steerings
    left = left_out(lm.anatomy, steerings)
    kept = without(steerings, left)
    _refuse_left(left, kept, request.split)
    copied = plain_copy(lm.model, lm.name)
    anatomy = Anatomy(copied, like=lm.anatomy)
    maps = changed_maps(anatomy, kept)
    if not maps:
        raise TrimtabError(
            f"{Steerings(kept).label} does nothing, so that there is no adapter to write: turn the "
            "dial (FILE@DIAL)"
        )
    rank = _padded(max(each.rank for each in maps))
    in_alpha = _is_linear(kept, maps)
    if in_alpha:
        maps = changed_maps(anatomy, [replace(kept[0], value=1.0)])
    scale = kept[0].setting if in_alpha else 1.0
    targets = _targets(copied, maps)
    tensors = _tensors(targets, rank)
    config = _config(lm, targets, rank, rank * scale)
    for each in maps:
        each.apply(scale)
    share = unlike(lm, kept, copied, request.force)
    if share is not None:
        raise TrimtabError(
            f"cannot export from {lm.name}: on a short text the adapted model's logits differ from "
            f"the steered model's by {share:.2g} of the largest, so something else reads or writes "
            "there than is known; attach the steering instead"
        )
    base = dict(vars(lm.identity))
    held = [record_of(steering, base) for steering in kept]
    record = {
        "format": _FORMAT,
        "steerings": held,
        "dial_in_alpha": in_alpha,
        "left_out": [str(each) for each in left],
    }
    baked, rest = (*lm.baked, *held), tuple(only(steerings, left))
    return Adapter(config, tensors, tuple(targets), record, baked, tuple(kept), tuple(left), rest)


def _refuse_left(left: Sequence[Left], kept: Sequence[Steering], split: bool) -> None:
    """Refuse what an adapter cannot carry, unless the rest is wanted, and there is one."""
    if not left or (split and kept):
        return
    more = f", and {len(left) - 1} more" if len(left) > 1 else ""
    remedy = " (--split writes the rest)" if kept else ""
    raise TrimtabError(f"an adapter cannot carry {left[0]}{more}{remedy}")


def _is_linear(steerings: Sequence[Steering], maps: Sequence[ChangedMap]) -> bool:
    """Whether twice the dial is twice what is added to every weight."""
    return (
        len(steerings) == 1
        and all(each.meeting == 1 for each in maps)
        and all(is_linear_in_dial(each.operator) for each in steerings[0].interventions)
    )


def _padded(rank: int) -> int:
    """A rank that engines make room for."""
    for known in _RANKS:
        if rank <= known:
            return known
    warnings.warn(
        f"the adapter has rank {rank}: vLLM takes no more than {_RANKS[-1]}, and others may not "
        "either; bake the steering, or choose fewer units",
        TrimtabWarning,
        stacklevel=2,
    )
    return rank


# -- as PEFT names and stores it -----------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """Where PEFT puts a map's change: at a linear map's module, or at one of a module's parameters
    (fused experts have no modules of their own)."""

    changed: ChangedMap
    module: nn.Module
    path: str
    #: The parameter's name, None where the module is a linear map itself.
    parameter: str | None

    @property
    def weight(self) -> str:
        """The weight's name in the model."""
        return f"{self.path}.{self.parameter or 'weight'}"


#: What PEFT takes, in a mixture, for names of what each expert had before experts were fused; a
#: dense block's maps of these names it knows by their parameters.
_NAMES_OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")

#: Where PEFT lets nothing be added to an `out_proj`, because most Mambas read its weight apart.
_MAMBAS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


def _targets(model: Any, maps: Sequence[ChangedMap]) -> list[Target]:
    paths = {id(module): path for path, module in model.named_modules()}
    mixture = any(parameter.dim() == 3 for parameter in model.parameters())
    targets = []
    for changed in maps:
        inner, _, name = changed.linear_map.weight.rpartition(".")
        module = changed.linear_map.owner.get_submodule(inner)
        path = paths[id(module)]
        if path.endswith(".out_proj") and model.config.model_type in _MAMBAS:
            raise TrimtabError(
                f"PEFT adds nothing to {path} in {model.config.model_type}: bake the steering, or "
                "attach it"
            )
        plain = type(module) in (nn.Linear, Conv1D) and name == "weight"
        if mixture and path.rpartition(".")[2] in _NAMES_OF_EXPERTS:
            plain = False
        targets.append(Target(changed, module, path, None if plain else name))
    return sorted(targets, key=lambda target: (target.path, target.parameter or ""))


def _tensors(targets: Sequence[Target], rank: int) -> dict[str, Tensor]:
    """lora_A and lora_B of every target, float64, filled up with zeros to the rank."""
    tensors: dict[str, Tensor] = {}
    for target in targets:
        down, up = target.changed.down, target.changed.up
        if target.parameter is not None and _is_swapped(target):
            down, up = up.mT, down.mT
        down = nn.functional.pad(down, (0, 0, 0, rank - target.changed.rank))
        up = nn.functional.pad(up, (0, rank - target.changed.rank))
        if down.dim() == 3:  # of experts: one below the other, and with the expert running fastest
            down, up = down.flatten(0, 1), up.permute(1, 2, 0).flatten(1)
        key = _key(target, targets)
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    return tensors


def _is_swapped(target: Target) -> bool:
    """Whether PEFT takes for what a parameter reads what it writes."""
    linear_map = target.changed.linear_map
    if linear_map.read().dim() < 3:
        return linear_map.transposed
    return linear_map.transposed is not bool(getattr(target.module, "is_transposed", False))


def _key(target: Target, targets: Sequence[Target]) -> str:
    """PEFT wraps a module once for each of its parameters, in their order, so that the last one's
    wrapper is outermost."""
    key = f"base_model.model.{target.path}"
    if target.parameter is None:
        return key
    own = [name for name, _ in target.module.named_parameters(recurse=False)]
    wrapped = {other.parameter for other in targets if other.module is target.module}
    inside = sum(name in wrapped for name in own[own.index(target.parameter) + 1 :])
    return key + ".base_layer" * inside


def _config(
    language_model: LanguageModel, targets: Sequence[Target], rank: int, alpha: float
) -> dict[str, Any]:
    """adapter_config.json."""
    base, revision = _base_of(language_model)
    modules = [target for target in targets if target.parameter is None]
    parameters = [f"{target.path}.{target.parameter}" for target in targets if target.parameter]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": [target.path for target in modules],
        **({"target_parameters": parameters} if parameters else {}),
        "fan_in_fan_out": bool(modules) and all(type(one.module) is Conv1D for one in modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _base_of(language_model: LanguageModel) -> tuple[str, str | None]:
    """The name by which others find the model, and its revision on the hub."""
    name = language_model.name
    if exists(Path(name)):
        return str(Path(name).absolute()), None
    name, _, revision = name.partition("@")
    return name, revision or None


# -- the directory -------------------------------------------------------------------------------


def _save(adapter: Adapter, directory: Path, dtype: torch.dtype) -> None:
    """Write one adapter."""
    tensors = {
        name: tensor.to(dtype=dtype, device="cpu").contiguous()
        for name, tensor in adapter.tensors.items()
    }
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise TrimtabError(
                f"{name} is NaN or infinite in {str(dtype).removeprefix('torch.')}: turn the dial "
                "down, or store the adapter in float32"
            )
    directory.mkdir(exist_ok=True)
    text = json.dumps(adapter.config, indent=2) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")
    record = json.dumps({**adapter.record, "tensors": _checksum(tensors)}, ensure_ascii=False)
    save_file(tensors, directory / WEIGHTS, {"format": "pt", _KEY: record})
    write_record(directory, adapter.baked)
    (directory / OWN).mkdir()
    for number, steering in enumerate(adapter.steerings, 1):
        steering.save(directory / OWN / f"{number}.safetensors")
    for number, steering in enumerate(adapter.rest, 1):
        steering.save(directory / OWN / f"left-{number}.safetensors")


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is_ours(directory: Path) -> bool:
    """Whether a directory holds an adapter as it is written here, or several, and nothing else."""
    return _is_adapter(directory) or all(map(_is_adapter, directory.iterdir()))


def _is_adapter(directory: Path) -> bool:
    if not directory.is_dir() or {file.name for file in directory.iterdir()} != _NAMES:
        return False
    return all(file.suffix == ".safetensors" for file in (directory / OWN).iterdir())


# -- read again ----------------------------------------------------------------------------------


def recognises(path: Path) -> bool:
    """Whether a path is an adapter's directory, ours or not."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(directory: Path) -> Steerings:
    """The steerings that an adapter of ours holds, at their dials, after every check.

    Where the dial is in lora_alpha it is read from there, so that it may have been turned.
    """
    where = shown(directory, 200)
    record, checksum = _record_in(directory)
    config = _read_config(directory / CONFIG)
    if record.get("tensors") != checksum:
        raise TrimtabError(
            f"{where} was changed after it was exported, so that it is no longer its steering: "
            "export it again"
        )
    said = record["steerings"]
    steerings = [
        Steering.load(directory / OWN / f"{number}.safetensors")
        for number in range(1, len(said) + 1)
    ]
    for steering, one in zip(steerings, said, strict=True):
        if steering.digest != one.get("digest"):
            raise TrimtabError(
                f"{where} holds another steering than {shown(one.get('label'))}, which it says it "
                "is of: export it again"
            )
    factor = float(config["lora_alpha"]) / float(config["r"])
    if record["dial_in_alpha"]:
        return Steerings([steerings[0].at(factor)])
    if abs(factor - 1) > 1e-9:
        raise TrimtabError(
            f"{where} has a lora_alpha of {config['lora_alpha']:g} for r = {config['r']:g}, which "
            "is no dial of its steering: export it at the dial that is wanted"
        )
    return Steerings(steerings)


def _record_in(directory: Path) -> tuple[dict[str, Any], str]:
    """What the weights say of themselves, and their checksum."""
    where = shown(directory, 200)
    try:
        with safe_open(directory / WEIGHTS, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = first_line(error) or type(error).__name__
        raise TrimtabError(f"{where}: {WEIGHTS} cannot be read: {shown(reason)}") from error
    if _KEY not in metadata:
        raise TrimtabError(
            f"{where} is an adapter that was not exported from a steering, and no steering can be "
            "read off its weights: use it as a model (tt.load, --model)"
        )
    record = json_object(metadata[_KEY], f"{where}: its record")
    said = record.get("steerings")
    fits = isinstance(said, list) and said and all(isinstance(one, dict) for one in said)
    if record.get("format") != _FORMAT or not fits or type(record.get("dial_in_alpha")) is not bool:
        raise TrimtabError(f"{where}: its record is not of format {_FORMAT}")
    return record, _checksum(tensors)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json_object(path.read_text(encoding="utf-8"), shown(path, 200))
    except (OSError, UnicodeDecodeError) as error:
        raise TrimtabError(f"cannot read {shown(path, 200)}: {error}") from error
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if type(value) not in (int, float) or (name == "r" and not value):
            raise TrimtabError(f"{shown(path, 200)}: {name} is no number")
    return config
