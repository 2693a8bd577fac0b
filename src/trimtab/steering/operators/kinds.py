"""All operators by their names, how files hold them, and how they fold into weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import Tensor

from trimtab.errors import TrimtabError, shown
from trimtab.plugins import Extended
from trimtab.steering.operators.adding import Add
from trimtab.steering.operators.base import Dial, LinearOperator, Operator
from trimtab.steering.operators.bounds import Clamp
from trimtab.steering.operators.diagonal import Scale, Shift
from trimtab.steering.operators.features import SetFeatures
from trimtab.steering.operators.low_rank import Ablate, Affine
from trimtab.steering.operators.planes import Rotate, Turn
from trimtab.steering.operators.responding import Respond
from trimtab.steering.operators.routing import Force


def _is_operator(added: Any, name: str) -> bool:
    return is_dataclass(added) and getattr(added, "__name__", "") == name and hasattr(added, "bind")


_OWN = (Scale, Shift, Add, Ablate, Affine, Clamp, Respond, Rotate, Turn, SetFeatures, Force)
#: Operators by the names that steering files have.
OPERATORS: Mapping[str, type[Any]] = Extended(
    "operator",
    {kind.__name__: kind for kind in _OWN},
    _is_operator,
)


def apply(operator: Operator, x: Tensor, dial: Dial) -> Tensor:
    """The operator on x [..., units] at a dial."""
    return operator.bind(dial, x.device)(x)


def fold_output(
    operator: LinearOperator,
    dial: float,
    weight: Tensor,
    bias: Tensor | None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Weights [..., out, in] whose output is the operator of the old output: A W, A b + c; with c
    for what is `factor` times that output."""
    columns = weight.double().transpose(-1, -2)  # each column of W is an activation [out]
    new = operator.linear_part(columns, dial).transpose(-1, -2)
    offset = operator.offset(dial).to(new) / factor
    return new, offset if bias is None else operator.linear_part(bias.double(), dial) + offset


def fold_input(
    operator: LinearOperator,
    dial: float,
    weight: Tensor,
    bias: Tensor | None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Weights [..., out, in] that read the operator of their old input: W A, b + W c; with c for
    what is the input divided by `factor`."""
    wide = weight.double()
    shift = wide @ (operator.offset(dial).to(wide) / factor)
    return operator.adjoint(wide, dial), shift if bias is None else bias.double() + shift


def to_tensors(operator: Operator) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An operator's tensors and its other fields, by name."""
    values = {
        item.name: getattr(operator, item.name)
        for item in fields(operator)  # type: ignore[arg-type]
        if not _left_out(item, getattr(operator, item.name))
    }
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in values.items() if name not in tensors}


def _left_out(item: Field[Any], value: Any) -> bool:
    """Whether files say nothing of a field."""
    default: Any = item.default
    same = value is None if default is None else value == default
    return bool(item.metadata.get("left_out")) and bool(same)


def from_tensors(name: str, given: dict[str, Any]) -> Operator:
    """An operator from its name and what `to_tensors` gives, after every check."""
    kind = OPERATORS.get(name)
    if kind is None:
        raise TrimtabError(
            f"unknown operator '{shown(name)}': install the package that adds it, if there is one"
        )
    types = get_type_hints(kind)
    known = [item.name for item in fields(kind)]
    needed = {item.name for item in fields(kind) if not item.metadata.get("came_later")}
    if not needed <= set(given) <= set(known):
        raise TrimtabError(
            f"{name} needs {', '.join(known)}; the file has {shown(', '.join(given)) or 'nothing'}"
        )
    for key, value in given.items():
        if not _is_of(value, types[key]):
            raise TrimtabError(f"{key} of {name} has the wrong type")
    operator: Operator = kind(**given)
    operator.check()
    return operator


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is exactly of a type, of one of several, or one of several texts."""
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    return type(value) in (get_args(hint) or (hint,))
