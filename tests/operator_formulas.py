"""Operators written out by hand, as formulas and as matrices."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.steering.operators import (
    Ablate,
    Add,
    Affine,
    Clamp,
    Respond,
    Rotate,
    Scale,
    SetFeatures,
    Shift,
    Turn,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DIALS = st.floats(-30, 30, width=32)
SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.sampled_from([(), (3,), (2, 5), (4, 1)])  # what comes before the units

#: Operators by the names that `random_operator` knows.
LINEAR = (
    "Scale", "clamped", "Add", "Ablate", "Rotate",
    "Ablate3", "Affine", "Constant", "Shift", "SetTo", "Unbound",
)  # fmt: skip
ALL = (
    *LINEAR, "Absolute", "Turn", "Adaptive",
    "Interval", "Clamp", "AtLeast", "AtMost", "Kept", "Capped", "Respond",
    "features clamp", "features at_least", "features ablate", "features scale",
)  # fmt: skip

#: Clamps by name: their bounds.
BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "Clamp": (-0.5, 0.75),
    "AtLeast": (0.25, None),
    "AtMost": (-math.inf, 0.25),
    "SetTo": (0.5, 0.5),
    "Unbound": (None, math.inf),
}

PLANES = st.sampled_from(["Rotate", "Turn", "Adaptive"])
DEGREES = st.floats(-720, 720, width=32)

# Enough to find what fails for whole ranges of input, and quick.
quick = settings(max_examples=50, deadline=None)


def random_operator(kind: str, seed: int, width: int = 12) -> Any:
    generator = torch.Generator().manual_seed(seed)
    if kind in ("Add", "Kept", "Capped"):
        keeps = {"Kept": "always", "Capped": "cap"}.get(kind, "no")
        return Add(torch.randn(width, generator=generator), keeps)  # type: ignore[arg-type]
    if kind in ("Affine", "Constant"):
        u, v = (torch.randn(width, 2, generator=generator) / 4 for _ in range(2))
        return Affine(u, v, torch.randn(width, generator=generator) if kind == "Constant" else None)
    if kind.startswith("features "):
        mode: Any = kind.partition(" ")[2]
        encoder, decoder = (torch.randn(3, width, generator=generator) for _ in range(2))
        bias, threshold, level = torch.randn(3, 3, generator=generator)
        decoder = (decoder.double() / decoder.double().norm(dim=-1, keepdim=True)).float()
        kept = level.abs() if mode in ("clamp", "at_least") else None
        return SetFeatures(encoder, bias, threshold, decoder, mode, kept)
    if kind == "Respond":
        added, reader = (torch.randn(width, generator=generator) / 4 for _ in range(2))
        return Respond(added, reader, 0.25)
    if kind in BOUNDS:
        direction = exactly(torch.randn(1, width, generator=generator))[0].float()
        return Clamp(direction, *BOUNDS[kind])
    if kind == "Ablate3":
        return Ablate(exactly(torch.randn(3, width, generator=generator)).float())
    if kind in ("Ablate", "Rotate", "Turn", "Adaptive"):
        # float32 rows as a file holds them; the oracles make them exact again, by another way.
        rows = exactly(torch.randn(2, width, generator=generator)).float()
        if kind == "Ablate":
            return Ablate(rows[0])
        return Rotate(rows) if kind == "Rotate" else Turn(rows, adaptive=kind == "Adaptive")
    units = torch.randperm(width, generator=generator)[: seed % (width + 1)]
    gain = torch.randn(len(units), generator=generator)
    if kind in ("Shift", "Interval"):
        shift, low = (torch.randn(len(units), generator=generator) for _ in range(2))
        ends = (low - 1, low + 1) if kind == "Interval" else ()
        return Shift(units, gain, shift, width, *ends)
    return Scale(units, gain, width, clamp_sign=kind == "clamped", absolute=kind == "Absolute")


def exactly(rows: Tensor) -> Tensor:
    """Rows made orthonormal in float64 by Householder's way; the first keeps its direction."""
    q, r = torch.linalg.qr(rows.double().T)
    return (q * r.diagonal().sign()).T


def activation(seed: int, shape: tuple[int, ...] = (2, 5), width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return 3 * torch.randn(*shape, width, generator=generator)


def matrix_of(operator: Any, dial: float) -> tuple[Tensor, Tensor]:
    """A and c of x -> A x + c in float64, from the formulas at the head of operators.py."""
    linear = torch.eye(operator.width, dtype=torch.float64)
    offset = torch.zeros(operator.width, dtype=torch.float64)
    if isinstance(operator, Ablate):
        rows = exactly(operator.direction.reshape(-1, operator.width))
        return linear - dial * rows.T @ rows, offset
    if isinstance(operator, Affine):
        constant = offset if operator.c is None else operator.c.double()
        return linear + dial * operator.u.double() @ operator.v.double().T, dial * constant
    if isinstance(operator, Clamp):
        if operator.low is None:
            return linear, offset
        v = operator.direction.double() / operator.direction.double().norm()
        return linear - dial * torch.outer(v, v), dial * operator.low * v
    if isinstance(operator, Shift):
        for unit, slope, shift in zip(
            operator.units.tolist(), operator.slope.tolist(), operator.shift.tolist(), strict=True
        ):
            linear[unit, unit] = 1 - dial + dial * slope
            offset[unit] = dial * shift
        return linear, offset
    if isinstance(operator, Rotate):
        b1, b2 = exactly(operator.basis)
        cos, sin = math.cos(math.radians(dial)), math.sin(math.radians(dial))
        linear = linear + (cos - 1) * (torch.outer(b1, b1) + torch.outer(b2, b2))
        return linear + sin * (torch.outer(b2, b1) - torch.outer(b1, b2)), offset
    if isinstance(operator, Add):
        return linear, dial * operator.vector.double()
    for unit, gain in zip(operator.units.tolist(), operator.gain.tolist(), strict=True):
        factor = 1 + dial * gain
        linear[unit, unit] = max(factor, 0.0) if operator.clamp_sign else factor
    return linear, offset


def formula(operator: Any, x: Tensor, dial: float) -> Tensor:
    """What any operator makes of one or more activations, token by token, in float64."""
    if isinstance(operator, Turn):
        b1, b2 = exactly(operator.basis)
        angle = math.radians(dial)
        flat = []
        for h in x.double().reshape(-1, operator.width):
            first, second = float(h @ b1), float(h @ b2)
            length = math.hypot(first, second)
            rest = h - first * b1 - second * b2
            laid = rest + length * (math.cos(angle) * b1 + math.sin(angle) * b2)
            flat.append(h if operator.adaptive and not first > 0 else laid)
        return torch.stack(flat).reshape(x.shape)
    if isinstance(operator, Scale) and operator.absolute:
        result = x.double().clone()
        for unit, gain in zip(operator.units.tolist(), operator.gain.tolist(), strict=True):
            result[..., unit] += dial * gain * x[..., unit].double().abs()
        return result
    if not operator.linear:
        return _by_token(operator, x, dial)
    linear, offset = matrix_of(operator, dial)
    return x.double() @ linear.T + offset


def _by_token(operator: Any, x: Tensor, dial: float) -> Tensor:
    """Clamps, shifts inside of an interval, features of an autoencoder, what is added as much as a
    reader fires, and added vectors after which the length is kept."""
    flat = []
    for h in x.double().reshape(-1, operator.width):
        if isinstance(operator, Clamp):
            v = operator.direction.double() / operator.direction.double().norm()
            along = float(h @ v)
            wanted = max(along, -math.inf if operator.low is None else operator.low)
            wanted = min(wanted, math.inf if operator.high is None else operator.high)
            flat.append(h + dial * (wanted - along) * v)
        elif isinstance(operator, SetFeatures):
            moved = h.clone()
            for place, row in enumerate(operator.decoder.double()):
                f = float(h @ operator.encoder[place].double()) + float(operator.bias[place])
                f = f if f > 0 and f > float(operator.threshold[place]) else 0.0
                level = 0.0 if operator.level is None else dial * float(operator.level[place])
                new = {
                    "clamp": level,
                    "at_least": max(f, level),
                    "ablate": (1 - dial) * f,
                    "scale": (1 + dial) * f,
                }[operator.mode]
                moved = moved + (new - f) * row
            flat.append(moved)
        elif isinstance(operator, Respond):
            fires = max(0.0, float(h @ operator.reader.double()) + operator.bias)
            flat.append(h + dial * fires * operator.vector.double())
        elif isinstance(operator, Shift):
            h = h.clone()
            for place, unit in enumerate(operator.units.tolist()):
                value = float(h[unit])
                if float(operator.low[place]) < value < float(operator.high[place]):
                    mapped = float(operator.slope[place]) * value + float(operator.shift[place])
                    h[unit] = value + dial * (mapped - value)
            flat.append(h)
        else:
            moved = h + dial * operator.vector.double()
            factor = float(h.norm() / moved.norm())
            flat.append(moved * (min(factor, 1.0) if operator.keep_norm == "cap" else factor))
    return torch.stack(flat).reshape(x.shape)


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    if not actual.numel():
        return
    difference = (actual.double() - expected.double()).abs().max()
    assert difference <= tolerance * (1 + expected.double().abs().max())
