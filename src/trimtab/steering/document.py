"""The file of a steering: how it is written, read, and checked before anything of it is used.

One .safetensors file holds the operators' tensors, and in its metadata one JSON document and a
checksum of all that. Nothing is ever unpickled. Here a steering is a dictionary of its fields.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trimtab.anatomy import parse_site
from trimtab.errors import TrimtabError, TrimtabWarning, first_line, shown
from trimtab.files import write_whole
from trimtab.steering.calibration import Calibration
from trimtab.steering.gate_document import GateDocument
from trimtab.steering.operators import Force, from_tensors, to_tensors
from trimtab.steering.parts import (
    STRICT,
    Dial,
    Finite,
    Intervention,
    ModelIdentity,
    Number,
    Word,
)
from trimtab.steering.scope import Place, Scope, Tokens
from trimtab.steering.scope_grammar import LONGEST

#: Files of format 2 have scopes that format 1 cannot say, which knows a place and a kind of tokens
#: only; files of format 3 have a gate. What an older format can say is written in it, so that older
#: versions read the file.
FORMAT_VERSION = 3
METADATA_KEY, GATE_KEY = "trimtab", "trimtab_gate"
_NAMES = {METADATA_KEY: "steering", GATE_KEY: "gate"}
#: SHA-256 of the document and the tensors. Beside the document, so that older versions, which know
#: no checksum, still read the file; files of theirs have none.
CHECKSUM_KEY = "trimtab_sha256"


class _InterventionDocument(BaseModel):
    model_config = STRICT

    site: str = Field(max_length=100)
    operator: Word
    positions: Place | None = None
    tokens: Tokens = "all"
    scope: str | None = Field(default=None, max_length=LONGEST)
    weight: Number = 1.0
    fields: dict[str, Any]


class _CalibrationDocument(BaseModel):
    model_config = STRICT

    kl: tuple[Number, ...]
    prompts: NonNegativeInt
    digest: Word
    positive: tuple[Number | None, ...]
    positive_worst5: tuple[Number | None, ...]
    negative: tuple[Number | None, ...]
    negative_worst5: tuple[Number | None, ...]


class _Document(BaseModel):
    """The JSON document in the file's metadata."""

    model_config = STRICT

    format: Literal[1, 2, 3] = Field(description="at most FORMAT_VERSION")
    method: Word
    hyperparameters: Finite
    dial: Dial
    value: Number | None
    calibration: _CalibrationDocument | None = None
    interventions: list[_InterventionDocument]
    gate: GateDocument | None = None
    model: ModelIdentity
    contrast: Finite
    findings: Finite = Field(default_factory=dict)
    versions: dict[str, str]
    date: str


def write(steering: Mapping[str, Any], path: Path, overwrite: bool) -> Path:
    """Write the fields of a steering as one file, whole or not at all; it passes what `read`
    checks."""
    tensors: dict[str, Tensor] = {}
    interventions = []
    for number, intervention in enumerate(steering["interventions"]):
        of_operator, others = to_tensors(intervention.operator)
        tensors |= {f"{number}.{name}": tensor for name, tensor in of_operator.items()}
        interventions.append(
            {
                "site": intervention.site,
                "operator": type(intervention.operator).__name__,
                **_scope_fields(intervention.scope),
                **({} if intervention.weight == 1 else {"weight": float(intervention.weight)}),
                "fields": others,
            }
        )
    tensors |= {f"table.{name}": tensor for name, tensor in steering["tables"].items()}
    gate = steering["gate"]
    if gate is not None:
        tensors |= {f"gate.{name}": tensor for name, tensor in gate.tensors.items()}
    dial, value, calibration = (steering[name] for name in ("dial", "value", "calibration"))
    low, high = dial.range
    scopes = any("scope" in each for each in interventions)
    others = {name: value for name, value in steering.items() if name not in ("tables", "gate")}
    document = others | {
        "format": 3 if gate is not None else 2 if scopes else 1,
        # Floats, as they come back: a file that is loaded and saved again stays as it is.
        "dial": asdict(dial) | {"default": float(dial.default), "range": [float(low), float(high)]},
        "value": None if value is None else float(value),
        "calibration": None if calibration is None else asdict(calibration),
        "interventions": interventions,
        "model": asdict(steering["model"]),
        **({} if gate is None else {"gate": gate.as_json()}),
    }
    text = _as_json(document, "this steering")
    _parse(text, tensors, "this steering")
    return _write(path, METADATA_KEY, text, tensors, overwrite)


def _as_json(document: Mapping[str, Any], what: str) -> str:
    try:
        text = json.dumps(document, sort_keys=True, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TrimtabError(
            f"{what} cannot be saved: what it says of itself must be JSON, and {shown(error, 150)}"
        ) from error
    return text


def _write(path: Path, key: str, text: str, tensors: dict[str, Tensor], overwrite: bool) -> Path:
    # Copies, because safetensors refuses tensors that share their memory.
    copies = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    metadata = {key: text, CHECKSUM_KEY: _checksum(text, copies)}
    if overwrite:
        refuse_other_file(path, key)
    return write_whole(path, _sorted(save(copies, metadata)), overwrite)


def read(path: Path) -> dict[str, Any]:
    """The fields of the steering in a file, after every check; of its gate what the document says,
    and the tensors."""
    text, tensors, checksum = _content(path, METADATA_KEY)
    steering = _parse(text, tensors, shown(path, 200))
    _check_sum(path, text, tensors, checksum)
    return steering


def _check_sum(path: Path, text: str, tensors: dict[str, Tensor], checksum: str | None) -> None:
    """Refuse a file that was changed. Last, because what is wrong with a value says more."""
    if checksum is not None and checksum != _checksum(text, tensors):
        raise TrimtabError(
            f"{shown(path, 200)} is damaged: what it holds is not what was saved (its checksum "
            "differs); copy or fit it again"
        )


class GateFile(BaseModel):
    """The JSON document of a gate that is a file of its own."""

    model_config = STRICT

    format: Literal[1]
    gate: GateDocument
    model: ModelIdentity | None
    contrast: Finite


def write_gate(
    gate: Mapping[str, Any], tensors: dict[str, Tensor], path: Path, overwrite: bool
) -> Path:
    """Write what a gate says of itself and its tensors as one file, whole or not at all; it passes
    what `read_gate` checks."""
    text = _as_json({"format": 1, **gate}, "this gate")
    _parse_gate(text, tensors, "this gate")
    return _write(path, GATE_KEY, text, tensors, overwrite)


def read_gate(path: Path) -> tuple[GateFile, dict[str, Tensor]]:
    """What the file of a gate says, and its tensors, after every check."""
    text, tensors, checksum = _content(path, GATE_KEY)
    document = _parse_gate(text, tensors, shown(path, 200))
    _check_sum(path, text, tensors, checksum)
    return document, tensors


def _parse_gate(text: str, tensors: dict[str, Tensor], source: str) -> GateFile:
    try:
        document = GateFile.model_validate_json(text)
    except ValidationError as error:
        raise _no_document(error, source, "gate of format 1") from error
    for name, tensor in tensors.items():
        _check_tensor(f"{source}: tensor '{shown(name)}'", tensor)
    return document


def _parse(text: str, tensors: dict[str, Tensor], source: str) -> dict[str, Any]:
    """The fields of a steering from its JSON document and its tensors."""
    try:
        document = _Document.model_validate_json(text)
    except ValidationError as error:
        raise _no_document(error, source, f"steering of format {FORMAT_VERSION}") from error
    calibration = None
    if document.calibration is not None:
        try:
            calibration = _calibration(document.calibration.model_dump(), source)
        except TrimtabError as error:
            raise TrimtabError(f"{source}: {error}") from error
    low, high = document.dial.range
    if low > high:
        raise TrimtabError(f"{source}: the dial's range is {low:g} to {high:g}")
    for name, tensor in tensors.items():
        _check_tensor(f"{source}: tensor '{shown(name)}'", tensor)
    owners = _by_owner(tensors)
    interventions = []
    for number, described in enumerate(document.interventions):
        own = owners.pop(str(number), {})
        try:
            interventions.append(_intervention(described, own, document.model.layers))
        except TrimtabError as error:
            raise TrimtabError(f"{source}, {shown(described.site, 60)}: {error}") from error
    if not any(intervention.acts for intervention in interventions):
        raise TrimtabError(
            f"{source} does nothing: it has no intervention that changes an activation"
        )
    tables = owners.pop("table", {})
    gate = None if document.gate is None else (document.gate, owners.pop("gate", {}))
    if owners:
        of_owners = {id(tensor) for own in owners.values() for tensor in own.values()}
        foreign = min(name for name, tensor in tensors.items() if id(tensor) in of_owners)
        raise TrimtabError(f"{source}: unexpected tensor '{shown(foreign)}'")
    given = {name: getattr(document, name) for name in _Document.model_fields if name != "format"}
    return given | {
        "interventions": tuple(interventions),
        "tables": tables,
        "calibration": calibration,
        "gate": gate,
    }


def _no_document(error: ValidationError, source: str, what: str) -> TrimtabError:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "its document"
    return TrimtabError(f"{source} is not a trimtab {what}: {shown(where)}: {shown(first['msg'])}")


def _scope_fields(scope: Scope) -> dict[str, str]:
    """A scope as format 1 says it, where that can; the kind of tokens where it is not all, so that
    versions which know none read the rest."""
    placed = scope.as_placed
    if placed is None:
        return {"scope": str(scope)}
    positions, tokens = placed
    return {"positions": positions, **({} if tokens == "all" else {"tokens": tokens})}


def _scope(described: _InterventionDocument) -> Scope:
    if (described.scope is None) is (described.positions is None):
        raise TrimtabError("an intervention has one of positions and scope")
    if described.scope is not None:
        return Scope.parse(described.scope)
    assert described.positions is not None
    return Scope.placed(described.positions, described.tokens)


def kind_of_file(path: str | Path) -> str | None:
    """Whether a file is a steering or a gate; None where it is neither, or cannot be read."""
    try:
        with safe_open(Path(path).expanduser(), framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError):
        return None
    return next((name for key, name in _NAMES.items() if key in metadata), None)


def refuse_other_file(path: Path, key: str = METADATA_KEY) -> None:
    """Refuse to overwrite what is no steering (or no gate, by its key): the weights of a model, the
    texts of a contrast."""
    if not path.is_file():
        return
    if kind_of_file(path) != _NAMES[key]:
        raise TrimtabError(
            f"{path} is not a {_NAMES[key]}, and overwriting replaces only those: choose another "
            "name"
        )


def _content(path: Path, key: str) -> tuple[str, dict[str, Tensor], str | None]:
    """The JSON text and the tensors of a file, and its checksum where it has one."""
    where = shown(path, 200)
    try:
        there = path.is_file()
    except OSError as error:  # a name that is too long, a directory that may not be searched
        raise TrimtabError(f"cannot read {where}: {error.strerror or error}") from error
    if not there:
        raise TrimtabError(f"no such {_NAMES[key]} file: {where}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies, because in a file they may lie anywhere, and products of what is not aligned
            # round otherwise.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    # The last three are torch's, for shapes that pass safetensors' own checks.
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = first_line(error) or type(error).__name__
        raise TrimtabError(
            f"{where} is not a safetensors file, or it is truncated: {shown(reason)}"
        ) from error
    if key not in metadata:
        other = next((name for of, name in _NAMES.items() if of in metadata), None)
        raise TrimtabError(
            f"{where} is a safetensors file but not a trimtab {_NAMES[key]}"
            + (f": it is a {other}" if other else "")
        )
    unknown = sorted(set(metadata) - {key, CHECKSUM_KEY, "format"})
    if unknown:  # a damaged name would hide the checksum
        raise TrimtabError(f"{where} has metadata of an unknown name: {shown(unknown[0], 60)}")
    return metadata[key], tensors, metadata.get(CHECKSUM_KEY)


def _sorted(content: bytes) -> bytes:
    """A safetensors file with its header in order: safetensors writes metadata in any order, and
    one steering should be one file, byte by byte."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a document and its tensors (on the CPU), whatever their order in the file."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.int64):
        raise TrimtabError(f"{name} is {tensor.dtype}, not float32 or int64")
    # torch fails on more than 64 dimensions, and on empty shapes with huge strides.
    if tensor.dim() > 8 or (tensor.dim() > 1 and not tensor.numel()):
        raise TrimtabError(f"{name} has shape {shown(list(tensor.shape))}")
    # numpy, because a file may have thousands of small tensors, on which it is faster.
    if not np.isfinite(tensor.detach().cpu().numpy()).all():
        raise TrimtabError(f"{name} holds NaN or infinity")


def _by_owner(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by what comes before the first dot of their names (an intervention's number, or
    `table`; nothing without a dot) and by what follows it."""
    owners: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, dot, own = name.partition(".")
        owners.setdefault(owner if dot else "", {})[own] = tensor
    return owners


def _calibration(columns: dict[str, Any], source: str) -> Calibration:
    calibration = Calibration.rising(**columns)
    if asdict(calibration) != columns:  # earlier versions did not see to it
        warnings.warn(
            f"{source}: the calibration's dials did not rise with their budgets; those that fell "
            "are taken to be the ones before them",
            TrimtabWarning,
            stacklevel=4,
        )
    return calibration


def _intervention(
    described: _InterventionDocument, tensors: dict[str, Tensor], layers: int
) -> Intervention:
    layer, kind = parse_site(described.site)
    if layer is not None and layer >= layers:
        raise TrimtabError(f"layer {layer} is out of range: the model has 0 to {layers - 1}")
    operator = from_tensors(described.operator, {**tensors, **described.fields})
    if isinstance(operator, Force) and kind != "router":
        raise TrimtabError("Force chooses experts: it acts at a router and nowhere else")
    return Intervention(described.site, operator, _scope(described), described.weight)
