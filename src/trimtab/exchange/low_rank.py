"""Operators as changes of low rank, x -> x + left (right x), from their own algebra.

A linear map W between two such changes, the one of what it reads and the one of what it writes,
becomes (1 + L_o R_o) W (1 + L_i R_i) = W + up down with

    up = [L_o, (1 + L_o R_o) W L_i],    down = [R_o W; R_i]

so that ranks add, and nothing is approximated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from trimtab.model import Fold
from trimtab.steering import Ablate, Affine, Clamp, Rotate, Scale, Shift, orthonormal


@dataclass(frozen=True)
class Change:
    """x -> x + left (right x); left [..., units, rank] and right [..., rank, units] float64."""

    left: Tensor
    right: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Of columns x [..., units, n]."""
        return x + self.left @ (self.right @ x)


def change_of(fold: Fold) -> Change | None:
    """What an operator's linear part does at its dial; None where its low rank is not known."""
    factors = fold.factors
    if factors is not None:
        units = (factors != 1).nonzero()[:, 0]
        chosen = torch.zeros(len(units), len(factors), dtype=torch.float64)
        chosen[torch.arange(len(units)), units] = 1.0
        return Change(chosen.T * (factors[units] - 1), chosen)
    operator: Any = fold.operator
    match operator:
        case Affine():
            return Change(fold.dial * operator.u.double(), operator.v.double().T)
        case Ablate():
            rows = orthonormal(operator.direction.reshape(-1, operator.width))
        case Clamp():
            rows = orthonormal(operator.direction[None])
        case Rotate():
            rows = orthonormal(operator.basis)
        case _:
            return None
    # It changes nothing beyond the span of these rows, and stays in it.
    return Change((operator.linear_part(rows, fold.dial) - rows).T, rows)


def is_linear_in_dial(operator: Any) -> bool:
    """Whether twice the dial is twice the change, at any dial."""
    if isinstance(operator, Scale):
        return not operator.clamp_sign
    return isinstance(operator, Ablate | Affine | Clamp | Shift)


def composed(changes: list[Change]) -> Change | None:
    """Changes one after the other, the first one first, as one of their ranks together."""
    return reduce(_then, changes) if changes else None


def _then(first: Change, second: Change) -> Change:
    left = torch.cat((second(first.left), second.left), dim=-1)
    return Change(left, torch.cat((first.right, second.right), dim=-2))


def between(weight: Tensor, read: Change | None, written: Change | None) -> tuple[Tensor, Tensor]:
    """down [..., rank, in] and up [..., out, rank] of what a map [..., out, in] becomes between a
    change of what it reads and one of what it writes."""
    wide = weight.double()
    downs, ups = [], []
    if written is not None:
        downs.append(written.right.to(wide) @ wide)
        ups.append(written.left.to(wide).expand(*wide.shape[:-1], -1))
    if read is not None:
        mapped = wide @ read.left.to(wide)
        downs.append(read.right.to(wide).expand(*wide.shape[:-2], -1, -1))
        ups.append(mapped if written is None else _on(written, mapped))
    return torch.cat(downs, dim=-2), torch.cat(ups, dim=-1)


def _on(change: Change, columns: Tensor) -> Tensor:
    return Change(change.left.to(columns), change.right.to(columns))(columns)


def of_each_expert(factors: Tensor, experts: int) -> Change:
    """Factors of the inner units of all experts, side by side [experts * units], as one change for
    each expert, [experts, units, rank]."""
    own = factors.unflatten(0, (experts, -1))
    rank = int((own != 1).sum(1).max())
    # Those that change come first, in each expert.
    units = (own == 1).to(torch.int8).argsort(dim=1, stable=True)[:, :rank]
    right = torch.nn.functional.one_hot(units, own.shape[1]).double()
    left = right.mT * (own.gather(1, units) - 1)[:, None, :]
    return Change(left, right)
