"""Operators of low rank: what lies along a few directions is taken out, or mapped."""

from __future__ import annotations

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
    low_rank,
    orthonormal,
    widened,
)


@dataclass(frozen=True, eq=False, repr=False)
class Ablate(LinearDefaults):
    """x <- x - dial * R'R x; direction [units] float32 of length 1, or orthonormal ones [k, units].

    At dial 1 nothing is left along them, whichever basis of their span they are; at -1 what was
    there is doubled. A basis that is nearly orthonormal is made so, from its first row.
    """

    direction: Tensor

    linear = True
    identity = 0.0

    @property
    def _rows(self) -> Tensor:
        return self.direction[None] if self.direction.dim() == 1 else self.direction

    @property
    def width(self) -> int:
        return int(self.direction.shape[-1])

    @property
    def size(self) -> int:
        return int(self._rows.any(0).sum())

    @property
    def details(self) -> dict[str, Any]:
        return {"directions": len(self._rows)} if self.direction.dim() > 1 else {}

    def bind(self, dial: Dial, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        directions = orthonormal(self._rows)  # [k, units]
        if not isinstance(dial, Tensor):
            return low_rank(directions.T, -dial * directions, device)
        rows, dials = in_both(directions, device), in_both(dial.unsqueeze(-1), device)

        def ablate(x: Tensor) -> Tensor:
            wide = widened(x)
            r = rows[wide.dtype]
            changed: Tensor = wide - dials[wide.dtype] * (wide @ r.T) @ r
            return changed.to(x.dtype)

        return ablate

    def linear_part(self, x: Tensor, dial: float) -> Tensor:
        r = orthonormal(self._rows).to(x)
        return x - dial * (x @ r.T) @ r

    def check(self) -> None:
        if self.direction.dim() not in (1, 2) or not self.direction.numel():
            shape = list(self.direction.shape)
            raise TrimtabError(
                f"Ablate has a direction of shape {shape}, not [units], nor some [k, units]"
            )
        check_numbers("Ablate", self.direction)
        check_orthonormal("Ablate", self._rows)


@dataclass(frozen=True, eq=False, repr=False)
class Affine(LinearDefaults):
    """x <- x + dial * (U V'x + c); u and v [units, k], c [units] (None: zero), float32.

    Of rank k, and no matrix of units by units is formed. Ablate is Affine(-r, r); setting what lies
    along a direction r to a number is Affine(-r, r, number * r). LoReFT (2404.03592), whose edit is
    R'(Wx + b - Rx), is Affine(R', (W - R)', R'b); AlphaSteer (2506.07022), which adds r by a linear
    gate w, is Affine(r, w). Two at dials a and b make one of rank 2k: its matrix is
    a U V' + b U V' + a b U (V'U) V'.
    """

    u: Tensor
    v: Tensor
    c: Tensor | None = field(default=None, metadata=LEFT_OUT)

    linear = True
    identity = 0.0

    @property
    def width(self) -> int:
        return len(self.u)

    @property
    def size(self) -> int:
        changed = self.u.any(-1) & self.v.any()
        return int((changed if self.c is None else changed | (self.c != 0)).sum())

    @property
    def acts(self) -> bool:
        return self.size > 0

    @property
    def added(self) -> Tensor | None:
        maps = bool(self.u.any()) and bool(self.v.any())
        return None if maps else self.c

    @property
    def details(self) -> dict[str, Any]:
        return {"rank": self.u.shape[-1], "constant": self.c is not None}

    def bind(self, dial: Dial, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        if not isinstance(dial, Tensor):
            constant = None if self.c is None else dial * self.c.double()
            return low_rank(self.v, dial * self.u.double().T, device, constant)
        ups, downs = in_both(self.u.T, device), in_both(self.v, device)
        constants = None if self.c is None else in_both(self.c, device)
        dials = in_both(dial.unsqueeze(-1), device)

        def change(x: Tensor) -> Tensor:
            wide = widened(x)
            changed = (wide @ downs[wide.dtype]) @ ups[wide.dtype]
            if constants is not None:
                changed = changed + constants[wide.dtype]
            return as_dtype_of(wide + dials[wide.dtype] * changed, x)

        return change

    def linear_part(self, x: Tensor, dial: float) -> Tensor:
        return x + dial * (x @ self.v.to(x)) @ self.u.to(x).T

    def adjoint(self, x: Tensor, dial: float) -> Tensor:
        return x + dial * (x @ self.u.to(x)) @ self.v.to(x).T

    def offset(self, dial: float) -> Tensor:
        constant = torch.zeros(self.width) if self.c is None else self.c
        return dial * constant.double()

    def check(self) -> None:
        shapes = [list(each.shape) for each in (self.u, self.v)]
        if self.u.dim() != 2 or shapes[0] != shapes[1] or not self.u.numel():
            raise TrimtabError(
                f"Affine has u of shape {shapes[0]} and v of shape {shapes[1]}: both must be "
                "[units, k], k 1 or more"
            )
        if self.c is not None and self.c.shape != self.u.shape[:1]:
            raise TrimtabError(
                f"Affine has c of shape {list(self.c.shape)}, not [{self.width}], its units"
            )
        for numbers in (self.u, self.v, self.c):
            if numbers is not None:
                check_numbers("Affine", numbers)
