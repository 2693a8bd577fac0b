"""What options say, as values: numbers, words, lists, ranges."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.sweeps import Range

_UNIONS = (typing.Union, types.UnionType)
_LISTS = (tuple, list, Sequence)
_SWITCHES = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
#: Some methods have one layer and some several: either word will do. Positions are a scope.
_SPELLINGS = {"layer": "layers", "layers": "layer", "positions": "scope", "scope": "positions"}
#: Commas that are in no brackets and no quotation marks.
_OUTSIDE = re.compile(r""",(?=(?:[^"'()\[\]]|"[^"]*"|'[^']*'|\([^()]*\)|\[[^\[\]]*\])*$)""")
#: The largest number of float32, in which steering runs, and the smallest that is not rounded.
_LARGEST, _SMALLEST = 3.4028234663852886e38, 1.1754943508222875e-38


def flag_of(name: str) -> str:
    """How a field or an argument is written as an option: max_cost as --max-cost."""
    return f"--{name.replace('_', '-')}"


def flags_of(name: str, known: Collection[str]) -> tuple[str, ...]:
    """An option with the other spelling that is taken for it, among all fields that are `known`:
    --layer, and --layers where nothing else is called so."""
    other = _SPELLINGS.get(name)
    return (flag_of(name),) if other in (None, *known) else (flag_of(name), flag_of(str(other)))


def field_named(key: str, known: Collection[str]) -> str:
    """The field that a name means, which may be its other spelling."""
    other = _SPELLINGS.get(key, key)
    return other if key not in known and other in known else key


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The types that a hint allows."""
    return typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)


def words_of(hint: Any) -> list[str]:
    """The words among them."""
    literals = [kind for kind in kinds_of(hint) if typing.get_origin(kind) is typing.Literal]
    return [word for literal in literals for word in typing.get_args(literal)]


def list_in(hint: Any) -> Any:
    """The kind of list among them, if there is one."""
    return next((kind for kind in kinds_of(hint) if typing.get_origin(kind) in _LISTS), None)


def read_value(what: str, text: str, hint: Any) -> Any:
    """A value from text: a word, a number, yes or no, or a list, as the hint allows."""
    kinds, words, several = kinds_of(hint), words_of(hint), list_in(hint)
    if text in words:
        return text
    if int in kinds and re.fullmatch(r"-?\d{1,18}", text):
        return int(text)
    if several is not None and int in typing.get_args(several):
        return read_numbers(what, text, words)
    if several is not None and float in typing.get_args(several):
        return read_list(what, text, float)
    if several is not None:
        return tuple(part for part in text.split(",") if part)
    if float in kinds:
        return read_number(what, text)
    if bool in kinds:
        if text.lower() not in _SWITCHES:
            raise TrimtabError(f"{what}: write yes or no, not {text!r}")
        return _SWITCHES[text.lower()]
    if int in kinds and not words:
        raise TrimtabError(f"{what}: {text!r} is no whole number")
    return text  # the method says which words it knows


def read_named(option: str, given: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE ...` as a dictionary; a value that is no JSON is text, but for Python's True and
    False."""
    named: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name or name in named:
            twice = " (it is given twice)" if name in named else ""
            raise TrimtabError(f"{option} {text}: write NAME=VALUE, each name once{twice}")
        try:
            named[name] = json.loads({"True": "true", "False": "false"}.get(value, value))
        except (ValueError, RecursionError):
            named[name] = value
    return named


def read_number(what: str, text: str) -> float:
    """A number that steering can hold."""
    try:
        return in_float32(what, float(text))
    except ValueError as error:
        raise TrimtabError(f"{what}: {text!r} is no number") from error


def in_float32(what: str, value: float) -> float:
    """A number that steering, which runs in float32, can hold."""
    if not (value == 0 or _SMALLEST <= abs(value) <= _LARGEST):
        raise TrimtabError(
            f"{what}: {value!r} is beyond what float32 holds, {_SMALLEST:.2g} to {_LARGEST:.2g} on "
            "either side of 0"
        )
    return value


def read_list(what: str, text: str, item: Any) -> tuple[Any, ...]:
    """Several values with commas between them, of the kind that the hint `item` allows."""
    kinds, words = kinds_of(item), words_of(item)
    values: list[Any] = []
    for part in filter(None, map(str.strip, text.split(","))):
        if part in words or str in kinds:
            values.append(part)
        elif int in kinds:
            values += read_numbers(what, part, words)
        else:
            try:
                values.append(float(part))
            except ValueError as error:
                raise TrimtabError(f"{what} {text}: write numbers, as in 1,2.5,10") from error
    return tuple(values)


def read_numbers(what: str, text: str, words: Sequence[str] = ()) -> tuple[int, ...]:
    """`4,5,8-12` -> (4, 5, 8, 9, 10, 11, 12); a leading minus counts from the end.

    `words` are what may stand there instead.
    """
    numbers: list[int] = []
    for part in text.split(","):
        # Five digits of a range at most, so that no slip of the finger fills the memory.
        match = re.fullmatch(r"\s*(-?\d{1,5})-(\d{1,5})\s*|\s*(-?\d{1,9})()\s*", part)
        first = int(match[1] or match[3]) if match else 0
        last = int(match[2]) if match and match[2] else first
        if match is None or last < first:
            instead = "".join(f", or {word}" for word in words)
            raise TrimtabError(f"{what} {text}: write numbers, as in 4,5,8-12{instead}")
        numbers += range(first, last + 1)
    return tuple(numbers)


def read_values(option: str, text: str, hint: Any) -> list[Any] | Range:
    """`4,16,64` as values; where there are numbers `LOW:HIGH` or `LOW:HIGH:log` as a range; lists
    (of layers) are separated by /. What is in brackets or quotation marks is one value."""
    kinds = kinds_of(hint)
    if ":" in text and {int, float} & set(kinds):
        return _range(option, text, kinds)
    if list_in(hint) and ("/" in text or int not in kinds):
        parts = text.split("/")
    else:
        parts = _OUTSIDE.split(text)
    if not all(part.strip() for part in parts):
        raise TrimtabError(f"{option} {text!r}: a value is empty")
    return [read_value(option, part.strip(), hint) for part in parts]


def _range(option: str, text: str, kinds: Collection[Any]) -> Range:
    from trimtab.sweeps import Range

    low, _, rest = text.partition(":")
    high, _, kind = rest.partition(":")
    whole = all(re.fullmatch(r"[+-]?\d+", end.strip()) for end in (low, high))
    fractions = float in kinds and not (int in kinds and whole)
    try:
        ends = [float(end) if fractions else int(end) for end in (low, high)]
    except ValueError as error:
        what = "LOW:HIGH" if fractions else "whole numbers, LOW:HIGH"
        raise TrimtabError(f"{option} {text}: write {what}, or LOW:HIGH:log") from error
    if kind not in ("", "log"):
        raise TrimtabError(f"{option} {text}: write LOW:HIGH, or LOW:HIGH:log")
    return Range(ends[0], ends[1], kind == "log")
