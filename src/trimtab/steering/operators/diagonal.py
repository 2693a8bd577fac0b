"""Operators that act on each chosen unit by itself: a factor, or a factor and a constant."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.steering.operators.base import (
    CAME_LATER,
    LEFT_OUT,
    WIDEST,
    Dial,
    LinearDefaults,
    as_dtype_of,
    check_numbers,
)


@dataclass(frozen=True, eq=False, repr=False)
class Scale(LinearDefaults):
    """x_i <- (1 + dial * gain_i) x_i on the chosen units; the others stay as they are.

    units [k] int64, gain [k] float32. With `clamp_sign` a factor below 0 becomes 0, so that no
    activation changes its sign. With `absolute` it is x_i + dial * gain_i |x_i|, which is not
    linear.
    """

    units: Tensor
    gain: Tensor
    width: int
    clamp_sign: bool = False
    absolute: bool = field(default=False, metadata=CAME_LATER)

    identity = 0.0

    @property
    def linear(self) -> bool:
        return not self.absolute

    @property
    def size(self) -> int:
        return len(self.units)

    @property
    def acts(self) -> bool:
        return bool(self.gain.any())

    @property
    def description(self) -> str:
        return "a Scale that adds a multiple of |x|" if self.absolute else "Scale"

    def factors(self, dial: Dial, dtype: torch.dtype = torch.float32) -> Tensor:
        """What each unit is multiplied by: [width], or [..., width] for a dial of shape [...]."""
        dials = torch.as_tensor(dial, dtype=dtype)
        chosen = 1 + dials.unsqueeze(-1) * self.gain.to(dials)
        if self.clamp_sign:
            chosen = chosen.clamp(min=0)
        factors = torch.ones(*dials.shape, self.width, dtype=dtype, device=dials.device)
        return factors.index_copy(-1, self.units.to(dials.device), chosen)

    def bind(self, dial: Dial, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        factors = self.factors(dial).to(device)
        if self.absolute:
            gammas = factors - 1
            return lambda x: (x + x.abs() * gammas).to(x.dtype)
        return lambda x: as_dtype_of(x * factors, x)

    def linear_part(self, x: Tensor, dial: float) -> Tensor:
        return x * self.factors(dial, x.dtype).to(x.device)

    def check(self) -> None:
        if self.units.shape != self.gain.shape or self.units.dim() != 1:
            raise TrimtabError(
                f"Scale has {list(self.units.shape)} units and {list(self.gain.shape)} gains: "
                "the two must be of one length"
            )
        _check_units("Scale", self.units, self.width)
        if self.clamp_sign and self.absolute:
            raise TrimtabError("Scale cannot have both clamp_sign and absolute")
        check_numbers("Scale", self.gain)


@dataclass(frozen=True, eq=False, repr=False)
class Shift(LinearDefaults):
    """x_i <- (1 - dial) x_i + dial (slope_i x_i + shift_i) on the chosen units: at dial 1 a map of
    each unit's own, at 0 nothing, between them a share of it.

    units [k] int64, slope and shift [k] float32. With `low` and `high` [k] float32 only where
    low_i < x_i < high_i, which is not linear; there a unit that is outside stays as it is.
    Rodriguez et al., "Controlling Language and Diffusion Models by Transporting Activations"
    (2410.23054), equations of section 3.
    """

    units: Tensor
    slope: Tensor
    shift: Tensor
    width: int
    low: Tensor | None = field(default=None, metadata=LEFT_OUT)
    high: Tensor | None = field(default=None, metadata=LEFT_OUT)

    identity = 0.0

    @property
    def linear(self) -> bool:
        return self.low is None

    @property
    def size(self) -> int:
        return len(self.units)

    @property
    def acts(self) -> bool:
        return bool((self.slope != 1).any() or self.shift.any())

    @property
    def added(self) -> Tensor | None:
        only_adds = self.linear and bool((self.slope == 1).all())
        return self._spread(self.shift, 0.0) if only_adds else None

    @property
    def description(self) -> str:
        return "Shift" if self.linear else "a Shift that acts inside of an interval"

    @property
    def details(self) -> dict[str, Any]:
        return {} if self.linear else {"interval": True}

    def bind(self, dial: Dial, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        dials = torch.as_tensor(dial, dtype=torch.float32, device=device).unsqueeze(-1)
        factors = 1 + dials * self._spread(self.slope - 1, 0.0).to(device)
        added = dials * self._spread(self.shift, 0.0).to(device)
        if self.low is None or self.high is None:
            return lambda x: as_dtype_of(x * factors + added, x)
        low = self._spread(self.low, -math.inf).to(device)
        high = self._spread(self.high, math.inf).to(device)

        def shift(x: Tensor) -> Tensor:
            inside = (x > low) & (x < high)
            return torch.where(inside, as_dtype_of(x * factors + added, x), x)

        return shift

    def linear_part(self, x: Tensor, dial: float) -> Tensor:
        return x * (1 + dial * self._spread(self.slope.to(x) - 1, 0.0))

    def offset(self, dial: float) -> Tensor:
        return dial * self._spread(self.shift.double(), 0.0)

    def _spread(self, values: Tensor, elsewhere: float) -> Tensor:
        """What the chosen units have, [width], with something else at the others."""
        everywhere = values.new_full((self.width,), elsewhere)
        return everywhere.index_copy(0, self.units.to(values.device), values)

    def check(self) -> None:
        given = {"slopes": self.slope, "shifts": self.shift}
        if self.low is not None or self.high is not None:
            if self.low is None or self.high is None:
                raise TrimtabError("Shift has one end of its intervals: it needs low and high")
            given |= {"lower ends": self.low, "upper ends": self.high}
        for name, values in given.items():
            if self.units.shape != values.shape or self.units.dim() != 1:
                raise TrimtabError(
                    f"Shift has {list(self.units.shape)} units and {list(values.shape)} {name}: "
                    "they must be of one length"
                )
            check_numbers("Shift", values)
        _check_units("Shift", self.units, self.width)
        if self.low is not None and self.high is not None and bool((self.low > self.high).any()):
            raise TrimtabError("Shift has an interval whose lower end is above its upper end")


def _check_units(name: str, units: Tensor, width: int) -> None:
    """Refuse numbers of units [k] that are not all different ones of so many."""
    if units.dtype != torch.int64:
        raise TrimtabError(f"{name} has units of type {units.dtype}, not torch.int64")
    if not 1 <= width <= WIDEST:
        raise TrimtabError(f"{name} has a width of {width:g} units, not 1 to {WIDEST:g}")
    out_of_range = len(units) > 0 and not (int(units.min()) >= 0 and int(units.max()) < width)
    if out_of_range or len(units.unique()) < len(units):
        raise TrimtabError(f"{name} names a unit twice, or one outside 0 to {width - 1}")
