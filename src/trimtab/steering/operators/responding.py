"""Adding a direction as much as another one is there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.steering.operators.base import (
    Dial,
    OperatorDefaults,
    as_dtype_of,
    check_numbers,
    in_both,
    widened,
)


@dataclass(frozen=True, eq=False, repr=False)
class Respond(OperatorDefaults):
    """x <- x + dial * max(0, reader'x + bias) * vector; vector and reader [units] float32, bias a
    number. An activation of which the reader says nothing stays as it is, to the bit.

    Not linear in x, but linear in the dial. PSR's edit (2605.03907).
    """

    vector: Tensor
    reader: Tensor
    bias: float

    linear = False
    identity = 0.0
    description = "Respond, which adds where its reader fires,"

    @property
    def width(self) -> int:
        return len(self.vector)

    @property
    def size(self) -> int:
        return int(self.vector.count_nonzero()) if self.acts else 0

    @property
    def acts(self) -> bool:
        fires = bool(self.reader.any()) or self.bias > 0
        return fires and bool(self.vector.any())

    @property
    def details(self) -> dict[str, Any]:
        return {"bias": self.bias}

    def bind(self, dial: Dial, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        vectors, readers = in_both(self.vector, device), in_both(self.reader, device)
        dials = in_both(torch.as_tensor(dial, dtype=torch.float64).unsqueeze(-1), device)

        def respond(x: Tensor) -> Tensor:
            wide = widened(x)
            read = (wide @ readers[wide.dtype] + self.bias).clamp(min=0).unsqueeze(-1)
            return as_dtype_of(wide + dials[wide.dtype] * read * vectors[wide.dtype], x)

        return respond

    def check(self) -> None:
        shapes = [list(each.shape) for each in (self.vector, self.reader)]
        if self.vector.dim() != 1 or not len(self.vector) or shapes[0] != shapes[1]:
            raise TrimtabError(
                f"Respond has a vector of shape {shapes[0]} and a reader of shape {shapes[1]}: "
                "both must be [units]"
            )
        for numbers in (self.vector, self.reader):
            check_numbers("Respond", numbers)
        if not math.isfinite(self.bias) or abs(self.bias) > torch.finfo(torch.float32).max:
            raise TrimtabError(f"Respond has bias = {self.bias}, which is no finite number")
