"""The algebra: what a steering does to an activation, and how that folds into weights.

An operator acts on the units (the last dimension) of an activation x with one number, the dial d.
It is affine in x at a fixed dial when `linear` is true: x -> A x + c. Then it folds exactly into a
linear map that writes the activation (A W, A b + c) or into one that reads it (W A, b + W c).

    Scale   x_i <- (1 + d g_i) x_i     on chosen units, gain g     (AUSteer; a diagonal A)
    Add     x   <- x + d v                                         (CAA; A = 1, c = d v)

A dial is a number, or a tensor that broadcasts against x without its last dimension: [rows, 1] for
one dial per row of x [rows, tokens, units]. Arithmetic runs in float32 or better and is cast back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from trimtab.errors import TrimtabError

Dial = float | Tensor


class Operator(Protocol):
    """What an operator can do; `width` is the number of units of the site that it fits."""

    linear: ClassVar[bool]
    #: The dial at which it does nothing, None if there is none.
    identity: ClassVar[float | None]

    @property
    def width(self) -> int: ...
    @property
    def size(self) -> int: ...
    def bind(self, dial: Dial, device: torch.device | str) -> Callable[[Tensor], Tensor]: ...
    def linear_part(self, x: Tensor, dial: float) -> Tensor: ...
    def adjoint(self, x: Tensor, dial: float) -> Tensor: ...
    def offset(self, dial: float) -> Tensor: ...
    def check(self) -> None: ...


@dataclass(frozen=True, eq=False)
class Scale:
    """x_i <- (1 + dial * gain_i) x_i on the chosen units; the others stay as they are.

    units [k] int64, gain [k] float32. With `clamp_sign` a factor below 0 becomes 0, so that no
    activation changes its sign.
    """

    units: Tensor
    gain: Tensor
    width: int
    clamp_sign: bool = False

    linear: ClassVar[bool] = True
    identity: ClassVar[float | None] = 0.0

    @property
    def size(self) -> int:
        return len(self.units)

    def factors(self, dial: Dial, dtype: torch.dtype = torch.float32) -> Tensor:
        """What each unit is multiplied by: [width], or [..., width] for a dial of shape [...]."""
        dials = torch.as_tensor(dial, dtype=dtype)
        chosen = 1 + dials.unsqueeze(-1) * self.gain.to(dials)
        if self.clamp_sign:
            chosen = chosen.clamp(min=0)
        factors = torch.ones(*dials.shape, self.width, dtype=dtype, device=dials.device)
        return factors.index_copy(-1, self.units.to(dials.device), chosen)

    def bind(self, dial: Dial, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        """The operator at one dial (or one per row), with all that can be computed beforehand."""
        factors = self.factors(dial).to(device)
        return lambda x: (x * factors).to(x.dtype)

    def linear_part(self, x: Tensor, dial: float) -> Tensor:
        return x * self.factors(dial, x.dtype).to(x.device)

    def adjoint(self, x: Tensor, dial: float) -> Tensor:
        return self.linear_part(x, dial)

    def offset(self, dial: float) -> Tensor:
        return torch.zeros(self.width)

    def check(self) -> None:
        if self.units.shape != self.gain.shape or self.units.dim() != 1:
            raise TrimtabError(
                f"Scale has {list(self.units.shape)} units and {list(self.gain.shape)} gains: "
                "the two must be of one length"
            )
        if self.units.dtype != torch.int64:
            raise TrimtabError(f"Scale has units of type {self.units.dtype}, not torch.int64")
        if self.width < 1:
            raise TrimtabError(f"Scale has a width of {self.width} units")
        _check_numbers("Scale", self.gain)
        out_of_range = len(self.units) > 0 and not (
            int(self.units.min()) >= 0 and int(self.units.max()) < self.width
        )
        if out_of_range or len(self.units.unique()) < len(self.units):
            raise TrimtabError(f"Scale names a unit twice, or one outside 0 to {self.width - 1}")


@dataclass(frozen=True, eq=False)
class Add:
    """x <- x + dial * vector; vector [units] float32."""

    vector: Tensor

    linear: ClassVar[bool] = True
    identity: ClassVar[float | None] = 0.0

    @property
    def width(self) -> int:
        return len(self.vector)

    @property
    def size(self) -> int:
        return int(self.vector.count_nonzero())

    def bind(self, dial: Dial, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        dials = torch.as_tensor(dial, dtype=torch.float32, device=device)
        shift = dials.unsqueeze(-1) * self.vector.to(device)
        return lambda x: (x + shift).to(x.dtype)

    def linear_part(self, x: Tensor, dial: float) -> Tensor:
        return x

    def adjoint(self, x: Tensor, dial: float) -> Tensor:
        return x

    def offset(self, dial: float) -> Tensor:
        return dial * self.vector.double()

    def check(self) -> None:
        if self.vector.dim() != 1 or not len(self.vector):
            raise TrimtabError(f"Add has a vector of shape {list(self.vector.shape)}, not [units]")
        _check_numbers("Add", self.vector)


OPERATORS: dict[str, type[Any]] = {"Scale": Scale, "Add": Add}


def apply(operator: Operator, x: Tensor, dial: Dial) -> Tensor:
    """The operator on x [..., units] at a dial."""
    return operator.bind(dial, x.device)(x)


def fold_output(
    operator: Operator, dial: float, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights [..., out, in] whose output is the operator of the old output: A W, A b + c."""
    columns = weight.double().transpose(-1, -2)  # each column of W is an activation [out]
    new = operator.linear_part(columns, dial).transpose(-1, -2)
    offset = operator.offset(dial).to(new)
    return new, offset if bias is None else operator.linear_part(bias.double(), dial) + offset


def fold_input(
    operator: Operator, dial: float, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights [..., out, in] that read the operator of their old input: W A, b + W c."""
    wide = weight.double()
    shift = wide @ operator.offset(dial).to(wide)
    return operator.adjoint(wide, dial), shift if bias is None else bias.double() + shift


def to_tensors(operator: Operator) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An operator's tensors and its other fields, by name."""
    values = {field.name: getattr(operator, field.name) for field in fields(operator)}  # type: ignore[arg-type]
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in values.items() if name not in tensors}


def _check_numbers(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise TrimtabError(f"{name} has numbers of type {tensor.dtype}, not torch.float32")
    if not torch.isfinite(tensor).all():
        raise TrimtabError(f"{name} holds NaN or infinity")
