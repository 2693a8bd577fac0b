"""Operators that turn in a plane: by an angle, or to one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.steering.operators.base import (
    Dial,
    LinearDefaults,
    OperatorDefaults,
    check_numbers,
    check_orthonormal,
    in_both,
    low_rank,
    orthonormal,
    widened,
)


@dataclass(frozen=True, eq=False, repr=False)
class _InPlane(OperatorDefaults):
    """What turns in a plane; basis [2, units] float32, orthonormal."""

    basis: Tensor

    @property
    def width(self) -> int:
        return int(self.basis.shape[-1])

    @property
    def size(self) -> int:
        return int(self.basis.any(0).sum())

    @property
    def plane(self) -> Tensor:
        return self.basis

    def check(self) -> None:
        _check_plane(type(self).__name__, self.basis)


@dataclass(frozen=True, eq=False, repr=False)
class Rotate(_InPlane, LinearDefaults):
    """Turns the part of x in a plane by `dial` degrees from b1 toward b2; the rest stays.

    basis [2, units] float32, orthonormal. Linear and orthogonal: lengths are kept.
    """

    linear = True
    identity = 0.0
    farthest = 180.0  # after half a turn it comes back

    def bind(self, dial: Dial, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        basis = orthonormal(self.basis)
        if not isinstance(dial, Tensor):
            return low_rank(basis.T, _turned(dial) @ basis, device)
        angles = torch.deg2rad(dial.double()).unsqueeze(-1)  # [rows, 1, 1]
        planes = in_both(basis, device)
        lesses, sines = in_both(angles.cos() - 1, device), in_both(angles.sin(), device)

        def rotate(x: Tensor) -> Tensor:
            wide = widened(x)
            plane, less, sine = (these[wide.dtype] for these in (planes, lesses, sines))
            first, second = (wide @ plane.T).split(1, dim=-1)
            change = torch.cat((less * first - sine * second, sine * first + less * second), dim=-1)
            return (wide + change @ plane).to(x.dtype)

        return rotate

    def linear_part(self, x: Tensor, dial: float) -> Tensor:
        basis = orthonormal(self.basis).to(x)
        return x + (x @ basis.T) @ (_turned(dial).to(x) @ basis)

    def adjoint(self, x: Tensor, dial: float) -> Tensor:
        return self.linear_part(x, -dial)


@dataclass(frozen=True, eq=False, repr=False)
class Turn(_InPlane):
    """Lays the part of x in a plane at `dial` degrees from b1 toward b2, keeping its length.

    basis [2, units] float32, orthonormal. With `adaptive` only where <x, b1> > 0. Unlike Rotate it
    is not linear, and at 0 degrees it is not the identity: all that is in the plane comes to lie
    on +b1.
    """

    adaptive: bool = False

    linear = False
    identity = None
    description = "Turn, which lays activations at an absolute angle,"

    def bind(self, dial: Dial, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        planes = in_both(orthonormal(self.basis), device)
        angle = torch.deg2rad(torch.as_tensor(dial, dtype=torch.float64))
        # [2], or [rows, 1, 2] for one dial per row.
        targets = in_both(torch.stack((angle.cos(), angle.sin()), dim=-1), device)

        def turn(x: Tensor) -> Tensor:
            wide = widened(x)
            plane, target = planes[wide.dtype], targets[wide.dtype]
            inside = wide @ plane.T  # [..., 2]
            change: Tensor = inside.norm(dim=-1, keepdim=True) * target - inside
            if self.adaptive:
                change = change * (inside[..., :1] > 0)
            return (wide + change @ plane).to(x.dtype)

        return turn


def _turned(degrees: float) -> Tensor:
    """R - 1 as it acts on rows [.., 2]: coordinates c become c + c @ this, in float64."""
    angle = math.radians(degrees)
    less, sine = math.cos(angle) - 1, math.sin(angle)
    return torch.tensor([[less, sine], [-sine, less]], dtype=torch.float64)


def _check_plane(name: str, basis: Tensor) -> None:
    if basis.dim() != 2 or basis.shape[0] != 2 or basis.shape[1] < 2:
        raise TrimtabError(f"{name} has a basis of shape {list(basis.shape)}, not [2, units]")
    check_numbers(name, basis)
    check_orthonormal(name, basis)
