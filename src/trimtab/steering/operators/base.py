"""What an operator can do, what is so of most, and the arithmetic that they share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from trimtab.errors import TrimtabError

Dial = float | Tensor

#: How far from 1 and 0 the lengths and the product of a stored basis may be; `bind` and the folds
#: make it orthonormal anew. Published planes, kept in bfloat16, are off by up to 0.006.
_BASIS_TOLERANCE = 1e-2
#: Units that a site may have: a file must not say more, because whole rows of them are made.
WIDEST = 10**8


#: Marks a field that the first files lack: without it they mean its default.
CAME_LATER = {"came_later": True}
#: Marks one that files leave out where it has its default, so that older versions read the rest.
LEFT_OUT = {**CAME_LATER, "left_out": True}


class Operator(Protocol):
    """What an operator can do, and all that anybody asks of it. Its fields are tensors, numbers,
    true or false, and text: what a steering file can hold; or None, where a file says nothing.
    """

    @property
    def linear(self) -> bool: ...
    @property
    def identity(self) -> float | None:
        """The dial at which it does nothing, None if there is none."""

    @property
    def width(self) -> int:
        """The number of units of the site that it fits."""

    @property
    def size(self) -> int:
        """How many units it may change."""

    @property
    def acts(self) -> bool:
        """Whether it changes an activation at any dial."""

    @property
    def added(self) -> Tensor | None:
        """What it adds per unit of the dial, [units], where it does nothing else."""

    @property
    def plane(self) -> Tensor | None:
        """The plane that it turns in, [2, units]."""

    @property
    def farthest(self) -> float:
        """The dial, on either side, beyond which it does again what it does before."""

    @property
    def choice(self) -> Operator | None:
        """At a router: what is done to the scores by which it chooses, beside its logits."""

    @property
    def description(self) -> str:
        """What messages call it."""

    @property
    def details(self) -> dict[str, Any]:
        """What people are told of it beside its name and its size, by name."""

    def bind(self, dial: Dial, device: torch.device | str) -> Callable[[Tensor], Tensor]:
        """The operator at one dial (or one per row), with all that can be computed beforehand."""

    def check(self) -> None:
        """Refuse tensors that do not go together."""


class LinearOperator(Operator, Protocol):
    """An operator that folds into weights: x -> A x + c."""

    def linear_part(self, x: Tensor, dial: float) -> Tensor:
        """A x for activations x [..., units]."""

    def adjoint(self, x: Tensor, dial: float) -> Tensor:
        """A' x, which is what a matrix that reads the site takes: W A = (A' W')'."""

    def offset(self, dial: float) -> Tensor:
        """c, [units]."""


class OperatorDefaults:
    """What is so of most operators."""

    def __repr__(self: Operator) -> str:
        return f"<{type(self).__name__} on {self.size} of {self.width} units>"

    @property
    def acts(self) -> bool:
        return True

    @property
    def added(self) -> Tensor | None:
        return None

    @property
    def plane(self) -> Tensor | None:
        return None

    @property
    def farthest(self) -> float:
        return math.inf

    @property
    def choice(self) -> Operator | None:
        return None

    @property
    def description(self) -> str:
        return type(self).__name__

    @property
    def details(self) -> dict[str, Any]:
        return {}


class LinearDefaults(OperatorDefaults):
    """What is so of most linear operators: A is symmetric, and nothing is added."""

    def adjoint(self: LinearOperator, x: Tensor, dial: float) -> Tensor:
        return self.linear_part(x, dial)

    def offset(self: LinearOperator, dial: float) -> Tensor:
        return torch.zeros(self.width)


def orthonormal(basis: Tensor) -> Tensor:
    """Rows [k, units] made orthonormal by Gram-Schmidt from the first one, in float64."""
    rows: list[Tensor] = []
    for row in basis.double():
        for _ in range(2 if rows else 0):  # twice, because once leaves what rounding left
            for done in rows:
                row = row - (row @ done) * done
        rows.append(row / row.norm())
    return torch.stack(rows)


def low_rank(
    down: Tensor, up: Tensor, device: torch.device | str, constant: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """x -> x + (x down) up + constant for down [units, rank] and up [rank, units]."""
    downs, ups = in_both(down, device), in_both(up, device)
    constants = None if constant is None else in_both(constant, device)

    def change(x: Tensor) -> Tensor:
        wide = widened(x)
        down, up = downs[wide.dtype], ups[wide.dtype]
        if constants is not None:
            # Projected before anything is added: the constant is no part of x.
            return as_dtype_of(wide + ((wide @ down) @ up + constants[wide.dtype]), x)
        if x.dim() == 3 and x.shape[1] == 1:  # a token of each row: fewer calls are faster
            return as_dtype_of(wide + (wide @ down) @ up, x)
        flat = wide.reshape(-1, x.shape[-1])
        return as_dtype_of(torch.addmm(flat, flat @ down, up).view(x.shape), x)

    return change


def in_both(numbers: Tensor, device: torch.device | str) -> dict[torch.dtype, Tensor]:
    """The numbers on a device in both types in which activations are computed."""
    both = {torch.float32: numbers.to(device=device, dtype=torch.float32)}
    if torch.device(device).type != "mps":  # which has no float64
        both[torch.float64] = numbers.to(device=device, dtype=torch.float64)
    return both


def as_dtype_of(x: Tensor, other: Tensor) -> Tensor:
    """x in another's dtype; asked first, because `to` takes as long as a small addition."""
    return x if x.dtype == other.dtype else x.to(other.dtype)


def widened(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def check_numbers(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise TrimtabError(f"{name} has numbers of type {tensor.dtype}, not torch.float32")
    if not torch.isfinite(tensor).all():
        raise TrimtabError(f"{name} holds NaN or infinity")


def check_orthonormal(name: str, basis: Tensor) -> None:
    """Refuse rows [k, units] that are not nearly orthonormal."""
    wide = basis.double()
    error = (wide @ wide.T - torch.eye(len(wide), dtype=torch.float64)).abs().max()
    if not error <= _BASIS_TOLERANCE:
        counted = {1: "", 2: "two directions "}.get(len(wide), f"{len(wide)} directions ")
        angles = {1: "", 2: " at a right angle"}.get(len(wide), " at right angles")
        raise TrimtabError(
            f"{name}'s basis is not {counted}of length 1{angles}: it is off by {float(error):.2g}"
        )
