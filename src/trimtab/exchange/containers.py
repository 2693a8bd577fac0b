"""Files of other programs, opened with care: what kind of container one is, and the plain values
and tensors in it.

Such a file may have been made to harm. Its size is bounded before it is read, nothing in it is ever
run, no path is taken from inside it, and what its numbers claim is compared with what it holds.
"""

from __future__ import annotations

import json
import math
import pickletools
import re
import stat
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.checkpoints import gguf_tensors
from trimtab.errors import TrimtabError, first_line, shown
from trimtab.files import parse_json

Kind = Literal["gguf", "pickle", "safetensors", "npy", "json", "csv"]

#: Bytes that a file may have. A vector for each of 130 blocks of 16,384 units is 9 MB, and five
#: times that as text.
LARGEST, LARGEST_TEXT = 1 << 28, 1 << 26
#: All that a pickle of plain tensors and dictionaries names.
_NAMED = re.compile(
    r"torch\._utils _rebuild_tensor_v2|torch\._utils _rebuild_parameter"
    r"|torch (?:Half|BFloat16|Float|Double)Storage|collections OrderedDict"
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Container:
    """What a file holds: of a pickle or of JSON its value, of a table its text, else tensors by
    name; and what it says of itself beside them."""

    path: Path
    kind: Kind
    content: Any
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def named(self) -> str:
        """What messages call it."""
        return shown(self.path, 200)

    def refused(self, why: str) -> TrimtabError:
        """The error that says why this file is not taken."""
        return TrimtabError(f"{self.named}: {why}")


def open_container(path: Path) -> Container:
    """Open a file by what it begins with."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise TrimtabError(f"cannot read {shown(path, 200)}: it is no file")
        size = about.st_size
        with path.open("rb") as file:
            start = file.read(16)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TrimtabError(f"cannot read {shown(path, 200)}: {reason}") from error
    kind = _kind_of(start)
    most = LARGEST_TEXT if kind in ("json", "csv") else LARGEST
    if size > most:
        raise TrimtabError(
            f"{shown(path, 200)} has {size:,} bytes, and a steering of this kind has at most "
            f"{most:,}: is it a model?"
        )
    content, metadata = _READERS[kind](path)
    return Container(path, kind, content, metadata)


def _kind_of(start: bytes) -> Kind:
    if start.startswith(b"GGUF"):
        return "gguf"
    if start.startswith(b"\x93NUMPY"):
        return "npy"
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < LARGEST:
        return "safetensors"
    if start.startswith((b"PK", b"\x80")):
        return "pickle"
    if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        return "json"
    return "csv"


def _gguf(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return gguf_tensors(path)


def _npy(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        # Mapped, so that a header which claims more than there is fails before room is made.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        floats = array.dtype.kind == "f" and array.dtype.itemsize <= 8
        kept = np.array(array, dtype=array.dtype.newbyteorder("=")) if floats else None
    except Exception as error:  # its header is read as Python, which fails in many ways
        raise _damaged(path, "a NumPy array", error) from error
    if kept is None:
        raise TrimtabError(f"{shown(path, 200)} holds {shown(array.dtype, 30)}, not floats")
    return {"": torch.from_numpy(kept)}, {}


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    # The last three are torch's, for shapes that pass safetensors' own checks.
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise _damaged(path, "a safetensors file", error) from error


def _pickle(path: Path) -> tuple[Any, dict[str, Any]]:
    """What `torch.save` wrote, if that is plain tensors, numbers, texts, lists and dictionaries."""
    for named in _named_by(path):
        if not _NAMED.fullmatch(named):
            raise TrimtabError(
                f"{shown(path, 200)} needs {shown(named, 60)} to be loaded, which may run code: "
                "save plain tensors and dictionaries instead, as in torch.save(vars(vector), FILE)"
            )
    try:
        # Mapped, so that a storage which claims more bytes than there are is refused by torch.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True), {}
    except Exception as error:  # its unpickler fails in many ways on what it does not expect
        raise _damaged(path, "a file of torch.save", error) from error


def _named_by(path: Path) -> list[str]:
    """What a pickle names, read before anything is made of it."""
    where = shown(path, 200)
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            raise TrimtabError(
                f"{where} is not a file of torch.save as it has been since PyTorch 1.6: load it "
                "where you trust it, and save its tensors anew"
            )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            pickles = [each for each in entries if each.filename.endswith("data.pkl")]
            code = archive.read(pickles[0]) if stored and len(pickles) == 1 else b"."
        operations = [(kind.name, str(argument)) for kind, argument, _ in pickletools.genops(code)]
    except Exception as error:  # a damaged archive fails in many ways, and so does a pickle
        raise _damaged(path, "a file of torch.save", error) from error
    if not stored:
        raise TrimtabError(f"{where} is compressed, which torch.save never does")
    if len(pickles) != 1:
        raise TrimtabError(f"{where} is a zip archive, but torch.save did not write it")
    return [name for kind, name in operations if kind in ("GLOBAL", "INST", "STACK_GLOBAL")]


def _json(path: Path) -> tuple[Any, dict[str, Any]]:
    return parse_json(_text(path), shown(path, 200)), {}


def _csv(path: Path) -> tuple[str, dict[str, Any]]:
    """The text, whose first line has the columns' names, which say what the table is."""
    return _text(path), {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TrimtabError(f"cannot read {shown(path, 200)}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TrimtabError(f"{shown(path, 200)} is of no format that is known here") from error


def _damaged(path: Path, what: str, error: Exception) -> TrimtabError:
    reason = first_line(error) or type(error).__name__
    return TrimtabError(f"{shown(path, 200)} is not {what}, or it is damaged: {shown(reason, 120)}")


_READERS: dict[Kind, Any] = {
    "gguf": _gguf,
    "pickle": _pickle,
    "safetensors": _safetensors,
    "npy": _npy,
    "json": _json,
    "csv": _csv,
}


# -- what is in it --------------------------------------------------------------------------------


def as_floats(value: Any, what: str, dimensions: tuple[int, ...]) -> Tensor:
    """A tensor of a file in float32, after every check: plain, finite, of so many dimensions, and
    with no more numbers than it has memory for."""
    if not isinstance(value, Tensor):
        raise TrimtabError(f"{what} is {shown(type(value).__name__, 40)}, not a tensor")
    if value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in _FLOATS:
        raise TrimtabError(f"{what} is a tensor of {shown(value.dtype, 40)}, not of plain floats")
    if value.dim() not in dimensions or not value.numel():
        raise TrimtabError(f"{what} has the shape {shown(list(value.shape), 60)}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise TrimtabError(f"{what} claims more numbers than the file holds")
    return _finite(value.detach().to(torch.float32).contiguous().clone(), what)


def as_vector(value: Any, what: str) -> Tensor:
    """A list of numbers of a JSON file, [units] float32."""
    if not isinstance(value, list) or not value:
        raise TrimtabError(f"{what} is not a list of numbers")
    if not all(isinstance(each, int | float) and not isinstance(each, bool) for each in value):
        raise TrimtabError(f"{what} has something in it that is no number")
    try:
        return _finite(torch.tensor([float(each) for each in value]), what)
    except (OverflowError, ValueError) as error:
        raise TrimtabError(f"{what} has a number beyond float32") from error


def _finite(tensor: Tensor, what: str) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise TrimtabError(f"{what} holds NaN or infinity, or numbers beyond float32")
    return tensor


def as_number(value: Any, what: str) -> float:
    """A number that steering in float32 can be done with."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(as_floats(value, what, (0, 1)))
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not abs(value) <= torch.finfo(torch.float32).max or math.isnan(value):
        raise TrimtabError(f"{what} is {shown(json_shown(value), 40)}, not a number")
    return float(value)


def as_layer(value: Any, layers: int, what: str) -> int:
    """The number of a layer, 0 to `layers` - 1; texts of digits are taken too."""
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,6}", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < layers:
        raise TrimtabError(
            f"{what} is {shown(json_shown(value), 40)}, and this model has 0 to {layers - 1}"
        )
    return value


def json_shown(value: Any) -> str:
    """A value as a message repeats it."""
    return (
        json.dumps(value)
        if isinstance(value, str | int | float | bool | None)
        else (type(value).__name__)
    )
