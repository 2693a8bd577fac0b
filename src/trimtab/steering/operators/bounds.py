"""Keeping what lies along a direction within bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.steering.operators.base import (
    LEFT_OUT,
    Dial,
    LinearDefaults,
    as_dtype_of,
    check_numbers,
    check_orthonormal,
    in_both,
    orthonormal,
    widened,
)


@dataclass(frozen=True, eq=False, repr=False)
class Clamp(LinearDefaults):
    """x <- x + dial * (clip(p, low, high) - p) v with p = v'x; direction v [units] float32 of
    length 1, bounds in units of the activation. The dial is the share: at 1 p is within the bounds.

    A bound that is None, or infinite, is none: `low` alone is "at least", `high` alone "at most".
    An activation within the bounds stays as it is, to the bit. Linear where both bounds are one
    number (then what lies along v is set to it) or neither is there; for dials from 0 to 1 two
    activations never come to lie farther apart than they were.
    Lu et al., "The Assistant Axis" (2601.10387), activation capping.
    """

    direction: Tensor
    low: float | None = field(default=None, metadata=LEFT_OUT)
    high: float | None = field(default=None, metadata=LEFT_OUT)

    identity = 0.0

    def __post_init__(self) -> None:
        # One spelling of no bound, which JSON has, too.
        for name, nowhere in (("low", -math.inf), ("high", math.inf)):
            bound = getattr(self, name)
            if bound is not None:
                object.__setattr__(self, name, None if bound == nowhere else float(bound))

    @property
    def linear(self) -> bool:
        return self.low == self.high

    @property
    def width(self) -> int:
        return len(self.direction)

    @property
    def size(self) -> int:
        return int(self.direction.count_nonzero())

    @property
    def acts(self) -> bool:
        return self.low is not None or self.high is not None

    @property
    def description(self) -> str:
        return "Clamp" if self.linear else "Clamp, which stops at a bound,"

    @property
    def details(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high}

    def bind(self, dial: Dial, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        if not self.acts:
            return lambda x: x.clone()
        rows = in_both(orthonormal(self.direction[None]), device)  # [1, units]
        dials = in_both(torch.as_tensor(dial, dtype=torch.float64).unsqueeze(-1), device)

        def clamp(x: Tensor) -> Tensor:
            wide = widened(x)
            v = rows[wide.dtype]
            along = wide @ v.T  # [..., 1]
            change = dials[wide.dtype] * (along.clamp(self.low, self.high) - along)
            return as_dtype_of(wide + change @ v, x)

        return clamp

    def linear_part(self, x: Tensor, dial: float) -> Tensor:
        if not self.acts:
            return x
        v = orthonormal(self.direction[None]).to(x)
        return x - dial * (x @ v.T) @ v

    def offset(self, dial: float) -> Tensor:
        return dial * (self.low or 0.0) * orthonormal(self.direction[None])[0]

    def check(self) -> None:
        if self.direction.dim() != 1 or not len(self.direction):
            shape = list(self.direction.shape)
            raise TrimtabError(f"Clamp has a direction of shape {shape}, not [units]")
        check_numbers("Clamp", self.direction)
        check_orthonormal("Clamp", self.direction[None])
        largest = torch.finfo(torch.float32).max
        for name, bound in (("low", self.low), ("high", self.high)):
            if bound is not None and not abs(bound) <= largest:
                raise TrimtabError(f"Clamp has {name} = {bound}, which is no bound to stop at")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise TrimtabError(
                f"Clamp has low = {self.low:g} above high = {self.high:g}: nothing is between"
            )
