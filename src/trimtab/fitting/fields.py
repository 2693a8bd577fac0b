"""Hyperparameters by declaration: a method's annotations say what its fields take, and this holds
them to it.

A plain frozen dataclass and one call in `__post_init__` do what a dataclass of pydantic's would:
`dataclasses.replace` comes by here too, and a mistake is at once our own error of one line.
"""

from __future__ import annotations

import typing
from dataclasses import MISSING, dataclass, fields
from dataclasses import Field as DataField
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from trimtab.errors import TrimtabError, choices

_LARGEST = torch.finfo(torch.float32).max
#: 8 is no "8" and True is no 1; whole numbers are numbers.
_STRICT = ConfigDict(strict=True)


@dataclass(frozen=True)
class Says:
    """Stands in an annotation: what is wrong with any other `{value}`, after the field's name."""

    text: str


#: No NaN and no infinity, also in float32, in which steering runs.
Number = Annotated[
    float,
    Field(ge=-_LARGEST, le=_LARGEST),
    Says("must be a finite number, not {value}: at most 3.4e38 in size"),
]
#: How many of something.
Count = Annotated[int, Field(ge=0), Says("must be 0 or more, not {value}")]
#: A number that is no bound of the two.
BetweenZeroAndOne = Annotated[
    float, Field(gt=0, lt=1), Says("must lie between 0 and 1, not {value}")
]


def check_number(what: str, value: float) -> None:
    """Refuse NaN and infinity, also what is infinity in float32, in which steering runs."""
    _check(what, value, Number, _adapter_of_numbers())


def validate(made: Any, name: str) -> None:
    """Hold the fields of a dataclass that was just made to their annotations, `name: field` in
    errors. Arrays and lists become tuples, and numbers what plain Python has."""
    for field, (kind, adapter) in _declared(type(made)).items():  # type: ignore[arg-type]
        value = plain(getattr(made, field))
        object.__setattr__(made, field, value)  # it is frozen
        _check(f"{name}: {field}", value, kind, adapter)


def plain(value: Any) -> Any:
    """Arrays and lists, also in a dict, as tuples; numbers as Python has them; paths as text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return str(value) if isinstance(value, Path) else value


def fields_in_words(kind: type[Any]) -> str:
    """The fields of a class that is about to become a dataclass, each with its default and help."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        found |= getattr(base, "__dataclass_fields__", {})
        found |= {name: value for name, value in vars(base).items() if isinstance(value, DataField)}
    lines = ["Fields:"]
    for name, each in found.items():
        default = "" if each.default is MISSING else f" = {each.default!r}"
        lines += ["", f"    {name}{default}", f"        {each.metadata.get('help', '')}"]
    return "\n".join(line.rstrip() for line in lines)


def _check(what: str, value: Any, kind: Any, adapter: TypeAdapter[Any]) -> None:
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        raise TrimtabError(f"{what} {_complaint(value, kind, error)}") from error


def _complaint(value: Any, kind: Any, error: ValidationError) -> str:
    """What is wrong with a value, in the annotation's own words where it has some."""
    for said in getattr(_given(kind), "__metadata__", ()):
        if isinstance(said, Says):
            return said.text.format(value=value)
    known = choices(kind)
    if known and isinstance(value, str):
        return f"is {value!r}: known are {', '.join(known)}"
    found = error.errors()[0]
    if found["type"] == "value_error":  # what reads a value says itself what is wrong
        return f"is {value!r}: {found['ctx']['error']}"
    wanted = found["msg"].replace("Input should be", "must be")
    return f"{wanted}, not {value!r}"


def _given(kind: Any) -> Any:
    """The annotation of a value that is there: of `X | None` that is X."""
    parts = [part for part in typing.get_args(kind) if part is not type(None)]
    optional = type(None) in typing.get_args(kind) and len(parts) == 1
    return parts[0] if optional else kind


@cache
def _declared(kind: type[Any]) -> dict[str, tuple[Any, TypeAdapter[Any]]]:
    """What each field of a dataclass takes."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {
        field.name: (hints[field.name], TypeAdapter(hints[field.name], config=_STRICT))
        for field in fields(kind)
    }


@cache
def _adapter_of_numbers() -> TypeAdapter[Any]:
    return TypeAdapter(Number, config=_STRICT)
