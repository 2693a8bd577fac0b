"""The artifact: a steering is interventions, one dial and where they came from.

It is saved as one .safetensors file: the operators' tensors in it, and in its metadata one JSON
document and a checksum of all that. Loading checks everything before anything is used; nothing is
ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    ValidationError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trimtab.anatomy import Anatomy, parse_site
from trimtab.errors import TrimtabError, TrimtabWarning, shown
from trimtab.files import exists, write_whole
from trimtab.steering.calibration import Calibration
from trimtab.steering.operators import WIDEST, Operator, from_tensors, to_tensors

FORMAT_VERSION = 1
METADATA_KEY = "trimtab"
#: SHA-256 of the document and the tensors. Beside the document, so that older versions, which know
#: no checksum, still read the file; files of theirs have none.
CHECKSUM_KEY = "trimtab_sha256"

#: Steering runs in float32, where a larger number is infinity.
_LARGEST = torch.finfo(torch.float32).max
_MOST_LAYERS = 100_000  # more than the name of a site can tell apart

#: Which tokens an intervention changes: all; those of the prompt; the generated ones; or the ones
#: that a next token is read from, the prompt's last and the generated ones.
Positions = Literal["all", "prompt", "generated", "last"]
POSITIONS: tuple[Positions, ...] = get_args(Positions)


@dataclass(frozen=True)
class Dial:
    """The one number that a user turns."""

    name: str
    default: float
    range: tuple[float, float]
    unit: str = ""


@dataclass(frozen=True)
class Intervention:
    """An operator at a site, at some positions."""

    site: str
    operator: Operator
    positions: Positions = "all"


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a steering was made for."""

    name: str
    architecture: str
    layers: int
    hidden_size: int
    digest: str
    #: Of the weights that stay whole when a model is quantised; "" where it was not noted.
    plain_digest: str = ""

    def __str__(self) -> str:
        name, architecture = shown(self.name), shown(self.architecture, 40)
        return f"{name} ({architecture}, {self.layers} layers, {shown(self.digest[:8])})"


@cache
def _version(name: str) -> str:
    return version(name)  # searches the disk


def _versions() -> dict[str, str]:
    return {name: _version(name) for name in ("trimtab", "torch", "transformers")}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, eq=False)
class Steering:
    """What a method's `fit` returns: attach it, turn its dial, bake it, save it.

    `tables` holds what the method knows beside the interventions, tensors by name (AUSteer: the
    chosen units in rank order with their scores), and `findings` what it found out that is no
    tensor (which layer was chosen, and why). `contrast` names the texts and their digest.
    `calibration` says which dials keep to which budgets (`trimtab.strength.calibrate`).
    `a + b` is both, and a acts first where the two meet.
    """

    method: str
    hyperparameters: dict[str, Any]
    interventions: tuple[Intervention, ...]
    dial: Dial
    model: ModelIdentity
    contrast: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)
    value: float | None = None
    calibration: Calibration | None = None
    versions: dict[str, str] = field(default_factory=_versions)
    date: str = field(default_factory=_now)

    # -- the dial -----------------------------------------------------------------------------

    @property
    def setting(self) -> float:
        """Where the dial stands."""
        return self.dial.default if self.value is None else self.value

    def at(
        self,
        value: float | None = None,
        *,
        kl: float | None = None,
        side: Literal["positive", "negative"] = "positive",
        median: bool = False,
    ) -> Steering:
        """The same steering with its dial turned to `value`.

        Of a calibrated steering `kl` turns it as far as so many nats allow: 95 % of the prompts
        that it was calibrated on stay within them, or with `median` half of them.
        """
        if (value is None) is (kl is None):
            raise TrimtabError("at() takes a dial, or kl= and a budget in nats")
        if value is None:
            if self.calibration is None:
                raise TrimtabError(
                    f"this {shown(self.method)} steering is not calibrated, so it does not know "
                    f"what {kl:g} nats allow: trimtab strength budget --save, or "
                    "strength.calibrate()"
                )
            assert kl is not None
            value = self.calibration.dial(kl, side, median)
        value = float(value)
        if not abs(value) <= _LARGEST:
            raise TrimtabError(f"the dial {shown(self.dial.name)} cannot be {value}")
        turned = replace(self, value=value)
        turned._warn_out_of_range()
        return turned

    def _warn_out_of_range(self) -> None:
        low, high = self.dial.range
        if not low <= self.setting <= high:
            warnings.warn(
                f"{shown(self.dial.name)} = {self.setting:g} is outside the sensible range of this "
                f"{shown(self.method)} steering, {low:g} to {high:g}",
                TrimtabWarning,
                stacklevel=3,
            )

    def __add__(self, other: Any) -> Steerings:
        together: Steerings = Steerings((self,)) + other
        return together

    @property
    def label(self) -> str:
        """For people: method and dial."""
        method, dial, unit = shown(self.method), shown(self.dial.name), shown(self.dial.unit)
        return f"{method} {dial}={self.setting:g}{unit}"

    @property
    def acts(self) -> bool:
        """Whether it changes anything at any dial: with no unit chosen, or only zeros to add, it
        does not."""
        return any(intervention.operator.acts for intervention in self.interventions)

    @property
    def digest(self) -> str:
        """SHA-256 of what it does to a model, whatever its dial: sites, operators, positions."""
        digest = hashlib.sha256()
        for intervention in self.interventions:
            tensors, others = to_tensors(intervention.operator)
            kind = type(intervention.operator).__name__
            about = [intervention.site, kind, intervention.positions, others]
            digest.update(json.dumps(about, sort_keys=True).encode())
            for name in sorted(tensors):
                digest.update(name.encode() + tensors[name].cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    # -- does it fit --------------------------------------------------------------------------

    def check_fits(
        self,
        anatomy: Anatomy,
        identity: ModelIdentity,
        force: bool = False,
        quantised: bool = False,
    ) -> None:
        """Refuse a model that this steering was not made for; `force` allows another's weights.

        A `quantised` model has other weights than the one it was made from, so that there the
        weights are compared that stay whole.
        """
        same = (self.model.architecture, self.model.layers, self.model.hidden_size)
        if same != (identity.architecture, identity.layers, identity.hidden_size):
            raise TrimtabError(
                f"the sizes do not fit: this steering was made for {self.model} with hidden size "
                f"{self.model.hidden_size}, the model is {identity} with {identity.hidden_size}"
            )
        for intervention in self.interventions:
            width = anatomy.width(intervention.site)
            if intervention.operator.width != width:
                raise TrimtabError(
                    f"the sizes do not fit: {intervention.site} has {width} units in "
                    f"{shown(identity.name)}, the steering has {intervention.operator.width}"
                )
        if force or self.model.digest == identity.digest:
            return
        if quantised and not self.model.plain_digest:
            warnings.warn(
                f"this steering was made for {self.model}, and its file does not say whether the "
                f"quantised {identity.name} was made from the same weights: fit and save it anew",
                TrimtabWarning,
                stacklevel=2,
            )
        elif not (quantised and self.model.plain_digest == identity.plain_digest):
            raise TrimtabError(
                f"this steering was made for {self.model}, the model is {identity}: fit one for "
                "this model, or use force (--force) if you know that it carries over"
            )

    # -- the file -----------------------------------------------------------------------------

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write one .safetensors file, whole or not at all; it passes what `load` checks."""
        tensors: dict[str, Tensor] = {}
        described = []
        for number, intervention in enumerate(self.interventions):
            of_operator, other = to_tensors(intervention.operator)
            for name, tensor in of_operator.items():
                tensors[f"{number}.{name}"] = tensor
            described.append(
                {
                    "site": intervention.site,
                    "operator": type(intervention.operator).__name__,
                    "positions": intervention.positions,
                    "fields": other,
                }
            )
        tensors |= {f"table.{name}": tensor for name, tensor in self.tables.items()}
        low, high = self.dial.range
        document = {
            "format": FORMAT_VERSION,
            "method": self.method,
            "hyperparameters": self.hyperparameters,
            # Floats, as they come back: a file that is loaded and saved again stays as it is.
            "dial": {
                "name": self.dial.name,
                "default": float(self.dial.default),
                "range": [float(low), float(high)],
                "unit": self.dial.unit,
            },
            "value": None if self.value is None else float(self.value),
            "calibration": None if self.calibration is None else asdict(self.calibration),
            "interventions": described,
            "model": vars(self.model),
            "contrast": self.contrast,
            "findings": self.findings,
            "versions": self.versions,
            "date": self.date,
        }
        try:
            text = json.dumps(document, sort_keys=True, ensure_ascii=False)
            text.encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise TrimtabError(
                f"this steering cannot be saved: what it says of itself must be JSON, and "
                f"{shown(error, 150)}"
            ) from error
        self._parse(text, tensors, "this steering")
        # Copies, because safetensors refuses tensors that share their memory.
        own = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
        metadata = {METADATA_KEY: text, CHECKSUM_KEY: _checksum(text, own)}
        if overwrite:
            refuse_other_file(Path(path))
        return write_whole(Path(path), _sorted(save(own, metadata)), overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Steering:
        """Read and check a file that `save` wrote."""
        steering = cls._load(Path(path))
        steering._warn_out_of_range()
        return steering

    @classmethod
    def _load(cls, path: Path) -> Steering:
        text, tensors, checksum = _read(path)
        steering = cls._parse(text, tensors, shown(path, 200))
        # Last, because what is wrong with a value says more than that something was changed.
        if checksum is not None and checksum != _checksum(text, tensors):
            raise TrimtabError(
                f"{shown(path, 200)} is damaged: what it holds is not what was saved (its checksum "
                "differs); copy or fit it again"
            )
        return steering

    @classmethod
    def read(cls, argument: str) -> Steering:
        """From `FILE`, `FILE@DIAL` or `FILE@kl=NATS`: what follows the last @ is the dial, unless
        there is a file of that name."""
        path, at, value = argument.rpartition("@")
        if not at or exists(Path(argument)):
            return cls.load(argument)
        number = value.removeprefix("kl=")
        try:
            dial = float(number)
        except ValueError as error:
            raise TrimtabError(
                f"{shown(argument, 150)}: '{shown(number)}' is no number; write FILE@DIAL, as in "
                "joy.safetensors@12, or FILE@kl=NATS"
            ) from error
        steering = cls._load(Path(path))
        return steering.at(dial) if number == value else steering.at(kl=dial)

    @classmethod
    def _parse(cls, text: str, tensors: dict[str, Tensor], source: str) -> Steering:
        """A steering from its JSON document and its tensors, after every check."""
        try:
            document = _Document.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "its document"
            raise TrimtabError(
                f"{source} is not a trimtab steering of format {FORMAT_VERSION}: "
                f"{shown(where)}: {shown(first['msg'])}"
            ) from error
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
        if not any(intervention.operator.acts for intervention in interventions):
            raise TrimtabError(
                f"{source} does nothing: it has no intervention that changes an activation"
            )
        tables = owners.pop("table", {})
        if owners:
            of_owners = {id(tensor) for own in owners.values() for tensor in own.values()}
            foreign = min(name for name, tensor in tensors.items() if id(tensor) in of_owners)
            raise TrimtabError(f"{source}: unexpected tensor '{shown(foreign)}'")
        return cls(
            method=document.method,
            hyperparameters=document.hyperparameters,
            interventions=tuple(interventions),
            dial=Dial(document.dial.name, document.dial.default, (low, high), document.dial.unit),
            model=ModelIdentity(**document.model.model_dump()),
            contrast=document.contrast,
            tables=tables,
            findings=document.findings,
            value=document.value,
            calibration=calibration,
            versions=document.versions,
            date=document.date,
        )


class Steerings(tuple[Steering, ...]):
    """Several steerings that act together, each at its own dial, in this order.

    Give it wherever one steering goes. At one site the earlier one acts first; a site that the
    model reaches earlier comes first in any case.
    """

    def __add__(self, other: Any) -> Steerings:
        if isinstance(other, Steering):
            return Steerings((*self, other))
        if isinstance(other, Steerings):
            return Steerings((*self, *other))
        return NotImplemented

    @property
    def label(self) -> str:
        """For people: the methods and their dials."""
        return " + ".join(steering.label for steering in self)


def together(steering: Steering | Steerings | None) -> tuple[Steering, ...]:
    """The steerings that act together, in order: none, one, or several."""
    if steering is None:
        return ()
    return (steering,) if isinstance(steering, Steering) else tuple(steering)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _finite(value: dict[str, Any]) -> dict[str, Any]:
    json.dumps(value, allow_nan=False)  # a ValueError says where there is NaN or infinity
    return value


def _float32(value: float) -> float:
    if abs(value) > _LARGEST:
        raise ValueError(f"{value:g} is beyond float32, in which steering runs")
    return value


_Finite = Annotated[dict[str, Any], AfterValidator(_finite)]
_Number = Annotated[FiniteFloat, AfterValidator(_float32)]
_Word = Annotated[str, Field(max_length=200)]


class _DialDocument(_Strict):
    name: _Word
    default: _Number
    range: tuple[_Number, _Number]
    unit: _Word


class _InterventionDocument(_Strict):
    site: str = Field(max_length=100)
    operator: _Word
    positions: Positions
    fields: dict[str, Any]


class _ModelDocument(_Strict):
    name: str
    architecture: _Word
    layers: Annotated[int, Field(ge=1, le=_MOST_LAYERS)]
    hidden_size: Annotated[int, Field(ge=1, le=WIDEST)]
    digest: _Word
    plain_digest: _Word = ""


class _CalibrationDocument(_Strict):
    kl: tuple[_Number, ...]
    prompts: NonNegativeInt
    digest: _Word
    positive: tuple[_Number | None, ...]
    positive_worst5: tuple[_Number | None, ...]
    negative: tuple[_Number | None, ...]
    negative_worst5: tuple[_Number | None, ...]


class _Document(_Strict):
    """The JSON document in the file's metadata."""

    format: Literal[1] = Field(description="FORMAT_VERSION")
    method: _Word
    hyperparameters: _Finite
    dial: _DialDocument
    value: _Number | None
    calibration: _CalibrationDocument | None = None
    interventions: list[_InterventionDocument]
    model: _ModelDocument
    contrast: _Finite
    findings: _Finite = Field(default_factory=dict)
    versions: dict[str, str]
    date: str


def refuse_other_file(path: Path) -> None:
    """Refuse to overwrite what is no steering: the weights of a model, the texts of a contrast."""
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt") as file:
            ours = METADATA_KEY in (file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        ours = False
    if not ours:
        raise TrimtabError(
            f"{path} is not a steering, and overwriting replaces only those: choose another name"
        )


def _read(path: Path) -> tuple[str, dict[str, Tensor], str | None]:
    """The JSON text and the tensors of a file, and its checksum where it has one."""
    where = shown(path, 200)
    try:
        there = path.is_file()
    except OSError as error:  # a name that is too long, a directory that may not be searched
        raise TrimtabError(f"cannot read {where}: {error.strerror or error}") from error
    if not there:
        raise TrimtabError(f"no such steering file: {where}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # The last three are torch's, for shapes that pass safetensors' own checks.
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrimtabError(
            f"{where} is not a safetensors file, or it is truncated: {shown(reason)}"
        ) from error
    if METADATA_KEY not in metadata:
        raise TrimtabError(f"{where} is a safetensors file but not a trimtab steering")
    unknown = sorted(set(metadata) - {METADATA_KEY, CHECKSUM_KEY, "format"})
    if unknown:  # a damaged name would hide the checksum
        raise TrimtabError(f"{where} has metadata of an unknown name: {shown(unknown[0], 60)}")
    return metadata[METADATA_KEY], tensors, metadata.get(CHECKSUM_KEY)


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
    layer, _ = parse_site(described.site)
    if layer is not None and layer >= layers:
        raise TrimtabError(f"layer {layer} is out of range: the model has 0 to {layers - 1}")
    operator = from_tensors(described.operator, {**tensors, **described.fields})
    return Intervention(described.site, operator, described.positions)
