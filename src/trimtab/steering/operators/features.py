"""Changing how active features of a sparse autoencoder are, and nothing else of an activation."""

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
    OperatorDefaults,
    as_dtype_of,
    check_numbers,
    in_both,
    widened,
)

#: What becomes of an activation: set to a value, raised to it, taken away, or made larger.
FeatureMode = Literal["clamp", "at_least", "ablate", "scale"]
#: How far from 1 the length of a stored decoder row may be.
_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False, repr=False)
class SetFeatures(OperatorDefaults):
    """x <- x + sum_i (f'_i - f_i(x)) d_i over k features of a sparse autoencoder.

    What the autoencoder does not explain of x stays as it is: of dec(f') - dec(f) only the rows of
    features that change are left, and its bias cancels. All f_i are read from the same x:

        f_i(x) = e_i'x + b_i  where that is above 0 and above threshold_i, else 0

    encoder and decoder [k, units], bias, threshold and level [k], all float32. Decoder rows have
    length 1, so that f_i is by how much x is moved; a ReLU has threshold 0. With the dial t

        clamp     f'_i = t level_i
        at_least  f'_i = max(f_i, t level_i)     nothing happens at dials of 0 and below
        ablate    f'_i = (1 - t) f_i             t is the share that is taken away
        scale     f'_i = (1 + t) f_i             t is s - 1 for features made s times as active

    At dial 0 all but clamp, which then ablates, do nothing, to the bit; clamp leaves an x alone at
    which f_i is t level_i. Adding t level_i d_i is clamping to f_i + t level_i, whatever f_i: that
    is `Add`. Not linear. Reading the result does not give f' again: other features, and i itself
    where <e_i, d_i> is not 1, read something else there. After ablating alone what i reads is
    f_i (1 - <e_i, d_i>), where that is above its threshold.
    """

    encoder: Tensor
    bias: Tensor
    threshold: Tensor
    decoder: Tensor
    mode: FeatureMode
    level: Tensor | None = field(default=None, metadata=LEFT_OUT)

    linear = False
    description = "SetFeatures, which reads features of an autoencoder,"

    @property
    def identity(self) -> float | None:
        return None if self.mode == "clamp" else 0.0

    @property
    def width(self) -> int:
        return int(self.decoder.shape[-1])

    @property
    def size(self) -> int:
        return int(self.decoder.any(0).sum())

    @property
    def acts(self) -> bool:
        raises = self.mode != "at_least" or (self.level is not None and bool(self.level.any()))
        return raises and bool(self.decoder.any())

    @property
    def details(self) -> dict[str, Any]:
        return {"mode": self.mode.replace("_", " "), "features": len(self.decoder)}

    def active(self, x: Tensor) -> Tensor:
        """How active the features are at activations x [..., units]: [..., k]."""
        return self._reader(x.device)(widened(x))

    def bind(self, dial: Dial, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        read, rows = self._reader(device), in_both(self.decoder, device)
        dials = in_both(torch.as_tensor(dial, dtype=torch.float64).unsqueeze(-1), device)
        level = torch.zeros(len(self.decoder)) if self.level is None else self.level
        levels = in_both(level, device)

        def change(x: Tensor) -> Tensor:
            wide = widened(x)
            t, f = dials[wide.dtype], read(wide)
            if self.mode == "scale":
                moved = t * f
            elif self.mode == "ablate":
                moved = -t * f
            else:
                moved = t * levels[wide.dtype] - f
                moved = moved if self.mode == "clamp" else moved.clamp(min=0)
            return as_dtype_of(wide + moved @ rows[wide.dtype], x)

        return change

    def _reader(self, device: torch.device | str) -> Callable[[Tensor], Tensor]:
        """Reads the features from activations in float32 or float64."""
        columns, biases = in_both(self.encoder.T, device), in_both(self.bias, device)
        thresholds = in_both(self.threshold.clamp(min=0), device)

        def read(wide: Tensor) -> Tensor:
            f = wide @ columns[wide.dtype] + biases[wide.dtype]
            return torch.where(f > thresholds[wide.dtype], f, 0.0)

        return read

    def check(self) -> None:
        shapes = [list(each.shape) for each in (self.encoder, self.decoder)]
        if self.decoder.dim() != 2 or shapes[0] != shapes[1] or not self.decoder.numel():
            raise TrimtabError(
                f"SetFeatures has an encoder of shape {shapes[0]} and a decoder of shape "
                f"{shapes[1]}: both must be [k, units], k 1 or more"
            )
        check_choice("mode", self.mode, FeatureMode)
        if (self.level is None) is (self.mode in ("clamp", "at_least")):
            raise TrimtabError(
                f"SetFeatures has {'no' if self.level is None else 'a'} level, and mode "
                f"{self.mode} has {'one' if self.level is None else 'none'}"
            )
        for name in ("bias", "threshold", "level"):
            given = getattr(self, name)
            if given is not None and given.shape != self.decoder.shape[:1]:
                raise TrimtabError(
                    f"SetFeatures has a {name} of shape {list(given.shape)}, not "
                    f"[{len(self.decoder)}], its features"
                )
        for numbers in (self.encoder, self.bias, self.threshold, self.decoder, self.level):
            if numbers is not None:
                check_numbers("SetFeatures", numbers)
        lengths = self.decoder.double().norm(dim=-1)
        if not bool(((lengths - 1).abs() <= _TOLERANCE).all()):
            raise TrimtabError(
                "SetFeatures has a decoder row that is not of length 1: its length belongs into "
                "the encoder"
            )
