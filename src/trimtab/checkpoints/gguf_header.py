"""Checks what a GGUF file says of itself against its size, before anybody makes room for it.

Readers believe a header: one byte of an array's length fills the memory, one of the number of
blocks builds a model without end. Here every count, length, size and offset is compared with what
the file can hold, as llama.cpp does: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.errors import shown

_VERSIONS = (2, 3)
#: Formats of the plain kinds of values, by their number in a file.
_PLAIN = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEEPEST = 4  # arrays of arrays, which no known file has
_MOST_DIMENSIONS = 4
#: Bytes of a string in a list. Tokens and merges are short; the work on one grows with its square.
_LONGEST_ITEM = 4096
#: The smallest that a key with its value, and a tensor's description, can be.
_KEY_BYTES, _TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 4 + 8
_BLOCK = re.compile(r"(?:[a-z]+\.)?blk\.(0|[1-9][0-9]{0,5})\.")


class DamagedError(Exception):
    """What is wrong with a header, in a few words."""


@dataclass
class Header:
    """The plain values and strings of a header by key, and the shape of each tensor."""

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """How many numbers the file holds."""
        return sum(math.prod(shape) for shape in self.tensors.values())


def check_header(path: Path) -> Header:
    """The header of a GGUF file, or DamagedError where it says what the file cannot hold."""
    with path.open("rb") as file:
        if not file.seek(0, 2):
            raise DamagedError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(content).header()


class _Reader:
    """Reads a header from its beginning on; whatever does not fit is a DamagedError."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.size = len(content)
        self.at = 4  # after the magic bytes
        self.order = "<"

    def header(self) -> Header:
        # Files of the other byte order have their version's bytes the other way round.
        if (version := self._number("I")) & 0xFFFF == 0:
            self.order, self.at = ">", 4
            version = self._number("I")
        if version not in _VERSIONS:
            raise DamagedError(f"version {version}, known are {_VERSIONS[0]} and {_VERSIONS[1]}")
        tensors, keys = self._number("Q"), self._number("Q")
        self._fits(tensors, _TENSOR_BYTES, "tensors")
        self._fits(keys, _KEY_BYTES, "keys")
        header = Header()
        for _ in range(keys):
            key = self._text("a key")
            if key in header.values:
                raise DamagedError(f"it has the key '{shown(key)}' twice")
            header.values[key] = self._value(self._number("I"), f"'{shown(key)}'")
        self._tensors(tensors, header)
        _check_blocks(header)
        return header

    def _tensors(self, count: int, header: Header) -> None:
        """The descriptions of the tensors, whose data must follow each other without a gap."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        alignment = header.values.get("general.alignment", 32)
        if not (isinstance(alignment, int) and 0 < alignment <= 1 << 20 and _is_power(alignment)):
            raise DamagedError(f"an alignment of {shown(alignment)}")
        end = 0
        for _ in range(count):
            name = self._text("a tensor's name")
            what = f"tensor '{shown(name)}'"
            if name in header.tensors:
                raise DamagedError(f"it has {what} twice")
            dimensions = self._number("I")
            if not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise DamagedError(f"{what} has {dimensions} dimensions")
            shape = tuple(self._number("Q") for _ in range(dimensions))
            kind, offset = self._number("I"), self._number("Q")
            if kind not in set(GGMLQuantizationType):
                raise DamagedError(f"{what} is of an unknown type, {kind}")
            elements, octets = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            if 0 in shape or shape[0] % elements:
                raise DamagedError(f"{what} has the shape {list(shape)}")
            if offset != end:
                raise DamagedError(f"{what} begins at {offset}, not at {end}")
            end = _padded(offset + math.prod(shape) // elements * octets, alignment)
            header.tensors[name] = shape
        start = _padded(self.at, alignment)
        # The last tensor may be without its padding.
        if not start + end - alignment < self.size <= start + end:
            raise DamagedError(f"it should have {start + end} bytes and has {self.size}")

    def _value(self, kind: int, what: str, depth: int = 0) -> Any:
        """A plain value or a string; of an array only that it fits, and how long it is."""
        if kind in _PLAIN:
            return self._number(_PLAIN[kind])
        if kind == _STRING:
            return self._text(what)
        if kind != _ARRAY or depth == _DEEPEST:
            raise DamagedError(f"{what} is of an unknown kind, {kind}")
        item, count = self._number("I"), self._number("Q")
        if item in _PLAIN:
            octets = struct.calcsize(f"={_PLAIN[item]}")
            self._fits(count, octets, f"items in {what}")
            self.at += count * octets
            return count
        self._fits(count, 8, f"items in {what}")
        for _ in range(count):
            if item == _STRING:
                self._text(f"an item of {what}", _LONGEST_ITEM)
            else:
                self._value(item, what, depth + 1)
        return count

    def _number(self, kind: str) -> Any:
        form = f"{self.order}{kind}"
        octets = struct.calcsize(form)
        self._fits(1, octets, "numbers")
        (number,) = struct.unpack_from(form, self.content, self.at)
        self.at += octets
        return number

    def _text(self, what: str, longest: int | None = None) -> str:
        length = self._number("Q")
        self._fits(length, 1, f"bytes of {what}")
        if longest is not None and length > longest:
            raise DamagedError(f"{what} has {length} bytes")
        begin, self.at = self.at, self.at + length
        try:
            return self.content[begin : self.at].decode()
        except UnicodeDecodeError as error:
            raise DamagedError(f"{what} is not UTF-8 text") from error

    def _fits(self, count: int, octets: int, what: str) -> None:
        if count * octets > self.size - self.at:
            raise DamagedError(f"it ends before {count} {what}")


def _check_blocks(header: Header) -> None:
    """The number of blocks that the header says is the number that its tensors are of."""
    found = {int(match[1]) for name in header.tensors if (match := _BLOCK.match(name))}
    said = header.values.get(f"{header.values.get('general.architecture')}.block_count")
    if found and said is not None and found != set(range(len(found))):
        raise DamagedError("blocks are missing between those that it has")
    if found and said is not None and said != len(found):
        raise DamagedError(f"it says that it has {shown(said)} blocks and has {len(found)}")


def _padded(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment


def _is_power(number: int) -> bool:
    """Whether a number is a power of two."""
    return number & (number - 1) == 0
