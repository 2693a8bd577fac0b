"""The steering that undoes another one: each operator's inverse at its dial, where it has one.

Scale    by 1 / f                    no factor f may be zero
Shift    x / f - b / f               the same
Add      of the vector, less         always
Rotate   back by the angle           always
Ablate   at dial d: by -d / (1 - d)  not at 1, where nothing is left along the directions
Affine   x -> x + U'V'(x) + c'       where 1 + V'U is regular (Woodbury)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError, shown
from trimtab.steering import (
    Ablate,
    Add,
    Affine,
    Dial,
    Intervention,
    Rotate,
    Scale,
    Shift,
    Steering,
)

#: What a factor, or a share that is left, must be above, so that float32 can hold its inverse well.
_SMALLEST = 1e-4


def inverse(steering: Steering) -> Steering:
    """The steering at its dial, undone: at dial 1, whatever the other's was. Raises TrimtabError
    with the reason where that is not possible."""
    undone = [
        _undone(each, steering)
        for each in reversed(steering.interventions)
        if not each.idle_at(steering.setting)
    ]
    return replace(
        steering,
        method=f"inverse of {steering.method}",
        interventions=tuple(undone),
        dial=Dial("share", 1.0, (0.0, 1.0)),
        value=None,
        calibration=None,
        tables={},
        findings={},
    )


def _undone(intervention: Intervention, steering: Steering) -> Intervention:
    operator: Any = intervention.operator
    dial = intervention.dial_at(steering.setting)
    where = f"{shown(steering.method)} at {intervention.site} cannot be taken out"
    if not intervention.scope.everywhere:
        raise TrimtabError(
            f"{where}: it acts on the scope '{intervention.scope}', which no weights do"
        )
    if not operator.linear:
        raise TrimtabError(f"{where}: {operator.description} is not linear, so no weights hold it")
    weight = 1.0
    if isinstance(operator, Add | Rotate):
        weight = -dial
    elif isinstance(operator, Scale):
        operator = _scale(operator.factors(dial, torch.float64), operator, where)
    elif isinstance(operator, Shift):
        operator = _shift(operator, dial, where)
    elif isinstance(operator, Ablate):
        weight = _share(dial, where)
    elif isinstance(operator, Affine):
        operator = _affine(operator, dial, where)
    else:
        raise TrimtabError(f"{where}: how {operator.description} is undone is not known")
    return replace(intervention, operator=operator, weight=weight)


def _scale(factors: Tensor, operator: Scale, where: str) -> Scale:
    chosen = factors[operator.units]
    _refuse_zeros(chosen, where)
    return Scale(operator.units, (1 / chosen - 1).float(), operator.width)


def _shift(operator: Shift, dial: float, where: str) -> Shift:
    factors = 1 + dial * (operator.slope.double() - 1)
    _refuse_zeros(factors, where)
    back = -dial * operator.shift.double() / factors
    return Shift(operator.units, (1 / factors).float(), back.float(), operator.width)


def _refuse_zeros(factors: Tensor, where: str) -> None:
    gone = int((factors.abs() < _SMALLEST).sum())
    if gone:
        raise TrimtabError(
            f"{where}: it multiplies {gone} unit{'s' if gone > 1 else ''} by zero, and nothing is "
            "left to multiply back"
        )


def _share(dial: float, where: str) -> float:
    if abs(1 - dial) < _SMALLEST:
        raise TrimtabError(
            f"{where}: an ablation leaves nothing along its directions to bring back"
        )
    return -dial / (1 - dial)


def _affine(operator: Affine, dial: float, where: str) -> Affine:
    u, v = operator.u.double(), operator.v.double()
    inner = torch.eye(u.shape[1], dtype=torch.float64) + dial * v.T @ u
    values = torch.linalg.svdvals(inner)
    if float(values[-1]) < _SMALLEST * float(values[0].clamp(min=1)):
        raise TrimtabError(f"{where}: its map leaves nothing along a direction to bring back")
    back = -dial * torch.linalg.solve(inner, u, left=False)  # (1 + dU V')^-1 = 1 + back V'
    c = None
    if operator.c is not None:
        added = dial * operator.c.double()
        c = -(added + back @ (v.T @ added)).float()
    return Affine(back.float(), operator.v, c)
