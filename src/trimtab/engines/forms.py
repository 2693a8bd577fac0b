"""The forms of arithmetic that operators come to, for rows that each have vectors and a dial of
their own.

All is in float32. What is no form (an autoencoder's features, a map of high rank, an operator of a
plugin) is left to the operator itself.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.steering import (
    Ablate,
    Add,
    Affine,
    Clamp,
    Operator,
    Respond,
    Rotate,
    Scale,
    Shift,
    Turn,
    orthonormal,
)

#: The highest rank of a map, and how many vectors a slot has at a site, at most.
RANK = 8
MOST = 2 * RANK + 1


class Form(IntEnum):
    """Arithmetic, and the vectors that it takes."""

    NOTHING = 0
    ADD = 1  # what is added
    KEPT = 2  # what is added
    CAPPED = 3  # what is added
    SCALE = 4  # gains
    CLAMPED = 5  # gains
    ABSOLUTE = 6  # gains
    SHIFT = 7  # slopes less 1, shifts
    INTERVAL = 8  # slopes less 1, shifts, lower ends, upper ends
    MAP = 9  # a constant, k that read, k that are added
    ROTATE = 10  # a plane's two
    TURN = 11  # a plane's two
    ADAPTIVE = 12  # a plane's two
    BOUNDED = 13  # a direction; numbers: the bounds
    RESPOND = 14  # what reads, what is added; numbers: the bias


#: Forms whose dial is an angle, of which the arithmetic takes the cosine and the sine.
PLANES = (Form.ROTATE, Form.TURN, Form.ADAPTIVE)


class Packed(NamedTuple):
    """An operator as a form, its vectors [n, units] float32, and its two numbers."""

    form: Form
    vectors: Tensor
    numbers: tuple[float, float] = (0.0, 0.0)


def packed(operator: Operator) -> Packed | None:
    """An operator as the bank holds it; None of one that it does not carry."""
    made = _packed(operator)
    return None if made is None or len(made.vectors) > MOST else made


def _packed(operator: Any) -> Packed | None:
    # By its very class: an operator that is made of one of these may do something else.
    kind = type(operator)
    if kind is Add:
        form = {"no": Form.ADD, "always": Form.KEPT, "cap": Form.CAPPED}[operator.keep_norm]
        return Packed(form, operator.vector[None])
    if kind is Scale:
        form = Form.CLAMPED if operator.clamp_sign else Form.SCALE
        form = Form.ABSOLUTE if operator.absolute else form
        return Packed(form, _spread(operator, operator.gain)[None])
    if kind is Shift:
        rows = [_spread(operator, operator.slope - 1), _spread(operator, operator.shift)]
        if operator.low is None or operator.high is None:
            return Packed(Form.SHIFT, torch.stack(rows))
        rows += [_spread(operator, operator.low, -math.inf)]
        rows += [_spread(operator, operator.high, math.inf)]
        return Packed(Form.INTERVAL, torch.stack(rows))
    if kind is Ablate:
        basis = orthonormal(operator.direction.reshape(-1, operator.width))
        return Packed(Form.MAP, torch.cat((torch.zeros_like(basis[:1]), basis, -basis)).float())
    if kind is Affine:
        constant = torch.zeros(operator.width) if operator.c is None else operator.c
        return Packed(Form.MAP, torch.cat((constant[None], operator.v.T, operator.u.T)))
    if kind is Rotate:
        return Packed(Form.ROTATE, orthonormal(operator.basis).float())
    if kind is Turn:
        form = Form.ADAPTIVE if operator.adaptive else Form.TURN
        return Packed(form, orthonormal(operator.basis).float())
    if kind is Clamp:
        low = -math.inf if operator.low is None else operator.low
        high = math.inf if operator.high is None else operator.high
        return Packed(Form.BOUNDED, orthonormal(operator.direction[None]).float(), (low, high))
    if kind is Respond:
        vectors = torch.stack((operator.reader, operator.vector))
        return Packed(Form.RESPOND, vectors, (operator.bias, 0.0))
    return None


def _spread(operator: Scale | Shift, values: Tensor, elsewhere: float = 0.0) -> Tensor:
    """What the chosen units have, [units], with something else at the others."""
    return torch.full((operator.width,), elsewhere).index_copy(0, operator.units, values)


def changed(form: Form, x: Tensor, v: Tensor, numbers: Tensor, dials: Tensor) -> Tensor:
    """A form of arithmetic on activations x [rows, units] with vectors v [rows, n, units] and two
    numbers [rows, 2], or one of each for all rows, at dials [rows, 1]. Of the PLANES they are the
    cosine (for ROTATE less 1) and the sine, [rows, 2]. All float32."""
    if form == Form.ADD:
        return torch.addcmul(x, dials, v[:, 0])
    if form in (Form.KEPT, Form.CAPPED):
        moved = torch.addcmul(x, dials, v[:, 0])
        # Where nothing is left there is no direction to be long in.
        length = moved.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(moved.dtype).tiny)
        factor: Tensor = x.norm(dim=-1, keepdim=True) / length
        return moved * (factor.clamp(max=1.0) if form == Form.CAPPED else factor)
    if form == Form.ABSOLUTE:
        return torch.addcmul(x, x.abs(), dials * v[:, 0])
    if form in (Form.SCALE, Form.CLAMPED):
        factors = 1 + dials * v[:, 0]
        return x * (factors.clamp_(min=0) if form == Form.CLAMPED else factors)
    if form in (Form.SHIFT, Form.INTERVAL):
        mapped = x * (1 + dials * v[:, 0]) + dials * v[:, 1]
        return mapped if form == Form.SHIFT else _where_inside(x, mapped, v[:, 2], v[:, 3])
    if form == Form.MAP:
        rank = v.shape[1] // 2
        return x + dials * (_along(_along_of(x, v[:, 1 : rank + 1]), v[:, rank + 1 :]) + v[:, 0])
    if form == Form.RESPOND:
        read = (_along_of(x, v[:, :1]) + numbers[:, :1]).clamp_(min=0)
        return torch.addcmul(x, dials * read, v[:, 1])
    inside = _along_of(x, v)
    if form == Form.BOUNDED:
        clipped = torch.clamp(inside, numbers[:, :1], numbers[:, 1:])
        return torch.addcmul(x, dials * (clipped - inside), v[:, 0])
    if form == Form.ROTATE:  # the cosine less 1
        across = torch.stack((-inside[:, 1], inside[:, 0]), dim=-1)
        moved = dials[:, :1] * inside + dials[:, 1:] * across
    else:
        moved = inside.norm(dim=-1, keepdim=True) * dials - inside
        if form == Form.ADAPTIVE:
            moved = moved * (inside[:, :1] > 0)
    return x + _along(moved, v)


def _where_inside(x: Tensor, mapped: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.where((x > low) & (x < high), mapped, x)


def _along_of(x: Tensor, v: Tensor) -> Tensor:
    """What lies along vectors v [rows or 1, n, units]: [rows, n]."""
    return x @ v[0].T if len(v) == 1 else torch.linalg.vecdot(v, x.unsqueeze(1))


def _along(shares: Tensor, v: Tensor) -> Tensor:
    """So much, [rows, n], of vectors v [rows or 1, n, units]: [rows, units]."""
    return shares @ v[0] if len(v) == 1 else torch.bmm(shares.unsqueeze(1), v).squeeze(1)
