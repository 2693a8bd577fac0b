"""Adding a vector, as it is or with the activation's length kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.errors import TrimtabError, check_choice
from trimtab.steering.operators.base import (
    LEFT_OUT,
    Dial,
    LinearDefaults,
    as_dtype_of,
    check_numbers,
    widened,
)

#: Whether an activation gets its old length back: never, always, or where it grew.
KeepNorm = Literal["no", "always", "cap"]


@dataclass(frozen=True, eq=False, repr=False)
class Add(LinearDefaults):
    """x <- x + dial * vector; vector [units] float32.

    With keep_norm="always" the result gets the length that x had, with "cap" only where it would
    be longer; neither is linear. For h' = (h + a v) |h| / |h + a v|, v of length 1, c the cosine of
    h and v and t = a / |h|, the cosine of h' and v is (c + t) / sqrt(1 + 2 t c + t^2), and h' goes
    to +-|h| v as a goes to +-infinity. A norm that reads h' alone sees h + a v: then keeping the
    length changes nothing.
    """

    vector: Tensor
    keep_norm: KeepNorm = field(default="no", metadata=LEFT_OUT)

    identity = 0.0

    @property
    def linear(self) -> bool:
        return self.keep_norm == "no"

    @property
    def width(self) -> int:
        return len(self.vector)

    @property
    def size(self) -> int:
        if self.keep_norm != "no":
            return self.width if self.acts else 0
        return int(self.vector.count_nonzero())

    @property
    def acts(self) -> bool:
        return bool(self.vector.any())

    @property
    def added(self) -> Tensor | None:
        return self.vector if self.keep_norm == "no" else None

    @property
    def description(self) -> str:
        return "Add" if self.linear else "an Add that keeps the norm"

    @property
    def details(self) -> dict[str, Any]:
        return {} if self.linear else {"keep_norm": self.keep_norm}

    def bind(self, dial: Dial, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        dials = torch.as_tensor(dial, dtype=torch.float32, device=device)
        shift = dials.unsqueeze(-1) * self.vector.to(device)
        if self.keep_norm == "no":
            return lambda x: as_dtype_of(x + shift, x)
        most = 1.0 if self.keep_norm == "cap" else None

        def add(x: Tensor) -> Tensor:
            wide = widened(x)
            moved = wide + shift
            # Where nothing is left there is no direction to be long in.
            length = moved.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(moved.dtype).tiny)
            factor = wide.norm(dim=-1, keepdim=True) / length
            return as_dtype_of(moved * (factor if most is None else factor.clamp(max=most)), x)

        return add

    def linear_part(self, x: Tensor, dial: float) -> Tensor:
        return x

    def offset(self, dial: float) -> Tensor:
        return dial * self.vector.double()

    def check(self) -> None:
        if self.vector.dim() != 1 or not len(self.vector):
            raise TrimtabError(f"Add has a vector of shape {list(self.vector.shape)}, not [units]")
        check_numbers("Add", self.vector)
        check_choice("keep_norm", self.keep_norm, KeepNorm)
